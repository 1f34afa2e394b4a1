r"""The method: a damped, low-rank second-order correction of a solver's direction.

Levenberg-Marquardt-Langevin sampling (Wang et al., ICCV 2025, arXiv 2505.24222) replaces the
direction g that a diffusion solver is about to take. Per sample, with anchors U = [u_1 ... u_r]
(directions of earlier steps) and damping lambda > 0:

    H  = U U^T + lambda I                               the damped, low-rank Hessian
    d  = lambda H^-1 g = g - U (lambda I + U^T U)^-1 U^T g          (Woodbury; r x r)
    g' = d |g| / |d|                                    norm-preserving

d is also the residual of the ridge regression of g on the anchors, so the correction takes out of
g what the earlier directions already explain, the less of it the larger the damping.

Anchors that are nearly parallel to g or to one another leave d as a small difference of large
numbers, unless the damping is as large as they are. It is therefore computed in float64, where the
damping is not, and a few samples at a time, so that it stays in the processor's cache; the result
has the type of the input.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real

import torch
from torch import Tensor, nn

DAMPING_SCALES = ("relative", "absolute")
ANCHORS = ("history", "ema")
METHOD_VERSION = 1  # raised when LML's numbers change: it is part of what names a run

BLOCK = 5 * 2**18  # bytes of direction and anchors taken at a time: near the cache, little memory
ROUNDING = 500  # machine epsilons of |u|^2: a smaller damping drowns in U^T U's rounding
WELL_CONDITIONED = 1.0  # relative damping from which float32 loses no more than a digit


def default_damping(rank: int, steps: int | None = None) -> float:
    """lambda / mean |u|^2 where none is given: r (r + 1), times (steps / 5)^2 above 5 steps.

    Anchors that are g of the last r steps make of g, to first order, g + sum_i (g - u_i) / lambda,
    so that r (r + 1) turns it by half a step's change: by what a solver of first order lacks
    (Adams-Bashforth), however many its `steps` are (None). One of a higher order lacks less the
    shorter they are: with (steps / 5)^2 it keeps its order, up to the third. That this begins at 5
    is measured (experiments/README.md).
    """
    growth = 1.0 if steps is None else max(1.0, steps / 5) ** 2
    return max(1, rank * (rank + 1)) * growth


def _check(name: str, value: object, valid: bool, allowed: str) -> None:
    if not valid:
        raise ValueError(f"{name}={value}: must be {allowed}")


def _is_real(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_damping(value: object) -> bool:
    return _is_real(value) and math.isfinite(value) and value > 0


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
    ):
        super().__init__()
        whole = isinstance(rank, Integral) and not isinstance(rank, bool)
        _check("rank", rank, whole and rank >= 0, "a whole number >= 0")
        if isinstance(damping, Iterable) and not isinstance(damping, (str, bytes, Mapping)):
            damping = list(damping)
            valid = bool(damping) and all(d is None or _is_damping(d) for d in damping)
            _check("damping", damping, valid, "a list of finite numbers > 0 and of None")
        else:
            valid = damping is None or _is_damping(damping)
            _check(
                "damping", damping, valid, "a finite number > 0, or a list with one for each step"
            )
        _check(
            "damping_scale",
            damping_scale,
            damping_scale in DAMPING_SCALES,
            f"one of {', '.join(DAMPING_SCALES)}",
        )
        _check("anchor", anchor, anchor in ANCHORS, f"one of {', '.join(ANCHORS)}")
        _check("kappa", kappa, _is_real(kappa) and 0 <= kappa <= 1, "in [0, 1]")
        _check("norm_preserving", norm_preserving, isinstance(norm_preserving, bool), "a boolean")
        _check("freeze", freeze, _is_real(freeze) and 0 <= freeze <= 1, "in [0, 1]")
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

    @property
    def is_relative(self) -> bool:
        """Whether lambda is in units of mean |u|^2. The default damping always is."""
        return self.damping is None or self.damping_scale == "relative"

    def extra_repr(self) -> str:
        scale = "relative" if self.is_relative else "absolute"
        return (
            f"rank={self.rank}, damping={self.damping} ({scale}), "
            f"anchor={self.anchor}, kappa={self.kappa}, "
            f"norm_preserving={self.norm_preserving}, freeze={self.freeze}"
        )

    def dampings(
        self, timesteps: Sequence[float], num_train_timesteps: int, default: float
    ) -> tuple[float | None, ...]:
        """The damping of each step; None for a step that is left as it is.

        Args:
            timesteps: of the steps, in [0, T], where `freeze` looks for them.
            num_train_timesteps: T.
            default: the damping where the options give none.

        Raises:
            ValueError: `damping` is a list for another number of steps.
        """
        if isinstance(self.damping, list):
            values = self.damping
            if len(values) != len(timesteps):
                raise ValueError(
                    f"damping={values}: has {len(values)} entries for {len(timesteps)} steps"
                )
        else:
            values = [default if self.damping is None else self.damping] * len(timesteps)
        last = (1 - self.freeze) * num_train_timesteps if self.freeze else math.inf
        return tuple(
            None if timestep >= last else value
            for timestep, value in zip(timesteps, values, strict=True)
        )

    def forward(
        self, direction: Tensor, anchors: Sequence[Tensor], damping: float | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The corrected direction g', and the anchors of the next direction.

        g' has the shape (B, ...), type and device of `direction`. Samples of the batch do not
        influence one another.

        Args:
            direction: g, a floating-point tensor (B, ...).
            anchors: what the call before returned; () for the first direction of a trajectory,
                which is returned unchanged. Those of another shape or device are dropped.
            damping: on the scale of the options; with None g' is g.
        """
        if self.rank == 0:
            return direction, ()
        anchors = tuple(
            u for u in anchors if u.shape == direction.shape and u.device == direction.device
        )
        corrected = direction if damping is None else self._correct(anchors, direction, damping)
        return corrected, (*anchors, direction.detach().clone())[-self.rank :]

    def _correct(self, anchors: Sequence[Tensor], direction: Tensor, damping: float) -> Tensor:
        if self.anchor == "ema":
            if self.norm_preserving and (self.kappa == 0 or not anchors):
                return direction  # u = g; the rounding of a tiny d would be scaled to full size
            anchors = anchors or (direction,)
        if not anchors:
            return direction

        # The damping holds the condition number under 1 + r / damping.
        fast = self.is_relative and damping >= WELL_CONDITIONED
        fast = fast and direction.dtype != torch.float64
        corrected = torch.empty_like(direction)
        memory = (len(anchors) + 1) * direction.numel() * (4 if fast else 8)
        size = max(1, BLOCK * len(direction) // max(memory, 1))
        for start in range(0, len(direction), size):
            block = slice(start, start + size)
            vectors, out = [v[block] for v in (*anchors, direction)], corrected[block]
            held = self._correct_block(vectors, out, damping, fast)
            if fast and not held.all():
                again = torch.empty_like(out[~held])
                self._correct_block([v[~held] for v in vectors], again, damping, fast=False)
                out[~held] = again
        return corrected

    def _correct_block(
        self, inputs: list[Tensor], out: Tensor, damping: float, fast: bool
    ) -> Tensor:
        """Write g' of a few samples to `out` (b, ...); `inputs` are their anchors and g.

        `fast` is in float32 and with the numbers as they are, and right for the samples that are
        returned (b,): those whose squares are in float32's range.
        """
        # Apple's GPUs have no float64.
        single = fast or out.device.type == "mps"
        dtype = torch.float32 if single else torch.float64
        r = len(inputs) - 1
        vectors = out.new_empty((len(out), r + 1, out[0].numel()), dtype=dtype)
        for row, vector in enumerate(inputs):
            vectors[:, row] = vector.flatten(1)
        if self.anchor == "ema":
            vectors[:, 0].lerp_(vectors[:, 1], 1 - self.kappa)

        limits = torch.finfo(dtype)
        anchor_scale = direction_scale = 1.0
        scaled = not fast and out.dtype == dtype  # of other types all squares are finite here
        if scaled:
            anchor_scale = _power_of_two(vectors[:, :r])
            direction_scale = _power_of_two(vectors[:, r:])
            vectors[:, :r] /= anchor_scale
            vectors[:, r:] /= direction_scale

        gram = vectors @ vectors.mT
        squares = gram.diagonal(dim1=1, dim2=2)
        held = ((squares > 1e-15) & (squares < 1e15)).all(1)
        gram, projection = gram[:, :r, :r], gram[:, :r, r:]  # U^T U and U^T g
        mean_square = gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
        scale = mean_square if self.is_relative else anchor_scale**-2
        largest = limits.max**0.8  # a larger damping changes nothing
        damping = torch.full_like(mean_square, min(damping, largest)) * scale
        # of each anchor its own, as a small one has smaller errors, too
        damping = torch.maximum(damping, ROUNDING * limits.eps * squares[:, None, :r])
        damping = torch.where(damping > 0, damping, 1.0).clamp(max=largest)

        identity = torch.eye(r, dtype=dtype, device=out.device)
        factor, _ = torch.linalg.cholesky_ex(gram + damping * identity)
        weights = torch.cholesky_solve(projection, factor)
        # d = g - U weights
        d = torch.cat([-weights, torch.ones_like(weights[:, :1])], 1).mT @ vectors
        norm_d = _norm(d)
        # |g| may exceed the largest number of the type where no number of g does.
        limit = (1 - 4 * limits.eps) * torch.finfo(out.dtype).max / direction_scale
        size = (_norm(vectors[:, r:]) if self.norm_preserving else norm_d).clamp(max=limit)
        scale = torch.where(norm_d > 0, size / norm_d, 1.0)
        if scaled:
            d, scale = d * scale, direction_scale
        d, scale = d.view_as(out), scale.view(-1, *[1] * (out.ndim - 1))
        if d.requires_grad:
            out.copy_(d * scale)
        else:
            torch.mul(d, scale, out=out)
        return held


def _norm(vectors: Tensor) -> Tensor:
    # Not vector_norm, whose error in float32 grows with the number of elements.
    return (vectors * vectors).sum(2, keepdim=True).sqrt()


def _power_of_two(vectors: Tensor) -> Tensor:
    """The power of two at or below the largest number of each sample, (b, n, D) -> (b, 1, 1)."""
    _, exponent = torch.frexp(vectors.abs().amax((1, 2), keepdim=True))
    return torch.exp2(exponent.to(vectors.dtype) - 1)
