"""The work of scripts/calibrate.py: from a config to a problem, and from its result to a file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers import SchedulerMixin
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from tqdm import tqdm

from lml import schema
from lml.calibration import objectives, stored
from lml.calibration.search import (
    CalibrationError,
    Objective,
    Problem,
    Progress,
    adds_noise,
    calibrate,
    fine_steps,
    most_evaluations,
)
from lml.correction import LMLCorrection
from lml.device import use_device
from lml.errors import UserError, first_line, say
from lml.files import disk_error, read_object, write_json
from lml.instances import make
from lml.pipelines import Model, find_model
from lml.processes import is_first, joined, on_first
from lml.runs.plan import choose_prompts
from lml.runs.records import check_output
from lml.runs.sampling import guarded, load_sampler
from lml.runs.solver import check_start, find_steps, make_scheduler, read_solver
from lml.schedulers import LMLSchedulerMixin
from lml.seals import canonical, differences, sealed, why_not_sealed

STATE = "state.json"  # from which an interrupted search continues
FINE_SOLVER = "dpmsolverpp"
PROTOCOL = (
    *("seed", "searched", "unseen", "ranks", "numbers", "rounds", "fine", "extractor"),
    *("batch_size", "dtype"),
)


def make_objective(cfg: Mapping[str, Any], model: Model, device: torch.device) -> Objective:
    """The space that samples are compared in: their own, or features of their images."""
    if cfg["extractor"] is None:
        return objectives.of_samples() if model.has_latents else objectives.of_pixels()
    network = make(cfg["extractor"], "extractor")
    if not isinstance(network, nn.Module):
        target = cfg["extractor"]["_target_"]
        raise UserError(f"extractor._target_={target}: expected a network")
    network = network.to(device).eval().requires_grad_(False)

    def extract(images: Tensor) -> Tensor:
        try:
            return network(images)
        except Exception as error:  # its layers may raise anything
            size, reason = tuple(images.shape[1:]), first_line(error)
            raise UserError(f"extractor: does not take images of {size} ({reason})") from None

    return objectives.of_features(extract, cfg["objective"])


def check(cfg: Mapping[str, Any]) -> None:
    """UserError if the config does not fit configs/calibrate.yaml, or can't be calibrated."""
    schema.check(cfg, schema.Calibrate)
    for key in ("ranks", "numbers"):
        if not cfg[key]:
            raise UserError(f"{key}=[]: expected at least one")
    if cfg["extractor"] is None and cfg["objective"] != "rmse":
        raise UserError(f"extractor=null: objective={cfg['objective']} needs a network")
    if cfg["extractor"] is not None and cfg["objective"] == "rmse":
        raise UserError("extractor: objective=rmse takes none; choose another objective first")
    check_start(cfg["model"], "a calibration")


_fine: dict[str, Tensor] = {}  # fine solutions that the cells of a sweep share


def make_problem(
    cfg: Mapping[str, Any], model: Model, scheduler: SchedulerMixin, device: torch.device
) -> Problem:
    """The problem that the config `cfg` (configs/calibrate.yaml) describes."""
    name = cfg["fine"]["solver"]
    fine = {
        **cfg,
        "solver": read_solver(name, "fine.solver"),
        "grid": {},
        "lml": {"rank": 0},
        "nfe": cfg["fine"]["nfe"],
    }
    fine_scheduler = make_scheduler(fine, model)
    count = cfg["searched"] + cfg["unseen"]
    prompts = choose_prompts({**cfg, "num_images": count}, model)
    sampler = load_sampler(cfg, model, device)
    step = cfg["solver"].get("step") or {}
    decode = cfg["extractor"] is not None

    about = {
        "model": model.settings,
        "prompts": prompts and prompts.settings,
        **{key: cfg[key] for key in ("seed", "dtype", "attention", "fine")},
    }

    def sample(solver: SchedulerMixin, steps: int, indices: Sequence[int]) -> Tensor:
        if solver is fine_scheduler:
            key = canonical({**about, "decode": decode, "indices": list(indices)})
            if key not in _fine:
                _fine[key] = solve(solver, steps, indices)
            return _fine[key]
        return solve(solver, steps, indices, **step)

    def solve(solver: SchedulerMixin, steps: int, indices: Sequence[int], **options: Any) -> Tensor:
        texts = None if prompts is None else [prompts.texts[i] for i in indices]
        seeds = [cfg["seed"] + i for i in indices]
        with guarded(cfg, model, device):
            return sampler(solver, steps, seeds, texts, decode=decode, **options).float()

    return Problem(
        sample,
        sampler.network,
        scheduler,
        find_steps(scheduler, cfg["nfe"], cfg["solver"]["name"]),
        fine_scheduler,
        find_steps(fine_scheduler, cfg["fine"]["nfe"], name),
        make_objective(cfg, model, device),
        cfg["batch_size"],
    )


