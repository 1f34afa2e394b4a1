"""Calibrations on the disk: the settings that they belong to, and how to find them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lml.correction import METHOD_VERSION
from lml.data.assets import ROOT
from lml.errors import UserError
from lml.files import read_object
from lml.schema import LML, CalibrationFile
from lml.seals import differences, sealed, settings_hash, why_not_sealed

FILE = "calibration.json"
PLACES = ("outputs/calibrations", "assets/calibrations")
CHOSEN_BY_IT = (
    *("name", "calibration", "objective"),
    *("rank", "damping", "damping_scale", "length"),
)


class NoCalibrationError(UserError):
    """There is no calibration for the runs `cfgs`. The message says how to make them."""

    def __init__(self, cfgs: Sequence[Mapping[str, Any]]):
        self.cfgs = cfgs
        which, what = "these settings", "one"
        if len(cfgs) > 1:
            which, what = f"the settings of {len(cfgs)} cells", "them"
        super().__init__(
            f"lml=calibrated: no calibration for {which}; make {what}: {self._command()}"
        )

    def _command(self) -> str:
        first = self.cfgs[0]
        axes = {
            "model": [cfg["model"]["name"] for cfg in self.cfgs],
            "solver": [cfg["solver"]["name"] for cfg in self.cfgs],
            "grid": [cfg["grid"].get("name", "default") for cfg in self.cfgs],
            "nfe": [cfg["nfe"] for cfg in self.cfgs],
        }
        choices = {key: ",".join(map(str, dict.fromkeys(axis))) for key, axis in axes.items()}
        if first["model"].get("path"):
            choices["model.path"] = first["model"]["path"]
        if prompts := first["prompts"]:
            choices["model.guidance_scale"] = first["model"]["guidance_scale"]
            choices["prompts"] = prompts["_target_"].rpartition(".")[2]
            kept = {f"prompts.{key}": value for key, value in prompts.items()}
            choices |= {key: kept[key] for key in ("prompts.file", "prompts.path") if key in kept}
        swept = " -m" if any("," in str(choice) for choice in choices.values()) else ""
        words = (shlex.quote(f"{key}={value}") for key, value in choices.items())
        return " ".join([f"python scripts/calibrate.py{swept}", *words])


def settings_of(cfg: Mapping[str, Any], model: Mapping[str, Any], objective: str) -> dict[str, Any]:
    """The settings of a run that identify its calibration. `model` are the model's settings."""
    return {
        "model": dict(model),
        "solver": {key: cfg["solver"].get(key) or {} for key in ("scheduler", "step")},
        "grid": {key: value for key, value in cfg["grid"].items() if key != "name"},
        "nfe": cfg["nfe"],
        "lml": {key: value for key, value in cfg["lml"].items() if key not in CHOSEN_BY_IT},
        "objective": objective,
        "method_version": METHOD_VERSION,
    }


def folder_name(cfg: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """The name of the folder of a calibration with these settings; it ends with their hash."""
    parts = (
        cfg["model"]["name"],
        cfg["solver"]["name"],
        cfg["grid"].get("name", "default"),
        cfg["nfe"],
        settings["objective"],
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
    """`cfg` with the options of its calibration in `lml`; without lml=calibrated, a copy of `cfg`.

    `model` are the model's settings. UserError if there is no calibration for these settings, or
    if the file `lml.calibration` is for other settings.
    """
    lml = cfg["lml"]
    if "calibration" not in lml:
        return dict(cfg)
    settings = settings_of(cfg, model, lml.get("objective", LML.objective))
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
    objective = settings["objective"]
    name = "calibrated" if objective == LML.objective else f"calibrated ({objective})"
    return {**cfg, "lml": {"name": name, **rest, **values["lml"]}}
