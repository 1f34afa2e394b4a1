"""What a table calls a setting: by what differs from the configs that ship today."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf

from lml import configs
from lml.correction import METHOD_VERSION
from lml.seals import canonical

OFF, DEFAULT, PUBLISHED, CALIBRATED = "off", "default", "published", "calibrated"

CALIBRATIONS = (CALIBRATED, f"{CALIBRATED} (features)")  # by the objective

PRESETS = (DEFAULT, PUBLISHED)


def lml_of_run(config: Mapping[str, Any]) -> dict[str, Any]:
    """LML's options of a run's config.yaml, with the method's version, where it says one."""
    settings = config["settings"]
    version = {key: settings[key] for key in ("method_version",) if key in settings}
    return {**config["lml"], **version}


@functools.cache
def lml_label(options: str, solver: str, nfe: int, model: str) -> str:
    """ "off", a preset, "calibrated", or what differs: "rank=3, damping=16".

    `options` are those of the config group `lml`, as JSON; `solver` and `model` are names.
    """
    ours = _plain(json.loads(options))
    if not ours.get("rank"):
        return OFF
    # The numbers of runs from before it was kept are those of version 1.
    version = ours.pop("method_version", 1)
    older = [] if version == METHOD_VERSION else [f"method {version}"]
    if (name := ours.pop("name", None)) in CALIBRATIONS:  # the dampings are each run's own
        return ", ".join([name, *older])
    changes = {name: _changes(ours, _preset(name, solver, nfe, model)) for name in PRESETS}
    name = min(changes, key=lambda name: len(changes[name]))
    base = [] if name == DEFAULT and changes[name] else [name]
    return ", ".join([*base, *changes[name], *older])


def _preset(name: str, solver: str, nfe: int, model: str) -> dict[str, Any]:
    # what it refers to: the published target is the solver's, its damping that of the model and nfe
    around = {"solver": _option("solver", solver), "model": _option("model", model), "nfe": nfe}
    cfg = OmegaConf.create({"lml": _option("lml", name), **around})
    return _plain(OmegaConf.to_container(cfg.lml, resolve=True))


def _plain(lml: dict[str, Any]) -> dict[str, Any]:
    # Runs from before there was the option do not say that it was 1.
    return {key: value for key, value in lml.items() if (key, value) != ("length", 1.0)}


@functools.cache
def solver_label(name: str, options: str) -> str:
    """The solver's name, and which of its `options` (scheduler and step, as JSON) are its own."""
    if not (config := _option("solver", name)):
        return name
    ours = json.loads(options)
    scheduler, step = (_changes(ours[k], config.get(k) or {}) for k in ("scheduler", "step"))
    return ", ".join([name, *scheduler, *step])


@functools.cache
def _option(group: str, name: str) -> dict[str, Any]:
    """The option, not resolved; nothing where the group has none such."""
    # by the names that there are: `name` may be what somebody else's run says
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
    """Sorts LML's labels: off, published, default, and the others by their numbers."""
    first = [OFF, PUBLISHED, DEFAULT, *CALIBRATIONS]
    padded = re.sub(r"\d+(\.\d+)?", lambda number: f"{float(number[0]):014.6f}", label)
    return (first.index(label) if label in first else len(first), padded)
