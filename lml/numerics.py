"""The formula of `lml.correction` in stable arithmetic, for any finite input.

It takes the inner products of g and its anchors, solves the r x r system for y in float64, by
Cholesky's factors, and adds up d = g - U y. For most samples float32 is enough for the tensors. But
anchors that are nearly parallel to g or to one another leave d as a small difference of large
numbers, unless the damping is as large as they are. So the rounding of each sample is bounded, and
a sample with too much of it is done again: in float64, scaled by powers of two so that no square
overflows, with a floor under the damping.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK = 2**17  # numbers of a vector in a block of samples: what needs memory is done in blocks
SMALLEST = 1e-24  # |u|^2 and |g|^2: below it products underflow in float32
ROUNDING = 100.0  # in float32's epsilons, relative to |d|: more than that is done in float64
FLOOR = 500  # in float64's epsilons of |u|^2: a smaller damping drowns in the rounding of U^T U


class Anchors(tuple):
    """u_1 ... u_r, the oldest first. `products` is U^T U (B, r, r), if it is known."""

    products: Tensor | None = None


def correct(
    direction: Tensor,
    anchors: Sequence[Tensor],
    damping: float,
    is_relative: bool,
    norm_preserving: bool,
    products: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """g' of each sample, of the shape (B, ...), type, device and layout of `direction`.

    The second value is [U g]^T [U g] (B, r + 1, r + 1), or None if it was not computed for all
    samples. Its part that belongs to the next direction's anchors may be that one's `products`.

    Args:
        direction: g, a floating-point tensor (B, ...).
        anchors: r >= 1 tensors like it.
        damping: lambda > 0; with `is_relative` in units of mean |u|^2.
        norm_preserving: scale d to the norm of g.
        products: U^T U (B, r, r), if known.
    """
    ceiling = torch.finfo(_wide(direction)).max ** 0.8  # a larger damping changes nothing
    options = (min(damping, ceiling), is_relative, norm_preserving)
    largest = torch.finfo(direction.dtype).max
    dtype = torch.promote_types(direction.dtype, torch.float32)
    vectors = [v.flatten(1).to(dtype) for v in (*anchors, direction)]
    corrected = torch.empty_like(direction)
    out = corrected.flatten(1).to(dtype)  # a view, unless layout or type differ

    tracked = torch.is_grad_enabled() and any(v.requires_grad for v in vectors)
    if tracked or dtype == torch.float64:
        rest, products = torch.arange(len(out), device=out.device), None
    else:
        products = _inner_products(vectors, out, products)
        rest = _in_float32(vectors, products, out, *options, largest)
    for rows in rest.split(_block(out)) if len(rest) else ():
        out[rows] = _in_float64([v[rows] for v in vectors], *options, largest, tracked).to(dtype)
    if dtype != corrected.dtype or not corrected.is_contiguous():
        corrected.copy_(out.view_as(corrected))
    return corrected, products


def _in_float32(
    vectors: list[Tensor],
    products: Tensor,
    out: Tensor,
    damping: float,
    is_relative: bool,
    norm_preserving: bool,
    largest: float,
) -> Tensor:
    """Write g' to `out` (B, D); `vectors` are the anchors and g, `products` their inner products.

    Returns the samples to do again.
    """
    r = len(vectors) - 1
    gram = products.to(_wide(out))
    squares = gram.diagonal(dim1=1, dim2=2)
    U2, g2 = squares[:, :r].sum(1, keepdim=True), squares[:, r:]  # |U|^2 and |g|^2
    lam = damping / r * U2 if is_relative else torch.full_like(U2, damping)
    y = _solve(gram, lam)
    d2 = g2 - (y * (lam * y + gram[:, :r, r])).sum(1, keepdim=True)  # as U^T d is lambda y
    stretch = (g2 / d2).sqrt()

    # |(lambda I + U^T U)^-1 U^T| is at most 1 / (2 sqrt(lambda)): by |U| times that, |U| |y| is
    # longer than |g|, and errors of U^T U and U^T g are longer in d.
    rounding = (1 + (U2 / lam).sqrt() / 2) ** 2 * stretch  # NaN where a square overflows
    enough = (rounding < ROUNDING) & (g2 < largest**2) & (squares > SMALLEST).all(1, keepdim=True)
    _weighted_sum(vectors, y, stretch if norm_preserving else torch.ones_like(stretch), out)
    # At this damping |U y| is at most |g| / 3, and d2 as good as g2.
    if norm_preserving and not (is_relative and damping >= 2 * r):
        out *= (g2.sqrt() / _norm(out)).to(out.dtype)
    return (~enough).nonzero()[:, 0]


def _in_float64(
    vectors: list[Tensor],
    damping: float,
    is_relative: bool,
    norm_preserving: bool,
    largest: float,
    tracked: bool,
) -> Tensor:
    """g' of a few samples (b, D), no number of it above `largest`; gradients flow if `tracked`."""
    size_U, size_g = _power_of_two(vectors[:-1]), _power_of_two(vectors[-1:])
    vectors = [*(u / size_U for u in vectors[:-1]), vectors[-1] / size_g]
    out = None if tracked else torch.empty_like(vectors[-1])
    gram = _inner_products(vectors, out)
    limits = torch.finfo(gram.dtype)
    anchor_squares = gram.diagonal(dim1=1, dim2=2)[:, :-1]
    lam = damping * (anchor_squares.mean(1, keepdim=True) if is_relative else size_U**-2)
    # for each anchor its own, as a small one has smaller errors, too
    lam = torch.maximum(lam, FLOOR * limits.eps * anchor_squares)
    lam = torch.where(lam > 0, lam, 1.0).clamp(max=limits.max**0.8)

    d = _weighted_sum(vectors, _solve(gram, lam), torch.ones_like(size_g), out)
    norm_d = _norm(d)
    norm = gram[:, -1:, -1].sqrt() if norm_preserving else norm_d
    # |g| may exceed the largest number of the type where no number of g does.
    norm = norm.clamp(max=(1 - 4 * limits.eps) * largest / size_g)
    return d * torch.where(norm_d > 0, norm / norm_d, 1.0) * size_g


