"""The presets solver=authors_...: what the authors' scripts make, by plain diffusers."""

from __future__ import annotations

import functools
import json
from types import SimpleNamespace

import diffusers
import pytest
import torch
from hub_schedulers import HUB_SCHEDULERS
from test_configs import composed as compose
from test_method_version import network
from torch import Tensor

from lml.pipelines import loading
from lml.runs.solver import find_steps, make_scheduler

composed = functools.cache(compose)
FILES = {  # scheduler_config.json, by model
    **{name: HUB_SCHEDULERS[name] for name in ("celebahq_ldm", "sd15", "sd2_base", "sdxl")},
    "pixart": HUB_SCHEDULERS["pixart"],
    "cifar10_ddpm": {
        "_class_name": "DDPMScheduler",
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "beta_start": 0.0001,
        "clip_sample": True,
        "num_train_timesteps": 1000,
        "trained_betas": None,
        "variance_type": "fixed_large",
    },
}
# Their own copy of diffusers' class ends at the smallest noise level, and has no other option.
OWN = {"final_sigmas_type": "sigma_min"}
PLAIN = {"ddim": "DDIM", "pndm": "PNDM", "unipc": "UniPCMultistep"}
BENCHMARK = ("sd15", "sd2_base", "sdxl", "pixart")  # of their script for T2I-CompBench
CASES = [
    *[
        (m, p)
        for m in FILES
        for p in ("ddim", "pndm", "unipc", "dpm")
        if (m, p) != ("pixart", "dpm")
    ],
    *[(model, "dpmpp") for model in ("cifar10_ddpm", "celebahq_ldm")],
    *[(model, "coco_dpmpp") for model in ("sd15", "sd2_base")],
    *[(model, "compbench_dpm") for model in BENCHMARK],
]


def theirs(preset: str, own: dict):
    """As the scripts do it: `from_config`, then what they set on the scheduler or its config."""
    if preset in PLAIN:
        return getattr(diffusers, f"{PLAIN[preset]}Scheduler").from_config(own)
    ends = {} if preset == "dpmpp" else OWN
    made = diffusers.DPMSolverMultistepScheduler.from_config(own, **ends)
    kind = "dpmsolver" if preset == "dpm" else "dpmsolver++"
    # their script for T2I-CompBench takes the first object that seems to have the attribute
    on = made if preset.startswith("compbench") else made.config
    on.solver_order, on.algorithm_type = 3, kind
    return made


def ours(preset: str, model: str, own: dict, tmp_path, *more: str):
    (tmp_path / "scheduler_config.json").write_text(json.dumps(own))
    scheduler, _ = loading.read_scheduler(tmp_path, "model.path=x", {})
    of = SimpleNamespace(name=model, scheduler=scheduler, has_latents=model != "cifar10_ddpm")
    return make_scheduler(composed(f"model={model}", f"solver=authors_{preset}", *more), of)


def follow(scheduler, steps: int, dtype=torch.float32, size: int = 8) -> Tensor:
    """What `steps` steps make of fixed noise (2, 3, size, size)."""
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, size, size, generator=generator, dtype=torch.float64).to(dtype)
    x = x * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(network(scheduler.scale_model_input(x, t), t), t, x).prev_sample
    return x


def distance(a: Tensor, b: Tensor) -> float:
    """RMS of the difference over that of `b`."""
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(("model", "preset"), CASES)
def test_a_baseline_is_the_plain_scheduler_of_their_script(tmp_path, model, preset):
    own = getattr(diffusers, FILES[model]["_class_name"]).from_config(FILES[model]).config
    made = ours(preset, model, FILES[model], tmp_path)
    # The one difference: we never clip latents, which DDIM does where the file says nothing.
    if (model, preset) == ("pixart", "ddim"):
        own = {**own, "clip_sample": False}
    for steps in (5, 10, 20):
        expected = theirs(preset, own)
        assert torch.equal(follow(made, steps), follow(expected, steps)), steps
        assert torch.equal(made.timesteps, expected.timesteps)


def test_the_presets_are_not_our_solvers(tmp_path):
    """At 5 steps: UniPC of order 2 and not 3, 2M and not 3M, another end, Runge-Kutta steps."""
    for preset, other, model in [
        ("unipc", "unipc", "cifar10_ddpm"),
        ("compbench_dpm", "coco_dpmpp", "sd15"),
        ("coco_dpmpp", "dpmpp", "sd15"),
    ]:
        made = ours(preset, model, FILES[model], tmp_path)
        solver = "solver=unipc" if other == "unipc" else f"solver=authors_{other}"
        reference = ours(preset, model, FILES[model], tmp_path, solver, "lml=off")
        assert 1e-3 < distance(follow(made, 5), follow(reference, 5)) < 0.5, preset


def test_five_steps_of_pndm_are_14_evaluations_but_on_stable_diffusion(tmp_path):
    for model, nfe in (("cifar10_ddpm", 14), ("celebahq_ldm", 14), ("sd15", 6)):
        made = ours("pndm", model, FILES[model], tmp_path)
        assert find_steps(made, nfe, "authors_pndm") == 5
        made.set_timesteps(5)
        assert len(made.timesteps) == nfe


LM = [("dpm_lm", "dpm"), ("ddim_lm", "ddim"), ("coco_dpmpp_lm", "coco_dpmpp")]


@pytest.mark.parametrize(("preset", "base"), [*LM, ("compbench_dpm_lm", "compbench_dpm")])
def test_in_float64_their_correction_is_its_base_solver(tmp_path, preset, base):
    made, plain = (ours(name, "sd15", FILES["sd15"], tmp_path) for name in (preset, base))
    assert made.correction.kappa == 0 and made.correction.rank == 1
    for steps in (5, 10, 20):
        corrected, expected = (follow(s, steps, torch.float64, 32) for s in (made, plain))
        assert 0 < distance(corrected, expected) < 2.5e-7, steps


@pytest.mark.parametrize(
    ("preset", "base", "least"),  # at 5, 10 and 20 steps
    [("dpm_lm", "dpm", (0.5, 0.05, 5e-3)), ("ddim_lm", "ddim", (0.02, 0.02, 0.02))],
)
def test_in_float32_only_their_arithmetic_is_rounding_noise(tmp_path, preset, base, least):
    """The published formula, in stable arithmetic, is the base solver there, too."""
    own = FILES["cifar10_ddpm"]
    made, plain = (ours(name, "cifar10_ddpm", own, tmp_path) for name in (preset, base))
    published = ours(base, "cifar10_ddpm", own, tmp_path, "lml=published")
    for steps, far in zip((5, 10, 20), least, strict=True):
        expected = follow(plain, steps, size=32)
        assert distance(follow(published, steps, size=32), expected) < 1e-6
        assert distance(follow(made, steps, size=32), expected) > far, steps
