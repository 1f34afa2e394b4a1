"""The run folder: writes its files atomically, and checks them when they are read.

    config.yaml         the configuration, the settings that determine the images, provenance
    images/000000.png   sealed: a text chunk ties the pixels to the run and the index
    latents/000000.npy  float32, if a metric needs them
    manifest.json       what is complete, and the sha256 of config and images
    metrics.json        results of metrics, each sealed, so that an edit by hand is noticed
    timing.json         sealed, too
    grid.png, prompts.jsonl, control.png

There is no journal: an image is done if its file is there and its seal is right.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from omegaconf import OmegaConf
from PIL import Image, PngImagePlugin

from lml.data.images import LATENTS, latents_path, open_image
from lml.errors import UserError
from lml.files import (
    disk_error,
    file_hash,
    read_json,
    replacing,
    write_atomic,
    write_json,
)
from lml.runs.names import image_index, image_name
from lml.runs.records import WRITTEN, check_output, hold, merge_metrics, read_config
from lml.schema import Manifest
from lml.seals import differences, settings_hash

SEAL = "lml-seal"
# The file of scripts/evaluate.py for the images as a plain folder.
APART = "images.metrics.json"


def _names(folder: Path) -> list[str]:
    # pathlib takes ten times as long, and a run may have a million images
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries]


class RunFolder:
    """The folder of one run. `settings` determine the images; their `hash` seals each image.

    Only `open` touches the disk, not the constructor. Messages call the folder `run_dir`.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any]):
        self.path = Path(path)
        self.images = self.path / "images"
        self.settings = settings
        self.hash = settings_hash(settings)
        self._lock = FileLock(self.path / ".lock")
        self._replaced: Mapping[str, Any] | None = None  # settings of the run to replace
        self._config: str | None = None  # config.yaml, until it is written

    def open(self, config: Mapping[str, Any], overwrite: bool = False, wait: bool = False) -> None:
        """Make the folder, or continue the run in it, and lock it until `close`.

        `config` is written as config.yaml if there is none. With `wait`, wait for another process
        that writes to the folder. With `overwrite`, `begin` removes the run that is there, even if
        it is this one.

        UserError if the folder holds another run, is no run's, is among a run's images, is in use
        or cannot be written to, and if its config.yaml was edited.
        """
        check_output(self.path, "run_dir")
        self._check(overwrite)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=-1 if wait else 0)
            held = self._check(overwrite)
            self._replaced = held if overwrite else None
            if overwrite or held != self.settings:
                self._config = OmegaConf.to_yaml({**config, "settings": dict(self.settings)})
            if self._replaced is None:
                self.begin()
            self.images.mkdir(exist_ok=True)
            for folder in (self.path, self.images):
                for name in _names(folder):
                    if name.startswith(".") and name.endswith(".tmp"):
                        (folder / name).unlink()
        except BaseException as error:
            self.close()
            if isinstance(error, Timeout):
                line = f"run_dir={self.path}: another process is writing to it"
                raise UserError(line) from None
            if isinstance(error, OSError):
                raise disk_error(self.path, error) from None
            raise

    def begin(self) -> None:
        """Remove the files of the run to replace, if `open` found one.

        Call it when the first images are made but not yet written. If it is interrupted, the folder
        is that of the earlier run, incomplete, or that of this run.
        """
        if self._config is None:
            return
        try:
            with replacing(self.path / "config.yaml") as file:
                file.write(self._config.encode())
                file.flush()  # a full disk is noticed before anything is removed
                self._clear()
        except OSError as error:
            raise disk_error(self.path, error) from None
        self._config = self._replaced = None

    def _clear(self) -> None:
        there = _names(self.path)
        for name in (*WRITTEN, APART):  # the manifest first
            if name in there:
                (self.path / name).unlink()
        for folder, suffix in ((self.path / LATENTS, ".npy"), (self.images, ".png")):
            for name in _names(folder) if folder.is_dir() else ():
                stem = name.removesuffix(suffix)
                if stem != name and self._owns(f"{stem}.png", self.settings.get("num_images")):
                    (folder / name).unlink()

    @property
    def is_replacing(self) -> bool:
        """Whether the folder still holds the files of the run to replace."""
        return self._replaced is not None

    def close(self) -> None:
        """Let others write to the folder."""
        self._lock.release(force=True)

    def _check(self, overwrite: bool) -> Mapping[str, Any] | None:
        """The settings of the run in the folder, or None. UserError if it must not be touched."""
        if not self.path.exists():
            return None
        if not self.path.is_dir():
            raise UserError(f"run_dir={self.path}: a file; expected a folder")
        if all(name.startswith(".") for name in _names(self.path)):
            return None
        settings = read_config(self.path)["settings"]
        found = differences(self.settings, settings)
        # A run without images has nothing to lose; its network may not have loaded.
        if found and not overwrite and any(name.endswith(".png") for name in self._images()):
            more = f" and {len(found) - 2} more" if len(found) > 2 else ""
            raise UserError(
                f"run_dir={self.path}: holds a run with other settings ({'; '.join(found[:2])}"
                f"{more}); choose another folder, or overwrite=true to replace that run"
            )
        if not found and not overwrite and self._is_config_edited(self.read_manifest()):
            raise UserError(
                f"run_dir={self.path}: config.yaml was edited after the run; restore it, or use "
                "overwrite=true to make the run anew"
            )
        return settings if found else self.settings

    def _is_config_edited(self, manifest: Mapping[str, Any]) -> bool:
        recorded = manifest.get("config_sha256")
        try:
            return recorded is not None and recorded != file_hash(self.path / "config.yaml")
        except OSError:
            return True

    def _images(self) -> list[str]:
        """The names in images/, sorted, without hidden ones."""
        names = _names(self.images) if self.images.is_dir() else []
        return sorted(name for name in names if not name.startswith("."))

    def _owns(self, name: str, num_images: int | None) -> bool:
        """Whether an image of this run, or of the run to replace, has this name."""
        if image_index(name, num_images) is not None:
            return True
        theirs = self._replaced
        return theirs is not None and image_index(name, theirs.get("num_images")) is not None

    def image_path(self, index: int) -> Path:
        """Where image `index` is stored."""
        return self.images / image_name(index, self.settings.get("num_images"))

    def seal(self, index: int, pixels: np.ndarray) -> str:
        """sha256 over the run, the index and the uint8 pixels (H, W, C)."""
        digest = hashlib.sha256(f"{self.hash} {index} {pixels.shape} ".encode())
        digest.update(np.ascontiguousarray(pixels))
        return digest.hexdigest()

    def latents_path(self, index: int) -> Path:
        """Where the latents of image `index` are stored, if they are kept."""
        return latents_path(self.image_path(index))

    def write_image(
        self, index: int, pixels: np.ndarray, latents: np.ndarray | None = None
    ) -> None:
        """Store uint8 `pixels` (H, W, C) with C = 1 or 3, sealed. The latents are stored first."""
        if latents is not None:
            buffer = io.BytesIO()
            np.save(buffer, latents)
            self.latents_path(index).parent.mkdir(exist_ok=True)
            write_atomic(self.latents_path(index), buffer.getvalue(), durable=False)
        text = PngImagePlugin.PngInfo()
        text.add_text(SEAL, self.seal(index, pixels))
        buffer = io.BytesIO()
        image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
        image.save(buffer, "PNG", pnginfo=text)
        write_atomic(self.image_path(index), buffer.getvalue(), durable=False)

    def holds(self, index: int) -> bool | None:
        """Whether the file of image `index` is whole; None if there is no file."""
        path = self.image_path(index)
        if not path.exists():
            return None
        try:
            with open_image(path) as image:
                pixels = np.asarray(image)
                seal = image.text.get(SEAL)
        except Exception:  # a decoder may raise anything for a broken file
            return False
        return seal == self.seal(index, pixels if pixels.ndim == 3 else pixels[..., None])

    def survey(self, num_images: int) -> tuple[set[int], list[str]]:
        """The indices of stored images, and the names of files that are broken or not this run's.

        A file whose sha256 is in the manifest needs no decoding. The images of a run to replace do
        not count. UserError for any other file in images/, since metrics would count it.
        """
        names = self._images()
        for name in names:
            if not self._owns(name, num_images):
                raise UserError(f"{self.images / name}: not one of this run's images; move it away")
        if self.is_replacing:
            return set(), []
        found = {image_index(name, num_images): name for name in names}
        known = self.read_manifest().get("images")
        known = known if isinstance(known, dict) else {}

        def check(index: int) -> bool | None:
            path, name = self.images / found[index], found[index]
            if name in known and path.is_file() and file_hash(path) == known[name]:
                return True
            return self.holds(index)

        with ThreadPoolExecutor() as pool:
            states = dict(zip(found, pool.map(check, found), strict=True))
        stored = {index for index, state in states.items() if state}
        return stored, [found[index] for index, state in states.items() if state is False]

    def changes(self, quick: bool = False) -> Iterator[str]:
        """The differences between a complete run and its manifest, a few words each.

        Compared are the names, the number and the sha256 of the images, and the sha256 of
        config.yaml. With `quick`, a file that is older than the manifest counts as unchanged.
        """
        manifest = self.read_manifest()
        known, count = manifest.get("images"), self.settings.get("num_images")
        if not manifest.get("complete"):
            yield "not complete"
            return
        if self._is_config_edited(manifest):
            yield "config.yaml was edited after the run"
        if not isinstance(known, dict) or not len(known) == manifest.get("num_images") == count:
            yield f"manifest.json does not have {count} images"
            return
        try:
            written = (self.path / "manifest.json").stat().st_mtime_ns
            with os.scandir(self.images) as entries:
                there = {e.name: e.stat() for e in entries if not e.name.startswith(".")}
        except OSError:
            yield "its images are missing"
            return
        for name in sorted(known.keys() | there.keys()):
            if name not in there:
                yield f"images/{name} is missing"
            elif name not in known:
                yield f"images/{name} is not one of its images (move it away)"
            elif not (quick and there[name].st_size and there[name].st_mtime_ns < written):
                try:
                    if file_hash(self.images / name) == known[name]:
                        continue
                except OSError:  # no file
                    pass
                yield f"images/{name} was changed after the run"

    def add_metrics(self, entries: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
        """Add `entries` to metrics.json: scores of the images that `manifest` lists, sealed.

        UserError if the run was made anew meanwhile, or if metrics.json is no file of metrics.
        """
        with hold(self._lock, f"run_dir={self.path}"):
            if self.read_manifest() != manifest:
                raise UserError(f"run_dir={self.path}: the run changed while it was scored")
            merge_metrics(self.path / "metrics.json", entries, f"run_dir={self.path}: metrics.json")

    def read_manifest(self) -> dict[str, Any]:
        """manifest.json of this run; {} if there is none."""
        manifest = read_json(self.path / "manifest.json", Manifest)
        return manifest if manifest.get("settings_sha256") == self.hash else {}

    def write_manifest(self, num_images: int, finished: bool = True) -> int:
        """Write manifest.json, and return the number of images that are stored.

        The run is complete if all images are stored and nothing else is to be written (`finished`).
        """
        names = [name for name in self._images() if image_index(name, num_images) is not None]
        images = {name: file_hash(self.images / name) for name in names}
        manifest = {
            "complete": finished and len(images) == num_images,
            "count": len(images),
            "num_images": num_images,
            "settings_sha256": self.hash,
            "config_sha256": file_hash(self.path / "config.yaml"),
            "images": images,
        }
        write_json(self.path / "manifest.json", manifest)
        return len(images)
