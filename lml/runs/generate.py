"""A run: seeds to batches to images in a run folder; over processes, resumed, counted and timed."""

from __future__ import annotations

import bisect
import contextlib
import importlib.metadata
import inspect
import io
import itertools
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from diffusers import SchedulerMixin
from filelock import FileLock
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchvision.utils import make_grid

from lml import __version__, schema
from lml.calibration.stored import calibrated
from lml.configs import compose
from lml.correction import METHOD_VERSION
from lml.damping import GRIDS
from lml.data import prompts as prompt_sets
from lml.data.assets import ROOT
from lml.data.images import LATENTS, read
from lml.device import is_memory, use_device
from lml.errors import UserError, first_line, nearest
from lml.instances import check_targets
from lml.metrics.evaluate import Context, build, check_count, check_prompts, evaluate
from lml.pipelines import find, pixel
from lml.pipelines.text import TextModel, TextSampler
from lml.pipelines.trajectory import Replay, Trajectory, record
from lml.processes import gather, joined, on_first, rank_and_world
from lml.schema import check_call
from lml.stopwatch import Stopwatch
from lml.store import (
    RunError,
    RunFolder,
    Writer,
    canonical,
    check_output,
    check_recorded,
    differences,
    hold,
    merge_metrics,
    read_config,
    read_json,
    read_metrics,
    sealed,
    settings_hash,
    why_not_sealed,
    write_atomic,
    write_json,
)

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
ATTENTION = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
# Options of a scheduler that choose its grid of timesteps: what the config group `grid` sets.
GRID = ("timestep_spacing", *GRIDS)
OWN_GRID = "of_model"  # of that group: whether the model's own are taken
# Options of a scheduler that are the model's whatever the solver, as it was trained with them.
NOISE_SCHEDULE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
    "use_flow_sigmas",
)
Model = pixel.PixelModel | TextModel
Sampler = pixel.PixelSampler | TextSampler
PACKAGES = ("torch", "diffusers", "torchmetrics", "torchvision", "numpy", "hydra-core")


# --- what the user asked for -----------------------------------------------------------------


def make_scheduler(cfg: Mapping[str, Any], model: Model) -> SchedulerMixin:
    """The solver of config `cfg` on the model's noise schedule, with the grid and LML's options.

    Of the model's own scheduler it takes the noise schedule, and the options that its file names,
    as diffusers' `from_config` does; those of the grid with `grid=model` alone. UserError for an
    option that the solver does not have, or a value that it refuses.
    """
    name = cfg["solver"]["name"]
    options = dict(cfg["solver"]["scheduler"])
    target = options.pop("_target_")
    try:
        cls = get_class(target)
    except Exception as error:  # Hydra wraps whatever the import raised
        reason = first_line(error)
        raise UserError(f"solver.scheduler._target_={target}: {reason}") from None
    if not issubclass(cls, SchedulerMixin):
        raise UserError(f"solver.scheduler._target_={target}: a scheduler is asked")
    if not any(issubclass(cls, c) for c in (type(model.scheduler), *model.scheduler.compatibles)):
        kind = type(model.scheduler).__name__
        raise UserError(f"solver={name}: not for {model.name}, whose noise schedule is a {kind}")
    groups = {
        "solver.scheduler": options,
        "grid": {k: v for k, v in cfg["grid"].items() if k not in ("name", OWN_GRID)},
        "lml": {k: v for k, v in cfg["lml"].items() if k != "name"},
    }
    schema.check(cfg["grid"], schema.Grid, "grid")
    own_grid = cfg["grid"].get(OWN_GRID, False)
    known = set(inspect.signature(cls.__init__).parameters) - {"self"}
    for group, values in groups.items():
        for key, value in values.items():
            if key in known:
                continue
            if key in GRID:
                fitting = ", ".join(_fitting_grids(known))
                raise UserError(
                    f"grid={cfg['grid'].get('name')}: {name} has no {key}; grids for it: {fitting}"
                )
            close = nearest(key, known)
            raise UserError(f"{group}.{key}={value}: {name} has no such option; nearest: {close}")
        check_call(cls, values, group)
    for key, value in (cfg["solver"].get("step") or {}).items():
        if key not in (taken := inspect.signature(cls.step).parameters):
            close = nearest(key, taken)
            raise UserError(f"solver.step.{key}={value}: {name} takes no such; nearest: {close}")
    check_call(inspect.unwrap(cls.step), cfg["solver"].get("step") or {}, "solver.step")
    own = model.scheduler.config
    for key in NOISE_SCHEDULE:
        if own.get(key) is True and key not in known:
            raise UserError(f"solver={name}: not for {model.name}, whose noise schedule has {key}")
    # Defaults of the model's scheduler class are not the model's, but for its noise schedule:
    # there diffusers would put the other class's default, such as Heun's own betas.
    defaults = set(own.get("_use_default_values", ())) - set(NOISE_SCHEDULE)
    left = defaults if own_grid else defaults | set(GRID)
    base = {k: v for k, v in own.items() if k in known and k not in left}
    if model.has_latents and "clip_sample" in known:
        base.setdefault("clip_sample", False)  # to [-1, 1], as DDIM's default is for pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # DPM-Solver is deprecated there
            return cls.from_config(base, **{k: v for g in groups.values() for k, v in g.items()})
    except Exception as error:  # whatever a solver stumbles on in its options
        reason = first_line(error)
        key = reason.split("=")[0]
        group = next((g for g, values in groups.items() if key in values), None)
        raise UserError(f"{group}.{reason}" if group else f"solver={name}: {reason}") from None


