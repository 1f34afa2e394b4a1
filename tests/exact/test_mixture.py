"""The mixture's limits, its stability far from every mode, and its constructors."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch.testing import assert_close

from lml.errors import UserError
from lml.exact import Empirical, Gaussian, MixtureOfGaussians

from .conftest import SHAPE, SIZE

torch_double = {"dtype": torch.float64}


def test_one_component_is_the_gaussian():
    torch.manual_seed(0)
    mean, factor = torch.randn(SHAPE, **torch_double), torch.randn(SIZE, 4, **torch_double)
    one = MixtureOfGaussians(torch.ones(1), mean[None], factor[None], floor=0.1)
    full = Gaussian.from_covariance(mean, factor @ factor.T + 0.1 * torch.eye(SIZE))
    x, v = torch.randn(2, 3, *SHAPE, **torch_double)
    for t in (0, 100, 999):
        assert_close(one(x, t).sample, full(x, t).sample)
        assert_close(one.hessian_vector(x, t, v), full.hessian_vector(x, t, v))


def test_components_without_extent_are_the_empirical_distribution():
    torch.manual_seed(0)
    means = torch.randn(6, *SHAPE, **torch_double) / 3
    points = MixtureOfGaussians(torch.ones(6), means, torch.zeros(6, SIZE, 1), floor=0.0)
    empirical = Empirical(means)
    x, v = torch.randn(2, 3, *SHAPE, **torch_double)
    for t in (0, 100, 400, 999):
        assert_close(points.posterior_mean(x, t), empirical.posterior_mean(x, t))
        assert_close(
            points.posterior_covariance_vector(x, t, v),
            empirical.posterior_covariance_vector(x, t, v),
        )


@pytest.mark.parametrize("t", [1e-2, 1.0, 1000.0])
def test_finite_where_every_density_underflows(t):
    model = MixtureOfGaussians.random(4, scheduler=FlowMatchEulerDiscreteScheduler())
    x = 1e3 * torch.randn(2, 3, 4, 4)
    assert model(x, t).sample.isfinite().all()
    assert model.hessian_vector(x, t, x).isfinite().all()


def test_random():
    model = MixtureOfGaussians.random(4, 3, components=5, rank=2, std=0.5, seed=3)
    assert model.means.shape == (5, 48) and model.basis.shape == (5, 48, 2)
    # E tr(F Fᵀ) = std² D
    many = MixtureOfGaussians.random(8, 3, components=50, rank=8, std=0.5)
    assert abs(many.variances.sum(1).mean() / (0.25 * 192) - 1) < 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"weights": torch.tensor([1.0, -1.0])},
            r"^weights=\[1.0, -1.0\]: expected 2 numbers above 0",
        ),
        ({"factors": torch.ones(2, 3, 1)}, r"^factors=\(2, 3, 1\): expected \(2, 24, r\)"),
        ({"floor": -1.0}, "^floor=-1.0: expected a variance"),
    ],
)
def test_bad_input(options, message):
    good = {
        "weights": torch.ones(2),
        "means": torch.zeros(2, *SHAPE),
        "factors": torch.ones(2, SIZE, 1),
    }
    with pytest.raises(UserError, match=message):
        MixtureOfGaussians(**good | options)


@pytest.mark.parametrize("key", ["components", "rank"])
def test_bad_random(key):
    with pytest.raises(UserError, match=f"^{key}=0: expected a whole number of at least 1"):
        MixtureOfGaussians.random(4, **{key: 0})
