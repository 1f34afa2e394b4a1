"""Reference sets that images are compared with, and the cache of their statistics."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from weakref import WeakValueDictionary

import torch
from filelock import FileLock
from torch import Tensor, nn
from tqdm import tqdm

from lml.data import cifar10
from lml.data.assets import locate
from lml.data.images import ImageFolder, ImageZip, stamp, to_tensor
from lml.data.statistics import ReferenceStatistics, describe
from lml.errors import UserError, nearest

TORCHVISION = "torchvision:"
KINDS = "a folder of images, a .zip of images, torchvision:CIFAR10:train, or an .npz of statistics"
BATCH_SIZE = 256


class TorchvisionImages:
    """A torchvision dataset's images, all of one size: `torchvision:NAME:SPLIT`.

    CIFAR10 is found as in lml.data.cifar10, and held in memory. Others must be in data/name, with
    its name in lower case. Nothing is downloaded. `size` is (H, W). UserError if it is missing.
    """

    def __init__(self, spec: str, key: str = "reference"):
        import torchvision.datasets

        self.spec, self.key = spec, key
        name, _, split = spec.removeprefix(TORCHVISION).partition(":")
        if name not in torchvision.datasets.__all__:
            close = nearest(name, torchvision.datasets.__all__)
            raise UserError(f"{key}={spec}: no torchvision dataset; nearest: {close}")
        if name == "CIFAR10":
            self.root, self.dataset = self._cifar10(split)
        else:
            self.root = locate(f"data/{name.lower()}")
            self.dataset = self._open(getattr(torchvision.datasets, name), split)
        self.size = tuple(self._image(0).shape[1:])

    def _cifar10(self, split: str) -> tuple[Path, Tensor]:
        if split not in cifar10.SHEETS:
            raise UserError(f"{self.key}={self.spec}: expected CIFAR10:train or CIFAR10:test")
        root = cifar10.find_folder()
        if root is None:
            self._refuse("CIFAR10", " or ".join(map(str, cifar10.SEARCHED)), "no such folder")
        return root, cifar10.load(split, root)[0]

    def _open(self, cls: type, split: str) -> torch.utils.data.Dataset:
        options = {}
        if "train" in inspect.signature(cls).parameters:
            if split not in ("train", "test"):
                name = cls.__name__
                raise UserError(f"{self.key}={self.spec}: expected {name}:train or {name}:test")
            options["train"] = split == "train"
        elif split:
            options["split"] = split
        try:
            return cls(self.root, **options)
        except Exception as error:  # each dataset raises its own error if it is missing
            self._refuse(cls.__name__, self.root, " ".join(str(error).split()))

    def _refuse(self, name: str, place: Path | str, reason: str) -> None:
        raise UserError(
            f"{self.key}={self.spec}: not in {place} ({reason}); fetch it with "
            f"torchvision.datasets.{name}('data/{name.lower()}', download=True)"
        ) from None

    def __len__(self) -> int:
        return len(self.dataset)

    def _image(self, index: int) -> Tensor:
        if isinstance(self.dataset, Tensor):
            return self.dataset[index]
        return to_tensor(self.dataset[index][0], f"{self.key}={self.spec}: image {index}")

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """All images in the official order, uint8 (B, 3, H, W)."""
        for start in range(0, len(self), batch_size):
            images = [self._image(i) for i in range(start, min(start + batch_size, len(self)))]
            for index, image in enumerate(images, start):
                if image.shape[1:] != self.size:
                    (height, width), (h, w) = self.size, image.shape[1:]
                    raise UserError(
                        f"{self.key}={self.spec}: image {index} has {w}x{h} pixels; all must have "
                        f"the {width}x{height} of the first"
                    )
            yield torch.stack(images)

    def stamp(self) -> str:
        """A hash that changes when a file in the dataset's folder does."""
        return stamp(sorted(file for file in self.root.rglob("*") if file.is_file()))


def open_images(spec: str | Path, key: str = "reference") -> ImageFolder | TorchvisionImages | None:
    """The images that `spec` names; None for an .npz. UserError, naming `key`, for anything else.

    `spec` is a folder, a .zip or torchvision:NAME:SPLIT. Relative paths start from the current
    folder or, if there is no such file, from the repository's root.
    """
    if str(spec).startswith(TORCHVISION):
        return TorchvisionImages(str(spec), key)
    path = locate(spec)
    if not path.exists():
        raise UserError(f"{key}={spec}: not found; expected {KINDS}")
    if path.is_dir():
        return ImageFolder(path, key)
    suffix = path.suffix.lower()
    if suffix not in (".zip", ".npz"):
        raise UserError(f"{key}={spec}: expected {KINDS}")
    return ImageZip(path, key) if suffix == ".zip" else None