def _fitting_grids(known: set[str]) -> list[str]:
    names = sorted(file.stem for file in (ROOT / "configs/grid").glob("*.yaml"))
    return [
        name for name in names if set(compose(f"+grid={name}").grid) - {"name", OWN_GRID} <= known
    ]


def read_solver(name: str, key: str) -> dict[str, Any]:
    """The config group solver=`name`. UserError, beginning with `key`, where there is none."""
    known = [file.stem for file in (ROOT / "configs/solver").glob("*.yaml")]
    if name not in known:
        raise UserError(f"{key}={schema.shown(name)}: unknown; nearest: {nearest(name, known)}")
    return OmegaConf.to_container(compose(f"+solver={name}").solver)


def choose_prompts(cfg: Mapping[str, Any], model: Model) -> prompt_sets.PromptSet | None:
    """The prompts of the config's `prompts`, as many as images at least; None for other models."""
    if not isinstance(model, TextModel):
        if cfg["prompts"]:
            raise UserError(f"prompts: model={model.name} takes none")
        return None
    if not cfg["prompts"]:
        raise UserError(f"prompts=none: model={model.name} needs prompts, as prompts=text does")
    return prompt_sets.load(cfg["prompts"]).take(cfg["num_images"])


def find_steps(scheduler: SchedulerMixin, nfe: int, solver: str) -> int:
    """The number of steps for which the scheduler called `solver` makes exactly `nfe` evaluations.

    UserError naming the nearest numbers that can be reached, when there is no such number of steps.
    """
    highest = scheduler.config.num_train_timesteps
    if nfe > highest:
        raise UserError(f"nfe={nfe}: at most {highest}, the number of the model's timesteps")

    def evaluations(steps: int) -> int:
        # With dynamic shifting the pipeline gives mu, which depends on the image's size.
        mu = {"mu": 1.0} if scheduler.config.get("use_dynamic_shifting") else {}
        try:
            scheduler.set_timesteps(steps, **mu)
        except Exception as error:  # whatever a solver stumbles on in such a grid
            raise UserError(f"nfe={nfe}: not for {solver} ({first_line(error)})") from None
        return len(scheduler.timesteps)

    steps = 1 + bisect.bisect_left(range(1, nfe + 1), nfe, key=evaluations)
    above = evaluations(steps)
    if above != nfe:
        below = [evaluations(steps - 1)] if steps > 1 else []
        reachable = " or ".join(map(str, [*below, above]))
        raise UserError(f"nfe={nfe}: {solver} can make {reachable}")
    return steps


