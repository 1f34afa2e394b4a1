"""Calibration: it finds what there is to find, on samples that it did not see, and no more."""

from __future__ import annotations

import inspect
import json
import math
import re
import shlex
import shutil

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    StableDiffusionImg2ImgPipeline,
    TextToVideoSDPipeline,
    UNet3DConditionModel,
)
from PIL import Image

from lml import calibration, configs, schedulers
from lml.calibration import Choice, Objective, Problem, calibrate, calibrate_pipeline
from lml.calibration.search import Memo, Progress, _step, memoised, most_evaluations
from lml.data.assets import ROOT
from lml.exact import Gaussian
from lml.pipelines import pixel

SCHEDULE = DDPMScheduler(prediction_type="v_prediction", clip_sample=False)


def flat(samples: torch.Tensor) -> torch.Tensor:
    return samples.flatten(1).double()


def problem(model, solver, steps=5, fine=200, grid="trailing", **options) -> Problem:
    """Sampling of an exact model: the fine solution is DPM-Solver++(3M)'s."""
    scheduler = solver.from_config({**SCHEDULE.config, "timestep_spacing": grid, **options}, rank=1)
    parent = schedulers.LMLDPMSolverMultistepScheduler
    fine_scheduler = parent.from_config(SCHEDULE.config, solver_order=3, rank=0)
    shape = (model.config.in_channels, *pixel.size(model))

    def sample(solver, steps, indices):
        noise, _ = pixel.draw_noise(list(indices), shape)
        return pixel.sample(model, solver, steps, noise)

    return Problem(
        sample, model, scheduler, steps, fine_scheduler, fine, Objective("rmse", flat, flat), 16
    )


@pytest.fixture(scope="module")
def gaussian():
    return Gaussian.random(sample_size=8, scheduler=SCHEDULE)


