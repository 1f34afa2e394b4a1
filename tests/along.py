"""A correction and the anchors of one trajectory, as schedulers hold them."""

from __future__ import annotations

from collections.abc import Callable

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