def determine(
    cfg: Mapping[str, Any],
    model: Model,
    prompts: prompt_sets.PromptSet | None,
    scheduler: SchedulerMixin,
) -> dict[str, Any]:
    """The settings that determine the images; their hash names the run.

    `scheduler` has its timesteps set.
    """
    keys = ("nfe", "seed", "num_images", "batch_size", "dtype", "compile", "channels_last")
    optional = {"attention": cfg["attention"]} if cfg["attention"] else {}
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
            # left out where it does nothing: so the run is what it was before there was the option
            lml.pop("length", None)
            lml |= {"length": lengths} if set(lengths) != {1.0} else {}
        except ValueError as error:  # a list for another number of steps
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
    """What is known of a run before a network is loaded."""

    cfg: Mapping[str, Any]
    model: Model
    prompts: prompt_sets.PromptSet | None
    scheduler: SchedulerMixin
    steps: int
    folder: RunFolder


def plan(cfg: Mapping[str, Any], model: Model, prompts: prompt_sets.PromptSet | None) -> Plan:
    """How `cfg` is made with its model and prompts; touches nothing.

    With lml=calibrated the plan's `cfg` has the dampings that were found. UserError for what the
    solver has not, or cannot do with this model.
    """
    cfg = calibrated(cfg, model.settings)
    scheduler = make_scheduler(cfg, model)
    steps = find_steps(scheduler, cfg["nfe"], cfg["solver"]["name"])
    settings = determine(cfg, model, prompts, scheduler)
    path = cfg["run_dir"] or Path("outputs", str(cfg["name"]), settings_hash(settings)[:10])
    return Plan(cfg, model, prompts, scheduler, steps, RunFolder(str(path), settings))


# --- the run -----------------------------------------------------------------------------------


class Observer:
    """Is told how a run goes. This one only passes on what must be said."""

    def say(self, line: str) -> None:
        """Something to know that is no error."""
        print(line, file=sys.stderr, flush=True)

    def begin(self, total: int) -> None:
        """This process starts on `total` images."""

    def made(self, count: int) -> None:
        """`count` more images are made."""

    def finish(self, folder: RunFolder, timing: Mapping[str, Any]) -> None:
        """All images are there; `timing` is of those made now, {} if none was."""

    def scored(self, results: Mapping[str, dict]) -> None:
        """What the metrics say."""


def run(cfg: DictConfig, observer: Observer | None = None) -> Path:
    """Make the images that `cfg` (configs/sample.yaml) asks for, score them, and return the folder.

    Makes only what is missing. Raises UserError for bad input, RunError when the run cannot go on.
    """
    config = OmegaConf.to_container(cfg, resolve=True)
    observer = observer or Observer()
    schema.check(config, schema.Sample)
    device = use_device(config["device"], config["threads"])
    with joined():
        check_prompts(config["metrics"], bool(config["prompts"]))
        metrics = build(config["metrics"])  # before any work, since it may be a typo
        check_count(metrics, config["num_images"])
        latents = any(getattr(metric, "takes_latents", False) for metric in metrics.values())
        folder, timing = generate(config, device, observer, latents=latents)
        observer.finish(folder, timing)
        if metrics:
            reference = partial(reference_run, config, device, observer, latents=latents)
            texts = on_first(partial(prompt_sets.find, folder.images))
            again = partial(replay, config, device)
            context = Context(reference, device, prompts=texts, replay=again, say=observer.say)
            manifest = on_first(folder.read_manifest)
            results = evaluate(folder.images, metrics, context=context)
            observer.scored(results)  # first: should the disk be full, they have been seen
            results = _sealed(results, config["metrics"], folder)
            on_first(partial(folder.add_metrics, results, manifest))
    return folder.path


