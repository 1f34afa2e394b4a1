"""The Gaussian's closed-form flow, and its constructors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from scipy.integrate import solve_ivp
from torch.testing import assert_close

from lml.errors import UserError
from lml.exact import Gaussian

from .conftest import SHAPE, gaussian, levels


@pytest.mark.parametrize(("t_from", "t_to"), [(999, 0), (700.5, 30.25), (20, 600)])
def test_flow_is_the_integral_of_the_probability_flow_ode(t_from, t_to):
    """In y = x/α and ρ = σ/α the ODE is dy/dρ = ε (Song et al., arXiv 2010.02502, equation 14)."""
    problem = gaussian()
    model, x = problem.make(), problem.sample(t_from, count=3)
    grid = np.arange(1000)
    log_ratio = np.array([np.log(sigma / alpha) for alpha, sigma in map(levels, grid)])

    def derivative(u: float, y: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(y).view(3, *SHAPE) / np.sqrt(1 + np.exp(2 * u))
        eps = model(x, float(np.interp(u, log_ratio, grid))).sample
        return np.exp(u) * eps.flatten().numpy()

    span = [np.log(levels(t)[1] / levels(t)[0]) for t in (t_from, t_to)]
    y = (x / levels(t_from)[0]).flatten().numpy()
    solution = solve_ivp(derivative, span, y, "DOP853", rtol=1e-10, atol=1e-10).y[:, -1]
    expected = torch.from_numpy(solution).view(3, *SHAPE) * levels(t_to)[0]
    assert_close(model.flow(x, t_from, t_to), expected, rtol=1e-7, atol=1e-7)


def test_flow_composes_and_inverts():
    problem = gaussian()
    model, x = problem.make(), problem.sample(900)
    assert_close(model.flow(x, 900, 900), x)
    assert_close(model.flow(model.flow(x, 900, 40.5), 40.5, 900), x)
    assert_close(model.flow(model.flow(x, 900, 300), 300), model.flow(x, 900))
    each = torch.tensor([900, 300, 300, 10, 0])
    expected = torch.cat([model.flow(x[i : i + 1], 900, t) for i, t in enumerate(each)])
    assert_close(model.flow(x, 900, each), expected)


@pytest.mark.parametrize("flow_matching", [False, True])
def test_flow_carries_the_noised_distribution_to_the_data(flow_matching):
    """The flow to the clean end is affine; it takes N(αμ, α²Σ + σ²I) to N(μ, Σ)."""
    problem = gaussian()
    scheduler = FlowMatchEulerDiscreteScheduler() if flow_matching else None
    model = problem.make(scheduler=scheduler)
    t = 1000 if flow_matching else 999  # pure noise, α = 0, in the first case
    noised = problem.density(*(level.item() for level in model.noise_levels(t)))
    data = problem.density(1.0, 0.0)
    assert_close(model.flow(noised.mean.view(1, *SHAPE), t).flatten(), data.mean)
    offsets = torch.linalg.cholesky(noised.covariance_matrix).T.reshape(-1, *SHAPE)
    carried = model.flow(noised.mean.view(SHAPE) + offsets, t).flatten(1) - data.mean
    assert_close(carried.T @ carried, data.covariance_matrix)


def test_random_has_the_spectrum_it_is_asked_for():
    model = Gaussian.random(4, 3, std=0.5, decay=1.5)
    size = 48
    assert_close(model.basis.T @ model.basis, torch.eye(size, dtype=torch.float64))
    assert_close(model.covariance.trace().item(), size * 0.25)
    spectrum = torch.linalg.eigvalsh(model.covariance).flip(0)
    assert_close(spectrum[0] / spectrum[-1], torch.tensor(size**1.5, dtype=torch.float64))
    assert model.config.sample_size == 4


def test_bad_input():
    with pytest.raises(UserError, match=r"^variances=\(24,\): expected 24 numbers >= 0"):
        Gaussian(torch.zeros(SHAPE), -torch.ones(24))
    with pytest.raises(UserError, match=r"^basis=\(24, 3\): expected a 24 x 24 matrix"):
        Gaussian(torch.zeros(SHAPE), torch.ones(24), torch.ones(24, 3))