@pytest.mark.parametrize("grid", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("steps", [5, 8])
def test_a_gaussian_is_solved_with_a_third_less_error(gaussian, grid, steps):
    """DDIM, on seeds that the search did not see."""
    p = problem(gaussian, schedulers.LMLDDIMScheduler, steps, grid=grid)
    found = calibrate(p, range(32), range(100, 132))
    assert found.chosen == "calibrated"
    assert found.errors["calibrated"]["unseen"] < found.errors["off"]["unseen"] * 2 / 3


OTHERS = (schedulers.LMLFlowMatchEulerDiscreteScheduler, schedulers.LMLIPNDMScheduler)


@pytest.mark.parametrize(
    "solver",  # all on a DDPM's noise schedule
    [
        cls
        for cls in schedulers.LMLSchedulerMixin.__subclasses__()
        if cls not in OTHERS and not cls.adds_noise  # else the errors are random
    ],
)
def test_no_solver_gets_worse(gaussian, solver):
    found = calibrate(problem(gaussian, solver, 6, 60), range(16), range(100, 116), rounds=1)
    errors = found.errors
    best = min(errors.values(), key=lambda error: error["unseen"])
    assert errors[found.chosen] == best
    assert errors["calibrated"]["searched"] <= errors["off"]["searched"]


def test_what_the_solver_solves_is_left_to_it():
    """A point mass: every step of DDIM is exact."""
    point = Gaussian(torch.zeros(3, 4, 4), torch.zeros(48), scheduler=SCHEDULE)
    found = calibrate(problem(point, schedulers.LMLDDIMScheduler), range(4), range(10, 14))
    assert found.chosen == "off" and found.choice == Choice(0)
    assert found.errors["off"]["unseen"] < 1e-4


def test_more_rounds_find_more(gaussian):
    errors = []
    for rounds in (1, 4):
        p = problem(gaussian, schedulers.LMLDDIMScheduler)
        found = calibrate(p, range(16), range(100, 116), rounds=rounds)
        errors.append(found.errors["calibrated"]["searched"])
    assert errors[1] < errors[0]


def test_networks_are_not_evaluated_where_nothing_changed(gaussian):
    """And what they answer is the same to the last bit."""
    p = problem(gaussian, schedulers.LMLDDIMScheduler)
    first = Choice(1, (None, 2.0, 2.0, 2.0, 2.0))
    third = Choice(1, (None, 2.0, 2.0, 4.0, 2.0))
    memo = Memo()
    for choice, evaluations in [(first, 5), (first, 5), (third, 6), (Choice(0), 9)]:
        memo.begin()
        with memoised(gaussian, memo):
            known = p.sample(choice.apply(p.scheduler), 5, range(4))
        assert torch.equal(known, p.sample(choice.apply(p.scheduler), 5, range(4)))
        assert memo.evaluations == evaluations  # the first step has no anchor
    assert "forward" not in vars(gaussian)


@pytest.mark.parametrize("guided", [False, True])
def test_a_prompts_embeddings_are_kept_once(guided):
    """Although the steps have them in tensors of their own, and guidance has two."""
    memo, embeddings = Memo(), torch.randn(1 + guided, 3, 8).unbind()
    for x in torch.randn(5, 3, 4):
        for prompt in embeddings:
            memo.answer(lambda x, prompt: x.add_(1), (x,), {"prompt": prompt.clone()})
    kept = [known for known, _ in memo.calls]
    assert len({prompt.data_ptr() for _, prompt in kept}) == len(embeddings)
    assert len({x.data_ptr() for x, _ in kept}) == len(kept) == memo.evaluations


@pytest.mark.parametrize("in_place", [True, False])
def test_a_compiled_network_stays_compiled(in_place):
    """And each graph is compiled once."""
    graphs = []
    backend = lambda graph, _: graphs.append(graph) or graph.forward  # noqa: E731
    network = torch.nn.Linear(3, 3)
    if in_place:
        network.compile(backend=backend)
    else:
        network = torch.compile(network, backend=backend)
    x = torch.randn(2, 3)
    expected = network(x)
    for _ in range(12):  # more than dynamo recompiles
        memo = Memo()
        for _ in range(2):
            memo.begin()
            with memoised(network, memo):
                assert torch.equal(network(x), expected)
        assert memo.evaluations == 1
    assert torch.equal(network(x), expected) and len(graphs) == 1


@pytest.mark.parametrize("seed", range(8))
def test_a_step_within_bounds_is_the_least_squares_solution(seed):
    """Without damping; projected coordinate descent in float64 is the second implementation."""
    generator = torch.Generator().manual_seed(seed)
    J = torch.randn(40, 5, generator=generator, dtype=torch.float64)
    r = torch.randn(40, generator=generator, dtype=torch.float64)
    low, high = torch.full((5,), -0.05).double(), torch.full((5,), 0.1).double()
    step = _step(J.T @ J, J.T @ r, 0.0, low, high)
    assert ((step >= low) & (step <= high)).all()
    best = torch.zeros(5, dtype=torch.float64)
    for _ in range(500):
        for k in range(5):
            rest = r + J @ best - J[:, k] * best[k]
            best[k] = (-(J[:, k] @ rest) / (J[:, k] @ J[:, k])).clamp(low[k], high[k])
    torch.testing.assert_close(step, best, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 1}, "single step"),
        ({"searched": range(0)}, "at least one sample"),
        ({"unseen": range(3, 5)}, "unseen"),
    ],
)
def test_what_can_not_be_measured_is_refused(gaussian, change, message):
    p = problem(gaussian, schedulers.LMLDDIMScheduler, change.get("steps", 4), fine=8)
    with pytest.raises(calibration.CalibrationError, match=message):
        calibrate(p, change.get("searched", range(4)), change.get("unseen", range(10, 14)))


def test_a_fine_solution_with_nan_is_refused(gaussian):
    p = problem(gaussian, schedulers.LMLDDIMScheduler, 4, fine=8)
    sample = p.sample
    p.sample = lambda solver, steps, indices: (
        sample(solver, steps, indices) * (math.nan if steps == 8 else 1)
    )
    with pytest.raises(calibration.CalibrationError, match="not finite"):
        calibrate(p, range(4), range(10, 14))


# --- timesteps -----------------------------------------------------------------------------------

MOVABLE = [
    ("DPMSolverMultistep", {}),
    ("DPMSolverMultistep", {"use_karras_sigmas": True}),
    ("DPMSolverSinglestep", {}),
    ("EulerDiscrete", {}),
    ("HeunDiscrete", {"use_karras_sigmas": True}),
    ("UniPCMultistep", {"solver_order": 3}),
    ("DEISMultistep", {"use_karras_sigmas": True}),
]


@pytest.mark.parametrize(("name", "options"), MOVABLE)
def test_timesteps_that_are_searched_too_halve_the_error_again(gaussian, name, options):
    """On seeds that the search did not see, compared with a search on the solver's grid."""
    solver = getattr(schedulers, f"LML{name}Scheduler")
    p = problem(gaussian, solver, **options)
    told = []
    fixed = calibrate(p, range(16), range(100, 116))
    found = calibrate(p, range(16), range(100, 116), timesteps=True, tell=told.append)
    error = {name: error["unseen"] for name, error in found.errors.items()}
    assert found.chosen == "calibrated" and error["off"] == fixed.errors["off"]["unseen"]
    assert error["calibrated"] < fixed.errors["calibrated"]["unseen"] / 2
    assert error["calibrated"] < error["timesteps"] < error["off"]
    timesteps = found.choice.timesteps
    assert len(timesteps) == 5 and list(timesteps) == sorted(set(timesteps), reverse=True)
    scheduler = found.choice.apply(p.scheduler)
    scheduler.set_timesteps(5)
    assert scheduler.timesteps.unique_consecutive().tolist() == list(timesteps)
    assert sum(told) == found.evaluations <= most_evaluations(p, 16, 16, (1,), 2, True)