def is_finished(folder: RunFolder, metrics: Mapping[str, Any]) -> bool:
    """Whether the run has all its images, and scores of all that the config `metrics` describes.

    Images that were touched since are read again; scores count with their seals.
    """
    if any(folder.changes(quick=True)):
        return False
    results = read_json(folder.path / "metrics.json")
    for name, config in metrics.items():
        entry, digest = results.get(name), settings_hash(config)
        if not isinstance(entry, dict) or why_not_sealed(entry, folder.hash, name):
            return False
        # What older versions of scripts/evaluate.py scored does not say how it was asked for.
        if schema.find(schema.Score, entry, name):
            return False
        if entry.get("config_sha256", digest) != digest:
            return False
    return True


def evaluate_folder(cfg: DictConfig, observer: Observer | None = None) -> Path:
    """Score a run, or any folder of images (configs/evaluate.yaml), and return the JSON file."""
    config = OmegaConf.to_container(cfg, resolve=True)
    schema.check(config, schema.Evaluate)
    observer = observer or Observer()
    run_dir, images, out = (config[key] for key in ("run_dir", "images", "out"))
    if (run_dir is None) == (images is None):
        raise UserError(f"run_dir={run_dir}: one of run_dir and images is asked (images={images})")
    device = use_device(config["device"], config["threads"])
    reference, again, run = None, None, None
    if run_dir is not None:
        images = Path(run_dir) / "images"
        latents = (Path(run_dir) / LATENTS).is_dir()

        def reference(**options: Any) -> Path:
            return reference_run(read_made(run_dir), device, observer, latents=latents, **options)

        def again(count: int) -> Replay:
            return replay(read_made(run_dir), device, count)

        made = read_config(run_dir)  # it is a run's; what is made counts only where a metric asks
        if not read_json(Path(run_dir) / "manifest.json", schema.Manifest).get("complete"):
            raise UserError(
                f"run_dir={run_dir}: not complete; finish the run, or give images={images}"
            )
        check_recorded(run_dir, made)
        run = RunFolder(run_dir, made["settings"])
        default = Path(run_dir) / "metrics.json"
    else:
        # Not among the images: a run, and what is exported of it, refuse files that aren't theirs.
        folder = Path(os.path.abspath(images))
        default = folder.parent / f"{folder.name}.metrics.json"
    out = Path(out) if out else default
    is_runs = run is not None and out.resolve() == default.resolve()
    if not is_runs:
        check_output(out, "out")
    if Path(images).is_dir() and not os.access(out.parent, os.W_OK):
        raise UserError(f"out={out}: {out.parent} cannot be written to; give out=FILE elsewhere")
    read_metrics(out, f"out={out}")
    with joined():
        manifest = on_first(partial(_check_images, run, images)) if run is not None else {}
        texts = on_first(partial(prompt_sets.find, images, config["prompts"]))
        context = Context(reference, device, config["batch_size"], texts, again, observer.say)
        results = evaluate(images, config["metrics"], context=context)
        observer.scored(results)  # first: should the disk be full, they have been seen
        if run is not None:
            results = _sealed(results, config["metrics"], run)
        if is_runs:
            on_first(partial(run.add_metrics, results, manifest))
        else:
            on_first(partial(_add_apart, out, results))
    return out


def _check_images(run: RunFolder, images: Path) -> dict[str, Any]:
    """The manifest of a run whose images are those that it made. UserError if they aren't."""
    manifest = run.read_manifest()
    if change := next(run.changes(), None):
        raise UserError(
            f"run_dir={run.path}: {change}; the same command as before mends the run, and "
            f"images={images} scores them as they are"
        )
    return manifest


