"""A folder of images as batches of uint8 pixels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lml.errors import UserError

SUFFIXES = (".png", ".bmp", ".webp", ".jpg", ".jpeg")
MODES = ("RGB", "L", "P", "1")


def read(path: Path) -> Tensor:
    """The image in `path` as uint8 (3, H, W). UserError when it is broken or not 8 bits of RGB."""
    try:
        with Image.open(path) as image:
            mode, pixels = image.mode, np.array(image.convert("RGB"))
    except Exception as error:  # a broken file raises whatever its decoder stumbled on
        raise UserError(f"{path}: not a readable image ({error})") from None
    if mode not in MODES:
        raise UserError(f"{path}: pixels of type {mode}; one of {', '.join(MODES)} is allowed")
    return torch.from_numpy(pixels).permute(2, 0, 1)


class ImageFolder:
    """The images in one folder, sorted by name, all of one size. Nothing is kept in memory.

    `names` are the file names, `size` is (H, W). Raises UserError when there is no such folder,
    when it holds no images, and, on reading, for a broken file or one of another size.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_dir():
            raise UserError(f"images={path}: no such folder")
        self.names = sorted(
            file.name
            for file in self.path.iterdir()
            if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")
        )
        if not self.names:
            raise UserError(f"images={path}: no images in it ({', '.join(SUFFIXES)})")
        self.size = tuple(read(self.path / self.names[0]).shape[1:])

    def __len__(self) -> int:
        return len(self.names)

    def load(self, names: Sequence[str]) -> Tensor:
        """The images of these names, uint8 (B, 3, H, W)."""
        images = []
        for name in names:
            images.append(image := read(self.path / name))
            if image.shape[1:] != self.size:
                (height, width), (h, w) = self.size, image.shape[1:]
                raise UserError(
                    f"{self.path / name}: {w}x{h} pixels; "
                    f"all images must have the {width}x{height} of {self.names[0]}"
                )
        return torch.stack(images)

    def blocks(self, batch_size: int) -> list[list[str]]:
        """The names in fixed blocks of `batch_size`."""
        return [self.names[i : i + batch_size] for i in range(0, len(self), batch_size)]

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """All images, uint8 (B, 3, H, W), block by block."""
        return map(self.load, self.blocks(batch_size))
