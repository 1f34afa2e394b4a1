"""Finds the files that come with the repository."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]


def locate(path: str | Path) -> Path:
    """`path` from the current folder or, if there is no such file, from the repository's root."""
    path = Path(os.path.expanduser(path))  # Path.expanduser fails for an unknown user
    return path if path.exists() else ROOT / path
