r"""The method: a damped, low-rank second-order correction of a solver's direction.

Levenberg-Marquardt-Langevin sampling (Wang et al., ICCV 2025, arXiv 2505.24222) replaces the
direction g that a diffusion solver is about to take. Per sample, with anchors U = [u_1 ... u_r]
(directions of earlier steps) and damping lambda > 0:

    H  = U U^T + lambda I                               the damped, low-rank Hessian
    d  = lambda H^-1 g = g - U (lambda I + U^T U)^-1 U^T g          (Woodbury; r x r)
    g' = d |g| / |d|                                    norm-preserving

d is also the residual of the ridge regression of g on the anchors. So the correction takes out of
g what the earlier directions explain already, the less of it the larger the damping.

`formula` is this as it is written; `lml.numerics` is the same in arithmetic that holds, and what
schedulers use; `lml.damping` says how much damping.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral

import torch
from torch import Tensor, nn

from lml import numerics
from lml.damping import damping_of_steps, is_damping, is_real, one_for_each_step

DAMPING_SCALES = ("relative", "absolute")
ANCHORS = ("history", "ema")
METHOD_VERSION = 2  # raised when LML's numbers change: it is part of what names a run


def formula(g: Tensor, U: Tensor, damping: float, relative: bool, normed: bool) -> Tensor:
    """g' (B, D) of the directions g (B, D) with anchors U (B, D, r)."""
    lam = damping * (U**2).sum(1).mean(1) if relative else torch.full_like(g[:, 0], damping)
    UT, identity = U.mT, torch.eye(U.shape[2], dtype=g.dtype, device=g.device)
    y = torch.linalg.solve(lam[:, None, None] * identity + UT @ U, UT @ g[:, :, None])
    d = g - (U @ y)[:, :, 0]
    return d * g.norm(dim=1, keepdim=True) / d.norm(dim=1, keepdim=True) if normed else d


def _check(name: str, value: object, valid: bool, allowed: str) -> None:
    if not valid:
        raise ValueError(f"{name}={value}: must be {allowed}")


def _is_list(value: object) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping))