@pytest.mark.parametrize("timesteps", [False, True])
@pytest.mark.parametrize("numbers", [["damping"], ["length"]])
def test_one_number_of_a_step_may_be_searched_alone(gaussian, numbers, timesteps):
    """The other is as without LML."""
    p, told = problem(gaussian, schedulers.LMLDEISMultistepScheduler), []
    how = {"timesteps": timesteps, "numbers": numbers}
    found = calibrate(p, range(16), range(100, 116), tell=told.append, **how)
    dampings, lengths = found.calibrated.damping, found.calibrated.length
    assert (set(dampings) == {None}) == (numbers == ["length"])
    assert (lengths is None) == (numbers == ["damping"])
    assert sum(told) == found.evaluations
    assert found.evaluations <= most_evaluations(p, 16, 16, (1,), 2, **how)
    errors = {name: error["searched"] for name, error in found.errors.items()}
    assert errors["calibrated"] < errors["off"]


@pytest.mark.parametrize(
    ("values", "timesteps"),
    [
        ([900.4, 500.6, 1.2], (900, 501, 1)),
        ([900.0, 899.9, 899.8], (900, 899, 898)),
        ([2.0, 1.0, 0.0], (3, 2, 1)),
        ([], ()),
    ],
)
def test_timesteps_are_whole_and_fall(values, timesteps):
    assert Progress(0, {"timesteps": values}, ["timesteps"]).choice().timesteps == (
        timesteps or None
    )


def test_a_grid_that_is_fixed_is_refused(gaussian):
    p = problem(gaussian, schedulers.LMLDDIMScheduler)
    with pytest.raises(calibration.CalibrationError, match="timesteps of LMLDDIMScheduler are fix"):
        calibrate(p, range(4), range(10, 14), timesteps=True)


# --- lengths -------------------------------------------------------------------------------------


def test_a_length_multiplies_the_corrected_direction(gaussian):
    p = problem(gaussian, schedulers.LMLDDIMScheduler, 3)
    g = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for lengths in ([1.0, 1.0, 1.0], [0.5, 2.0, 1.25]):
        scheduler = Choice(1, (None, 2.0, None), tuple(lengths)).apply(p.scheduler)
        scheduler.set_timesteps(3)
        anchors, plain = (), ()
        for damping, length in zip(scheduler.dampings, scheduler.lengths, strict=True):
            corrected, anchors = scheduler.correction(g, anchors, damping, length)
            without, plain = scheduler.correction(g, plain, damping)
            torch.testing.assert_close(corrected, without * length)
            torch.testing.assert_close(anchors, plain)  # they stay uncorrected
            g = g.roll(1, -1) + 0.5 * g


@pytest.mark.parametrize("length", [0, -1.0, True, "1", [], [1.0, None], [1.0, 0.0], math.nan])
def test_lengths_that_are_none(length):
    with pytest.raises(ValueError, match=r"^length="):
        schedulers.LMLDDIMScheduler(length=length)


def test_lengths_for_another_number_of_steps():
    scheduler = schedulers.LMLDDIMScheduler(length=[1.0, 1.1])
    scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match=r"length=.*has 2 entries for 3 steps"):
        _ = scheduler.lengths


