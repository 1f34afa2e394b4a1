"""Reads a folder or a zip of images in batches of uint8 pixels."""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import os
import warnings
import zipfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from lml.errors import UserError
from lml.files import open_regular

Check = Callable[[int, int], None]  # is called with a height and a width
SUFFIXES = (".png", ".bmp", ".webp", ".jpg", ".jpeg")
FORMATS = ("PNG", "BMP", "WEBP", "JPEG")  # Pillow would start Ghostscript for PostScript
# Files that are often beside images, and that nobody takes for images.
NO_IMAGES = (".csv", ".db", ".html", ".ini", ".json", ".jsonl", ".md", ".tsv", ".txt", ".yaml")
INSIDE = "in sub-folders"
MODES = ("RGB", "L", "P", "1", "RGBA", "LA")  # the last two only if opaque
READERS = 4  # threads that decode
LATENTS = "latents"  # a folder beside a run's images
METADATA = 2**24  # the most bytes of a file beside its pixels
# A file of a few bytes can decode to gigabytes of pixels.
warnings.simplefilter("error", Image.DecompressionBombWarning)


@contextlib.contextmanager
def open_image(file: Path | BinaryIO) -> Iterator[Image.Image]:
    """Open the image in `file`, a regular file of `FORMATS`, without decoding its pixels.

    Raises Pillow's errors, and ValueError for more pixels than Pillow's MAX_IMAGE_PIXELS.
    """
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(open_regular(file)) if isinstance(file, Path) else file
        try:
            image = stack.enter_context(Image.open(stream, formats=FORMATS))
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise ValueError(str(error)) from None
        # again, in case another filter of warnings is set
        if image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):
            raise ValueError(
                f"{image.width}x{image.height} pixels; {Image.MAX_IMAGE_PIXELS} at most"
            )
        yield image


def read(path: Path, upright: bool = False, check: Check | None = None) -> Tensor:
    """The image in `path` as uint8 (3, H, W).

    With `upright`, it is turned by its EXIF orientation; tools that score images don't do that.
    `check(height, width)` is called before the pixels are decoded. UserError if the image is
    broken, not 8-bit grey or RGB, or transparent somewhere.
    """
    return decode(path, str(path), upright, check)


def decode(
    file: Path | BinaryIO, name: str, upright: bool = False, check: Check | None = None
) -> Tensor:
    """The image in `file`, called `name` in errors, as uint8 (3, H, W). Otherwise as `read`."""
    try:
        with open_image(file) as image:
            if check is not None:
                check(image.height, image.width)
            return to_tensor(ImageOps.exif_transpose(image) if upright else image, name)
    except UserError:
        raise
    except Exception as error:  # a decoder may raise anything for a broken file
        raise UserError(f"{name}: not a readable image ({_reason(error)})") from None


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # Pillow's message has the file's address
        return f"none of {', '.join(FORMATS)}"
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def to_tensor(image: Image.Image, name: str) -> Tensor:
    """`image`, called `name` in errors, as uint8 (3, H, W). Errors as for `read`."""
    if image.mode not in MODES:
        modes = ", ".join(MODES)
        raise UserError(f"{name}: pixels of type {image.mode}; expected one of {modes}")
    if image.mode in ("RGBA", "LA") or "transparency" in image.info:
        lowest, _ = image.convert("RGBA").getextrema()[3]
        if lowest < 255:
            raise UserError(f"{name}: transparent in places; expected an opaque image")
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def stamp(files: Iterable[Path]) -> str:
    """sha256 over names, sizes and times of change; it changes when a file does."""
    digest = hashlib.sha256()
    for file in files:
        status = file.stat()
        digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def latents_path(image: Path) -> Path:
    """Where the latents of a run's image are, if they were kept."""
    return image.parents[1] / LATENTS / f"{image.stem}.npy"