def cache_folder() -> Path:
    """The folder for statistics, beside torch's hub folder: TORCH_HOME moves both."""
    return Path(torch.hub.get_dir()).parent / "lml"


_alive = WeakValueDictionary()


class Reference:
    """A reference set under one feature extractor. Its statistics are computed at first use.

    They are kept in `cache_folder()`, and computed again only if the source changes (a file's name,
    size or time), or for another extractor. Several processes compute the same statistics only
    once. Statistics in an .npz are read and checked at once: UserError if they are of another
    extractor or number of features.

    `size` is (H, W) of the images, or None if unknown. If `keep_features` is set before the
    statistics are computed, they also hold all features: 4 D bytes an image, in memory and on disk.
    """

    def __init__(self, spec: str | Path, extractor: nn.Module, key: str = "reference"):
        self.spec, self.extractor, self.key = str(spec), extractor, key
        self.keep_features = False
        self.images = open_images(spec, key)
        if self.images is None:
            self._statistics = ReferenceStatistics.load(spec, key, any_origin=True)
            self._statistics.check(extractor, key)
            self.size = self._statistics.size
            return
        self._statistics = None
        self.size = self.images.size
        self.stamp = self.images.stamp()
        path = getattr(self.images, "path", None)
        self.source = str(path.resolve()) if path else self.spec

    def describe(self) -> dict:
        """The reference's entry in a metric's protocol; it has no count before it is computed."""
        statistics, facts = self._statistics, {}
        if self.images is None:
            return statistics.describe()
        if statistics is not None:
            images = statistics.protocol["images"]
            facts = {"count": images["count"], "sha256": images["sha256"]}
        if left_out := getattr(self.images, "left_out", None):
            facts["left_out"] = left_out.total()
        return {"source": self.source, **facts, "size": list(self.size)}

    def statistics(self) -> ReferenceStatistics:
        """The statistics, from the cache or computed now."""
        statistics = self._statistics
        if statistics is None or (self.keep_features and statistics.features is None):
            self._statistics = self._find()
        return self._statistics

    def need_features(self, key: str = "reference") -> None:
        """Keep all features when they are computed. UserError if there are only statistics."""
        if self.images is None:
            raise UserError(
                f"{key}={self.spec}: has only mean and covariance, enough for a Fréchet distance; "
                "expected the images"
            )
        self.keep_features = True

    def _find(self) -> ReferenceStatistics:
        path = self.file()
        with contextlib.ExitStack() as stack:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(FileLock(f"{path}.lock"))
            except OSError:  # no writable cache
                return self._compute()
            with contextlib.suppress(UserError):  # not in the cache yet, or broken
                kept = ReferenceStatistics.load(path, features=self.keep_features)
                fits = kept.protocol.get("stamp") == self.stamp
                if fits and (kept.features is not None or not self.keep_features):
                    return kept
            made = self._compute()
            with contextlib.suppress(OSError):
                made.save(path)
            return made

    def file(self) -> Path:
        """The file of the statistics; its name depends on the source and the extractor."""
        what = [self.source, describe(self.extractor), getattr(self.extractor, "resize", "none")]
        name = re.sub(r"\W+", "-", Path(self.source).stem).strip("-")
        digest = hashlib.sha256(json.dumps(what).encode()).hexdigest()
        return cache_folder() / f"{name}-{digest[:16]}.npz"

    def _compute(self) -> ReferenceStatistics:
        batches = self.images.batches(BATCH_SIZE)
        count = -(-len(self.images) // BATCH_SIZE)
        # disable=None: a bar in a terminal, nothing in a file
        batches = tqdm(batches, f"{self.key}={self.spec}", count, unit="batch", disable=None)
        made = ReferenceStatistics.compute(batches, self.extractor, self.keep_features)
        made.protocol |= {
            "resize": getattr(self.extractor, "resize", "none"),
            "source": self.source,
            "stamp": self.stamp,
        }
        return made


def find_reference(spec: str | Path | None, extractor: nn.Module, key: str) -> Reference:
    """The reference set that `spec` names, shared between metrics with the same extractor.

    So it is computed only once for all of them. UserError, naming `key`, if `spec` is None.
    """
    if spec is None:
        raise UserError(f"{key}=null: expected {KINDS}; reference= sets it for all metrics")
    made = Reference(spec, extractor, key)
    if made.images is None:
        return made
    return _alive.setdefault((made.source, made.stamp, id(extractor)), made)


def check_size(images: Tensor, reference: Reference | ReferenceStatistics) -> None:
    """UserError unless `images` (B, C, H, W) have the reference's resolution, if that is known."""
    if reference.size is not None and tuple(images.shape[2:]) != tuple(reference.size):
        (height, width), (h, w) = reference.size, images.shape[2:]
        raise UserError(f"images of {w}x{h} pixels: the reference's have {width}x{height}")
