"""Records what happens along a run's trajectories."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import SchedulerMixin
from torch import Tensor, nn

from lml.exact import ExactModel


@dataclass
class Correction:
    """One call of LML: the direction g, g', the anchors and the damping (None: g' is g).

    Tensors are (B, C, H, W); `anchors` are those that `LMLCorrection` was called with.
    """

    direction: Tensor
    corrected: Tensor
    anchors: tuple[Tensor, ...]
    damping: float | None


@dataclass
class Trajectory:
    """The trajectory of a batch of B samples, from noise to images.

    Every tensor is (B, C, H, W). `evaluations`: for each call of an exact model, the timestep and
    x_t = α x_0 + σ ε; empty for other networks. `corrections`: one for each step that LML corrects.
    `images`: in about [-1, 1].
    """

    evaluations: list[tuple[float, Tensor]] = field(default_factory=list)
    corrections: list[Correction] = field(default_factory=list)
    images: Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass
class Replay:
    """The first `count` samples of a run, made again and recorded.

    `timesteps` are those of the network's evaluations. `batches` are this process's share of the
    samples; each is made when the iterator reaches it.
    """

    network: nn.Module
    scheduler: SchedulerMixin
    timesteps: list[float]
    count: int
    batches: Iterable[Trajectory]


@contextmanager
def record(network: nn.Module, scheduler: SchedulerMixin) -> Iterator[Trajectory]:
    """A `Trajectory` that records the calls of `network` and `scheduler` inside, without images.

    `scheduler` must be the object that is used, not a copy.
    """
    trajectory = Trajectory()

    def evaluated(_: nn.Module, args: tuple, output: Any) -> None:
        sample, timestep = args[:2]
        trajectory.evaluations.append((float(timestep), sample))

    def corrected(_: nn.Module, args: tuple, output: tuple) -> None:
        direction, anchors, damping = args[:3]
        trajectory.corrections.append(Correction(direction, output[0], anchors, damping))

    hooks = []
    if isinstance(network, ExactModel):
        hooks.append(network.register_forward_hook(evaluated))
    if isinstance(correction := getattr(scheduler, "correction", None), nn.Module):
        hooks.append(correction.register_forward_hook(corrected))
    try:
        yield trajectory
    finally:
        for hook in hooks:
            hook.remove()
