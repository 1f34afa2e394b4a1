"""Progress on the terminal."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

LINE_SECONDS = 15.0


class Progress:
    """Shows the work done, the speed and the time left.

    In a terminal it is a bar, otherwise a line every `LINE_SECONDS`. It counts in `unit`s.
    """

    def __init__(self, total: int, show: bool = True, unit: str = "image"):
        self.total, self.count, self.unit = total, 0, f"{unit}s"
        self.start = self.said = time.monotonic()
        self.lines = show and not sys.stderr.isatty()
        hide = self.lines or not show
        self.bar = tqdm(total=total, unit=unit, dynamic_ncols=True, disable=hide)

    def update(self, count: int) -> None:
        """`count` more are done."""
        self.count += count
        self.bar.update(count)
        now = time.monotonic()
        if self.lines and now - self.said >= LINE_SECONDS and self.count < self.total:
            self.said = now
            rate = self.count / (now - self.start)
            left = tqdm.format_interval((self.total - self.count) / rate)
            print(
                f"{self.count} of {self.total} {self.unit}, {rate:.1f} {self.unit}/s, {left} left",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        """Leave the last state on the screen."""
        self.bar.close()
