"""The objective of a search."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lml.errors import UserError, nearest
from lml.files import read_json, read_object
from lml.metrics.base import class_of, declared
from lml.schema import Score
from lml.seals import why_not_sealed


def find_objective(cfg: Mapping[str, Any]) -> str:
    """The metric, or metric/part, that the search of `cfg` optimises. UserError if unclear."""
    asked, metrics = cfg["sweep"]["objective"], list(cfg["metrics"])
    if asked is None and len(metrics) != 1:
        choice = f"one of {', '.join(metrics)}" if metrics else "metrics=NAME"
        raise UserError(f"sweep.objective=null: expected {choice}")
    name, _, part = (asked or metrics[0]).partition("/")
    if name not in metrics:
        known = nearest(name, metrics) or "none"
        raise UserError(f"sweep.objective={asked}: not one of the run's metrics; nearest: {known}")
    parts = declared(class_of(cfg["metrics"][name])).parts
    part = part or ("mean" if "mean" in parts else "")  # the other parts are its spread
    if parts and part not in parts:
        choice = " or ".join(f"{name}/{part}" for part in parts)
        raise UserError(f"sweep.objective={asked or 'null'}: expected {choice}")
    return f"{name}/{part}" if part else name


def read_objective(cfg: Mapping[str, Any], folder: Path) -> float | None:
    """The objective of the finished run in `folder`; None without a search."""
    if not cfg.get("sweep"):
        return None
    name, _, part = (objective := find_objective(cfg)).partition("/")
    file = folder / "metrics.json"
    entry = read_object(file, dict[str, Score]).get(name, {})
    owner = str(read_json(folder / "manifest.json").get("settings_sha256"))
    if reason := why_not_sealed(entry, owner, name):
        raise UserError(f"run_dir={folder}: metrics.json: {name} {reason}; score the run anew")
    value = entry["value"]
    if isinstance(value, Mapping) != bool(part) or (part and part not in value):
        parts = " or ".join(f"{name}/{key}" for key in value) if isinstance(value, dict) else name
        raise UserError(f"sweep.objective={objective}: expected {parts}")
    return float(value[part] if part else value)