class ImageFolder:
    """The images in one folder, sorted by name, all of one size. Nothing is kept in memory.

    `names` are the file names, `size` is (H, W). `left_out` counts files that may be images and
    are not read, by their suffix, or as "in sub-folders". UserError, naming `key`, if there is no
    such folder or no image in it and, on reading, for a broken file or one of another size.
    """

    nested = False  # whether images in sub-folders are read, too

    def __init__(self, path: str | Path, key: str = "images"):
        self.path, self.key = Path(path), key
        self.names, others = [], []
        for file in self._files():
            (self.names if self._is_read(file) else others).append(file.as_posix())
        self.names.sort()
        others = sorted(name for name in others if Path(name).suffix.lower() not in NO_IMAGES)
        self.left_out = Counter(map(self._kind, others))
        if not self.names:
            reason = f"no images in it ({', '.join(SUFFIXES)})"
            inside = [name for name in others if self._kind(name) == INSIDE]
            if others:
                reason += f"; left out: {self._counts()}"
            if inside:
                reason += f", as in {self.path / Path(inside[0]).parent}"
            raise UserError(f"{key}={path}: {reason}")
        self.size: tuple[int, int] | None = None  # until the first image is read
        self.size = tuple(self.read(self.names[0]).shape[1:])

    def _files(self) -> Iterator[Path]:
        """All files, without hidden ones, by their path in the folder."""
        if not self.path.is_dir():
            reason = (
                "a file; expected a folder of images" if self.path.exists() else "no such folder"
            )
            raise UserError(f"{self.key}={self.path}: {reason}")
        for folder, folders, files in os.walk(self.path):
            folders[:] = [name for name in folders if not name.startswith(".")]
            inside = Path(folder).relative_to(self.path)
            yield from (inside / name for name in files if not name.startswith("."))

    def _is_read(self, name: Path) -> bool:
        return name.suffix.lower() in SUFFIXES and (self.nested or len(name.parts) == 1)

    def _kind(self, name: str) -> str:
        if "/" in name and not self.nested:
            return INSIDE
        return Path(name).suffix.lower() or "without a suffix"

    def _counts(self) -> str:
        return ", ".join(f"{count} {kind}" for kind, count in sorted(self.left_out.items()))

    def describe_left_out(self) -> str | None:
        """A line that says what is left out, if anything is."""
        if not self.left_out:
            return None
        count = self.left_out.total()
        files = "1 file is" if count == 1 else f"{count} files are"
        return (
            f"{self.key}={self.path}: {len(self)} images ({', '.join(SUFFIXES)}); "
            f"{files} left out: {self._counts()}"
        )

    def __len__(self) -> int:
        return len(self.names)

    def read(self, name: str) -> Tensor:
        """One image, uint8 (3, H, W)."""
        return read(self.path / name, check=partial(self._check, name))

    def _check(self, name: str, h: int, w: int) -> None:
        if self.size not in (None, (h, w)):
            height, width = self.size
            raise UserError(
                f"{self.path / name}: {w}x{h} pixels; "
                f"all images must have the {width}x{height} of {self.names[0]}"
            )

    def stamp(self) -> str:
        """A hash that changes when a file is changed, added or removed."""
        return stamp(self.path / name for name in self.names)

    def load(self, names: Sequence[str]) -> Tensor:
        """The images of these names, uint8 (B, 3, H, W)."""
        return torch.stack([self.read(name) for name in names])

    def blocks(self, batch_size: int) -> list[list[str]]:
        """The names in fixed blocks of `batch_size`."""
        return [self.names[i : i + batch_size] for i in range(0, len(self), batch_size)]

    def load_blocks(self, blocks: Iterable[Sequence[str]]) -> Iterator[Tensor]:
        """The images of each block in turn, as from `load`; the next block is decoded meanwhile."""
        pool, ahead = ThreadPoolExecutor(READERS), deque()
        try:
            for block in blocks:
                ahead.append([pool.submit(self.read, name) for name in block])
                if len(ahead) > 1:
                    yield self._finished(ahead.popleft())
            if ahead:
                yield self._finished(ahead.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def _finished(self, images: list[Future]) -> Tensor:
        return torch.stack([image.result() for image in images])

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """All images, uint8 (B, 3, H, W), block by block."""
        return self.load_blocks(self.blocks(batch_size))


class ImageZip(ImageFolder):
    """The images in a zip file and in its folders, sorted by name; otherwise as `ImageFolder`.

    UserError also for a file that is no zip.
    """

    nested = True

    def _files(self) -> Iterator[Path]:
        try:
            self.archive = zipfile.ZipFile(open_regular(self.path))
        except (OSError, zipfile.BadZipFile) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise UserError(f"{self.key}={self.path}: not a zip file ({reason})") from None
        for entry in self.archive.infolist():
            name = Path(entry.filename)
            hidden = any(part.startswith((".", "__MACOSX")) for part in name.parts)
            if not (hidden or entry.is_dir()):
                yield name

    def read(self, name: str) -> Tensor:
        check = partial(self._check, name)
        try:
            with self.archive.open(name) as stream, open_image(stream) as image:
                check(image.height, image.width)
                largest = 8 * image.height * image.width + METADATA
            if (size := self.archive.getinfo(name).file_size) > largest:
                raise ValueError(f"{size} bytes; {largest} at most, at its height and width")
            data = self.archive.read(name)
        except UserError:
            raise
        except Exception as error:  # zlib's, zipfile's and the disk's share no base class
            reason = _reason(error)
            raise UserError(f"{self.path / name}: not a readable image ({reason})") from None
        return decode(io.BytesIO(data), str(self.path / name), check=check)

    def stamp(self) -> str:
        return stamp([self.path])
