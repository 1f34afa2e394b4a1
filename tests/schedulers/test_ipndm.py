"""iPNDM on a DDPM's schedule against its formula (its order: test_order_of_convergence.py)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from torch.testing import assert_close

from lml.schedulers import LMLDiscreteIPNDMScheduler
from lml.schedulers.ipndm import WEIGHTS, DiscreteIPNDMScheduler

KINDS = ["epsilon", "v_prediction", "sample"]


def levels(t: int) -> tuple[float, float]:
    """(alpha, sigma) of the default schedule, by numpy; those of clean images below 0."""
    square = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[t] if t >= 0 else 1.0
    return square**0.5, (1 - square) ** 0.5


def noise_of(x: torch.Tensor, t: int) -> torch.Tensor:
    """A smooth stand-in for a network: its output turns as the timestep falls."""
    return torch.tanh(x + 0.3 * torch.sin(x.flip(-1) + t / 200))


def trajectory(cls: type, kind: str = "epsilon", steps: int = 8, **options) -> torch.Tensor:
    scheduler = cls(
        beta_start=1e-4, beta_end=0.02, clip_sample=False, prediction_type=kind, **options
    )
    scheduler.set_timesteps(steps)
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    samples = [x]
    for t in scheduler.timesteps.tolist():
        alpha, sigma = levels(t)
        noise = noise_of(x, t)
        clean = (x - sigma * noise) / alpha
        v = alpha * noise - sigma * clean
        output = {"epsilon": noise, "v_prediction": v, "sample": clean}[kind]
        x = scheduler.step(output, t, x).prev_sample
        samples.append(x)
    return torch.stack(samples)


@pytest.mark.parametrize("kind", KINDS)
def test_the_formula(kind):
    """x_s = A x + B e, e by Adams-Bashforth; the network's parametrisation does not matter."""
    samples = trajectory(DiscreteIPNDMScheduler, kind)
    times = list(range(875, -1, -125))  # "leading", as DDIM's
    noises, x = [], samples[0]
    for t, result in zip(times, samples[1:], strict=True):
        noises.append(noise_of(x, t))
        order = min(len(noises), 4)
        # the weights from their definition: exact for polynomials of degree below the order
        nodes = -np.arange(order, dtype=float)
        integrals = 1 / np.arange(1, order + 1)
        weights = np.linalg.solve(np.vander(nodes, increasing=True).T, integrals)
        e = sum(w * past for w, past in zip(weights, noises[::-1], strict=False))
        (alpha, sigma), (alpha_s, sigma_s) = levels(t), levels(t - 125)
        x = alpha_s / alpha * x + (sigma_s - alpha_s / alpha * sigma) * e
        assert_close(x, result, rtol=1e-4, atol=1e-5)  # diffusers' alphas are float32


def test_weights_of_each_order_sum_to_one():
    assert [sum(w) for w in WEIGHTS] == pytest.approx([1, 1, 1, 1], rel=1e-15)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_step_is_ddims_bit_for_bit(kind):
    ours, ddim = (trajectory(cls, kind) for cls in (DiscreteIPNDMScheduler, DDIMScheduler))
    assert torch.equal(ours[1], ddim[1]) and not torch.allclose(ours[2], ddim[2])


def test_a_trajectory_forgets_the_one_before():
    scheduler = DiscreteIPNDMScheduler(clip_sample=False)
    x = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    firsts = []
    for _ in range(2):
        scheduler.set_timesteps(5)
        firsts.append(scheduler.step(noise_of(x, 800), 800, x).prev_sample)
        scheduler.step(-x, 600, x)
    assert torch.equal(*firsts)


def test_saved_and_loaded(tmp_path):
    LMLDiscreteIPNDMScheduler(rank=1, damping=3.0, clip_sample=False).save_pretrained(tmp_path)
    loaded = LMLDiscreteIPNDMScheduler.from_pretrained(tmp_path)
    assert (loaded.config.rank, loaded.config.damping) == (1, 3.0)
    plain = DiscreteIPNDMScheduler.from_pretrained(tmp_path)
    assert type(plain) is DiscreteIPNDMScheduler and plain.config.clip_sample is False


def test_the_step_before_the_timesteps_is_ddims_error():
    with pytest.raises(ValueError, match="set_timesteps"):
        DiscreteIPNDMScheduler().step(torch.zeros(1, 1, 2, 2), 0, torch.zeros(1, 1, 2, 2))
