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
# What scripts/evaluate.py says of the images as a plain folder.
APART = "images.metrics.json"


def _names(folder: Path) -> list[str]:
    # pathlib's objects take ten times as long, and a run may have a million images
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries]


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
        self._replaced: Mapping[str, Any] | None = None  # the settings of a run to be replaced
        self._config: str | None = None  # config.yaml, as long as it has to be written

    def open(self, config: Mapping[str, Any], overwrite: bool = False, wait: bool = False) -> None:
        """Make the folder, or go on with the run in it, and lock it until `close`.

        `config` is written as config.yaml unless it is there. With `wait`, another process that
        writes to the folder is let finish. With `overwrite`, what a run wrote there is replaced,
        also if it was this one, but not before `begin`. Raises UserError for a folder that holds
        another run, for one that is no run's, for one among a run's images, for one whose
        config.yaml was edited, for one in use and for one that cannot be written to.
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
        """Remove what an earlier run wrote, where `open` found one that is to be replaced.

        To be called when the first images are made, and only to be written. At whatever moment it
        is cut, the folder is one of the earlier run, not complete, or one of this.
        """
        if self._config is None:
            return
        try:
            with replacing(self.path / "config.yaml") as file:
                file.write(self._config.encode())
                file.flush()  # a full disk is noticed before anything is gone
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
        """Whether what is in the folder is still that of a run to be replaced."""
        return self._replaced is not None

    def close(self) -> None:
        """Let others write to the folder."""
        self._lock.release(force=True)

    def _check(self, overwrite: bool) -> Mapping[str, Any] | None:
        """The settings of the run in the folder, if any. UserError when it must not be touched."""
        if not self.path.exists():
            return None
        if not self.path.is_dir():
            raise UserError(f"run_dir={self.path}: a file; expected a folder")
        if all(name.startswith(".") for name in _names(self.path)):
            return None
        settings = read_config(self.path)["settings"]
        found = differences(self.settings, settings)
        # A run that has no image yet (its network would not load, say) has nothing to lose.
        if found and not overwrite and any(name.endswith(".png") for name in self._images()):
            more = f" and {len(found) - 2} more" if len(found) > 2 else ""
            raise UserError(
                f"run_dir={self.path}: holds a run with other settings ({'; '.join(found[:2])}"
                f"{more}); choose another folder, or overwrite=true to replace that run"
            )
        if not found and not overwrite and self._is_config_edited(self.read_manifest()):
            raise UserError(
                f"run_dir={self.path}: config.yaml was edited after the run; restore it, or "
                "overwrite=true makes the run anew"
            )
        return settings if found else self.settings

    def _is_config_edited(self, manifest: Mapping[str, Any]) -> bool:
        recorded = manifest.get("config_sha256")
        try:
            return recorded is not None and recorded != file_hash(self.path / "config.yaml")
        except OSError:
            return True

    def _images(self) -> list[str]:
        """The names in images/, sorted, but for hidden ones."""
        names = _names(self.images) if self.images.is_dir() else []
        return sorted(name for name in names if not name.startswith("."))

    def _owns(self, name: str, num_images: int | None) -> bool:
        """Whether an image of this run, of so many, or of the one to be replaced has that name."""
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
            write_atomic(self.latents_path(index), buffer.getvalue(), durable=False)
        text = PngImagePlugin.PngInfo()
        text.add_text(SEAL, self.seal(index, pixels))
        buffer = io.BytesIO()
        image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
        image.save(buffer, "PNG", pnginfo=text)
        write_atomic(self.image_path(index), buffer.getvalue(), durable=False)

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

        A file whose sha256 is in the manifest needs no decoding. Of a run that is to be replaced
        none is. Raises UserError for images in the folder that could not be this run's, nor its,
        since metrics would count them.
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
        """What of a complete run is not as its manifest says, a few words each.

        That is the names and the number of its images, their sha256, and that of config.yaml. If
        `quick`, a file that is older than the manifest counts as what it was.
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
            yield "its images are not there"
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

        UserError when the run was made anew meanwhile, or metrics.json is no file of metrics.
        """
        with hold(self._lock, f"run_dir={self.path}"):
            if self.read_manifest() != manifest:
                raise UserError(f"run_dir={self.path}: it has changed while it was scored")
            merge_metrics(self.path / "metrics.json", entries, f"run_dir={self.path}: metrics.json")

    def read_manifest(self) -> dict[str, Any]:
        """manifest.json, or {} when there is none of this run's."""
        manifest = read_json(self.path / "manifest.json", Manifest)
        return manifest if manifest.get("settings_sha256") == self.hash else {}

    def write_manifest(self, num_images: int, finished: bool = True) -> int:
        """Say what is stored, and return how many images are.

        The run is complete when all are, and `finished` says that nothing else has to be written.
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
