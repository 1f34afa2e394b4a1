"""What a table calls a setting: by what differs from the configs that ship today."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf

from lml.configs import CONFIGS, compose
from lml.correction import METHOD_VERSION
from lml.seals import canonical

OFF, DEFAULT, PUBLISHED, CALIBRATED = "off", "default", "published", "calibrated"

CALIBRATIONS = (CALIBRATED, f"{CALIBRATED} (features)")  # by the objective

PRESETS = (DEFAULT, PUBLISHED)

# What people call them. Figures say these names; tables say those of the configs, which are typed.

SOLVERS = {
    "ddim": "DDIM",
    "ddim_released": "DDIM (released)",
    "deis": "DEIS-{order}",
    "dpmsolver": "DPM-Solver-{order}",
    "dpmsolver_released": "DPM-Solver-{order} (released)",
    "dpmsolver_singlestep": "DPM-Solver++({order}S)",
    "dpmsolverpp": "DPM-Solver++({order}M)",
    "euler": "Euler",
    "flow_euler": "Euler (flow matching)",
    "heun": "Heun",
    "ipndm": "iPNDM-4",
    "ipndm_diffusers": "iPNDM-4 (diffusers)",
    "pndm": "PNDM",
    "unipc": "UniPC-{order}",
}
GRIDS = {
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
}


@functools.cache
def lml_label(options: str, solver: str, nfe: int) -> str:
    """ "off", a preset, "calibrated", or what differs: "rank=3, damping=16".

    `options` are those of the config group `lml`, as JSON.
    """
    ours = _plain(json.loads(options))
    if not ours.get("rank"):
        return OFF
    # The numbers of runs from before it was kept are those of version 1.
    version = ours.pop("method_version", 1)
    older = [] if version == METHOD_VERSION else [f"method {version}"]
    if (name := ours.pop("name", None)) in CALIBRATIONS:  # the dampings are each run's own
        return ", ".join([name, *older])
    changes = {name: _changes(ours, _preset(name, solver, nfe)) for name in PRESETS}
    name = min(changes, key=lambda name: len(changes[name]))
    base = [] if name == DEFAULT and changes[name] else [name]
    return ", ".join([*base, *changes[name], *older])


def _preset(name: str, solver: str, nfe: int) -> dict[str, Any]:
    # what it refers to: the published target is the solver's, its damping that of the evaluations
    around = {"solver": {}, **_option("solver", solver), "nfe": nfe}
    cfg = OmegaConf.create({**_option("lml", name), **around})
    return _plain(OmegaConf.to_container(cfg.lml, resolve=True))


def _plain(lml: dict[str, Any]) -> dict[str, Any]:
    # Runs from before there was the option do not say that it was 1.
    return {key: value for key, value in lml.items() if (key, value) != ("length", 1.0)}


@functools.cache
def solver_label(name: str, options: str) -> str:
    """The solver's name, and which of its `options` (scheduler and step, as JSON) are its own."""
    config = _option("solver", name).get("solver")
    if config is None:
        return name
    ours = json.loads(options)
    scheduler, step = (_changes(ours[k], config.get(k) or {}) for k in ("scheduler", "step"))
    return ", ".join([name, *scheduler, *step])


@functools.cache
def _option(group: str, name: str) -> dict[str, Any]:
    """What the option adds to a config, not resolved; nothing where the group has none such."""
    # by the names that there are: `name` may be what somebody else's run says
    if name not in [file.stem for file in (CONFIGS / group).glob("*.yaml")]:
        return {}
    return OmegaConf.to_container(compose(f"+{group}={name}"))


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
    """Sorts LML's labels: off, published, default, and the others by their numbers."""
    first = [OFF, PUBLISHED, DEFAULT, *CALIBRATIONS]
    padded = re.sub(r"\d+(\.\d+)?", lambda number: f"{float(number[0]):014.6f}", label)
    return (first.index(label) if label in first else len(first), padded)


# --- names that people write -------------------------------------------------------------------


def version_of(label: str) -> tuple[str, str]:
    """LML's label without the method's version, and ", method 1" (or "" for that of today)."""
    plain, version = re.fullmatch(r"(.*?)(, method \d+)?", label).groups()
    return plain, version or ""


def metric_name(metric: str) -> str:
    """ "FD-CIFAR" for fd_cifar; of a metric that is not known, its own name in words."""
    return METRICS.get(metric, metric.replace("/", ", ").replace("_", " "))


def grid_name(grid: str) -> str:
    """ "Karras" for karras."""
    return GRIDS.get(grid, grid.replace("_", " "))


def solver_name(label: str) -> str:
    """ "DPM-Solver++(2M)" for what `solver_label` says, here "dpmsolverpp, solver_order=2"."""
    name, *changes = label.split(", ")
    # the class of another version of this project is no setting
    changes = [change for change in changes if not change.startswith("_target_=")]
    known = SOLVERS.get(name, name)
    if "{order}" in known:
        own = [change for change in changes if change.startswith("solver_order=")]
        changes = [change for change in changes if change not in own]
        scheduler = _option("solver", name)["solver"]["scheduler"]
        order = own[0].partition("=")[2] if own else scheduler["solver_order"]
        known = known.format(order=order)
    return ", ".join([known, *map(_words, changes)])


def lml_name(label: str) -> str:
    """What `lml_label` says, in words: "rank 3, damping 16"."""
    return _words(label.replace("norm_preserving=False", "norm not preserved"))


def _words(change: str) -> str:
    return change.replace("=", " ").replace("_", " ")
