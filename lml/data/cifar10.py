"""CIFAR-10 as uint8 tensors, from a folder of lossless PNG sheets or from torchvision's copy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lml.data.assets import find_workplace
from lml.data.images import open_image
from lml.errors import UserError
from lml.files import open_regular

SEARCHED = (Path("data/cifar10"), Path("../shared/data/cifar10"))
IMAGES = 10_000  # the most in a sheet
SHEETS = {
    "train": [f"data_batch_{k}.png" for k in range(1, 6)],
    "test": ["test_batch.png"],
}


def _sheet(path: Path) -> np.ndarray:
    """One sheet: row k is image k, its 32x32 pixels laid out row by row."""
    try:
        with open_image(path) as sheet:
            if sheet.width != 32 * 32 or sheet.height > IMAGES:
                raise ValueError(f"{sheet.width}x{sheet.height} pixels")
            return np.asarray(sheet.convert("RGB")).reshape(-1, 32, 32, 3)
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path}: not a sheet of CIFAR-10 images ({error})") from None


def find_folder(path: str | Path | None = None) -> Path | None:
    """The folder that holds CIFAR-10 (`path`, or the first of `SEARCHED`), or None."""
    searched = [find_workplace() / place for place in SEARCHED]
    for folder in [Path(path)] if path is not None else searched:
        if (folder / "data_batch_1.png").is_file() or (folder / "cifar-10-batches-py").is_dir():
            return folder
    return None


def load(
    split: str = "train",
    path: str | Path | None = None,
    download: bool = False,
    key: str = "data",
) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 32, 32) uint8 and labels (N,) int64 of `split`, "train" or "test".

    `path` is a folder of PNG sheets or the root of torchvision's `CIFAR10`; without it the
    places in `SEARCHED` are tried. With `download=True`, torchvision fetches what is missing.
    UserError, naming `key`, if there is nothing to read, or if it is broken.
    """
    folder = find_folder(path)
    if folder is not None and (folder / "data_batch_1.png").is_file():
        images = np.concatenate([_sheet(folder / name) for name in SHEETS[split]])
        with open_regular(folder / f"{split}_labels.npy") as file:
            labels = np.load(file)
    elif folder is not None or download:
        from torchvision.datasets import CIFAR10

        root = folder or Path(path or find_workplace() / SEARCHED[0])
        try:
            dataset = CIFAR10(root, train=split == "train", download=download)
        except (RuntimeError, OSError) as error:
            raise UserError(f"{key}.path={root}: {' '.join(str(error).split())}") from None
        images, labels = dataset.data, np.asarray(dataset.targets)
    else:
        places = path or " or ".join(map(str, SEARCHED))
        raise UserError(
            f"{key}.path={path}: CIFAR-10 is not in {places}; name its folder, "
            f"or let torchvision fetch it with {key}.download=true"
        )
    images = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).contiguous()
    return images, torch.from_numpy(labels.astype(np.int64))
