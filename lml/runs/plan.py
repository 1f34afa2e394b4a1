"""What can be determined about a run before a network is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import SchedulerMixin

from lml.calibration.stored import calibrated
from lml.correction import METHOD_VERSION
from lml.data import prompts as prompt_sets
from lml.errors import UserError
from lml.pipelines import Model
from lml.pipelines.text import TextModel
from lml.runs.solver import find_steps, make_scheduler
from lml.runs.store import RunFolder
from lml.seals import settings_hash


def choose_prompts(cfg: Mapping[str, Any], model: Model) -> prompt_sets.PromptSet | None:
    """The prompts of a run, at least one for each image; None for models without prompts."""
    if not isinstance(model, TextModel):
        if cfg["prompts"]:
            raise UserError(f"prompts: model={model.name} takes none; use prompts=none")
        return None
    if not cfg["prompts"]:
        raise UserError(
            f"prompts=none: model={model.name} needs prompts; use prompts=text, for example"
        )
    return prompt_sets.load(cfg["prompts"]).take(cfg["num_images"])


def determine(
    cfg: Mapping[str, Any],
    model: Model,
    prompts: prompt_sets.PromptSet | None,
    scheduler: SchedulerMixin,
) -> dict[str, Any]:
    """The settings that determine the images; their hash names the run.

    The timesteps of `scheduler` must be set.
    """
    keys = ("nfe", "seed", "num_images", "batch_size", "dtype", "compile", "channels_last")
    # left out where they do nothing, so that runs older than these options keep their hash
    optional = {key: cfg[key] for key in ("attention", "seeds") if cfg.get(key)}
    if prompts is not None:
        optional["prompts"] = prompts.settings
    lml = {key: value for key, value in cfg["lml"].items() if key != "name"}
    if lml.get("rank") == 0:
        lml = {"rank": 0}
    if (correction := getattr(scheduler, "correction", None)) and correction.rank:
        scale = "relative" if correction.is_relative else "absolute"
        try:
            lml = {**lml, "damping": list(scheduler.dampings), "damping_scale": scale}
            lengths = list(scheduler.lengths)
            # left out where it does nothing, so that runs older than this option keep their hash
            lml.pop("length", None)
            lml |= {"length": lengths} if set(lengths) != {1.0} else {}
        except ValueError as error:  # a list of another number of steps
            raise UserError(f"lml.{error}") from None
        optional["method_version"] = METHOD_VERSION
    return {
        "model": model.settings,
        "solver": {key: cfg["solver"].get(key) or {} for key in ("scheduler", "step")},
        "grid": {key: value for key, value in cfg["grid"].items() if key != "name"},
        "lml": lml,
        **{key: cfg[key] for key in keys},
        **optional,
    }


@dataclass
class Plan:
    """A run before its network is loaded: config, model, prompts, solver, steps and folder."""

    cfg: Mapping[str, Any]
    model: Model
    prompts: prompt_sets.PromptSet | None
    scheduler: SchedulerMixin
    steps: int
    folder: RunFolder


def plan(cfg: Mapping[str, Any], model: Model, prompts: prompt_sets.PromptSet | None) -> Plan:
    """Plan the run of `cfg` with its model and prompts. Writes nothing.

    With lml=calibrated, the plan's `cfg` has the calibrated dampings. UserError for options that
    the solver doesn't have, and for solvers that don't fit the model.
    """
    cfg = calibrated(cfg, model.settings)
    scheduler = make_scheduler(cfg, model)
    strength = cfg["model"].get("strength")
    steps = find_steps(scheduler, cfg["nfe"], cfg["solver"]["name"], strength)
    settings = determine(cfg, model, prompts, scheduler)
    path = cfg["run_dir"] or Path("outputs", str(cfg["name"]), settings_hash(settings)[:10])
    return Plan(cfg, model, prompts, scheduler, steps, RunFolder(str(path), settings))
