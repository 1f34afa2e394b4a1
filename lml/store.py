"""The run folder: what is written, atomically, and what is known of it afterwards.

    config.yaml         the configuration, the settings that determine the images, provenance
    images/000000.png   sealed: a text chunk says which run and index the pixels belong to
    latents/000000.npy  float32, where a metric asked for them
    manifest.json       what is complete, and the sha256 of config and images
    metrics.json        what the metrics say, each sealed, so that an edit by hand is noticed
    timing.json         sealed, too
    grid.png, prompts.jsonl

No journal is kept: an image that is there and whose seal holds is done.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from omegaconf import OmegaConf
from omegaconf._utils import get_yaml_loader
from PIL import Image, PngImagePlugin

from lml.data.images import LATENTS, latents_path, open_image
from lml.errors import UserError
from lml.files import file_hash, load_yaml, read_object
from lml.schema import Manifest, check

IMAGE = re.compile(r"\d{6,}\.png")
SEAL = "lml-seal"
# What a run's folder holds beside its configuration, its images and their latents.
WRITTEN = ("manifest.json", "metrics.json", "timing.json", "grid.png", "prompts.jsonl")
# What scripts/evaluate.py says of the images as a plain folder.
APART = "images.metrics.json"


class RunError(UserError):
    """A run that cannot go on, for a reason outside the program. The message is one line."""


def canonical(settings: Mapping[str, Any]) -> str:
    """`settings` as JSON, the same for any order of keys, and for 8 written as 8.0."""

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


def write_atomic(path: Path, data: bytes | str, key: str = "run_dir") -> None:
    """Write the whole file or leave what was there.

    RunError when the disk is full or read-only; `key` is what the user gave the folder as.
    """
    data = data.encode() if isinstance(data, str) else data
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise disk_error(path.parent, error, key) from None


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON, written like `write_atomic`."""
    write_atomic(path, json.dumps(value, indent=2) + "\n")


def merge_json(path: Path, entries: Mapping[str, Any]) -> None:
    """Add `entries` to the JSON object in `path`; those of the same name are replaced."""
    write_json(path, {**read_json(path), **entries})


def sealed(values: Mapping[str, Any], *owner: str) -> dict[str, Any]:
    """`values` with a `seal`: the sha256 of them and of what they belong to."""
    values = {key: value for key, value in values.items() if key != "seal"}
    return {**values, "seal": settings_hash({"values": values, "owner": owner})}


def is_edited(values: Mapping[str, Any], *owner: str) -> bool:
    """Whether `values` are others than when they were `sealed`. Without a seal nobody can say."""
    return "seal" in values and values["seal"] != sealed(values, *owner)["seal"]


def disk_error(folder: Path, error: OSError, key: str = "run_dir") -> RunError:
    """What to say of a folder that could not be written to."""
    full = error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None))
    remedy = f"free some space, or choose another {key}" if full else "a writable folder is asked"
    return RunError(f"{key}={folder}: {error.strerror or error}; {remedy}")


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