# --- pipelines -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "timesteps"),
    [*((name, False) for name in ("sd15", "sdxl", "sd3", "pixart", "flux")), ("sd15", True)],
)
def test_a_pipeline_is_calibrated(pipelines, name, timesteps):
    pipe = DiffusionPipeline.from_pretrained(pipelines / name)
    pipe.set_progress_bar_config(disable=True)
    flow = "FlowMatch" in type(pipe.scheduler).__name__
    cls = (
        schedulers.LMLFlowMatchEulerDiscreteScheduler
        if flow
        else schedulers.LMLDPMSolverMultistepScheduler
    )
    pipe.scheduler = before = cls.from_config(pipe.scheduler.config)
    size = {"pixart": {"use_resolution_binning": False}, "flux": {"height": 16, "width": 16}}
    size = size.get(name, {})  # FLUX's own is 256x256, whatever the network
    found = calibrate_pipeline(
        pipe, ["a cat", "a dog"], 4, samples=4, fine_steps=12, batch_size=2, rounds=1,
        timesteps=timesteps, guidance_scale=3.0, **size,
    )  # fmt: skip
    assert bool(found.calibrated.timesteps) <= timesteps == ("timesteps" in found.errors)
    assert type(pipe.scheduler) is cls and pipe.scheduler is not before
    assert pipe.scheduler.correction.rank == found.choice.rank
    unseen = {name: error["unseen"] for name, error in found.errors.items()}
    assert unseen[found.chosen] == min(unseen.values())

    def latents(scheduler, steps=4):
        pipe.scheduler = scheduler
        generator = [torch.Generator().manual_seed(1_000_002 + k) for k in range(2)]
        prompts = ["a cat", "a dog"]
        options = {"guidance_scale": 3.0, "output_type": "latent", **size}
        return pipe(
            prompts, num_inference_steps=steps, generator=generator, **options
        ).images.double()

    chosen = pipe.scheduler
    fine = latents(cls.from_config(before.config, rank=0), 12)
    error = (latents(chosen) - fine).square().mean().sqrt().item()
    assert error == pytest.approx(unseen[found.chosen], rel=1e-3)


def test_a_pipeline_without_latents(tiny_model):
    pipe = DDPMPipeline.from_pretrained(tiny_model)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = schedulers.LMLDPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    found = calibrate_pipeline(pipe, None, 4, samples=4, fine_steps=12, batch_size=2, rounds=1)
    assert found.errors["off"]["unseen"] > 0


def test_a_pipeline_that_makes_videos(pipelines):
    """Its output has `frames`, and no `images`."""
    made = DiffusionPipeline.from_pretrained(pipelines / "sd15")
    torch.manual_seed(0)
    unet = UNet3DConditionModel(
        sample_size=8,
        block_out_channels=(16, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    scheduler = schedulers.LMLDPMSolverMultistepScheduler.from_config(made.scheduler.config)
    pipe = TextToVideoSDPipeline(made.vae, made.text_encoder, made.tokenizer, unet, scheduler)
    pipe.set_progress_bar_config(disable=True)
    found = calibrate_pipeline(
        pipe, ["a cat"], 4, samples=4, fine_steps=12, batch_size=2, rounds=1, num_frames=2
    )
    assert found.errors["off"]["unseen"] > 0


def of_call(pipe, prompts=None, **call) -> dict:
    """The errors of a calibration of `pipe` for these arguments."""
    before, cls = pipe.scheduler, schedulers.LMLDPMSolverMultistepScheduler
    if not isinstance(before, schedulers.LMLSchedulerMixin):
        if "FlowMatch" in type(before).__name__:
            cls = schedulers.LMLFlowMatchEulerDiscreteScheduler
        pipe.scheduler = cls.from_config(before.config)
    pipe.set_progress_bar_config(disable=True)
    size = {"num_inference_steps": 2, "samples": 4, "fine_steps": 4, "batch_size": 2, "rounds": 1}
    found = calibrate_pipeline(pipe, prompts, **size, **call)
    pipe.scheduler = before
    return found.errors


def wan() -> DiffusionPipeline:
    """A tiny Wan, which makes videos, without its text encoder."""
    vae = diffusers.AutoencoderKLWan(
        base_dim=3, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    network = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, text_dim=32, ffn_dim=32, num_layers=1
    )
    solver = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    scheduler = diffusers.UniPCMultistepScheduler(**solver)
    return diffusers.WanPipeline(None, None, vae, scheduler, network)


def qwen() -> DiffusionPipeline:
    """A tiny Qwen-Image without its text encoder; its grid is shifted by the size of the image."""
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=24,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 16,
        latents_std=[1.0] * 16,
    )
    network = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=32,
        axes_dims_rope=(8, 4, 4),
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, time_shift_type="exponential", shift_terminal=0.02
    )
    return diffusers.QwenImagePipeline(scheduler, vae, None, None, network)


@pytest.mark.parametrize("build", [wan, qwen])
def test_a_pipeline_by_its_embeddings(build):
    torch.manual_seed(0)
    pipe, signs = build(), ("", "negative_")
    pipe.set_progress_bar_config(disable=True)
    embeddings = {f"{sign}prompt_embeds": torch.randn(3, 8, 32) for sign in signs}
    call: dict = {"height": 16, "width": 16, "num_frames": 5}
    if build is qwen:
        call = {"height": 32, "width": 32, "true_cfg_scale": 4.0}
        embeddings |= {f"{sign}prompt_embeds_mask": torch.ones(3, 8, dtype=int) for sign in signs}
    first = {key: value[:1] for key, value in embeddings.items()}

    def sample() -> torch.Tensor:
        noise = torch.Generator().manual_seed(0)
        how = {"num_inference_steps": 4, "output_type": "latent", "return_dict": False}
        return pipe(generator=noise, **how, **call, **first)[0]

    theirs, cls = sample(), getattr(schedulers, f"LML{type(pipe.scheduler).__name__}")
    pipe.scheduler = cls.from_config(pipe.scheduler.config, rank=0)
    assert torch.equal(sample(), theirs)
    errors = of_call(pipe, **call, **embeddings)
    assert errors["calibrated"]["searched"] < errors["off"]["searched"]


