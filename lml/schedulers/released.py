"""The authors' arithmetic, step by step as they released it: for audits, not for use.

Their `lm_correct` and `DDIMLMScheduler` (github.com/zituitui/LML-diffusion-sampler) evaluate, in
the type of the tensors at hand (for flow matching always in float32),

    u = kappa g_previous + (1 - kappa) g            g itself at the first step
    d = g - u (u.g) / (lambda + |u|^2)              lambda absolute
    g' = d |g| / |d|

At kappa = 0, the published value, d is g lambda / (lambda + |g|^2), which is parallel to g. It is
the difference of two nearly equal numbers: in float32, mostly rounding noise. `lml.correction` is
the same method in stable arithmetic. The order of operations is theirs, too: u (u.g) before
the quotient. With the quotient first, d is often exactly zero, and g' is NaN.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

# diffusers looks up the loader of a pipeline's scheduler by this name in this module.
from diffusers import SchedulerMixin as SchedulerMixin
from torch import Tensor

from lml.correction import LMLCorrection
from lml.schedulers.solvers import (
    LMLDDIMScheduler,
    LMLDPMSolverMultistepScheduler,
    LMLFlowMatchEulerDiscreteScheduler,
)


class ReleasedCorrection(LMLCorrection):
    """`LMLCorrection` with the released arithmetic; it may return NaN.

    Raises:
        ValueError: an option that the released code does not have.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        fixed = {"anchor": "ema", "damping_scale": "absolute", "norm_preserving": True}
        for name, value in fixed.items():
            if self.rank and getattr(self, name) != value:
                raise ValueError(f"{name}={getattr(self, name)}: the released code has {value}")

    def _correct(
        self, anchors: Sequence[Tensor], direction: Tensor, damping: float
    ) -> tuple[Tensor, None]:
        axes = tuple(range(1, direction.ndim))
        g = u = direction
        if anchors:
            u = self.kappa * anchors[-1] + (1 - self.kappa) * g
        square = (g * g).sum(axes, keepdim=True)
        d = g - u * (g * u).sum(axes, keepdim=True) / (damping + (u * u).sum(axes, keepdim=True))
        return d * square.sqrt() / (d * d).sum(axes, keepdim=True).sqrt(), None


class ReleasedDDIMScheduler(LMLDDIMScheduler):
    """The authors' `ddim_lm`, with target=direction."""

    correction_class = ReleasedCorrection
    may_diverge = True


class ReleasedDPMSolverMultistepScheduler(LMLDPMSolverMultistepScheduler):
    """The authors' `dpm_lm`, with target=increment."""

    correction_class = ReleasedCorrection
    may_diverge = True


class ReleasedFlowMatchEulerDiscreteScheduler(LMLFlowMatchEulerDiscreteScheduler):
    """The authors' `lml_euler`, with target=prediction, which here is the velocity."""

    correction_class = ReleasedCorrection
    may_diverge = True

    @functools.wraps(LMLFlowMatchEulerDiscreteScheduler.step)
    def step(self, model_output: Tensor, *args, **kwargs):
        """As the parent's, in float32; the sample is of the type of `model_output`."""
        if self.correction.rank == 0:
            return super().step(model_output, *args, **kwargs)
        # the correction of a velocity in bfloat16 is not rounded to that before it is added
        output = super().step(model_output.to(torch.float32), *args, **kwargs)
        if isinstance(output, tuple):
            return (output[0].to(model_output.dtype), *output[1:])
        output.prev_sample = output.prev_sample.to(model_output.dtype)
        return output