class RunFolder:
    """One run's folder. `settings` determine the images; `hash` is theirs, and seals each image.

    Making the object touches nothing; `open` does. Messages call the folder `run_dir`.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any]):
        self.path = Path(path)
        self.images = self.path / "images"
        self.settings = settings
        self.hash = settings_hash(settings)
        self._lock = FileLock(self.path / ".lock")

    def open(self, config: Mapping[str, Any], overwrite: bool = False, wait: bool = False) -> None:
        """Make the folder, or go on with the run in it, and lock it until `close`.

        `config` is written as config.yaml unless it is there. With `wait`, another process that
        writes to the folder is let finish. With `overwrite`, what a run wrote there is removed,
        also if it was this one. Raises UserError for a folder that holds another run, for one that
        is no run's, for one among a run's images, for one in use and for one that cannot be written
        to.
        """
        check_output(self.path, "run_dir")
        self._check(overwrite)
        text = OmegaConf.to_yaml({**config, "settings": dict(self.settings)})
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=-1 if wait else 0)
            if not self._check(overwrite) or overwrite:
                self._clear()
                write_atomic(self.path / "config.yaml", text)
            self.images.mkdir(exist_ok=True)
            for partial in [*self.path.glob(".*.tmp"), *self.images.glob(".*.tmp")]:
                partial.unlink()
        except Timeout:
            raise UserError(f"run_dir={self.path}: another process is writing to it") from None
        except OSError as error:
            raise disk_error(self.path, error) from None

    def close(self) -> None:
        """Let others write to the folder."""
        self._lock.release(force=True)

    def _check(self, overwrite: bool) -> bool:
        """Whether the folder holds this run already. UserError when it must not be touched."""
        if not self.path.exists():
            return False
        if not self.path.is_dir():
            raise UserError(f"run_dir={self.path}: a file; a folder is asked")
        names = [file.name for file in self.path.iterdir() if not file.name.startswith(".")]
        if not names:
            return False
        found = differences(self.settings, read_config(self.path)["settings"])
        # A run that has no image yet (its network would not load, say) has nothing to lose.
        if found and not overwrite and any(self.images.glob("*.png")):
            more = f" and {len(found) - 2} more" if len(found) > 2 else ""
            raise UserError(
                f"run_dir={self.path}: holds a run with other settings ({'; '.join(found[:2])}"
                f"{more}); choose another folder, or overwrite=true to replace that run"
            )
        return not found

    def _clear(self) -> None:
        for file in self.images.glob("*.png"):
            if IMAGE.fullmatch(file.name):
                file.unlink()
        for name in (*WRITTEN, APART):
            (self.path / name).unlink(missing_ok=True)
        for file in (self.path / LATENTS).glob("*.npy"):
            file.unlink()

    def image_path(self, index: int) -> Path:
        """Where image `index` is stored."""
        return self.images / f"{index:06d}.png"

    def seal(self, index: int, pixels: np.ndarray) -> str:
        """sha256 over the run, the index and the uint8 pixels (H, W, C)."""
        digest = hashlib.sha256(f"{self.hash} {index} {pixels.shape} ".encode())
        digest.update(np.ascontiguousarray(pixels))
        return digest.hexdigest()

    def latents_path(self, index: int) -> Path:
        """Where the latents that image `index` was decoded from are stored, if they are."""
        return latents_path(self.image_path(index))

    def write_image(
        self, index: int, pixels: np.ndarray, latents: np.ndarray | None = None
    ) -> None:
        """Store uint8 `pixels` (H, W, C) with C = 1 or 3, sealed; before them the latents."""
        if latents is not None:
            buffer = io.BytesIO()
            np.save(buffer, latents)
            self.latents_path(index).parent.mkdir(exist_ok=True)
            write_atomic(self.latents_path(index), buffer.getvalue())
        text = PngImagePlugin.PngInfo()
        text.add_text(SEAL, self.seal(index, pixels))
        buffer = io.BytesIO()
        image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
        image.save(buffer, "PNG", pnginfo=text)
        write_atomic(self.image_path(index), buffer.getvalue())

    def holds(self, index: int) -> bool | None:
        """Whether image `index` is there and whole; None when there is no such file."""
        path = self.image_path(index)
        if not path.exists():
            return None
        try:
            with open_image(path) as image:
                pixels = np.asarray(image)
                seal = image.text.get(SEAL)
        except Exception:  # a broken file raises whatever its decoder stumbled on
            return False
        return seal == self.seal(index, pixels if pixels.ndim == 3 else pixels[..., None])

    def survey(self, num_images: int) -> tuple[set[int], list[str]]:
        """Which images are stored, and the names of files that are broken or of another run.

        A file whose sha256 is in the manifest needs no decoding. Raises UserError for images in the
        folder that could not be this run's, since metrics would count them.
        """
        known = self.read_manifest().get("images", {})
        expected = {self.image_path(index).name for index in range(num_images)}
        for name in sorted(f.name for f in self.images.iterdir() if not f.name.startswith(".")):
            if name not in expected:
                raise UserError(f"{self.images / name}: not one of this run's images; move it away")

        def check(index: int) -> bool | None:
            path = self.image_path(index)
            if path.name in known and path.is_file() and file_hash(path) == known[path.name]:
                return True
            return self.holds(index)

        with ThreadPoolExecutor() as pool:
            states = list(pool.map(check, range(num_images)))
        stored = {index for index, state in enumerate(states) if state}
        broken = [self.image_path(i).name for i, state in enumerate(states) if state is False]
        return stored, broken

    def read_manifest(self) -> dict[str, Any]:
        """manifest.json, or {} when there is none of this run's."""
        manifest = read_json(self.path / "manifest.json", Manifest)
        return manifest if manifest.get("settings_sha256") == self.hash else {}

    def write_manifest(self, num_images: int) -> int:
        """Say what is stored, and return how many images are."""
        paths = [self.image_path(index) for index in range(num_images)]
        images = {path.name: file_hash(path) for path in paths if path.exists()}
        manifest = {
            "complete": len(images) == num_images,
            "count": len(images),
            "num_images": num_images,
            "settings_sha256": self.hash,
            "config_sha256": file_hash(self.path / "config.yaml"),
            "images": images,
        }
        write_json(self.path / "manifest.json", manifest)
        return len(images)


class Writer:
    """Stores images while the network goes on with the next batch; holds at most two batches."""

    def __init__(self, folder: RunFolder, threads: int = 2):
        self.folder = folder
        self._pool = ThreadPoolExecutor(threads)
        self._pending = []

    def submit(self, images: Iterable[tuple[int, np.ndarray, np.ndarray | None]]) -> None:
        """Queue images as `RunFolder.write_image` takes them, once those before are on the disk."""
        self.wait()
        self._pending = [self._pool.submit(self.folder.write_image, *image) for image in images]

    def wait(self) -> None:
        """Return when everything is stored; raise what went wrong with the first that isn't."""
        pending, self._pending = self._pending, []
        for future in pending:
            future.result()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown()  # what is queued is still stored


def read_json(path: Path, schema: Any = None) -> dict[str, Any]:
    """The JSON object in `path`; {} when the file is missing, broken, or not as `schema` says."""
    try:
        return read_object(path, schema)
    except (FileNotFoundError, UserError):
        return {}


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
