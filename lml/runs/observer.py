"""Whoever wants to know how a run goes."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from lml.runs.store import RunFolder


class Observer:
    """Is told how a run goes. This one only passes on what must be said."""

    def say(self, line: str) -> None:
        """Something to know that is no error."""
        print(line, file=sys.stderr, flush=True)

    def begin(self, total: int) -> None:
        """This process starts on `total` images."""

    def made(self, count: int) -> None:
        """`count` more images are made."""

    def finish(self, folder: RunFolder, timing: Mapping[str, Any]) -> None:
        """All images are there; `timing` is of those made now, {} if none was."""

    def scored(self, results: Mapping[str, dict]) -> None:
        """What the metrics say."""
