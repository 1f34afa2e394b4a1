"""The formula of `lml.correction` in arithmetic that holds, for any finite input.

Anchors that are nearly parallel to g or to one another leave d as a small difference of large
numbers, unless the damping is as large as they are. So it is computed in float64, unless the
damping is large enough for float32, and a few samples at a time, so that these stay in the
processor's cache. The r x r system is solved by Cholesky's factors, with a floor under the damping.
The result has the type of the input.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK = 5 * 2**18  # bytes of direction and anchors taken at a time: near the cache, little memory
ROUNDING = 500  # machine epsilons of |u|^2: a smaller damping drowns in U^T U's rounding
WELL_CONDITIONED = 1.0  # relative damping from which float32 loses no more than a digit


def correct(
    direction: Tensor,
    anchors: Sequence[Tensor],
    damping: float,
    is_relative: bool,
    norm_preserving: bool,
    kappa: float | None = None,
) -> Tensor:
    """g' of each sample, of the shape (B, ...), type and device of `direction`.

    Args:
        direction: g, a floating-point tensor (B, ...).
        anchors: r >= 1 tensors like it.
        damping: lambda > 0; with `is_relative` in units of mean |u|^2.
        norm_preserving: scale d to the norm of g.
        kappa: with one, the only anchor is u = kappa * anchors[0] + (1 - kappa) * g.
    """
    options = (damping, is_relative, norm_preserving, kappa)
    # The damping holds the condition number under 1 + r / damping.
    fast = is_relative and damping >= WELL_CONDITIONED and direction.dtype != torch.float64
    corrected = torch.empty_like(direction)
    memory = (len(anchors) + 1) * direction.numel() * (4 if fast else 8)
    size = max(1, BLOCK * len(direction) // max(memory, 1))
    for start in range(0, len(direction), size):
        block = slice(start, start + size)
        vectors, out = [v[block] for v in (*anchors, direction)], corrected[block]
        held = _correct_block(vectors, out, *options, fast)
        if fast and not held.all():
            again = torch.empty_like(out[~held])
            _correct_block([v[~held] for v in vectors], again, *options, fast=False)
            out[~held] = again
    return corrected


def _correct_block(
    inputs: list[Tensor],
    out: Tensor,
    damping: float,
    is_relative: bool,
    norm_preserving: bool,
    kappa: float | None,
    fast: bool,
) -> Tensor:
    """Write g' of a few samples to `out` (b, ...); `inputs` are their anchors and g.

    `fast` is in float32 and with the numbers as they are. It is right for the samples that are
    returned (b,): those whose squares are in float32's range.
    """
    # Apple's GPUs have no float64.
    single = fast or out.device.type == "mps"
    dtype = torch.float32 if single else torch.float64
    r = len(inputs) - 1
    vectors = out.new_empty((len(out), r + 1, out[0].numel()), dtype=dtype)
    for row, vector in enumerate(inputs):
        vectors[:, row] = vector.flatten(1)
    if kappa is not None:
        vectors[:, 0].lerp_(vectors[:, 1], 1 - kappa)

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
    unit = mean_square if is_relative else anchor_scale**-2
    largest = limits.max**0.8  # a larger damping changes nothing
    lam = torch.full_like(mean_square, min(damping, largest)) * unit
    # for each anchor its own, as a small one has smaller errors, too
    lam = torch.maximum(lam, ROUNDING * limits.eps * squares[:, None, :r])
    lam = torch.where(lam > 0, lam, 1.0).clamp(max=largest)

    identity = torch.eye(r, dtype=dtype, device=out.device)
    factor, _ = torch.linalg.cholesky_ex(gram + lam * identity)
    weights = torch.cholesky_solve(projection, factor)
    # d = g - U weights
    d = torch.cat([-weights, torch.ones_like(weights[:, :1])], 1).mT @ vectors
    norm_d = _norm(d)
    # |g| may exceed the largest number of the type where no number of g does.
    limit = (1 - 4 * limits.eps) * torch.finfo(out.dtype).max / direction_scale
    size = (_norm(vectors[:, r:]) if norm_preserving else norm_d).clamp(max=limit)
    stretch = torch.where(norm_d > 0, size / norm_d, 1.0)
    if scaled:
        d, stretch = d * stretch, direction_scale
    d, stretch = d.view_as(out), stretch.view(-1, *[1] * (out.ndim - 1))
    if d.requires_grad:
        out.copy_(d * stretch)
    else:
        torch.mul(d, stretch, out=out)
    return held


def _norm(vectors: Tensor) -> Tensor:
    # Not vector_norm, whose error in float32 grows with the number of elements.
    return (vectors * vectors).sum(2, keepdim=True).sqrt()


def _power_of_two(vectors: Tensor) -> Tensor:
    """The power of two at or below the largest number of each sample, (b, n, D) -> (b, 1, 1)."""
    _, exponent = torch.frexp(vectors.abs().amax((1, 2), keepdim=True))
    return torch.exp2(exponent.to(vectors.dtype) - 1)
