"""A mixture of low-rank Gaussians: curved score, several modes, cost O(K·D·r) for each sample."""

from __future__ import annotations

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from lml.errors import UserError
from lml.exact.base import ExactModel
from lml.schema import check_whole


class MixtureOfGaussians(ExactModel):
    """x_0 ~ Σ_k w_k N(μ_k, F_k F_kᵀ + τ I), with F_k of rank r and an isotropic floor τ.

    With F_k F_kᵀ = Q_k diag(s_k) Q_kᵀ, Woodbury's identity is diagonal: a component has the
    variances s_k + τ along Q_k, and τ in all other directions. Its weight at x follows from

        log N(x; α μ_k, α² F_k F_kᵀ + β I),  β = α² τ + σ²
          = −½ [ ‖d_k‖²/β − Σ_j α² s_kj (q_kjᵀ d_k)² / (β (α² s_kj + β))
                 + (D − r) log β + Σ_j log(α² s_kj + β) ] + const,  d_k = x − α μ_k.

    Args:
        weights: w_k > 0, (K,), in any units.
        means: μ_k, (K, C, H, W).
        factors: F_k, (K, D, r) with D = C·H·W and r ≤ D.
        floor: τ ≥ 0, a variance.
        kwargs: `scheduler` and `prediction_type` of `ExactModel`.
    """

    def __init__(
        self, weights: Tensor, means: Tensor, factors: Tensor, floor: float = 0.0, **kwargs
    ):
        super().__init__(means.shape[1:], **kwargs)
        count, size = len(means), means[0].numel()
        if weights.shape != (count,) or not (weights > 0).all():
            raise UserError(f"weights={weights.tolist()}: expected {count} numbers above 0")
        if factors.shape[:2] != (count, size) or not 1 <= factors.shape[2] <= size:
            shape = tuple(factors.shape)
            raise UserError(
                f"factors={shape}: expected ({count}, {size}, r) with r from 1 to {size}"
            )
        if not floor >= 0:
            raise UserError(f"floor={floor}: expected a variance of at least 0")
        basis, scale, _ = torch.linalg.svd(factors.double(), full_matrices=False)
        self.floor = float(floor)
        self.register_buffer("log_weights", weights.double().log())
        self.register_buffer("means", means.double().flatten(1))
        self.register_buffer("basis", basis)
        self.register_buffer("variances", scale**2)

    @classmethod
    def random(
        cls,
        sample_size: int = 16,
        in_channels: int = 3,
        components: int = 10,
        rank: int = 8,
        seed: int = 0,
        mean_std: float = 0.3,
        std: float = 0.3,
        floor: float = 0.0025,
        scheduler: SchedulerMixin | None = None,
        prediction_type: str | None = None,
    ) -> MixtureOfGaussians:
        """Random weights (softmax of N(0, 1)), means (N(0, `mean_std`²)) and factors.

        In an average pixel, a component's low-rank part has the standard deviation `std`, and the
        floor has √`floor`.
        """
        check_whole(components, "components")
        check_whole(rank, "rank")
        generator = torch.Generator().manual_seed(seed)
        shape = (in_channels, sample_size, sample_size)
        size = in_channels * sample_size**2

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        return cls(
            weights=normal(components).softmax(0),
            means=mean_std * normal(components, *shape),
            factors=std / rank**0.5 * normal(components, size, rank),
            floor=floor,
            scheduler=scheduler,
            prediction_type=prediction_type,
        )

    def _components(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Q_kᵀ (x − α μ_k) (B, K, r) and P(k | x_t = x) (B, K)."""
        own = torch.einsum("kd,kdr->kr", self.means, self.basis)
        along = torch.einsum("bd,kdr->bkr", x, self.basis) - alpha[:, :, None] * own
        square = (
            x.square().sum(1, keepdim=True)
            - 2 * alpha * x @ self.means.T
            + alpha**2 * self.means.square().sum(1)
        )
        beta = alpha**2 * self.floor + sigma**2
        spread = alpha[:, :, None] ** 2 * self.variances
        total = spread + beta[:, :, None]
        quadratic = square / beta - (spread / (beta[:, :, None] * total) * along**2).sum(2)
        # (D − r) log β is equal in all components
        log_weights = self.log_weights - 0.5 * (quadratic + total.log().sum(2))
        return along, log_weights.softmax(1)

    def _gains(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """α S / (α² S + σ²) for the floor S = τ, (B, 1), and for S = s_k + τ, (B, K, r)."""
        floor = alpha * self.floor / (alpha**2 * self.floor + sigma**2)
        alpha, sigma = alpha[:, :, None], sigma[:, :, None]
        variances = self.variances + self.floor
        return floor, alpha * variances / (alpha**2 * variances + sigma**2)

    def _sum_of_means(
        self, weights: Tensor, x: Tensor, along: Tensor, alpha: Tensor, sigma: Tensor
    ) -> Tensor:
        """Σ_k `weights`_k E[x_0 | x_t = x, k], (B, D), for any `weights` (B, K)."""
        floor, gain = self._gains(alpha, sigma)
        inside = weights[:, :, None] * (gain - floor[:, :, None]) * along
        return (
            (1 - floor * alpha) * (weights @ self.means)
            + floor * weights.sum(1, keepdim=True) * x
            + torch.einsum("bkr,kdr->bd", inside, self.basis)
        )

    def _posterior_mean(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        along, weights = self._components(x, alpha, sigma)
        return self._sum_of_means(weights, x, along, alpha, sigma)

    def _posterior_covariance_vector(
        self, x: Tensor, v: Tensor, alpha: Tensor, sigma: Tensor
    ) -> Tensor:
        """Within the components, Σ_k w_k Cov_k v, plus between them, Σ_k w_k (m_k·v − m·v) m_k."""
        along, weights = self._components(x, alpha, sigma)
        floor, gain = self._gains(alpha, sigma)
        v_along = torch.einsum("bd,kdr->bkr", v, self.basis)

        # The posterior variance is the gain times σ²/α; α may be 0, so there is no division by it
        beta = alpha**2 * self.floor + sigma**2
        floor_variance = self.floor * sigma**2 / beta
        variances = (self.variances + self.floor) * sigma[:, :, None] ** 2
        variances = variances / (alpha[:, :, None] ** 2 * self.variances + beta[:, :, None])
        inside = weights[:, :, None] * (variances - floor_variance[:, :, None]) * v_along
        within = floor_variance * v + torch.einsum("bkr,kdr->bd", inside, self.basis)

        means_v = (  # m_k·v without a term that is equal for all k
            (1 - floor * alpha) * (v @ self.means.T)
            + ((gain - floor[:, :, None]) * along * v_along).sum(2)
        )
        centred = weights * (means_v - (weights * means_v).sum(1, keepdim=True))
        return within + self._sum_of_means(centred, x, along, alpha, sigma)
