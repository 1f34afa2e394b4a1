"""Hashes of settings and of values: they name runs, and show that a file was edited."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def canonical(settings: Mapping[str, Any]) -> str:
    """`settings` as JSON. The order of the keys makes no difference, nor does 8 or 8.0."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return int(value) if isinstance(value, float) and value.is_integer() else value

    return json.dumps(plain(settings), sort_keys=True, separators=(",", ":"))


def settings_hash(settings: Mapping[str, Any]) -> str:
    """sha256 of what determines a run's images."""
    return hashlib.sha256(canonical(settings).encode()).hexdigest()


def sealed(values: Mapping[str, Any], *owner: str) -> dict[str, Any]:
    """`values` with a `seal`: the sha256 of the values and of their `owner`."""
    values = {key: value for key, value in values.items() if key != "seal"}
    return {**values, "seal": settings_hash({"values": values, "owner": owner})}


def why_not_sealed(values: Mapping[str, Any], *owner: str) -> str | None:
    """Why `values` cannot be trusted; None when they are unchanged since `sealed`."""
    if not values.get("seal"):
        return "has no seal"
    if values["seal"] != sealed(values, *owner)["seal"]:
        return "was edited after it was written"
    return None


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The keys in which two settings differ, as `key=theirs, not ours`."""
    found = []
    for key in sorted({*ours, *theirs}):
        a, b = ours.get(key), theirs.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{prefix}{key}.")
        elif canonical({"": a}) != canonical({"": b}):
            found.append(f"{prefix}{key}={b}, not {a}")
    return found
