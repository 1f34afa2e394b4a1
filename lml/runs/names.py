"""The file names of a run's images."""

from __future__ import annotations

import re

DIGITS = 6  # of an image's name, at least


def image_name(index: int, num_images: int | None) -> str:
    """The file name of image `index`. All names of a run have one length, so they sort by index."""
    width = DIGITS if num_images is None else max(DIGITS, len(str(num_images - 1)))
    return f"{index:0{width}d}.png"


def image_index(name: str, num_images: int | None) -> int | None:
    """The index of the image called `name`; None if a run of `num_images` has no such image."""
    if not re.fullmatch(rf"[0-9]{{{DIGITS},18}}\.png", name):
        return None
    index = int(name.removesuffix(".png"))
    is_there = num_images is None or index < num_images
    return index if is_there and image_name(index, num_images) == name else None