def test_a_pipeline_that_begins_with_an_image(pipelines):
    """It takes no latents, and skips the first steps."""
    parts = DiffusionPipeline.from_pretrained(pipelines / "sd15").components
    parts["scheduler"] = schedulers.LMLDDIMScheduler.from_config(parts["scheduler"].config)
    pipe = StableDiffusionImg2ImgPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    options = {"image": Image.new("RGB", (16, 16), (200, 30, 10)), "strength": 0.6}
    found = calibrate_pipeline(
        pipe, ["a cat"], 8, samples=4, fine_steps=40, batch_size=2, rounds=1, **options
    )
    assert found.errors["calibrated"]["searched"] < found.errors["off"]["searched"]
    scheduler = pipe.scheduler
    assert pipe("a cat", num_inference_steps=8, **options).images and pipe.scheduler is scheduler


def test_a_pipelines_calibration_has_one_progress_bar(tiny_model, capfd):
    pipe = DDPMPipeline.from_pretrained(tiny_model)
    pipe.scheduler = schedulers.LMLDDIMScheduler.from_config(pipe.scheduler.config)
    capfd.readouterr()  # loading has a bar, too
    bars = []
    for options in ({}, {"disable": True}):
        pipe.set_progress_bar_config(**options)
        calibrate_pipeline(pipe, None, 4, samples=4, fine_steps=12, batch_size=2, rounds=1)
        bars.append(re.findall(r"[/]([0-9]+) \[00:00<\?", capfd.readouterr().err))
    assert len(bars[0]) == 1 and not bars[1]
    pipe(num_inference_steps=4)
    assert not capfd.readouterr().err  # as it was set
    pipe.set_progress_bar_config()
    pipe(num_inference_steps=4)
    assert "4/4" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3"])
def test_texts_are_for_all_samples_and_lists_for_one_in_turn(pipelines, name):
    pipe = DiffusionPipeline.from_pretrained(pipelines / name)
    assert of_call(pipe, "a cat") == of_call(pipe, ["a cat"]) != of_call(pipe, ["a", "cat"])
    prompts = ["a cat", "a dog", "a bird"]
    texts = of_call(pipe, prompts, negative_prompt="bad")
    assert texts == of_call(pipe, prompts, negative_prompt=["bad"]) != of_call(pipe, prompts)
    accepted = inspect.signature(pipe.encode_prompt).parameters
    asked = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    asked |= {key: prompts for key in ("prompt", "prompt_2", "prompt_3") if key in accepted}
    made = pipe.encode_prompt(negative_prompt=["bad"] * 3, **asked)
    keys = ("", "negative_", "pooled_", "negative_pooled_")
    embeddings = {f"{key}prompt_embeds": value for key, value in zip(keys, made, strict=False)}
    assert of_call(pipe, **embeddings)["off"] == pytest.approx(texts["off"], rel=1e-4)


def test_class_labels_are_taken_in_turn(pipelines):
    """DiT's pipeline takes neither prompts nor the number of images."""
    torch.manual_seed(0)
    network = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        out_channels=8,
        num_layers=1,
        sample_size=8,
        patch_size=2,
    )
    vae = DiffusionPipeline.from_pretrained(pipelines / "sd15").vae
    pipe = DiTPipeline(network.eval(), vae, DDIMScheduler())
    errors = of_call(pipe, class_labels=[207, 360])
    assert errors == of_call(pipe, class_labels=[207, 360] * 2) != of_call(pipe, class_labels=[207])


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"prompts": []}, "expected at least one, or None"),
        ({"samples": 1}, "samples=1"),
        ({"eta": 1.0}, "adds noise"),
        ({"num_inference_steps": 1}, "single step"),
        ({"generator": torch.Generator()}, "^generator: calibrate_pipeline sets it"),
        ({"latents": torch.zeros(1)}, "^latents: calibrate_pipeline sets it"),
        ({"output_type": "pil"}, "^output_type: calibrate_pipeline sets it"),
        ({"num_images_per_prompt": 2}, "^num_images_per_prompt: calibrate_pipeline sets it"),
        ({"prompt": "a dog"}, "^prompt: calibrate_pipeline sets it"),
    ],
)
def test_a_pipeline_that_can_not_be_calibrated_keeps_its_scheduler(pipelines, options, error):
    pipe = DiffusionPipeline.from_pretrained(pipelines / "sd15")
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(TypeError, match=r"not one of lml\.schedulers"):
        calibrate_pipeline(pipe, ["a cat"])
    pipe.scheduler = before = schedulers.LMLDDIMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises((TypeError, ValueError), match=error):
        calibrate_pipeline(pipe, **{"prompts": ["a cat"], "num_inference_steps": 4, **options})
    assert pipe.scheduler is before