def _add_apart(out: Path, results: Mapping[str, dict]) -> None:
    with hold(FileLock(out.with_name(f".{out.name}.lock")), f"out={out}"):
        merge_metrics(out, results, f"out={out}")


def _sealed(
    results: Mapping[str, dict], metrics: Mapping[str, Any], run: RunFolder
) -> dict[str, dict]:
    """The results of the config `metrics`: how they were asked for, and the run's seal."""
    asked = {name: {"config_sha256": settings_hash(metrics[name])} for name in results}
    return {name: sealed(entry | asked[name], run.hash, name) for name, entry in results.items()}


def read_made(run_dir: str | Path) -> dict[str, Any]:
    """What is made of config.yaml when the run in the folder is made again, whoever made it first.

    UserError when it was edited after the run, or has things made that are none of ours.
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

    With `latents`, those are beside them, if the model has any.
    They are made under outputs/reference, or found there. Returns their folder.
    """
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
    # Other jobs of a sweep may need the same reference at the same time.
    return generate(fine, device, observer, wait=True, latents=latents)[0].images


def replay(config: Mapping[str, Any], device: torch.device, count: int) -> Replay:
    """The first `count` samples of the run `config` again: same noise, solver and LML, not stored.

    In batches of the run's size, so that with `count` below it numbers may differ by rounding.
    UserError for a run on the disk that would now come out differently.
    """
    model = find(config["model"])
    planned = plan(config, model, choose_prompts(config, model))
    settings = planned.folder.settings
    if found := differences(settings, config.get("settings", settings)):
        path, reason = planned.folder.path, "; ".join(found[:2])
        raise UserError(f"run_dir={path}: its images can't be made again now ({reason})")
    share, scheduler = Share(device=device, **vars(planned), stored=set()), planned.scheduler
    sampler = share.sampler()

    def batches() -> Iterator[Trajectory]:
        rank, world = rank_and_world()
        for block in share.blocks(count)[rank::world]:
            with record(sampler.network, scheduler) as trajectory:
                trajectory.images = share.images(sampler, block)
            yield trajectory

    return Replay(sampler.network, scheduler, scheduler.timesteps.tolist(), count, batches())


def generate(
    cfg: Mapping[str, Any],
    device: torch.device,
    observer: Observer,
    wait: bool = False,
    latents: bool = False,
) -> tuple[RunFolder, dict[str, Any]]:
    """The run folder with all its images, and the timing of those made now ({} if none was).

    With `wait`, a process that makes the same run is let finish, and not an error. With `latents`,
    those that images were decoded from are kept beside them, if the model has any.
    """
    rank, _ = rank_and_world()
    model = find(cfg["model"])
    planned = plan(cfg, model, choose_prompts(cfg, model))
    folder, count = planned.folder, cfg["num_images"]
    latents = latents and model.has_latents
    stored = on_first(partial(_open, folder, planned.cfg, observer, wait, latents))
    try:
        timing = {}
        if len(stored) < count:
            share = Share(device=device, **vars(planned), stored=stored, latents=latents)
            timing = share.make(observer)
        if rank == 0:
            _finish(folder, count, planned.prompts, timing)
        return folder, timing
    except BaseException as error:
        if rank == 0 and not folder.is_replacing:
            with contextlib.suppress(UserError, OSError):
                done = folder.write_manifest(count, finished=False)
                if isinstance(error, KeyboardInterrupt):
                    error.args = (
                        f"interrupted: {done} of {count} images stored; "
                        "the same command completes the run",
                    )
        raise
    finally:
        if rank == 0:
            folder.close()


