"""A run again: with a fine solver, or to record its trajectories."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from lml import schema
from lml.errors import UserError
from lml.instances import check_targets
from lml.pipelines import find_model
from lml.pipelines.trajectory import Replay, Trajectory, record
from lml.processes import rank_and_world
from lml.runs.generate import generate
from lml.runs.observer import Observer
from lml.runs.plan import choose_prompts, plan
from lml.runs.records import (
    check_recorded,
    read_config,
)
from lml.runs.solver import check_start, made_timesteps, read_solver
from lml.runs.worker import Worker
from lml.seals import differences


def read_made(run_dir: str | Path) -> dict[str, Any]:
    """The config to make the run in `run_dir` again; the run may be somebody else's.

    UserError if config.yaml was edited after the run, or if it names objects that are not ours.
    """
    config = read_config(run_dir)
    check_recorded(run_dir, config)
    apart = ("metrics", "logger", "provenance")
    made = {key: value for key, value in config.items() if key not in apart}
    check_targets(made, f"run_dir={run_dir}")
    schema.check(made, schema.WholeRunConfig, f"run_dir={run_dir}: config.yaml")
    return {**made, "run_dir": run_dir}


def reference_run(
    config: Mapping[str, Any],
    device: torch.device,
    observer: Observer,
    nfe: int = 200,
    solver: str = "dpmsolverpp",
    latents: bool = False,
) -> Path:
    """The images that the run `config` approximates: same noise, `nfe` evaluations, LML off.

    With `latents`, their latents are stored, too, if the model has any. The images are made under
    outputs/reference, or found there. Returns their folder.
    """
    check_start(config["model"], "metrics=[convergence]")
    fine = {
        **config,
        "name": "reference",
        "run_dir": None,
        "overwrite": False,
        "solver": read_solver(solver, "metrics.convergence.solver"),
        "grid": {},
        "lml": {"rank": 0},
        "nfe": nfe,
    }
    try:
        # Other jobs of a sweep may need the same reference at the same time.
        return generate(fine, device, observer, wait=True, latents=latents)[0].images
    except UserError as error:
        if str(error).startswith("solver="):  # it is not the run's solver
            raise UserError(f"metrics.convergence.{error}") from None
        raise


def replay(config: Mapping[str, Any], device: torch.device, count: int) -> Replay:
    """The first `count` samples of the run `config` again: same noise, solver and LML, not stored.

    The batch size is the run's. If `count` is smaller, numbers may differ by rounding. UserError
    if the run's settings are no longer those that are stored with it.
    """
    model = find_model(config["model"])
    planned = plan(config, model, choose_prompts(config, model))
    settings = planned.folder.settings
    if found := differences(settings, config.get("settings", settings)):
        path, reason = planned.folder.path, "; ".join(found[:2])
        raise UserError(f"run_dir={path}: its images can't be made again now ({reason})")
    worker, scheduler = Worker(planned, device), planned.scheduler
    sampler = worker.sampler()

    def batches() -> Iterator[Trajectory]:
        rank, world = rank_and_world()
        for block in worker.blocks(count)[rank::world]:
            with record(sampler.network, scheduler) as trajectory:
                trajectory.images = worker.images(sampler, block)
            yield trajectory

    times = made_timesteps(scheduler, planned.steps, config["model"].get("strength"))
    return Replay(sampler.network, scheduler, times.tolist(), count, batches())