class LMLCorrection(nn.Module):
    """Corrects the directions of a trajectory, one a call.

    It holds options alone. The anchors of a trajectory belong to whoever follows it:

        anchors = ()
        for g in directions:
            corrected, anchors = correction(g, anchors, damping)

    Gradients flow through the direction, but not through the anchors: these are detached copies.

    Args:
        rank: r >= 0, the number of anchors; 0 returns every direction unchanged.
        damping: lambda > 0, on the scale that `damping_scale` sets; or a list of them, one for each
            step of the grid, in which None leaves its step as it is; or None: the default of the
            scheduler, which is relative.
        damping_scale: of a given damping: "relative": lambda = damping * mean_i |u_i|^2, free of
            units, resolution and step size; "absolute": lambda = damping, as published.
        anchor: "history": the last r uncorrected directions; "ema": the one anchor
            u = kappa * g_previous + (1 - kappa) * g, as published.
        kappa: in [0, 1], of `anchor="ema"`. At 0 the anchor is g itself, d is parallel to g, and
            the norm-preserving correction is the identity.
        norm_preserving: scale d to the norm of g.
        freeze: in [0, 1]; no correction while timestep >= (1 - freeze) * T.
        length: > 0, of g' in units of what it would be; or a list with one for each step.

    Raises:
        ValueError: an option is out of its range.
    """

    def __init__(
        self,
        rank: int = 2,
        damping: float | Sequence[float | None] | None = None,
        damping_scale: str = "relative",
        anchor: str = "history",
        kappa: float = 0.0,
        norm_preserving: bool = True,
        freeze: float = 0.0,
        length: float | Sequence[float] = 1.0,
    ):
        super().__init__()
        whole = isinstance(rank, Integral) and not isinstance(rank, bool)
        _check("rank", rank, whole and rank >= 0, "a whole number >= 0")
        if _is_list(damping):
            damping = list(damping)
            valid = bool(damping) and all(d is None or is_damping(d) for d in damping)
            _check("damping", damping, valid, "a list of finite numbers > 0 and of None")
        else:
            valid = damping is None or is_damping(damping)
            _check(
                "damping", damping, valid, "a finite number > 0, or a list with one for each step"
            )
        if _is_list(length):
            length = list(length)
            valid = bool(length) and all(map(is_damping, length))
            _check("length", length, valid, "a list of finite numbers > 0")
        else:
            valid = is_damping(length)
            _check("length", length, valid, "a finite number > 0, or a list with one for each step")
        _check(
            "damping_scale",
            damping_scale,
            damping_scale in DAMPING_SCALES,
            f"one of {', '.join(DAMPING_SCALES)}",
        )
        _check("anchor", anchor, anchor in ANCHORS, f"one of {', '.join(ANCHORS)}")
        _check("kappa", kappa, is_real(kappa) and 0 <= kappa <= 1, "in [0, 1]")
        _check("norm_preserving", norm_preserving, isinstance(norm_preserving, bool), "a boolean")
        _check("freeze", freeze, is_real(freeze) and 0 <= freeze <= 1, "in [0, 1]")
        _check("rank", rank, anchor == "history" or rank <= 1, "0 or 1 with anchor=ema")
        # int and float, so that a config with NumPy's numbers can be saved.
        self.rank = int(rank)
        if isinstance(damping, list):
            self.damping = [None if d is None else float(d) for d in damping]
        else:
            self.damping = None if damping is None else float(damping)
        self.damping_scale = damping_scale
        self.anchor = anchor
        self.kappa = float(kappa)
        self.norm_preserving = norm_preserving
        self.freeze = float(freeze)
        self.length = list(map(float, length)) if isinstance(length, list) else float(length)

    @property
    def is_relative(self) -> bool:
        """Whether lambda is in units of mean |u|^2. The default damping always is."""
        return self.damping is None or self.damping_scale == "relative"

    def extra_repr(self) -> str:
        scale = "relative" if self.is_relative else "absolute"
        return (
            f"rank={self.rank}, damping={self.damping} ({scale}), "
            f"anchor={self.anchor}, kappa={self.kappa}, "
            f"norm_preserving={self.norm_preserving}, freeze={self.freeze}, length={self.length}"
        )

    def dampings(
        self, timesteps: Sequence[float], num_train_timesteps: int, default: float
    ) -> tuple[float | None, ...]:
        """The damping of each step at `timesteps` in [0, T]; see `lml.damping.damping_of_steps`.

        `default` is the damping where the options give none, `num_train_timesteps` is T.
        """
        damping = default if self.damping is None else self.damping
        last = (1 - self.freeze) * num_train_timesteps if self.freeze else math.inf
        return damping_of_steps(damping, last, timesteps)

    def lengths(self, steps: int) -> tuple[float, ...]:
        """The length of each of so many steps. ValueError: the option is a list for others."""
        return one_for_each_step("length", self.length, steps)

    def forward(
        self,
        direction: Tensor,
        anchors: Sequence[Tensor],
        damping: float | None,
        length: float = 1.0,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The corrected direction g', and the anchors of the next direction.

        g' has the shape (B, ...), type and device of `direction`. Samples of the batch do not
        influence one another.

        Args:
            direction: g, a floating-point tensor (B, ...).
            anchors: what the call before returned; () for the first direction of a trajectory,
                which is returned unchanged. Those of another shape or device are dropped.
            damping: on the scale of the options; with None g' is g.
            length: what g' is multiplied by.
        """
        if self.rank == 0:
            return direction, ()
        anchors = tuple(
            u for u in anchors if u.shape == direction.shape and u.device == direction.device
        )
        corrected = direction if damping is None else self._correct(anchors, direction, damping)
        if length != 1:
            corrected = corrected * length
        return corrected, (*anchors, direction.detach().clone())[-self.rank :]

    def _correct(self, anchors: Sequence[Tensor], direction: Tensor, damping: float) -> Tensor:
        kappa = None
        if self.anchor == "ema":
            if self.norm_preserving and (self.kappa == 0 or not anchors):
                return direction  # u = g; the rounding of a tiny d would be scaled to full size
            anchors, kappa = anchors or (direction,), self.kappa
        if not anchors:
            return direction
        return numerics.correct(
            direction, anchors, damping, self.is_relative, self.norm_preserving, kappa
        )
