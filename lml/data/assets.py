"""Where the files that come with the repository lie: in a clone, or inside an installed wheel."""

from __future__ import annotations

import os
from pathlib import Path

INSTALLED = Path(__file__).parents[1] / "repository"  # setup.py puts it into a wheel
ROOT = INSTALLED if INSTALLED.is_dir() else Path(__file__).parents[2]


def locate(path: str | Path) -> Path:
    """`path` as seen from the current folder or, if it isn't there, from the repository's root."""
    path = Path(os.path.expanduser(path))  # Path.expanduser fails for a user who is not there
    return path if path.exists() else ROOT / path


def find_workplace() -> Path:
    """Where data is kept: the root of the clone, or the current folder where there is none."""
    return Path.cwd() if ROOT == INSTALLED else ROOT