def run(cfg: DictConfig) -> dict[str, Any]:
    """Make the calibration of `cfg` (configs/calibrate.yaml); returns the content of its file.

    A finished calibration is only read. An interrupted one continues.
    """
    config = OmegaConf.to_container(cfg, resolve=True)
    check(config)
    config["fine"]["nfe"] = config["fine"]["nfe"] or fine_steps(config["nfe"])
    device = use_device(config["device"], config["threads"])
    with joined():
        model = find_model(config["model"])
        config["fine"]["solver"] = config["fine"]["solver"] or _fine_solver(config, model)
        scheduler = make_scheduler({**config, "lml": {**config["lml"], "rank": 1}}, model)
        if not isinstance(scheduler, LMLSchedulerMixin):
            raise UserError(f"solver={config['solver']['name']}: has no LML to calibrate")
        if scheduler.correction_class is not LMLCorrection:
            raise UserError(
                f"solver={config['solver']['name']}: the released arithmetic cannot be calibrated; "
                "choose a solver whose name does not begin with authors_"
            )
        if adds_noise(scheduler, config["solver"].get("step") or {}):
            raise UserError(
                f"solver={config['solver']['name']}: adds noise, so no fine solution has the same "
                "noise"
            )
        if config["timesteps"]:
            stored.check_timesteps(config["solver"], "timesteps")
        settings = stored.settings_of(
            config, model.settings, config["objective"], config["timesteps"]
        )
        name = stored.folder_name(config, settings)
        folder = Path(config["run_dir"] or Path(stored.PLACES[0], name))
        whole = {"settings": settings, "protocol": {key: config[key] for key in PROTOCOL}}
        found = on_first(lambda: _open(folder, whole, config["overwrite"]))
        if found is not None:
            return found
        values = _calibrate(config, model, scheduler, whole, folder, device)
        on_first(lambda: _store(folder, values))
        return values


def _fine_solver(cfg: Mapping[str, Any], model: Model) -> str:
    """DPM-Solver++(3M), or the calibrated solver itself if the former does not fit the model."""
    solver = read_solver(FINE_SOLVER, "fine.solver")
    try:
        make_scheduler({**cfg, "solver": solver, "grid": {}, "lml": {"rank": 0}}, model)
    except UserError:
        return cfg["solver"]["name"]
    return FINE_SOLVER