def _inner_products(
    vectors: list[Tensor], out: Tensor | None, known: Tensor | None = None
) -> Tensor:
    """[U g]^T [U g] (B, r + 1, r + 1) of the vectors (B, D); `known` is U^T U, if it is.

    `out`, if any, holds numbers on the way, so that no other memory of its size is needed.
    """
    n = len(vectors)
    lower = {
        (i, j): torch.mul(vectors[i], vectors[j], out=out).sum(1)
        if known is None or i == n - 1
        else known[:, i, j]
        for i in range(n)
        for j in range(i + 1)
    }
    products = [lower[max(i, j), min(i, j)] for i in range(n) for j in range(n)]
    return torch.stack(products, 1).unflatten(1, (n, n))


def _solve(gram: Tensor, lam: Tensor) -> Tensor:
    """y = (lambda I + U^T U)^-1 U^T g (B, r); a lambda for each sample (B, 1), or anchor (B, r)."""
    damped = gram.clone()
    damped.diagonal(dim1=1, dim2=2)[:, :-1] += lam
    factor, _ = torch.linalg.cholesky_ex(damped[:, :-1, :-1])
    return torch.cholesky_solve(damped[:, :-1, -1:], factor)[:, :, 0]


def _weighted_sum(vectors: list[Tensor], y: Tensor, scale: Tensor, out: Tensor | None) -> Tensor:
    """(g - U y) scale (B, D) with y (B, r) and scale (B, 1); in `out`, if any."""
    total = torch.mul(vectors[-1], scale.to(vectors[-1].dtype), out=out)
    weights = (-scale * y).to(total.dtype)
    for i, u in enumerate(vectors[:-1]):
        total.addcmul_(u, weights[:, i : i + 1])
    return total


def _norm(vectors: Tensor) -> Tensor:
    """(B, 1). Not vector_norm, whose error in float32 grows with the number of elements."""
    blocks = vectors.split(_block(vectors))
    return torch.cat([(block * block).sum(1, keepdim=True) for block in blocks]).sqrt()


def _block(vectors: Tensor) -> int:
    """The number of samples in a block."""
    return max(1, BLOCK // max(1, vectors.shape[1]))


def _power_of_two(vectors: list[Tensor]) -> Tensor:
    """The power of two at or below the largest number of each sample, (B, 1)."""
    ends = [end for v in vectors for end in (v.amax(1, keepdim=True), -v.amin(1, keepdim=True))]
    _, exponent = torch.frexp(torch.stack(ends).detach().amax(0))
    return torch.exp2(exponent.to(_wide(exponent)) - 1)


def _wide(vector: Tensor) -> torch.dtype:
    # Apple's GPUs have no float64.
    return torch.float32 if vector.device.type == "mps" else torch.float64
