"""Small problems, and their densities: the same ingredients given to torch.distributions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor
from torch.distributions import (
    Categorical,
    Distribution,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
)

from lml.exact import Empirical, ExactModel, Gaussian, MixtureOfGaussians

SHAPE = (2, 3, 4)
SIZE = 24
EYE = torch.eye(SIZE, dtype=torch.float64)


def levels(t: float) -> tuple[float, float]:
    """(α, σ) of the default schedule by numpy: log(σ/α) linear between whole timesteps."""
    square = DDPMScheduler().alphas_cumprod.double().numpy()
    ratio = np.exp(np.interp(t, np.arange(1000), 0.5 * np.log((1 - square) / square)))
    return 1 / np.hypot(1, ratio), ratio / np.hypot(1, ratio)


@dataclass
class Problem:
    """A problem, `make(**options)`, and the density of x_t, flattened, at any (α, σ)."""

    make: Callable[..., ExactModel]
    density: Callable[[float, float], Distribution]

    def sample(self, t: float, count: int = 5, seed: int = 0) -> Tensor:
        """Noised draws, (count, *SHAPE) float64: where a sampler goes."""
        torch.manual_seed(seed)
        return self.density(*levels(t)).sample((count,)).view(count, *SHAPE)


def gaussian() -> Problem:
    torch.manual_seed(1)
    mean = torch.randn(SHAPE, dtype=torch.float64)
    factor = torch.randn(SIZE, SIZE, dtype=torch.float64) / 5
    covariance = factor @ factor.T
    return Problem(
        lambda **options: Gaussian.from_covariance(mean, covariance, **options),
        lambda alpha, sigma: MultivariateNormal(
            alpha * mean.flatten(), alpha**2 * covariance + sigma**2 * EYE
        ),
    )


def mixture() -> Problem:
    torch.manual_seed(2)
    weights = torch.tensor([3.0, 1.0, 2.0, 2.0])  # not normalised
    means = torch.randn(4, *SHAPE, dtype=torch.float64) / 3
    factors = torch.randn(4, SIZE, 3, dtype=torch.float64) / 3
    covariance = factors @ factors.mT + 0.02 * EYE
    return Problem(
        lambda **options: MixtureOfGaussians(weights, means, factors, floor=0.02, **options),
        lambda alpha, sigma: MixtureSameFamily(
            Categorical(weights.double()),
            MultivariateNormal(
                alpha * means.flatten(1),
                alpha**2 * covariance + sigma**2 * EYE,
            ),
        ),
    )


def empirical() -> Problem:
    torch.manual_seed(3)
    images = torch.randint(0, 256, (30, *SHAPE), dtype=torch.uint8)
    points = images.flatten(1).double() / 127.5 - 1
    return Problem(
        lambda **options: Empirical(images, block_size=7, **options),
        lambda alpha, sigma: MixtureSameFamily(
            Categorical(torch.ones(30).double()),
            Independent(Normal(alpha * points, torch.full_like(points, sigma)), 1),
        ),
    )


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """These tensors are too small for more: on a busy machine the others are only waited for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=[gaussian, mixture, empirical], ids=lambda make: make.__name__)
def problem(request) -> Problem:
    return request.param()
