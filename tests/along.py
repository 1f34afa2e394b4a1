"""What tests of trajectories share: a correction with its anchors, and the noise of a step."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from lml.correction import LMLCorrection
from lml.damping import default_damping


def along(correction: LMLCorrection) -> Callable[[Tensor], Tensor]:
    """A function that corrects one direction of a trajectory after the other."""
    anchors: tuple[Tensor, ...] = ()
    damping = correction.damping or default_damping(correction.rank)

    def corrected(direction: Tensor) -> Tensor:
        nonlocal anchors
        result, anchors = correction(direction, anchors, damping)
        return result

    return corrected


def noise_from(generator: torch.Generator | int, scheduler) -> dict:
    """Options of a step with which a solver that adds noise takes it from `generator`, or a seed.

    So that two trajectories can be compared, whatever the solver.
    """
    if "generator" not in inspect.signature(scheduler.step).parameters:
        return {}
    if isinstance(generator, int):
        generator = torch.Generator().manual_seed(generator)
    return {"generator": generator}
