"""Calibrations on the disk: the settings that they belong to, and how to find them."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lml import configs, schedulers
from lml.correction import METHOD_VERSION
from lml.data.assets import ROOT
from lml.errors import UserError
from lml.files import read_object
from lml.quoting import hydra_value, shell_quoted
from lml.schedulers.aligned import takes_option
from lml.schema import LML, CalibrationFile
from lml.seals import canonical, differences, sealed, settings_hash, why_not_sealed

FILE = "calibration.json"
PLACES = ("outputs/calibrations", "assets/calibrations")
GROUPS = ("model", "solver", "grid", "prompts")  # config groups of a run
CHOSEN_BY_IT = (
    *("name", "calibration", "objective", "timesteps"),
    *("rank", "damping", "damping_scale", "length"),
)


class NoCalibrationError(UserError):
    """There is no calibration for the runs `cfgs`. The message says how to make them."""

    def __init__(self, cfgs: Sequence[Mapping[str, Any]]):
        self.cfgs = cfgs
        which, what = "these settings", "one"
        if len(cfgs) > 1:
            which, what = f"the settings of {len(cfgs)} cells", "them"
        # a command has one model, one set of prompts and one value of each other option
        groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
        for cfg in cfgs:
            groups.setdefault(tuple(_options(cfg)), []).append(cfg)
        commands = " && ".join(_command(*group) for group in groups.items())
        super().__init__(f"lml=calibrated: no calibration for {which}; make {what}: {commands}")


def _choice(cfg: Mapping[str, Any], group: str) -> str:
    """The option of a config group that a run has."""
    if group == "prompts":
        return cfg["prompts"]["_target_"].rpartition(".")[2] if cfg["prompts"] else "none"
    return cfg[group].get("name", "default")


@functools.cache  # the cells of a sweep share it
def _composed(*words: str) -> dict[str, Any]:
    cfg = configs.compose(*words, config="calibrate")
    return OmegaConf.to_container(cfg, resolve=True)


def _options(cfg: Mapping[str, Any]) -> Iterator[str]:
    """What to type after scripts/calibrate.py for a run, beside its solver, grid and nfe."""
    choices = [f"{group}={_choice(cfg, group)}" for group in GROUPS]
    usual = _composed(*choices, f"nfe={cfg['nfe']}")
    yield choices[0]
    if cfg["prompts"]:
        yield f"prompts={_choice(cfg, 'prompts')}"
    for key in ("objective", "timesteps"):
        if (value := cfg["lml"].get(key, usual[key])) != usual[key]:
            yield f"{key}={hydra_value(value)}"
    lml = {key: value for key, value in cfg["lml"].items() if key not in CHOSEN_BY_IT}
    for group, values in {**{group: cfg[group] for group in GROUPS}, "lml": lml}.items():
        yield from _changes(values, usual[group], group)


def _changes(values: Mapping[str, Any], usual: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for key, value in values.items():
        name = f"{prefix}.{key}"
        if isinstance(value, Mapping):
            yield from _changes(value, usual.get(key) or {}, name)
        elif canonical({"": value}) != canonical({"": usual.get(key)}):
            yield f"{'' if key in usual else '+'}{name}={hydra_value(value)}"


def _command(options: Sequence[str], cfgs: Sequence[Mapping[str, Any]]) -> str:
    axes = {
        "solver": [_choice(cfg, "solver") for cfg in cfgs],
        "grid": [_choice(cfg, "grid") for cfg in cfgs],
        "nfe": [cfg["nfe"] for cfg in cfgs],
    }
    choices = {key: ",".join(map(str, dict.fromkeys(axis))) for key, axis in axes.items()}
    swept = " -m" if any("," in choice for choice in choices.values()) else ""
    model, *rest = options
    words = [model, *(f"{key}={choice}" for key, choice in choices.items()), *rest]
    return " ".join([f"python scripts/calibrate.py{swept}", *map(shell_quoted, words)])


def calibrated_name(lml: Mapping[str, Any]) -> str:
    """What a calibrated `lml` is called: "calibrated", "calibrated (features, timesteps)"."""
    objective = lml.get("objective", LML.objective)
    how = [objective] if objective != LML.objective else []
    how += ["timesteps"] if lml.get("timesteps") else []
    return f"calibrated ({', '.join(how)})" if how else "calibrated"


def check_timesteps(solver: Mapping[str, Any], key: str) -> None:
    """UserError, naming `key`, if the timesteps of the config `solver` cannot be searched."""
    if not _takes_timesteps(solver["scheduler"]["_target_"]):
        others = ", ".join(_solvers_with_timesteps())
        raise UserError(
            f"{key}=true: not with solver={solver['name']}, whose grid is fixed; with {others}"
        )


def _takes_timesteps(target: str) -> bool:
    # what is none of ours is refused where schedulers are made
    cls = vars(schedulers).get(target.removeprefix("lml.schedulers."))
    return cls is None or takes_option(cls)


def _solvers_with_timesteps() -> Iterator[str]:
    for name in configs.names("solver"):
        preset = name.startswith("authors_") or name.endswith("_calibrated")
        if not preset and _takes_timesteps(configs.option("solver", name).scheduler._target_):
            yield name


def settings_of(
    cfg: Mapping[str, Any], model: Mapping[str, Any], objective: str, timesteps: bool
) -> dict[str, Any]:
    """The settings of a run that identify its calibration. `model` are the model's settings."""
    settings = {
        "model": dict(model),
        "solver": {key: cfg["solver"].get(key) or {} for key in ("scheduler", "step")},
        "grid": {key: value for key, value in cfg["grid"].items() if key != "name"},
        "nfe": cfg["nfe"],
        "lml": {key: value for key, value in cfg["lml"].items() if key not in CHOSEN_BY_IT},
        "objective": objective,
        "method_version": METHOD_VERSION,
    }
    return {**settings, "timesteps": True} if timesteps else settings