def _open(
    folder: RunFolder, cfg: Mapping[str, Any], observer: Observer, wait: bool, latents: bool
) -> set[int]:
    count = cfg["num_images"]
    folder.open({**cfg, "provenance": provenance()}, cfg["overwrite"], wait)
    try:
        if cfg.get("metrics") and not cfg["overwrite"]:  # before there is anything to add
            path = folder.path / "metrics.json"
            read_metrics(path, f"run_dir={folder.path}: {path.name}")
        stored, broken = folder.survey(count)
        complete = folder.read_manifest().get("complete")
    except BaseException:
        folder.close()
        raise
    if broken:
        more = f" and {len(broken) - 5} more" if len(broken) > 5 else ""
        names = ", ".join(broken[:5])
        observer.say(f"{folder.images}: broken or not this run's, made again: {names}{more}")
    if len(stored) == count and not complete and not (folder.path / "timing.json").exists():
        # Cut after its last image: the last batch again, so that there is a time to tell.
        stored -= set(range(count - 1 - (count - 1) % cfg["batch_size"], count))
    # An image whose latents are asked for and were not kept is made again, the same.
    return {i for i in stored if not latents or folder.latents_path(i).exists()}


_loaded: dict[str, Sampler] = {}  # the last one: the runs of a sweep share it, compiled


def load_sampler(cfg: Mapping[str, Any], model: Model, device: torch.device) -> Sampler:
    """The loaded model; it is kept for the next run."""
    options = (device, DTYPES[cfg["dtype"]], cfg["channels_last"], cfg["compile"])
    key = canonical({"config": cfg["model"], **model.settings, "options": str(options)})
    if key not in _loaded:
        _loaded.clear()
        with _enough_memory(cfg, model, device):
            _loaded[key] = model.sampler(*options)
    return _loaded[key]


@contextlib.contextmanager
def guarded(cfg: Mapping[str, Any], model: Model, device: torch.device) -> Iterator[None]:
    """Samples of the model are made inside, with the attention that `cfg` asks for.

    RunError for too little memory, and for what other people's code stumbles on.
    """
    name = cfg["attention"]
    attention = sdpa_kernel(ATTENTION[name]) if name else contextlib.nullcontext()
    try:
        with attention, _enough_memory(cfg, model, device):
            yield
    except RuntimeError as error:
        if re.search("No (available kernel|viable backend)", str(error)):
            raise RunError(f"attention={name}: not for this model, type and device") from None
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            _refuse(error, model)
        reason = first_line(error)
        raise RunError(f"compile=true: torch.compile fails here ({reason})") from None
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        _refuse(error, model)


@contextlib.contextmanager
def _enough_memory(cfg: Mapping[str, Any], model: Model, device: torch.device) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_memory(error):
            raise
        less = ["a smaller batch_size", "dtype=bfloat16"]
        if "cpu_offload" in cfg["model"]:
            less += ["model.slicing=true", "model.cpu_offload=true"]
        raise RunError(
            f"batch_size={cfg['batch_size']}: too large for {model.name} and the memory of "
            f"{device}; what takes less: {', '.join(less)}"
        ) from None


def _refuse(error: Exception, model: Model) -> NoReturn:
    """RunError where other people's code raised it, as on a network's config; else `error`."""
    last = error.__traceback__
    while last.tb_next is not None:
        last = last.tb_next
    where = last.tb_frame.f_globals.get("__name__", "")
    if isinstance(error, UserError) or where.partition(".")[0] == "lml":
        raise error
    raise RunError(
        f"model={model.name}: fails in {where} ({first_line(error)}); the configs of its "
        "parts may not be those of its weights; HYDRA_FULL_ERROR=1 shows where"
    ) from error


