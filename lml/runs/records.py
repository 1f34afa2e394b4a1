"""The records in a run's folder: config.yaml and metrics.json."""

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

WAIT = 60.0  # seconds to wait while another process adds its scores
# The files in a run's folder beside its config, its images and their latents.
CONTROL = "control.png"  # the map that was made of the model's control_photo
WRITTEN = ("manifest.json", "metrics.json", "timing.json", "grid.png", "prompts.jsonl", CONTROL)


def read_metrics(path: Path, label: str) -> dict[str, Any]:
    """The content of a file of metrics; {} if there is no file.

    UserError, beginning with `label`, for any other file: adding scores would destroy it.
    """
    try:
        value = load_json(path)
        entries = value.values() if isinstance(value, dict) else [None]
        if not all(isinstance(entry, dict) and "value" in entry for entry in entries):
            raise ValueError("expected the names of metrics and their values")
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

    UserError as `read_metrics`. Several processes may do this at a time if each holds the lock of
    the file. For a run's metrics.json, that is the lock of the run's folder.
    """
    write_json(path, {**read_metrics(path, label), **entries}, label.partition("=")[0])


@contextlib.contextmanager
def hold(lock: FileLock, label: str) -> Iterator[None]:
    """Hold `lock`. UserError, beginning with `label`, if another process holds it for `WAIT` s."""
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
    """UserError if `path` is among a run's own files. `key` is the key that set the path.

    A run refuses a folder with images that aren't its own.
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

    UserError if that is no run's folder, or if the config does not fit `schema`.
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
    """UserError if config.yaml, read as `config`, does not have the hashes in manifest.json."""
    manifest = read_json(Path(path) / "manifest.json")
    hashes = {
        "config_sha256": file_hash(Path(path) / "config.yaml"),
        "settings_sha256": settings_hash(config["settings"]),
    }
    for key, value in hashes.items():
        if manifest.get(key) != value:
            raise UserError(
                f"run_dir={path}: config.yaml was edited after the run (manifest.json has another "
                f"{key}); restore it"
            )
