"""Errors and messages for the user, one line each."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input. The message is one line: the key, the value, and what is allowed."""


class RunError(UserError):
    """A run cannot continue, for a reason outside the program. The message is one line."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """The names in `choices` closest to `name`, comma separated; all of them when none is close."""
    choices = sorted(choices)
    close = difflib.get_close_matches(name, choices, n=3, cutoff=0.5)
    return ", ".join(close or choices)


def first_line(error: object) -> str:
    """The first line of an error's text that is not empty, or the name of its class."""
    lines = [line.strip() for line in str("" if error is None else error).splitlines()]
    return next(filter(None, lines), "" if error is None else type(error).__name__)


def say(line: str) -> None:
    """Write one line to stderr, with the rank of this process if there are several."""
    several = os.environ.get("WORLD_SIZE", "1") not in ("0", "1") and "RANK" in os.environ
    rank = f"[rank {os.environ['RANK']}] " if several else ""
    print(f"{rank}{line}", file=sys.stderr, flush=True)
