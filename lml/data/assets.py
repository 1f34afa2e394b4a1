"""Where the files that come with the repository lie."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]


def locate(path: str | Path) -> Path:
    """`path` as seen from the current folder or, if it isn't there, from the repository's root."""
    path = Path(os.path.expanduser(path))  # Path.expanduser fails for a user who is not there
    return path if path.exists() else ROOT / path
