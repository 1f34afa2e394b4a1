"""What a solver takes from a model's own scheduler: its schedule, its options, and its grid."""

from __future__ import annotations

import functools
import inspect
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from hub_schedulers import HUB_SCHEDULERS
from hydra.utils import get_class
from PIL import Image
from test_configs import composed as compose
from test_configs import names

from lml.errors import UserError
from lml.pipelines import loading
from lml.pipelines import tiny as tiny_pipelines
from lml.pipelines.tiny import FLOW
from lml.runs.solver import NOISE_SCHEDULE, make_scheduler

composed = functools.cache(compose)  # the same few configs, hundreds of times

# Those that share a noise schedule, beside flow matching's.
SOLVERS = [
    name
    for name in names("solver")
    if not name.startswith(("authors_", "flow_euler")) and not name.endswith("_calibrated")
]
SOLVERS.remove("ipndm_diffusers")
CLASSES = [
    "DDIMScheduler",
    "DDPMScheduler",
    "PNDMScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
]


def model(folder: Path, stored: dict, has_latents: bool = True) -> SimpleNamespace:
    """As much of a model as a scheduler is made from, with `stored` in its folder."""
    (folder / "scheduler_config.json").write_text(json.dumps(stored))
    scheduler, _ = loading.read_scheduler(folder, "model.path=x", {})
    return SimpleNamespace(name="x", scheduler=scheduler, has_latents=has_latents)


def made(solver: str, of: SimpleNamespace, *more: str, grid: str = "model"):
    return make_scheduler(composed(f"solver={solver}", "lml=off", f"grid={grid}", *more), of)


def parent(solver: str) -> type:
    """The class without LML."""
    return get_class(composed(f"solver={solver}")["solver"]["scheduler"]["_target_"]).__bases__[-1]


def own_options(solver: str) -> dict:
    """What the solver's config sets."""
    options = composed(f"solver={solver}")["solver"]["scheduler"]
    return {key: value for key, value in options.items() if key != "_target_"}


@pytest.mark.parametrize("name", sorted(HUB_SCHEDULERS))
def test_with_grid_model_a_solver_is_what_diffusers_makes_of_the_models_own(tmp_path, name):
    """But that latents are not clipped where the file says nothing."""
    of = model(tmp_path, stored := HUB_SCHEDULERS[name])
    own = getattr(diffusers, stored["_class_name"]).from_config(stored).config
    for solver in ["flow_euler"] if name in FLOW else SOLVERS:
        cls = parent(solver)
        known = inspect.signature(cls.__init__).parameters
        unclipped = {"clip_sample": False} if "clip_sample" in known else {}
        theirs = cls.from_config(own, **{**unclipped, **own_options(solver)})
        ours = made(solver, of)
        assert {k: ours.config.get(k) for k in known} == {k: theirs.config.get(k) for k in known}
        mu = {"mu": 1.0} if own.get("use_dynamic_shifting") else {}
        ours.set_timesteps(7, **mu)
        theirs.set_timesteps(7, **mu)
        assert torch.equal(ours.timesteps, theirs.timesteps), solver
        for levels in {"sigmas", "alphas_cumprod"} & set(vars(theirs)):
            assert torch.equal(getattr(ours, levels), getattr(theirs, levels)), solver


