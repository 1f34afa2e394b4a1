"""The labels of settings in tables: their differences from the configs of today."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from typing import Any, get_args

from omegaconf import OmegaConf

from lml import configs
from lml.calibration.stored import calibrated_name
from lml.correction import METHOD_VERSION
from lml.schema import CalibrationObjective
from lml.seals import canonical

OFF, DEFAULT, PUBLISHED = "off", "default", "published"

CALIBRATIONS = tuple(
    calibrated_name({"objective": objective, "timesteps": timesteps})
    for timesteps in (False, True)
    for objective in get_args(CalibrationObjective)
)

PRESETS = (DEFAULT, PUBLISHED)

# The usual names, for figures; a solver's is the `title` of its config. Tables have the names of
# the configs, which users type.

GRIDS = {
    "ays": "Align Your Steps",
    "default": "default grid",
    "karras": "Karras",
    "lu": "uniform log-SNR",
    "model": "model's grid",
}
MODELS = {
    "cifar10": "embedded CIFAR-10",
    "gaussian": "Gaussian",
    "ideal_cifar10": "ideal CIFAR-10",
}
METRICS = {
    "clip_cosine": "CLIP cosine",
    "clip_score": "CLIP score",
    "cmmd": "CMMD",
    "convergence/cosine": "cosine to the fine solution",
    "convergence/latent_cosine": "cosine of the latents to the fine solution",
    "convergence/latent_rmse": "error of the latents to the fine solution (RMSE)",
    "convergence/rmse": "error to the fine solution (RMSE)",
    "correction_cosine/cosine": "cosine of the corrected to the given direction",
    "correction_cosine/min": "least cosine of the corrected to the given direction",
    "correction_cosine/non_finite": "images that are not finite",
    "fd_cifar": "FD-CIFAR",
    "fd_cifar_matched": "FD-CIFAR at matched contrast",
    "fd_dinov2": "FD-DINOv2",
    "fid": "FID",
    "hessian/angle_corrected": "angle of the corrected direction to Newton's (degrees)",
    "hessian/angle_prediction": "angle of the prediction to Newton's direction (degrees)",
    "hessian/hilbert_schmidt": "Hilbert-Schmidt distance of LML's to the true Hessian",
    "hessian/hilbert_schmidt_identity": "Hilbert-Schmidt distance of c I to the true Hessian",
    "hessian/hilbert_schmidt_scaled": "Hilbert-Schmidt distance of c H to the true Hessian",
    "hessian/indefinite": "share of indefinite damped Hessians",
    "hessian/spectral": "spectral distance of LML's to the true Hessian",
    "hessian/spectral_identity": "spectral distance of c I to the true Hessian",
    "hessian/spectral_scaled": "spectral distance of c H to the true Hessian",
    "ideal_direction/angle_corrected": "angle of the corrected to the ideal direction (degrees)",
    "ideal_direction/angle_prediction": "angle of the prediction to the ideal direction (degrees)",
    "ideal_direction/angle_step": "angle of the step to the ideal direction (degrees)",
    "ideal_direction/corrected": "cosine of the corrected to the ideal direction",
    "ideal_direction/prediction": "cosine of the prediction to the ideal direction",
    "ideal_direction/step": "cosine of the step to the ideal direction",
    "image_reward/mean": "ImageReward",
    "image_reward/std": "ImageReward, deviation over images",
    "inception_score/mean": "Inception score",
    "inception_score/std": "Inception score, deviation over splits",
    "kid/mean": "KID",
    "kid/std": "KID, deviation over subsets",
    "lpips_diversity": "LPIPS diversity",
    "precision_recall/f_score": "F-score of precision and recall",
    "precision_recall/precision": "precision",
    "precision_recall/recall": "recall",
    "t2i_compbench/3d_spatial": "T2I-CompBench 3D spatial (UniDet)",
    "t2i_compbench/color": "T2I-CompBench color (BLIP-VQA)",
    "t2i_compbench/complex": "T2I-CompBench complex (3-in-1)",
    "t2i_compbench/non_spatial": "T2I-CompBench non-spatial (CLIPScore)",
    "t2i_compbench/numeracy": "T2I-CompBench numeracy (UniDet)",
    "t2i_compbench/shape": "T2I-CompBench shape (BLIP-VQA)",
    "t2i_compbench/spatial": "T2I-CompBench spatial (UniDet)",
    "t2i_compbench/texture": "T2I-CompBench texture (BLIP-VQA)",
}


def lml_of_run(config: Mapping[str, Any]) -> dict[str, Any]:
    """LML's options of a run's config.yaml, with the method's version, where it says one."""
    settings = config["settings"]
    version = {key: settings[key] for key in ("method_version",) if key in settings}
    return {**config["lml"], **version}


def is_off(lml: Mapping[str, Any]) -> bool:
    """Whether a run has neither a correction nor timesteps that a calibration found."""
    return not lml.get("rank") and "timesteps" not in str(lml.get("name"))


