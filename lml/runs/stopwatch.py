"""Where the time of a run goes."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


class Stopwatch:
    """Counts seconds for each part of the work, and the samples that a network evaluated.

    On CUDA it records events, and synchronises only in `seconds`.
    """

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.evaluations = 0
        self._spans = []
        self._hooks = []

    @contextlib.contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Count the time spent inside as `part`."""
        start = self._now()
        yield
        self._spans.append((part, start, self._now()))

    def attach(self, module: nn.Module, part: str, count: bool = False) -> None:
        """Until `close`, count the time of every call of `module` as `part`.

        With `count`, also count its samples.
        """
        starts = []

        def before(_: nn.Module, args: tuple, options: dict) -> None:
            if count:
                inputs = options.get("hidden_states", options.get("sample"))
                self.evaluations += len(args[0] if args else inputs)
            starts.append(self._now())

        def after(*_: Any) -> None:
            self._spans.append((part, starts.pop(), self._now()))

        self._hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
        self._hooks.append(module.register_forward_hook(after))

    def close(self) -> None:
        """Detach from all modules."""
        while self._hooks:
            self._hooks.pop().remove()

    def seconds(self) -> Counter:
        """Seconds by part so far."""
        total = Counter()
        if self.cuda:
            torch.cuda.synchronize()
        for part, start, end in self._spans:
            total[part] += start.elapsed_time(end) / 1000 if self.cuda else end - start
        return total

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
