"""aligned_timesteps and grid=ays: Align Your Steps, at its own number of steps and at any other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.schedulers import AysSchedules
from PIL import Image
from test_configs import composed

from lml import schedulers
from lml.calibration.search import Choice
from lml.pipelines.tiny import SCHEDULE

from .test_authors import follow

AYS = {"sd15": "StableDiffusion", "sdxl": "StableDiffusionXL"}
TIMESTEPS = AysSchedules["StableDiffusionTimesteps"]
TAKES = ["DPMSolverMultistep", "DPMSolverSinglestep", "EulerDiscrete", "HeunDiscrete"]


def made(name: str, timesteps=TIMESTEPS, **options):
    cls = getattr(schedulers, f"LML{name}Scheduler")
    return cls(**SCHEDULE, aligned_timesteps=timesteps, **{"rank": 0, **options})


def levels(scheduler) -> np.ndarray:
    """sqrt((1 - a) / a) of each timestep of the noise schedule."""
    return (1 / scheduler.alphas_cumprod - 1).sqrt().numpy()


@pytest.mark.parametrize("model", AYS)
def test_the_models_have_those_of_diffusers(model):
    timesteps = composed(f"model={model}", "grid=ays")["grid"]["aligned_timesteps"]
    assert timesteps == AysSchedules[f"{AYS[model]}Timesteps"]
    scheduler = made("EulerDiscrete", timesteps)
    scheduler.set_timesteps(10)
    sigmas = AysSchedules[f"{AYS[model]}Sigmas"]  # rounded, and some of them not well
    np.testing.assert_allclose(scheduler.sigmas, sigmas, atol=0.004)


@pytest.mark.parametrize("name", TAKES)
def test_at_its_own_number_of_steps_it_is_diffusers_with_these_timesteps(name):
    scheduler = made(name)
    parent = type(scheduler).__bases__[-1](**SCHEDULE)

    class Given:
        """`parent`, as `follow` asks it for ten steps."""

        def __getattr__(self, key):
            return getattr(parent, key)

        def set_timesteps(self, steps):
            parent.set_timesteps(timesteps=TIMESTEPS)

    assert torch.equal(follow(scheduler, 10), follow(Given(), 10))
    assert torch.equal(scheduler.timesteps, parent.timesteps)
    assert torch.equal(scheduler.sigmas, parent.sigmas)
    scheduler.set_timesteps(timesteps=[900, 500, 100])
    assert scheduler.timesteps.unique().tolist() == [100, 500, 900]


@pytest.mark.parametrize("name", ["UniPCMultistep", "DEISMultistep"])
@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_where_diffusers_takes_no_timesteps_they_replace_its_own(name, spacing):
    """Its own timesteps, given as a list, give its own trajectory."""
    parent = getattr(schedulers, f"LML{name}Scheduler").__bases__[-1]
    parent = parent(**SCHEDULE, timestep_spacing=spacing)
    own = follow(parent, 7)
    scheduler = made(name, parent.timesteps.tolist())
    given = follow(scheduler, 7)
    assert torch.equal(scheduler.timesteps, parent.timesteps)
    torch.testing.assert_close(scheduler.sigmas, parent.sigmas, rtol=1e-6, atol=0)
    torch.testing.assert_close(given, own, rtol=1e-5, atol=1e-5)
    scheduler = made(name, use_karras_sigmas=True)
    with pytest.raises(ValueError, match=r"^aligned_timesteps: not with use_karras_sigmas=True"):
        scheduler.set_timesteps(10)


@pytest.mark.parametrize("steps", [1, 4, 7, 12, 20, 50])
def test_another_number_of_steps_interpolates_the_logarithms_of_the_noise_levels(steps):
    scheduler = made("DPMSolverMultistep")
    scheduler.set_timesteps(steps)
    grid, of = scheduler.timesteps.tolist(), levels(scheduler)
    assert len(grid) == steps and grid[0] == 999 and grid[-1] > 0
    known = np.log(of[[*TIMESTEPS, 0]])
    for k, timestep in enumerate(grid):
        position = k * (len(known) - 1) / steps
        i = int(position)
        wanted = known[i] + (position - i) * (known[i + 1] - known[i])
        near = np.abs(np.log(of) - wanted).min()
        assert abs(np.log(of[timestep]) - wanted) <= near + 2e-3
    if steps == 20:
        assert grid[::2] == TIMESTEPS


def test_it_is_kept_by_all_that_copies_a_scheduler(tmp_path):
    scheduler = made("DPMSolverMultistep", rank=2)
    scheduler.save_pretrained(tmp_path)
    copies = [
        type(scheduler).from_pretrained(tmp_path),
        Choice(1, (None, 2.0, 2.0, 2.0)).apply(scheduler),
        schedulers.LMLEulerDiscreteScheduler.from_config(scheduler.config),
    ]
    for copy in copies:
        copy.set_timesteps(4)
        assert copy.timesteps.tolist() == [999, 692, 455, 173]
    plain = made("DPMSolverMultistep", None, rank=2)
    plain.set_timesteps(4)
    scheduler.set_timesteps(4)
    assert scheduler.default_damping == 16 * plain.default_damping
    for cls in (schedulers.LMLDDIMScheduler, DDIMScheduler):  # which have no such option
        other = cls.from_config(scheduler.config)
        other.set_timesteps(4)
        assert other.timesteps.tolist() == [750, 500, 250, 0]
    with pytest.raises(TypeError, match="aligned_timesteps"):
        schedulers.LMLDDIMScheduler(aligned_timesteps=TIMESTEPS)


@pytest.mark.parametrize(
    "timesteps", [[], [10, 20], [1000, 5], [20, 20], [20, 0], [20.5, 10], "ays", 10, [True]]
)
def test_what_is_no_grid(timesteps):
    with pytest.raises(ValueError, match=r"^aligned_timesteps="):
        made("DPMSolverMultistep", timesteps)


def test_too_many_steps():
    with pytest.raises(ValueError, match=r"^aligned_timesteps: there are no timesteps for so many"):
        made("EulerDiscrete").set_timesteps(150)


ARGUMENTS = ["grid=ays", "model=sd15", "num_images=3", "batch_size=2", "metrics=none", "threads=1"]


def test_a_run_has_the_images_of_diffusers(script, pipelines, prompts, tmp_path):
    more = [*prompts, f"model.path={pipelines / 'sd15'}", "lml=off", "nfe=10", "run_dir=run"]
    outcome = script("sample", *ARGUMENTS, *more, "solver.scheduler.solver_order=2")
    assert (outcome.code, outcome.err) == (0, "")
    pipe = StableDiffusionPipeline.from_pretrained(pipelines / "sd15")
    pipe.set_progress_bar_config(disable=True)
    parent = schedulers.LMLDPMSolverMultistepScheduler.__bases__[-1]
    pipe.scheduler = parent.from_config(pipe.scheduler.config)
    texts = (tmp_path / "prompts.txt").read_text().split("\n")[:2]
    images = pipe(
        texts,
        timesteps=TIMESTEPS,
        generator=[torch.Generator().manual_seed(seed) for seed in (0, 1)],
        output_type="np",
    ).images
    for index, image in enumerate(images):
        stored = np.asarray(Image.open(tmp_path / f"run/images/{index:06d}.png")).astype(int)
        assert np.abs(stored - 255 * image).max() <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["solver=ddim"],
            "grid=ays: ddim has no aligned_timesteps; grids for it: default, leading",
        ),
        (["solver=authors_pndm"], "grid=ays: authors_pndm has no aligned_timesteps; grids for"),
        (["nfe=200"], "nfe=200: not for dpmsolverpp (aligned_timesteps: there are no timesteps"),
        (["grid.aligned_timesteps=[5,9]"], "grid.aligned_timesteps=[5, 9]: must be whole numbers"),
        (["grid.aligned_timesteps=yes"], "grid.aligned_timesteps="),
    ],
)
def test_bad_input_is_one_line(script, pipelines, prompts, tmp_path, arguments, message):
    path = f"model.path={pipelines / 'sd15'}"
    outcome = script("sample", *ARGUMENTS, *prompts, path, "run_dir=run", *arguments)
    assert outcome.code == 2 and outcome.err.count("\n") == 1
    assert message in outcome.err
    assert not (tmp_path / "run").exists()