# --- the script ----------------------------------------------------------------------------------

SMALL = [
    "model=gaussian",
    "model.network.sample_size=8",
    "solver=ddim",
    "grid=trailing",
    "nfe=5",
    "threads=1",
]
SEARCH = ["searched=8", "unseen=8", "batch_size=4", "fine.nfe=40", "rounds=2", "progress=false"]


def files(folder):
    return sorted(folder.glob("outputs/calibrations/*/calibration.json"))


def found(path) -> dict:
    """What is the same however often it is made."""
    left_out = ("seconds", "seal")
    return {k: v for k, v in json.loads(path.read_text()).items() if k not in left_out}


@pytest.fixture(params=["", "timesteps"])
def small(request) -> list[str]:
    """Arguments of a calibration, also of one whose timesteps are searched."""
    return [*SMALL, "solver=dpmsolverpp", "timesteps=true"] if request.param else SMALL


def of_run(small: list[str], lml: str) -> list[str]:
    """`small` for sample.py, where lml=calibrated takes the calibration."""
    plain = [word for word in small if word != "timesteps=true"]
    asked = lml == "calibrated" and plain != small
    return [*plain, f"lml={lml}", *(["lml.timesteps=true"] if asked else [])]


@pytest.fixture
def made(script, tmp_path, small):
    outcome = script("calibrate", *small, *SEARCH)
    assert outcome.code == 0, outcome.err
    assert re.match(r"at most [\d,]+ network evaluations", outcome.out)
    assert re.search(r"off 0\.\d+, default .* calibrated .*: calibrated; rank 1", outcome.out)
    (path,) = files(tmp_path)
    assert [p.name for p in path.parent.iterdir()] == ["calibration.json"]
    return path


def test_sample_takes_it_and_has_the_error_that_it_reports(script, made, small, tmp_path):
    values = json.loads(made.read_text())
    rmse = {}
    for lml in ("off", "default", "calibrated"):
        outcome = script(
            "sample", *of_run(small, lml), "num_images=8", "seed=1000008", "batch_size=4",
            "metrics=[convergence]", "metrics.convergence.nfe=40", f"run_dir={tmp_path / lml}",
        )  # fmt: skip
        assert outcome.code == 0, outcome.err
        results = json.loads((tmp_path / lml / "metrics.json").read_text())
        rmse[lml] = results["convergence"]["value"]["rmse"]
        assert rmse[lml] == pytest.approx(values["errors"][lml]["unseen"], abs=1e-4)
    options = values["lml"]
    explicit = [f"lml.{k}={json.dumps(options[k])}" for k in ("rank", "damping", "length")]
    explicit += [f"+grid.{k}={json.dumps(v)}" for k, v in values.get("grid", {}).items()]
    again = script(
        "sample", *of_run(small, "default"), *explicit, "num_images=8", "seed=1000008",
        "batch_size=4", "metrics=none", f"run_dir={tmp_path / 'calibrated'}",
    )  # fmt: skip
    assert again.code == 0 and "all were stored before" in again.out  # it is the same run


@pytest.mark.parametrize(("nfe", "fine"), [(5, 40), (12, 60)])
def test_the_fine_solution_has_several_times_the_steps(script, tmp_path, nfe, fine):
    few = [o.replace("=8", "=2") for o in SEARCH if "fine" not in o and "rounds" not in o]
    assert script("calibrate", *SMALL, *few, f"nfe={nfe}", "rounds=1").code == 0
    (path,) = files(tmp_path)
    assert json.loads(path.read_text())["protocol"]["fine"]["nfe"] == fine


def test_it_is_the_same_each_time(script, made, small, tmp_path):
    first = made.read_bytes()
    assert script("calibrate", *small, *SEARCH).code == 0
    assert made.read_bytes() == first  # it was read
    assert script("calibrate", *small, *SEARCH, "overwrite=true").code == 0
    values = json.loads(first)
    values.pop("seconds"), values.pop("seal")
    assert found(made) == values


