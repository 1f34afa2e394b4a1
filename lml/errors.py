"""What a user has to know, said in one line."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input. The message is one line: the key, the value, and what is allowed."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """The names in `choices` closest to `name`, comma separated; all of them when none is close."""
    choices = sorted(choices)
    close = difflib.get_close_matches(name, choices, n=3, cutoff=0.5)
    return ", ".join(close or choices)


def say(line: str) -> None:
    """Write one line to stderr, with the rank of this process where there are several."""
    rank = f"[rank {os.environ['RANK']}] " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    print(f"{rank}{line}", file=sys.stderr, flush=True)
