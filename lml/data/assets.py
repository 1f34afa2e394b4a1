"""Finds the files that come with the repository: in a clone, or in an installed wheel."""

from __future__ import annotations

import os
from pathlib import Path

INSTALLED = Path(__file__).parents[1] / "repository"  # setup.py puts it into a wheel
ROOT = INSTALLED if INSTALLED.is_dir() else Path(__file__).parents[2]


def locate(path: str | Path) -> Path:
    """`path` from the current folder or, if there is no such file, from the repository's root."""
    path = Path(os.path.expanduser(path))  # Path.expanduser fails for an unknown user
    return path if path.exists() else ROOT / path


def find_workplace() -> Path:
    """The folder for data: the root of the clone or, without a clone, the current folder."""
    return Path.cwd() if ROOT == INSTALLED else ROOT