def test_an_interrupted_search_goes_on(script, made, small, tmp_path, monkeypatch):
    from lml.calibration import script as body

    whole = found(made)
    made.unlink()
    write, calls = body.write_json, []

    def interrupted(path, value):
        write(path, value)
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(body, "write_json", interrupted)
    with pytest.raises(KeyboardInterrupt):
        script("calibrate", *small, *SEARCH)
    monkeypatch.undo()
    assert not made.exists() and (made.parent / "state.json").exists()
    assert script("calibrate", *small, *SEARCH).code == 0
    again = found(made)
    for cost in ("tries", "evaluations"):
        assert again.pop(cost) < whole.pop(cost)
    assert again == whole and not (made.parent / "state.json").exists()


def test_two_processes_find_the_same(made, small, ranks, tmp_path):
    whole = found(made)
    outcome = ranks(ROOT / "scripts/calibrate.py", *small, *SEARCH, "run_dir=two")
    assert outcome.code == 0, outcome.err
    assert found(tmp_path / "two/calibration.json") == whole
    assert outcome.out.count("solver=") == 1, outcome.out


def test_a_file_from_before_there_were_lengths_is_read(script, made, small):
    from lml.calibration.stored import seal

    values = json.loads(made.read_text())
    del values["calibrated"]["length"], values["lml"]["length"]
    made.write_text(json.dumps(seal(values)))
    outcome = script("calibrate", *small, *SEARCH)
    assert outcome.code == 0 and "damping" in outcome.out and "length" not in outcome.out


def test_timesteps_without_lml_may_be_the_best(script, tmp_path, monkeypatch):
    """They are a row of their own, and are not taken for the run that they are compared with."""
    from lml.calibration import search

    bad = Progress(1, {"damping": [8.0] * 4}, ["damping"])
    monkeypatch.setattr(search._Searches, "with_timesteps", lambda *_: [bad])
    words = [*SMALL, "solver=euler"]
    assert script("calibrate", *words, *SEARCH, "timesteps=true").code == 0
    (path,) = files(tmp_path)
    assert json.loads(path.read_text())["chosen"] == "timesteps"
    monkeypatch.undo()
    run = ["sample", *words, "num_images=4", "metrics=[convergence]", "name=study"]
    assert script(*run, "lml=off").code == 0
    assert script(*run, "lml=calibrated", "lml.timesteps=true").code == 0
    outcome = script("tabulate", "name=study", "show=[convergence/rmse]")
    assert outcome.code == 0
    assert re.search(r"\| off \| ([\d.]+) \|", outcome.out)
    assert re.search(r"\| calibrated \(timesteps\) \| [\d.]+ \(-[\d.]+ %\) \|", outcome.out)


def test_features_may_be_compared(script, tmp_path):
    """It is another calibration than that by pixels, and is found by its name."""
    outcome = script("calibrate", *SMALL, *SEARCH, "objective=features", "rounds=1")
    assert outcome.code == 0, outcome.err
    (path,) = files(tmp_path)
    values = json.loads(path.read_text())
    errors = values["errors"]
    assert errors["calibrated"]["searched"] < errors["off"]["searched"]
    sample = ["sample", *SMALL, "lml=calibrated", "num_images=2", "metrics=none"]
    assert script(*sample).code == 2
    assert script(*sample, "lml.objective=features").code == 0


def test_a_sweep_ends_with_the_best(script, tmp_path):
    outcome = script("calibrate", "-m", *SMALL, *SEARCH, "solver=ddim,ipndm")
    assert outcome.code == 0, outcome.err
    assert re.search(r"best of 2 for nfe=5: solver=\w+ grid=trailing lml=\w+, 0\.", outcome.out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nfe=1"], "nfe=1"),
        (["objective=beauty"], "objective=beauty"),
        (["objective=features", "extractor=null"], "extractor=null: objective=features needs a"),
        (["extractor={_target_:torch.nn.Flatten}"], "extractor: objective=rmse takes none"),
        (["ranks=[0]"], "ranks[0]=0"),
        (["numbers=[]"], "numbers=[]: expected at least one"),
        (["numbers=[damping,norm]"], "numbers[1]=norm"),
        (["solver.step.eta=1.0"], "adds noise"),
        (["solver=dpmsolverpp", "solver.scheduler.algorithm_type=sde-dpmsolver++"], "adds noise"),
        (["solver=euler", "grid=default", "+solver.step.s_churn=1.0"], "adds noise"),
        (["solver=euler_ancestral", "grid=default"], "adds noise"),
        (
            [
                "model=gaussian_flow",
                "solver=flow_euler",
                "grid=default",
                "+solver.scheduler.stochastic_sampling=true",
            ],
            "adds noise",
        ),
        (["fine.solver=none"], "fine.solver=none"),
        (["searched=0"], "searched=0"),
        (["solver=authors_dpm_lm"], "released"),
        (
            ["timesteps=true"],
            "timesteps=true: not with solver=ddim, whose grid is fixed; with deis, dpm",
        ),
        (["timesteps=maybe"], "timesteps=maybe"),
    ],
)
def test_bad_input_is_one_line(script, tmp_path, arguments, message):
    outcome = script("calibrate", *SMALL, *SEARCH, *arguments)
    assert outcome.code == 2, outcome.err
    assert message in outcome.err and len(outcome.err.strip().splitlines()) == 1
    assert not files(tmp_path)


