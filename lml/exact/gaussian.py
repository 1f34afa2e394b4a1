"""A Gaussian with full covariance: linear score, closed-form probability-flow ODE."""

from __future__ import annotations

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from lml.errors import UserError
from lml.exact.base import ExactModel


class Gaussian(ExactModel):
    """x_0 ~ N(μ, V diag(s) Vᵀ).

    In the eigenbasis V, every component is a separate problem:

        E[x_0 | x_t]   = μ + α s / (α² s + σ²) · (x_t − α μ)
        Cov[x_0 | x_t] = s σ² / (α² s + σ²)

    Args:
        mean: μ, (C, H, W).
        variances: s ≥ 0, (D,) with D = C·H·W.
        basis: V, (D, D), orthonormal columns; the identity if None.
        kwargs: `scheduler` and `prediction_type` of `ExactModel`.
    """

    def __init__(self, mean: Tensor, variances: Tensor, basis: Tensor | None = None, **kwargs):
        super().__init__(mean.shape, **kwargs)
        size = mean.numel()
        basis = torch.eye(size) if basis is None else basis
        if variances.shape != (size,) or not (variances >= 0).all():
            raise UserError(f"variances={tuple(variances.shape)}: expected {size} numbers >= 0")
        if basis.shape != (size, size):
            raise UserError(f"basis={tuple(basis.shape)}: expected a {size} x {size} matrix")
        self.register_buffer("mean", mean.double().flatten())
        self.register_buffer("variances", variances.double())
        self.register_buffer("basis", basis.double())

    @classmethod
    def from_covariance(cls, mean: Tensor, covariance: Tensor, **kwargs) -> Gaussian:
        """N(`mean` (C, H, W), `covariance` (D, D)), symmetric and positive semi-definite."""
        variances, basis = torch.linalg.eigh(covariance.double())
        return cls(mean, variances.clamp(min=0), basis, **kwargs)

    @classmethod
    def random(
        cls,
        sample_size: int = 16,
        in_channels: int = 3,
        seed: int = 0,
        std: float = 0.4,
        decay: float = 1.0,
        scheduler: SchedulerMixin | None = None,
        prediction_type: str | None = None,
    ) -> Gaussian:
        """Random eigenbasis, the k-th variance ∝ k^−`decay`, `std` the root mean variance.

        `decay` = 1 spreads the variances over three orders of magnitude, as in natural images. The
        mean of every pixel is drawn from N(0, 0.1²).
        """
        generator = torch.Generator().manual_seed(seed)
        shape = (in_channels, sample_size, sample_size)
        size = in_channels * sample_size**2
        draw = torch.randn(size, size, generator=generator, dtype=torch.float64)
        variances = torch.arange(1, size + 1, dtype=torch.float64) ** -decay
        return cls(
            mean=0.1 * torch.randn(shape, generator=generator, dtype=torch.float64),
            variances=variances * std**2 / variances.mean(),
            basis=torch.linalg.qr(draw).Q,
            scheduler=scheduler,
            prediction_type=prediction_type,
        )

    @property
    def covariance(self) -> Tensor:
        """V diag(s) Vᵀ, (D, D) float64."""
        return (self.basis * self.variances) @ self.basis.T

    def _posterior_mean(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        gain = alpha * self.variances / (alpha**2 * self.variances + sigma**2)
        return self.mean + (x - alpha * self.mean) @ self.basis * gain @ self.basis.T

    def _posterior_covariance_vector(
        self, x: Tensor, v: Tensor, alpha: Tensor, sigma: Tensor
    ) -> Tensor:
        variances = self.variances * sigma**2 / (alpha**2 * self.variances + sigma**2)
        return v @ self.basis * variances @ self.basis.T

    def flow(self, x: Tensor, t_from: float | Tensor, t_to: float | Tensor | None = None) -> Tensor:
        """The probability-flow ODE's solution at `t_to` that passes through `x` at `t_from`.

        `x` is (B, C, H, W). Timesteps are as in the call; `t_to` = None is the clean end (α = 1,
        σ = 0). In the eigenbasis

            x_to − α_to μ = sqrt((α_to² s + σ_to²) / (α_from² s + σ_from²)) (x_from − α_from μ)

        since dx = (f x − g²/2 ∇ log p_t) dt keeps each component's z-score (Song et al., arXiv
        2011.13456, equation 13, with the score of a Gaussian).
        """
        alpha, sigma = self._levels(x, t_from)
        alpha_to, sigma_to = self._levels(x, t_to) if t_to is not None else (1.0, 0.0)
        scale = (alpha_to**2 * self.variances + sigma_to**2).sqrt()
        scale = scale / (alpha**2 * self.variances + sigma**2).sqrt()
        centred = x.flatten(1).double() - alpha * self.mean
        solution = alpha_to * self.mean + centred @ self.basis * scale @ self.basis.T
        return solution.view(x.shape).to(x.dtype)