@pytest.mark.parametrize("solver", ["euler", "dpmsolverpp", "unipc", "heun", "flow_euler"])
@pytest.mark.parametrize("flag", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"])
def test_grid_model_has_the_sigmas_of_the_models_own(tmp_path, solver, flag):
    stored = HUB_SCHEDULERS["sd3" if solver == "flow_euler" else "sdxl"]
    of = model(tmp_path, {**stored, "use_karras_sigmas": False, flag: True})
    assert made(solver, of).config[flag]
    assert not made(solver, of, grid="default").config[flag]
    if solver == "flow_euler":
        return
    trailing = made(solver, of, grid="trailing").config
    assert (trailing.timestep_spacing, trailing[flag]) == ("trailing", False)
    assert made("ddim", of).config.timestep_spacing == "leading"  # which has no such flag
    default = made(solver, of, grid="default").config.timestep_spacing
    assert default == inspect.signature(parent(solver)).parameters["timestep_spacing"].default


@pytest.mark.parametrize("name", names("model"))
def test_each_models_grid_unless_another_is_asked_for(name):
    kind = composed(f"model={name}")["model"].get("kind")
    grid = "default" if kind is None else "model"
    assert composed(f"model={name}")["grid"]["name"] == grid
    for asked in ("default", "trailing", "karras", "model"):
        assert composed(f"model={name}", f"grid={asked}")["grid"]["name"] == asked
    # an experiment's goes before the model's
    assert composed("experiment=theory", f"model={name}")["grid"]["name"] == "trailing"


def test_the_models_grid_is_another_run(tmp_path):
    """Though a file without a spacing makes the same one of it."""
    grids = [composed(f"grid={grid}")["grid"] for grid in names("grid")]
    without_names = [{k: v for k, v in grid.items() if k != "name"} for grid in grids]
    assert len({json.dumps(grid) for grid in without_names}) == len(grids)
    of = model(tmp_path, HUB_SCHEDULERS["sd15"])
    with pytest.raises(UserError, match=r"^grid\.of_model=yes: expected true or false$"):
        made("ddim", of, "grid.of_model='yes'")
    with pytest.raises(UserError, match=r"^grid=karras: ddim.*grids for it: .*model"):
        made("ddim", of, grid="karras")


# --- options that a file does not name ---------------------------------------------------------


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("grid", ["default", "model"])
def test_a_class_adds_nothing_to_a_model_but_its_noise_schedule(tmp_path, name, grid):
    """Of what a file leaves out, the schedule is its class's, and all else the solver's own."""
    of = model(tmp_path, {"_class_name": name}, has_latents=False)
    own = inspect.signature(getattr(diffusers, name)).parameters
    for solver in SOLVERS:
        config = made(solver, of, grid=grid).config
        for option, parameter in inspect.signature(parent(solver)).parameters.items():
            schedule = option in NOISE_SCHEDULE and option in own
            expected = own[option].default if schedule else parameter.default
            expected = own_options(solver).get(option, expected)
            assert config[option] == expected, (solver, option)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("clip", [None, False, True])
def test_latents_are_clipped_only_where_the_models_own_file_says_so(tmp_path, name, clip):
    stored = {"_class_name": name, **({} if clip is None else {"clip_sample": clip})}
    latent, pixel = (model(tmp_path, stored, has_latents=kind) for kind in (True, False))
    having = [s for s in SOLVERS if "clip_sample" in inspect.signature(parent(s)).parameters]
    assert {"ddim", "ipndm", "heun"} <= set(having)
    for solver in having:
        default = inspect.signature(parent(solver)).parameters["clip_sample"].default
        assert made(solver, latent).config.clip_sample is bool(clip)
        assert made(solver, pixel).config.clip_sample is (default if clip is None else clip)
    asked = "+solver.scheduler.clip_sample=true"
    assert made("ddim", latent, asked).config.clip_sample is True


@pytest.mark.parametrize("option", ["rescale_betas_zero_snr", "use_flow_sigmas"])
def test_a_noise_schedule_that_a_solver_does_not_have(tmp_path, option):
    """It is refused: left out, the images would be those of another schedule."""
    stored = {"_class_name": "DPMSolverMultistepScheduler", option: True}
    of = model(tmp_path, stored)
    for solver in SOLVERS:
        if option in inspect.signature(parent(solver)).parameters:
            assert made(solver, of).config[option] is True
            continue
        message = f"^solver={solver}: not for x, whose noise schedule has {option}$"
        with pytest.raises(UserError, match=message):
            made(solver, of)


# --- images ------------------------------------------------------------------------------------

TOY = ["num_images=2", "batch_size=2", "nfe=5", "metrics=none", "threads=1", "lml=off"]


@pytest.mark.parametrize(
    ("name", "solver"),
    [
        ("sdxl", "euler"),
        ("sdxl", "dpmsolverpp"),
        ("sdxl", "unipc"),
        ("sdxl", "pndm"),
        ("pixart", "ddim"),
        ("pixart", "ipndm"),
        ("sd15", "heun"),
    ],
)
def test_images_are_those_of_the_pipeline_with_the_models_own_config(
    script, pipelines, prompts, tmp_path, name, solver
):
    """With scheduler_config.json as it is on the hub, and grid=model as it is unless asked."""
    folder = Path(shutil.copytree(pipelines / name, tmp_path / name))
    stored = HUB_SCHEDULERS[name]
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(stored))
    arguments = [f"model={name}", f"model.path={folder}", f"solver={solver}", *TOY, *prompts]
    outcome = script("sample", *arguments, "run_dir=run")
    assert (outcome.code, outcome.err) == (0, "")
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    cls = parent(solver)
    clip = "clip_sample" in inspect.signature(cls).parameters
    options = {**own_options(solver), **({"clip_sample": False} if clip else {})}
    pipe.scheduler = cls.from_config(pipe.scheduler.config, **options)
    steps = 5
    while pipe.scheduler.set_timesteps(steps) or len(pipe.scheduler.timesteps) > 5:
        steps -= 1
    call = composed(f"model={name}")["model"]
    expected = pipe(
        ["a cat", "a dog"],
        num_inference_steps=steps,
        guidance_scale=call["guidance_scale"],
        generator=[torch.Generator().manual_seed(seed) for seed in (0, 1)],
        **call["call"],
    ).images
    ours = np.stack([np.asarray(Image.open(f)) for f in sorted(tmp_path.glob("run/images/*"))])
    theirs = np.stack([np.asarray(image) for image in expected])
    assert abs(ours.astype(int) - theirs).max() <= 1


@pytest.mark.parametrize("name", sorted(set(tiny_pipelines.PIPELINES) - set(FLOW)))
def test_no_latents_are_clipped(pipelines, tmp_path, name):
    """Of images without a prompt's help: their numbers go beyond 1 with every solver."""
    from lml.pipelines import find_model

    folder = Path(shutil.copytree(pipelines / name, tmp_path / name))
    stored = {k: v for k, v in HUB_SCHEDULERS[name].items() if k != "clip_sample"}
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(stored))
    config = composed(f"model={name}", f"model.path={folder}", "prompts=none")
    found = find_model(config["model"])
    sampler = found.sampler(torch.device("cpu"), torch.float32, False, False)
    for solver in ("ddim", "ipndm", "heun"):
        cfg = composed(f"model={name}", f"solver={solver}", "lml=off")
        sampler(make_scheduler(cfg, found), 4, [0], ["a cat"])
        assert sampler.latents.abs().max() > 1.5, solver