@dataclass
class Share:
    """What one of N processes makes of a run: each Nth of the blocks that miss an image."""

    cfg: Mapping[str, Any]
    device: torch.device
    model: Model
    prompts: prompt_sets.PromptSet | None
    scheduler: SchedulerMixin
    steps: int
    folder: RunFolder
    stored: set[int]
    latents: bool = False  # keep them, too

    def make(self, observer: Observer) -> dict[str, Any]:
        """Make and store the images that are missing; returns the timing of all processes."""
        rank, world = rank_and_world()
        blocks = self.blocks(self.cfg["num_images"])
        blocks = [block for block in blocks if not self.stored.issuperset(block)][rank::world]
        sampler = self.sampler() if blocks else None
        if sampler and self.prompts is not None and rank == 0:
            for line in sampler.cut(self.prompts.texts):
                observer.say(line)
        watch = Stopwatch(self.device)
        if blocks:
            watch.attach(sampler.network, "network", count=True)
            for name, network in sampler.parts.items():
                watch.attach(network, name)
            if isinstance(correction := getattr(self.scheduler, "correction", None), nn.Module):
                watch.attach(correction, "correction")
        observer.begin(sum(map(len, blocks)))
        start = time.perf_counter()
        with contextlib.closing(watch), Writer(self.folder) as writer:
            # A block is made whole, even if one image is missing: its composition is fixed.
            batches = ((block, self._batch(sampler, block, watch)) for block in blocks)
            if self.cfg["overwrite"]:
                # What cannot be made, for whatever reason, replaces nothing.
                batches = itertools.chain(list(itertools.islice(batches, 1)), batches)
                on_first(self.folder.begin)
            for block, pixels in batches:
                latents = [None] * len(block)
                if self.latents:
                    latents = sampler.latents.float().cpu().numpy()
                with watch.measure("writing"):
                    made = zip(block, pixels, latents, strict=True)
                    writer.submit(image for image in made if image[0] not in self.stored)
                observer.made(len(block))
            with watch.measure("writing"):
                writer.wait()
        guided = bool(sampler and sampler.guided)
        return self._timing(watch, sum(map(len, blocks)), time.perf_counter() - start, guided)

    def measure(self) -> float:
        """Network evaluations per second of this process, as `nfe` counts them: of its first batch.

        The network stays loaded, compiled for the size of batch that the run has.
        """
        sampler, block = self.sampler(), range(min(self.cfg["batch_size"], self.cfg["num_images"]))
        replace(self, steps=min(2, self.steps))._batch(sampler, block, Stopwatch(self.device))
        start = time.perf_counter()
        self._batch(sampler, block, Stopwatch(self.device))
        return self.cfg["nfe"] * len(block) / (time.perf_counter() - start)

    def sampler(self) -> Sampler:
        """The loaded model; it is kept for the next run."""
        return load_sampler(self.cfg, self.model, self.device)

    def blocks(self, count: int) -> list[range]:
        """The first `count` images in batches."""
        size = self.cfg["batch_size"]
        return [range(i, min(i + size, count)) for i in range(0, count, size)]

    def _batch(self, sampler: Sampler, block: range, watch: Stopwatch) -> np.ndarray:
        with watch.measure("sampling"):
            images = self.images(sampler, block)
        return pixel.to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()

    def images(self, sampler: Sampler, block: range) -> Tensor:
        """Those of the numbers in `block`, (B, C, H, W) in about [-1, 1]."""
        seeds = [self.cfg["seed"] + i for i in block]
        prompts = None if self.prompts is None else self.prompts[block.start : block.stop].texts
        options = self.cfg["solver"].get("step") or {}
        with guarded(self.cfg, self.model, self.device):
            try:
                with _finite_images(sampler, self.scheduler) as checked:
                    return checked(sampler(self.scheduler, self.steps, seeds, prompts, **options))
            except FloatingPointError as error:
                raise RunError(
                    f"model={self.model.name}: {error}; images {block[0]} to {block[-1]} not stored"
                ) from None

    def _timing(
        self, watch: Stopwatch, images: int, seconds: float, guided: bool
    ) -> dict[str, Any]:
        shares = gather((watch.seconds(), watch.evaluations, images, seconds, guided))
        parts = sum((share[0] for share in shares), Counter())
        evaluations, images = (sum(share[i] for share in shares) for i in (1, 2))
        per_image, nfe = evaluations / images, self.cfg["nfe"]
        # Most guided models are evaluated with and without the prompt; some take guidance as input.
        if per_image not in (nfe, 2 * nfe if any(share[4] for share in shares) else nfe):
            raise RuntimeError(f"nfe={nfe}, but {per_image:g} evaluations were counted")
        total = sum(share[3] for share in shares)
        known = ("sampling", "network", "correction", "writing")
        others = {name: value for name, value in parts.items() if name not in known}
        inside = parts["network"] + sum(others.values())
        seconds = {
            "network": parts["network"],
            **others,
            "correction": parts["correction"],
            "solver": parts["sampling"] - inside - parts["correction"],
            "writing": parts["writing"],
            "other": total - parts["sampling"] - parts["writing"],
            "total": total,
        }
        return {
            "images": images,
            "images_per_second": round(images / max(share[3] for share in shares), 3),
            "evaluations_per_image": nfe,
            "guidance_evaluations_per_image": per_image - nfe,
            "seconds": {name: round(value, 4) for name, value in seconds.items()},
            "outside_network": round(1 - inside / total, 4),
            "processes": len(shares),
            "threads": torch.get_num_threads(),
            "device": str(self.device),
        }


