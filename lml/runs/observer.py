"""What follows the progress of a run."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from lml.runs.store import RunFolder


class Observer:
    """Is told how a run goes. This class prints messages and ignores the rest."""

    def say(self, line: str) -> None:
        """A message that is no error."""
        print(line, file=sys.stderr, flush=True)

    def begin(self, total: int) -> None:
        """This process starts on `total` images."""

    def made(self, count: int) -> None:
        """`count` more images are made."""

    def finish(self, folder: RunFolder, timing: Mapping[str, Any]) -> None:
        """All images are stored; `timing` is that of the images made now, {} if there are none."""

    def scored(self, results: Mapping[str, dict]) -> None:
        """The results of the metrics, by name."""