def _open(folder: Path, whole: Mapping[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """The finished calibration in `folder`, which is made if there is none."""
    check_output(folder, "run_dir")
    file = folder / stored.FILE
    if file.exists() and not overwrite:
        values = stored.read(file, "run_dir")
        if found := differences(whole["settings"], values["settings"]):
            raise UserError(f"run_dir={folder}: holds another calibration ({found[0]})")
        if found := differences(whole["protocol"], values.get("protocol") or {}):
            say(f"run_dir={folder}: was made with {found[0]}; overwrite=true makes it anew")
        return values
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(folder, error) from None
    return None


def _read_state(path: Path, whole: Mapping[str, Any]) -> dict[str, Progress]:
    """The interrupted searches, by key. `whole` holds the settings and the protocol."""
    try:
        kept = read_object(path, schema.CalibrationState)
        reason = why_not_sealed(kept, STATE)
    except FileNotFoundError:
        return {}
    except UserError as error:
        kept, reason = {}, str(error).removeprefix(f"{path}: ")
    if reason:
        say(f"{path}: {reason}; the search starts anew")
        return {}
    if canonical(kept["of"]) != canonical(whole):
        return {}
    return {key: Progress(**progress) for key, progress in kept["searches"].items()}


def _store(folder: Path, values: Mapping[str, Any]) -> None:
    write_json(folder / stored.FILE, values)
    (folder / STATE).unlink(missing_ok=True)


def _calibrate(
    cfg: Mapping[str, Any],
    model: Model,
    scheduler: SchedulerMixin,
    whole: Mapping[str, Any],
    folder: Path,
    device: torch.device,
) -> dict[str, Any]:
    problem = make_problem(cfg, model, scheduler, device)
    states = on_first(lambda: _read_state(folder / STATE, whole))

    def save(states: Mapping[str, Progress]) -> None:
        if is_first():
            searches = {key: asdict(progress) for key, progress in states.items()}
            write_json(folder / STATE, sealed({"of": whole, "searches": searches}, STATE))

    searched = range(cfg["searched"])
    unseen = range(cfg["searched"], cfg["searched"] + cfg["unseen"])
    protocol = (cfg["ranks"], cfg["rounds"], cfg["timesteps"], cfg["numbers"])
    total = most_evaluations(problem, len(searched), len(unseen), *protocol)
    if is_first():
        print(f"at most {total:,} network evaluations", flush=True)
    shows = is_first() and cfg["progress"]
    bar = tqdm(total=total, unit="eval", unit_scale=True, disable=not shows)
    try:
        with bar:
            found = calibrate(problem, searched, unseen, *protocol, states, save, bar.update)
    except CalibrationError as error:
        raise UserError(f"model={model.name}: {error}") from None
    except KeyboardInterrupt as interruption:
        interruption.args = ("interrupted; the same command goes on from the last round",)
        raise
    return stored.seal(
        {
            **whole,
            "lml": found.choice.options(),
            **({"grid": grid} if (grid := found.choice.grid(scheduler)) else {}),
            **found.as_dict(),
        }
    )


def row(values: Mapping[str, Any]) -> str:
    """The result of a calibration in one line."""
    errors = {name: both["unseen"] for name, both in values["errors"].items() if both}
    off = errors["off"]
    changes = [f"{name} {error:.4f} ({_change(error, off)})" for name, error in errors.items()]
    dampings = values["calibrated"]["damping"]
    text = " ".join("-" if damping is None else f"{damping:.3g}" for damping in dampings)
    lengths = values["calibrated"].get("length") or ()
    also = f", length {' '.join(f'{length:.3g}' for length in lengths)}" if lengths else ""
    if timesteps := values["calibrated"].get("timesteps"):
        also += f", timesteps {' '.join(map(str, timesteps))}"
    return (
        f"off {off:.4f}, {', '.join(changes[1:])}: {values['chosen']}; "
        f"rank {values['calibrated']['rank']}, damping {text}{also}"
    )


def _change(error: float, off: float) -> str:
    return f"{100 * (error / off - 1):+.1f} %" if off and math.isfinite(error) else "-"


_told: list[tuple[str, int, float, str]] = []  # the cells of this sweep in this process


def tell(cfg: DictConfig, values: Mapping[str, Any]) -> None:
    """Print the result, and the best cell of a sweep so far."""
    if not is_first():
        return
    if HydraConfig.get().mode == RunMode.RUN or not HydraConfig.get().job.num:
        _told.clear()
    name = f"solver={cfg.solver.name} grid={cfg.grid.get('name', 'default')}"
    print(f"{name} nfe={cfg.nfe}: {row(values)}", flush=True)
    error = min(errors["unseen"] for errors in values["errors"].values() if errors)
    _told.append((cfg.model.name, cfg.nfe, error, f"{name} lml={values['chosen']}"))
    same = [entry for entry in _told if entry[:2] == _told[-1][:2]]
    if len(same) > 1:
        _, nfe, error, how = min(same, key=lambda entry: entry[2])
        print(f"  best of {len(same)} for nfe={nfe}: {how}, {error:.4f}", flush=True)
