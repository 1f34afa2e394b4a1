"""The released arithmetic: what it computes, and what float32 makes of it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from along import along
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch.nn.functional import cosine_similarity

from lml.correction import LMLCorrection
from lml.schedulers import LMLFlowMatchEulerDiscreteScheduler
from lml.schedulers.released import (
    ReleasedCorrection,
    ReleasedDDIMScheduler,
    ReleasedFlowMatchEulerDiscreteScheduler,
)

OPTIONS = {"rank": 1, "damping_scale": "absolute", "anchor": "ema"}


def directions(count: int = 4, dtype=torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(5, 3, 8, 8, generator=generator).to(dtype) for _ in range(count)]


def test_the_formula():
    """By numpy, sample by sample."""
    correct, previous = along(ReleasedCorrection(**OPTIONS, damping=2.0, kappa=0.3)), None
    for g in directions():
        corrected = correct(g)
        for i, row in enumerate(g.flatten(1).numpy()):
            u = row if previous is None else 0.3 * previous[i] + 0.7 * row
            d = row - u * np.dot(u, row) / (2.0 + np.dot(u, u))
            expected = d * np.linalg.norm(row) / np.linalg.norm(d)
            np.testing.assert_allclose(corrected[i].flatten(), expected, rtol=1e-9, atol=1e-12)
        previous = g.flatten(1).numpy()


@pytest.mark.parametrize("kappa", [0.0, 0.5])
def test_in_float64_with_a_moderate_damping_it_is_ours(kappa):
    released, ours = (along(c(**OPTIONS, damping=1.0, kappa=kappa)) for c in CORRECTIONS)
    for g in directions():
        torch.testing.assert_close(released(g), ours(g), rtol=1e-9, atol=1e-9)


CORRECTIONS = (ReleasedCorrection, LMLCorrection)


def test_in_float32_at_the_published_damping_it_is_rounding():
    """In exact arithmetic kappa = 0 gives g back."""
    released, double, ours = (
        along(c(**OPTIONS, damping=1e-3, kappa=0.0))
        for c in (ReleasedCorrection, ReleasedCorrection, LMLCorrection)
    )
    for g in directions(dtype=torch.float32):
        g = 16 * g  # as long as the noise of a 3x128x128 image
        assert torch.equal(ours(g), g)
        assert (cosine_similarity(released(g).flatten(1), g.flatten(1)) < 0.5).all()
        g = g.double()
        assert (cosine_similarity(double(g).flatten(1), g.flatten(1)) > 1 - 1e-9).all()


def test_a_zero_direction_is_nan_in_its_own_sample_alone():
    g = directions(1)[0].index_fill(0, torch.tensor(2), 0.0)
    corrected = along(ReleasedCorrection(**OPTIONS, damping=1.0))(g)
    assert corrected.flatten(1).isnan().any(1).tolist() == [False, False, True, False, False]


@pytest.mark.parametrize(
    ("name", "value"),
    [("anchor", "history"), ("damping_scale", "relative"), ("norm_preserving", False)],
)
def test_options_that_the_released_code_has_not(name, value):
    with pytest.raises(ValueError, match=f"^{name}={value}: the released code has"):
        ReleasedCorrection(**OPTIONS | {name: value})
    assert ReleasedCorrection(rank=0).rank == 0


def test_saved_and_loaded(tmp_path):
    ReleasedDDIMScheduler(**OPTIONS, target="direction", damping=5e-3).save_pretrained(tmp_path)
    loaded = ReleasedDDIMScheduler.from_pretrained(tmp_path)
    assert isinstance(loaded.correction, ReleasedCorrection)
    assert (loaded.config.damping, loaded.config.target) == (5e-3, "direction")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kappa", [0.0, 0.5])
def test_flow_matching_corrects_the_velocity_in_float32(dtype, kappa):
    """As in their FLUX, on packed latents (B, tokens, channels), whatever the type of the rest."""
    made = ReleasedFlowMatchEulerDiscreteScheduler(**OPTIONS, damping=1e-2, kappa=kappa, shift=3.0)
    made.set_timesteps(4)
    generator = torch.Generator().manual_seed(0)
    x, previous = torch.randn(2, 64, 16, generator=generator).to(dtype), None
    for k, t in enumerate(made.timesteps):
        velocity = torch.randn(2, 64, 16, generator=generator).to(dtype)
        g = velocity.float()
        u = g if previous is None else kappa * previous + (1 - kappa) * g
        inner, square = ((a * b).sum((1, 2), keepdim=True) for a, b in ((g, u), (u, u)))
        d = g - u * inner / (1e-2 + square)
        d = d * (g * g).sum((1, 2), keepdim=True).sqrt() / (d * d).sum((1, 2), keepdim=True).sqrt()
        step = made.sigmas[k + 1] - made.sigmas[k]
        expected = (x.float() + step * d).to(dtype)
        x = made.step(velocity, t, x, return_dict=k % 2 == 0)[0]
        assert x.dtype == dtype and torch.equal(x, expected)
        previous = g


def test_flow_matching_without_a_correction_is_the_base_solver():
    made, plain = ReleasedFlowMatchEulerDiscreteScheduler(rank=0), FlowMatchEulerDiscreteScheduler()
    x = v = directions(1)[0].bfloat16()
    for scheduler in (made, plain):
        scheduler.set_timesteps(4)
    ours, theirs = (s.step(v, s.timesteps[0], x).prev_sample for s in (made, plain))
    assert torch.equal(ours, theirs)


def test_flow_matching_in_float32_is_rounding_and_in_ours_the_base_solver():
    options = {**OPTIONS, "damping": 1e-2, "kappa": 0.0}
    x, v = 16 * directions(2)[0].float(), 16 * directions(2)[1].float()
    ends = {}
    for cls in (
        FlowMatchEulerDiscreteScheduler,
        LMLFlowMatchEulerDiscreteScheduler,
        ReleasedFlowMatchEulerDiscreteScheduler,
    ):
        made = cls(**({} if cls is FlowMatchEulerDiscreteScheduler else options))
        made.set_timesteps(4)
        ends[cls] = made.step(v, made.timesteps[0], x).prev_sample
    base, ours, released = ends.values()
    assert torch.equal(ours, base)
    assert (released - base).norm() > 0.1 * (base - x).norm()


def test_a_run_counts_images_that_are_not_finite(script, tmp_path):
    """In three dimensions g - g |g|^2 / (0 + |g|^2) is often 0 to the last bit, and g' 0 / 0."""
    model = ["model=gaussian", "model.network.sample_size=1", "lml=published", "lml.damping=1e-30"]
    arguments = [*model, "num_images=20", "batch_size=8", "nfe=4", "threads=1"]
    arguments += ["metrics=correction_cosine"]
    values = {}
    for solver in ("dpmsolver", "authors_dpm_lm"):
        outcome = script("sample", *arguments, f"solver={solver}", f"run_dir={solver}")
        assert (outcome.code, outcome.err) == (0, "")
        result = json.loads((tmp_path / solver / "metrics.json").read_text())["correction_cosine"]
        values[solver] = result["value"]
    assert values["dpmsolver"] == pytest.approx({"cosine": 1, "min": 1, "non_finite": 0})
    assert values["authors_dpm_lm"]["cosine"] < 0.9
    images = (tmp_path / "authors_dpm_lm/images").iterdir()
    black = sum(not np.asarray(Image.open(file)).any() for file in images)
    assert values["authors_dpm_lm"]["non_finite"] == black > 0