@pytest.mark.parametrize(
    "solver",
    [
        name
        for name in configs.names("solver")
        if not name.startswith("authors_") and not name.endswith("_calibrated")
    ],
)
def test_every_solver_is_calibrated_or_says_why_not(script, tmp_path, solver):
    model = "gaussian_flow" if solver.startswith("flow") else "gaussian"
    words = [f"model={model}", "model.network.sample_size=4", f"solver={solver}", *SMALL[4:]]
    outcome = script("calibrate", *words, *SEARCH)
    if solver in ("euler_ancestral", "ipndm_diffusers"):
        assert outcome.code == 2
        assert re.search("adds noise|not for gaussian, whose noise schedule", outcome.err)
        return
    assert outcome.code == 0, outcome.err
    (path,) = files(tmp_path)
    errors = json.loads(path.read_text())["errors"]
    assert errors["calibrated"]["searched"] <= errors["off"]["searched"]


def test_a_calibration_of_something_else_is_refused(script, made, small, tmp_path):
    sample = ["sample", *of_run(small, "calibrated"), "num_images=2", "metrics=none"]
    for other, message in [
        ("nfe=6", "nfe=5, not 6"),
        ("grid=leading", "grid.timestep_spacing=trailing, not leading"),
        ("model.network.std=0.5", "model.network.std=0.4, not 0.5"),
    ]:
        outcome = script(*sample, other, f"lml.calibration={made}")
        assert outcome.code == 2 and len(outcome.err.strip().splitlines()) == 1
        assert "made for other settings" in outcome.err and message in outcome.err
        outcome = script(*sample, other)
        assert outcome.code == 2 and "scripts/calibrate.py" in outcome.err
    text = made.read_text()
    made.write_text(text.replace('"rank": 1', '"rank": 2'))
    outcome = script(*sample)
    assert outcome.code == 2 and "edited" in outcome.err
    made.write_text(text[:50])
    assert script(*sample).code == 2


COMMON = [*SMALL[2:4], "threads=1"]  # for any model


@pytest.mark.parametrize(
    "options",
    [
        [*SMALL, "nfe=6"],
        [*SMALL, "model.network.std=0.5", "lml.norm_preserving=false"],
        [*SMALL, "lml.freeze=0.25", "+solver.scheduler.thresholding=true"],
        [*SMALL, "lml.objective=features"],
        [*SMALL, "solver=euler", "lml.timesteps=true"],
        [*COMMON, "model=cifar10_ddpm", "model.path='a, b'", "nfe=3"],
    ],
)
def test_the_message_says_the_command_that_makes_it(script, tiny_model, tmp_path, options):
    shutil.copytree(tiny_model, tmp_path / "a, b")
    sample = ["sample", *options, "lml=calibrated", "num_images=2", "metrics=none"]
    outcome = script(*sample)
    assert outcome.code == 2 and outcome.err.count("\n") == 1
    _, command = outcome.err.split("make one: python scripts/")
    name, *words = shlex.split(command)
    assert name == "calibrate.py" and ("'a, b'" in str(options)) == ("model.path" in command)
    assert script("calibrate", *words, *SEARCH).code == 0
    assert script(*sample).code == 0


def test_no_command_is_said_for_a_grid_that_is_fixed(script):
    outcome = script("sample", *SMALL, "lml=calibrated", "lml.timesteps=true", "num_images=2")
    assert outcome.code == 2 and outcome.err.count("\n") == 1
    assert outcome.err.startswith("lml.timesteps=true: not with solver=ddim, whose grid is fixed")
    arguments = ["lml=calibrated", "lml.timesteps=true", "solver.scheduler._target_=no.such"]
    outcome = script("sample", *SMALL, *arguments, "num_images=2")
    assert outcome.code == 2 and outcome.err.count("\n") == 1


def test_what_is_in_assets_is_found(script, tmp_path):
    """The embedded model's, by their settings."""
    outcome = script(
        "sample", "lml=calibrated", "nfe=5", "num_images=1", "metrics=none", "threads=1"
    )
    assert outcome.code == 0, outcome.err
