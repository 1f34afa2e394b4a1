"""The device that a script works on."""

from __future__ import annotations

import os
import re

import torch

from lml.errors import UserError


def find_device(name: str) -> torch.device:
    """The device `name`; "auto" is a GPU if there is one. Each process gets a GPU in turn.

    UserError when the device is not available.
    """
    kinds = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.mps.is_available()}
    there = [kind for kind, available in kinds.items() if available]
    if name == "auto":
        name = "cuda" if kinds["cuda"] else "cpu"
    if name == "cuda" and kinds["cuda"]:
        name = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
    try:
        device = torch.device(name)
        if device.type not in there or (device.index or 0) >= max(1, torch.cuda.device_count()):
            raise RuntimeError("not available")
    except (RuntimeError, TypeError):
        choices = " or ".join(["auto", *there])
        raise UserError(f"device={name}: not available; use {choices}") from None
    return device


def is_memory(error: BaseException) -> bool:
    """Whether memory ran out. On the CPU, torch has no error class for it."""
    lacking = re.search("allocate memory|not enough memory|Storage size calculation", str(error))
    return isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or bool(lacking)


def use_device(name: str, threads: int | None) -> torch.device:
    """`find_device(name)`. Also sets the number of CPU threads; None keeps torch's choice."""
    device = find_device(name)
    if threads is not None:
        torch.set_num_threads(threads)
    return device
