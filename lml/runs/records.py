"""What the files in a run's folder say of it: config.yaml and metrics.json."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import OmegaConf
from omegaconf._utils import get_yaml_loader

from lml.data.images import LATENTS
from lml.errors import UserError
from lml.files import (
    disk_error,
    file_hash,
    load_json,
    load_yaml,
    read_json,
    write_json,
)
from lml.schema import check
from lml.seals import settings_hash

WAIT = 60.0  # seconds that a process waits for another to have added its scores
# What a run's folder holds beside its configuration, its images and their latents.
WRITTEN = ("manifest.json", "metrics.json", "timing.json", "grid.png", "prompts.jsonl")


def read_metrics(path: Path, label: str) -> dict[str, Any]:
    """What a file of metrics says, {} without one.

    UserError, beginning with `label`, for anything else: it could only be replaced.
    """
    try:
        value = load_json(path)
        entries = value.values() if isinstance(value, dict) else [None]
        if not all(isinstance(entry, dict) and "value" in entry for entry in entries):
            raise ValueError("no values by the names of metrics")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(
            f"{label}: not a file of metrics ({reason}); mend it, or move it away"
        ) from None
    return value


def merge_metrics(path: Path, entries: Mapping[str, Any], label: str) -> None:
    """Add `entries` to the file of metrics in `path`; those of the same name are replaced.

    UserError as `read_metrics`. Of processes that do it at a time each waits for the others, if all
    hold the lock of the file: of a run's metrics.json that is its folder's.
    """
    write_json(path, {**read_metrics(path, label), **entries}, label.partition("=")[0])


@contextlib.contextmanager
def hold(lock: FileLock, label: str) -> Iterator[None]:
    """Hold `lock`. UserError, beginning with `label`, when another process does for `WAIT` s."""
    try:
        lock.acquire(timeout=WAIT)
    except Timeout:
        raise UserError(f"{label}: another process is writing to it") from None
    except OSError as error:
        raise disk_error(Path(lock.lock_file).parent, error, label.partition("=")[0]) from None
    try:
        yield
    finally:
        lock.release()


def check_output(path: str | Path, key: str) -> None:
    """UserError where what is written to `path` would be among a run's own files.

    A run refuses images that aren't its own. `key` is what the user gave the path as.
    """
    absolute = Path(path).resolve()
    for folder in absolute.parents:
        name = absolute.relative_to(folder).parts[0]
        if name not in (*WRITTEN, "config.yaml", "images", LATENTS):
            continue
        with contextlib.suppress(UserError):
            read_config(folder)
            break
    else:
        return
    raise UserError(f"{key}={path}: among the files of the run in {folder}; choose another place")


def read_config(path: str | Path, schema: Any = None) -> dict[str, Any]:
    """config.yaml of the run in the folder `path`.

    UserError when that is no run's folder, or the config is not as `schema` says.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"run_dir={path}: no such folder")
    try:
        stored = load_yaml(path / "config.yaml", get_yaml_loader())
        config = OmegaConf.to_container(OmegaConf.create(stored))
    except Exception:  # YAML's and OmegaConf's errors share no base class
        config = None
    if not isinstance(config, dict) or not isinstance(config.get("settings"), dict):
        raise UserError(f"run_dir={path}: not a run's folder (it has no config.yaml of a run)")
    check(config, schema or Any, f"run_dir={path}: config.yaml")
    return config


def check_recorded(path: str | Path, config: Mapping[str, Any]) -> None:
    """UserError unless manifest.json has the hashes of config.yaml, which reads as `config`."""
    manifest = read_json(Path(path) / "manifest.json")
    hashes = {
        "config_sha256": file_hash(Path(path) / "config.yaml"),
        "settings_sha256": settings_hash(config["settings"]),
    }
    for key, value in hashes.items():
        if manifest.get(key) != value:
            raise UserError(
                f"run_dir={path}: config.yaml was edited after the run (manifest.json has another "
                f"{key}), so that nothing is made of it"
            )