@functools.cache
def lml_label(options: str, solver: str, nfe: int, model: str) -> str:
    """ "off", a preset, "calibrated", or the differences: "rank=3, damping=16".

    `options` are those of the config group `lml`, as JSON; `solver` and `model` are names.
    """
    ours = _plain(json.loads(options))
    if is_off(ours):
        return OFF
    # Runs older than this key are of version 1. Without a correction there is no version.
    version = ours.pop("method_version", 1) if ours.get("rank") else METHOD_VERSION
    older = [] if version == METHOD_VERSION else [f"method {version}"]
    name = ours.pop("name", None)
    if "calibration" in ours:  # of a cell that has no calibration
        name = calibrated_name(ours)
    if name in CALIBRATIONS:  # dampings differ from run to run
        return ", ".join([name, *older])
    changes = {name: _changes(ours, _preset(name, solver, nfe, model)) for name in PRESETS}
    name = min(changes, key=lambda name: len(changes[name]))
    base = [] if name == DEFAULT and changes[name] else [name]
    return ", ".join([*base, *changes[name], *older])


def _preset(name: str, solver: str, nfe: int, model: str) -> dict[str, Any]:
    # the published target belongs to the solver, the published damping to the model and nfe
    around = {"solver": _option("solver", solver), "model": _option("model", model), "nfe": nfe}
    cfg = OmegaConf.create({"lml": _option("lml", name), **around})
    return _plain(OmegaConf.to_container(cfg.lml, resolve=True))


def _plain(lml: dict[str, Any]) -> dict[str, Any]:
    # Runs older than this option do not say that it was 1.
    return {key: value for key, value in lml.items() if (key, value) != ("length", 1.0)}


@functools.cache
def solver_label(name: str, options: str) -> str:
    """The solver's name, and those `options` (scheduler and step, as JSON) that differ."""
    if not (config := _option("solver", name)):
        return name
    ours = json.loads(options)
    parts = ((ours[k], config.get(k) or {}) for k in ("scheduler", "step"))
    scheduler, step = (_changes(_moved(a), _moved(b)) for a, b in parts)
    return ", ".join([name, *scheduler, *step])


def _moved(options: Mapping[str, Any]) -> dict[str, Any]:
    """Without the module of the class: one that has moved since is the same."""
    short = {k: v.rpartition(".")[2] for k, v in options.items() if k == "_target_"}
    return {**options, **short}


@functools.cache
def _option(group: str, name: str) -> dict[str, Any]:
    """The config of an option, not resolved; {} if the group does not have it."""
    # only existing names are composed: `name` may come from somebody else's run
    if name not in configs.names(group):
        return {}
    return OmegaConf.to_container(configs.option(group, name))


def _changes(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    changed = []
    for key in [*theirs, *(key for key in ours if key not in theirs)]:
        a, b = ours.get(key, "unset"), theirs.get(key, "unset")
        if canonical({"": a}) != canonical({"": b}):
            changed.append(f"{key}={_text(a)}")
    return changed


def _text(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def order(label: str) -> tuple[int, str]:
    """Sorts LML's labels: off, published, default, and the others by their numbers.

    A preset of another version of the method stands where it stood.
    """
    first = [OFF, PUBLISHED, DEFAULT, *CALIBRATIONS]
    padded = re.sub(r"\d+(\.\d+)?", lambda number: f"{float(number[0]):014.6f}", label)
    plain, _ = version_of(label)
    return (first.index(plain) if plain in first else len(first), padded)


# --- names that people write -------------------------------------------------------------------


def version_of(label: str) -> tuple[str, str]:
    """LML's label without the method's version, and ", method 1" (or "" for that of today)."""
    plain, version = re.fullmatch(r"(.*?)(, method \d+)?", label).groups()
    return plain, version or ""


def metric_name(metric: str) -> str:
    """ "FD-CIFAR" for fd_cifar; an unknown metric's own name in words."""
    return METRICS.get(metric, metric.replace("/", ", ").replace("_", " "))


def grid_name(grid: str) -> str:
    """ "Karras" for karras."""
    return GRIDS.get(grid, grid.replace("_", " "))


def solver_name(label: str) -> str:
    """ "DPM-Solver++(2M)" for the `solver_label` "dpmsolverpp, solver_order=2"."""
    name, *changes = label.split(", ")
    option = _option("solver", name)
    if "title" not in option:  # of somebody else's run
        return ", ".join([name, *map(_words, changes)])
    options = dict(option["scheduler"])
    for change in [c for c in changes if c.startswith("solver_order=")]:
        if "{solver_order}" in option["title"]:
            options["solver_order"] = change.partition("=")[2]
            changes.remove(change)
    return ", ".join([option["title"].format_map(options), *map(_words, changes)])


def lml_name(label: str) -> str:
    """An `lml_label` in words: "rank 3, damping 16"."""
    return _words(label.replace("norm_preserving=False", "norm not preserved"))


def _words(change: str) -> str:
    return change.replace("=", " ").replace("_", " ")
