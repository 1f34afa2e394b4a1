"""What the files of a run's images are called."""

from __future__ import annotations

import re

DIGITS = 6  # of an image's name, at least


def image_name(index: int, num_images: int | None) -> str:
    """The name of an image of a run of so many: all as long, so that they sort by number."""
    width = DIGITS if num_images is None else max(DIGITS, len(str(num_images - 1)))
    return f"{index:0{width}d}.png"


def image_index(name: str, num_images: int | None) -> int | None:
    """The index of the image of that name; None where a run of so many has no such image."""
    if not re.fullmatch(rf"[0-9]{{{DIGITS},18}}\.png", name):
        return None
    index = int(name.removesuffix(".png"))
    is_there = num_images is None or index < num_images
    return index if is_there and image_name(index, num_images) == name else None