@contextlib.contextmanager
def _finite_images(
    sampler: Sampler, scheduler: SchedulerMixin
) -> Iterator[Callable[[Tensor], Tensor]]:
    """A function that returns images of `sampler` if all their pixels are finite.

    FloatingPointError when they aren't, or when a decoder inside returned what isn't: pipelines cut
    infinite values to white. Not where the scheduler `may_diverge` and its latents have.
    """
    decoded: list[Tensor] = []

    def look(_: nn.Module, args: tuple, output: Tensor) -> None:
        decoded.append(output.isfinite().all())

    def checked(images: Tensor) -> Tensor:
        latents = sampler.latents
        if torch.stack([images.isfinite().all(), *decoded]).all():
            return images
        if latents is not None and latents.isfinite().all():
            raise FloatingPointError("the decoder returned NaN or inf")
        if not getattr(scheduler, "may_diverge", False):
            raise FloatingPointError("the solver returned NaN or inf")
        return images

    decoder = sampler.parts.get("decoder")
    hook = None if decoder is None else decoder.register_forward_hook(look)
    try:
        yield checked
    finally:
        if hook is not None:
            hook.remove()


def _finish(
    folder: RunFolder, count: int, prompts: prompt_sets.PromptSet | None, timing: Mapping[str, Any]
) -> None:
    if timing:
        write_json(folder.path / "timing.json", sealed(timing, folder.hash, "timing"))
    if prompts is not None:
        write_atomic(folder.path / prompt_sets.FILE, prompts.to_jsonl())
    if timing or not (folder.path / "grid.png").exists():
        write_atomic(folder.path / "grid.png", draw_grid(folder, min(count, 64)))
    # Last, since it says that all is there.
    if timing or not folder.read_manifest().get("complete"):
        folder.write_manifest(count)


def draw_grid(folder: RunFolder, count: int) -> bytes:
    """A PNG of the first `count` images in a square grid."""
    images = torch.stack([read(folder.image_path(i)) for i in range(count)])
    grid = make_grid(images, nrow=math.ceil(math.sqrt(count)), padding=2, pad_value=255)
    buffer = io.BytesIO()
    Image.fromarray(grid.permute(1, 2, 0).numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def provenance() -> dict[str, Any]:
    """The command line, package versions and git commit of this run."""
    versions = {"python": platform.python_version(), "lml": __version__}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {"command": command_line(), "versions": versions, "git": _commit()}


def command_line() -> str:
    """What was typed."""
    return shlex.join(["python", *sys.argv])


def _commit() -> str | None:
    def git(*command: str) -> str:
        arguments = ["git", "-C", str(ROOT), *command]
        return subprocess.run(
            arguments, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + (" with changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None