def folder_name(cfg: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """The name of the folder of a calibration with these settings; it ends with their hash."""
    parts = (
        cfg["model"]["name"],
        cfg["solver"]["name"],
        cfg["grid"].get("name", "default"),
        cfg["nfe"],
        settings["objective"],
        *(["timesteps"] if settings.get("timesteps") else []),
        settings_hash(settings)[:10],
    )
    return "-".join(map(str, parts))


def read(path: Path, key: str) -> dict[str, Any]:
    """The values of a calibration. UserError, naming `key`, if its file is damaged or edited."""
    path = path / FILE if path.is_dir() else path
    try:
        values = read_object(path, CalibrationFile)
    except FileNotFoundError:
        raise UserError(f"{key}={path}: no such file") from None
    except UserError as error:
        raise UserError(
            f"{key}={error}; not a calibration that scripts/calibrate.py made"
        ) from None
    if reason := why_not_sealed(values, "calibration"):
        raise UserError(f"{key}={path}: {reason}; make it again")
    return values


def seal(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with the seal that `read` checks."""
    return sealed(values, "calibration")


def find_calibration(settings: Mapping[str, Any]) -> Path | None:
    """The file of the calibration with exactly these settings, or None."""
    digest = settings_hash(settings)[:10]
    for place in PLACES:
        for base in dict.fromkeys((Path.cwd(), ROOT)):
            for file in sorted(base.joinpath(place).glob(f"*-{digest}/{FILE}")):
                return file
    return None


def calibrated(cfg: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    """`cfg` with its calibration's options in `lml` and `grid`; a copy without lml=calibrated.

    `model` are the model's settings. UserError if there is no calibration for these settings, or
    if the file `lml.calibration` is for other settings.
    """
    lml = cfg["lml"]
    if "calibration" not in lml:
        return dict(cfg)
    objective = lml.get("objective", LML.objective)
    timesteps = lml.get("timesteps", LML.timesteps)
    if timesteps:
        check_timesteps(cfg["solver"], "lml.timesteps")
    settings = settings_of(cfg, model, objective, timesteps)
    if lml["calibration"] is not None:
        values = read(Path(lml["calibration"]), "lml.calibration")
        if found := differences(settings, values["settings"]):
            raise UserError(
                f"lml.calibration={lml['calibration']}: made for other settings "
                f"({'; '.join(found[:2])})"
            )
    elif (path := find_calibration(settings)) is not None:
        values = read(path, "lml.calibration")
    else:
        raise NoCalibrationError([cfg])
    rest = {key: value for key, value in lml.items() if key not in CHOSEN_BY_IT}
    name = calibrated_name(lml)
    grid = {**cfg["grid"], **(values.get("grid") or {})}
    return {**cfg, "grid": grid, "lml": {"name": name, **rest, **values["lml"]}}
