"""The labels of settings in tables: their differences from the configs of today."""

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


@functools.cache
def lml_label(options: str, solver: str, nfe: int) -> str:
    """ "off", a preset, "calibrated", or the differences: "rank=3, damping=16".

    `options` are those of the config group `lml`, as JSON.
    """
    ours = _plain(json.loads(options))
    if not ours.get("rank"):
        return OFF
    # Runs older than this key are of version 1.
    version = ours.pop("method_version", 1)
    older = [] if version == METHOD_VERSION else [f"method {version}"]
    if (name := ours.pop("name", None)) in CALIBRATIONS:  # dampings differ from run to run
        return ", ".join([name, *older])
    changes = {name: _changes(ours, _preset(name, solver, nfe)) for name in PRESETS}
    name = min(changes, key=lambda name: len(changes[name]))
    base = [] if name == DEFAULT and changes[name] else [name]
    return ", ".join([*base, *changes[name], *older])


def _preset(name: str, solver: str, nfe: int) -> dict[str, Any]:
    # the preset refers to these: its target belongs to the solver, its damping to the evaluations
    around = {"solver": {}, **_option("solver", solver), "nfe": nfe}
    cfg = OmegaConf.create({**_option("lml", name), **around})
    return _plain(OmegaConf.to_container(cfg.lml, resolve=True))


def _plain(lml: dict[str, Any]) -> dict[str, Any]:
    # Runs older than this option do not say that it was 1.
    return {key: value for key, value in lml.items() if (key, value) != ("length", 1.0)}


@functools.cache
def solver_label(name: str, options: str) -> str:
    """The solver's name, and those `options` (scheduler and step, as JSON) that differ."""
    config = _option("solver", name).get("solver")
    if config is None:
        return name
    ours = json.loads(options)
    scheduler, step = (_changes(ours[k], config.get(k) or {}) for k in ("scheduler", "step"))
    return ", ".join([name, *scheduler, *step])


@functools.cache
def _option(group: str, name: str) -> dict[str, Any]:
    """The config of an option, not resolved; {} if the group does not have it."""
    # only existing names are composed: `name` may come from somebody else's run
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
    """Key to sort LML's labels: off, published, default, then the others by their numbers."""
    first = [OFF, PUBLISHED, DEFAULT, *CALIBRATIONS]
    padded = re.sub(r"\d+(\.\d+)?", lambda number: f"{float(number[0]):014.6f}", label)
    return (first.index(label) if label in first else len(first), padded)
