r"""The method: a damped, low-rank second-order correction of a solver's direction.

Levenberg-Marquardt-Langevin sampling (Wang et al., ICCV 2025, arXiv 2505.24222) replaces the
direction g that a diffusion solver is about to take. Per sample, with anchors U = [u_1 ... u_r]
(directions of earlier steps) and damping lambda > 0:

    H  = U U^T + lambda I                               the damped, low-rank Hessian
    d  = lambda H^-1 g = g - U (lambda I + U^T U)^-1 U^T g          (Woodbury; r x r)
    g' = d |g| / |d|                                    norm-preserving

d is also the residual of the ridge regression of g on the anchors. So the correction takes out of
g what the earlier directions explain already, the less of it the larger the damping.

`formula` is this as it is written; `lml.numerics` is the same in stable arithmetic, and what
schedulers use; `lml.damping` says how much damping.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lml import numerics
from lml.options import Options

METHOD_VERSION = 2  # raised when LML's numbers change: it is part of what names a run


def formula(g: Tensor, U: Tensor, damping: float, relative: bool, normed: bool) -> Tensor:
    """g' (B, D) of the directions g (B, D) with anchors U (B, D, r)."""
    g, UT, identity = g[:, :, None], U.mT, torch.eye(U.shape[2], dtype=U.dtype, device=U.device)
    lam = damping * (U**2).sum(1, True).mean(2, True) if relative else damping
    d = g - U @ torch.linalg.solve(lam * identity + UT @ U, UT @ g)
    corrected = d * g.norm(dim=1, keepdim=True) / d.norm(dim=1, keepdim=True) if normed else d
    return corrected[:, :, 0]


class LMLCorrection(Options):
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
                which is returned unchanged. Those of another shape or device count as ().
            damping: on the scale of the options; with None g' is g.
            length: what g' is multiplied by.
        """
        if self.rank == 0:
            return direction, ()
        if any((u.shape, u.device) != (direction.shape, direction.device) for u in anchors):
            anchors = ()
        corrected, products = direction, None
        if damping is not None:
            corrected, products = self._correct(anchors, direction, damping)
        if length != 1:
            corrected = corrected * length
        kept = numerics.Anchors((*anchors, direction.detach().clone())[-self.rank :])
        if products is not None and self.anchor == "history":
            kept.products = products[:, -self.rank :, -self.rank :]
        return corrected, kept

    def columns(self, anchors: Sequence[Tensor], direction: Tensor) -> Sequence[Tensor]:
        """u_1 ... u_r of g = `direction`, like it; `anchors` are what `forward` was given."""
        if self.anchor == "history":
            return anchors
        g = direction.to(torch.promote_types(direction.dtype, torch.float32))
        previous = anchors[-1].to(g.dtype) if anchors else g
        return (self.kappa * previous + (1 - self.kappa) * g,)  # lerp would overflow

    def _correct(
        self, anchors: Sequence[Tensor], g: Tensor, damping: float
    ) -> tuple[Tensor, Tensor | None]:
        """g', and the inner products of the anchors and g, if it took them."""
        if self.anchor == "ema" and self.norm_preserving and (self.kappa == 0 or not anchors):
            return g, None  # u = g; the rounding of a tiny d would be scaled to full size
        if not (U := self.columns(anchors, g)):
            return g, None
        known = getattr(U, "products", None)
        return numerics.correct(g, U, damping, self.is_relative, self.norm_preserving, known)
