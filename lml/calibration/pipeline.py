"""Calibration of a loaded diffusers pipeline."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor, nn
from tqdm import tqdm

from lml.calibration import objectives, search
from lml.calibration.search import (
    Calibration,
    Problem,
    adds_noise,
    calibrate,
    most_evaluations,
)
from lml.schedulers.mixin import LMLSchedulerMixin

# Arguments of a pipeline that `calibrate_pipeline` gives it, or that would give it more images.
GIVEN = re.compile("prompt|generator|latents|output_type|return_dict|num_.*_per_prompt")
# Those that have a value for each sample, and among them the texts.
PER_SAMPLE = re.compile(".*prompt.*|class_labels")
TEXT = re.compile("(negative_)?prompt(_[0-9]+)?")


def calibrate_pipeline(
    pipe: DiffusionPipeline,
    prompts: str | Sequence[str] | None = None,
    num_inference_steps: int = 6,
    samples: int = 32,
    fine_steps: int | None = None,
    seed: int = 1_000_000,
    batch_size: int = 4,
    ranks: Sequence[int] = (1,),
    rounds: int = 2,
    timesteps: bool = False,
    extractor: nn.Module | None = None,
    **call: Any,
) -> Calibration:
    """Choose the rank and the damping of each step of `pipe.scheduler`, and set them.

    If LML does not help, LML is off in the scheduler. The calibration compares latents (or images,
    if the pipeline has no latents), or features of the images, with those of `fine_steps` steps
    without LML from the same noise. It searches with the first half of the samples and checks with
    the second. A progress bar counts network evaluations times samples; the pipeline's own bars are
    hidden meanwhile, and `pipe.set_progress_bar_config(disable=True)` hides this one.

    Args:
        pipe: a pipeline whose scheduler is one of `lml.schedulers`.
        prompts: prompts like those of later use; the samples take them in turn. None for a
            pipeline without prompts, or if `call` has their embeddings.
        num_inference_steps: the number of steps of later use.
        samples: the number of samples, at least 2.
        fine_steps: the steps of the fine solution; by default five times as many, at least 40.
        timesteps: whether to search timesteps, too; for schedulers with `aligned_timesteps`.
        extractor: a network from uint8 images (N, 3, H, W) to features (N, ...), whose features are
            compared: torchmetrics' NoTrainInceptionV3, `lml.metrics.lpips.LPIPSFeatures()`,
            `lml.metrics.dinov2.load_dinov2(FOLDER)` ... None compares the samples themselves.
        call: other arguments of the pipeline's call: `guidance_scale`, `height`, `width` ...
            A text, such as `negative_prompt`, is for all samples. The samples take lists of texts
            and of `class_labels`, and the rows of embeddings such as `prompt_embeds`, in turn.

    Raises:
        TypeError: the scheduler is not one of `lml.schedulers`, or `call` has an argument that is
            set here.
        ValueError: there are no prompts, or nothing to measure (see `calibrate`).
    """
    scheduler = pipe.scheduler
    if not isinstance(scheduler, LMLSchedulerMixin):
        raise TypeError(
            f"{type(scheduler).__name__}: not one of lml.schedulers; "
            "set pipe.scheduler = LML….from_config(pipe.scheduler.config) first"
        )
    for key in call:
        if GIVEN.fullmatch(key):
            raise TypeError(f"{key}: calibrate_pipeline sets it, from its prompts and its seed")
    if prompts is not None:
        call["prompt"] = prompts if isinstance(prompts, str) else list(prompts)
        if call["prompt"] == []:
            raise ValueError("prompts: expected at least one, or None")
    if samples < 2:
        raise ValueError(f"samples={samples}: expected at least 2")
    accepted = inspect.signature(pipe.__call__).parameters
    has_latents = "latents" in accepted and extractor is None
    if adds_noise(scheduler, call):
        raise ValueError("the scheduler adds noise, so no fine solution has the same noise")

    @torch.no_grad()
    def sample(solver: SchedulerMixin, steps: int, indices: Sequence[int]) -> Tensor:
        options = {key: _of_samples(key, value, indices) for key, value in call.items()}
        if not any(map(PER_SAMPLE.fullmatch, options)):
            options["batch_size"] = len(indices)
        pipe.scheduler = solver
        made, *_ = pipe(  # called images, frames or audios
            num_inference_steps=steps,
            generator=[torch.Generator().manual_seed(seed + i) for i in indices],
            output_type="latent" if has_latents else "np",
            return_dict=False,
            **options,
        )
        made = torch.as_tensor(made).float()
        if extractor is None:
            return made
        device = next(extractor.parameters()).device
        return 2 * made.to(device).movedim(-1, -3) - 1

    fine = type(scheduler).from_config(scheduler.config, rank=0)
    problem = Problem(
        sample,
        _denoiser(pipe),
        scheduler,
        num_inference_steps,
        fine,
        fine_steps or search.fine_steps(num_inference_steps),
        objectives.of_samples() if extractor is None else objectives.of_features(extractor),
        batch_size,
    )
    halves = range(samples // 2), range(samples // 2, samples)
    protocol = (ranks, rounds, timesteps)
    total = most_evaluations(problem, *map(len, halves), *protocol)
    own = getattr(pipe, "_progress_bar_config", {})  # what set_progress_bar_config was given
    bar = tqdm(**{"total": total, "unit": "eval", "unit_scale": True, **own})
    pipe.set_progress_bar_config(**{**own, "disable": True})  # one bar, not one a trajectory
    try:
        with bar:
            found = calibrate(problem, *halves, *protocol, tell=bar.update)
    finally:
        pipe.scheduler = scheduler
        pipe.set_progress_bar_config(**own)
    pipe.scheduler = found.choice.apply(scheduler)
    return found


def _of_samples(key: str, value: Any, indices: Sequence[int]) -> Any:
    """The argument `key` of the pipeline's call for the samples with `indices`."""
    if isinstance(value, str):
        return [value] * len(indices) if TEXT.fullmatch(key) else value
    if not PER_SAMPLE.fullmatch(key) or not isinstance(value, (Sequence, Tensor)):
        return value
    chosen = [i % len(value) for i in indices]
    return value[chosen] if isinstance(value, Tensor) else [value[k] for k in chosen]


def _denoiser(pipe: DiffusionPipeline) -> nn.Module:
    for name in ("unet", "transformer"):
        if isinstance(network := getattr(pipe, name, None), nn.Module):
            return network
    raise TypeError(f"{type(pipe).__name__}: has neither a unet nor a transformer")
