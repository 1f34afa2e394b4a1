"""The processes that torchrun started: they join, exchange values, and follow the first."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from lml.errors import RunError, UserError, first_line


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Join the processes that torchrun started, if any."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world <= 1 or dist.is_initialized():
        yield
        return
    # The timeout is long, since shares are unequal. If a process fails, torchrun ends the others.
    try:
        dist.init_process_group("gloo", timeout=timedelta(days=7))
    except ValueError as error:
        reason = first_line(error)
        line = f"WORLD_SIZE={world}: torchrun sets other variables, too ({reason}); use torchrun"
        raise UserError(line) from None
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank_and_world() -> tuple[int, int]:
    """This process's rank, and the number of processes."""
    has_joined = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if has_joined else (0, 1)


def is_first() -> bool:
    """Whether this is the first process that torchrun started; also before `joined`."""
    rank = dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))
    return rank == 0


def on_first(function: Callable[[], Any]) -> Any:
    """Call `function` in the first process. All return its value, or raise its UserError."""
    rank, world = rank_and_world()
    if world == 1:
        return function()
    outcome = [None, None]
    if rank == 0:
        try:
            outcome[0] = function()
        except UserError as error:
            outcome[1] = error
    _collective(dist.broadcast_object_list, outcome)
    value, error = outcome
    if error is not None:
        error.elsewhere = rank > 0
        raise error
    return value


def gather(value: Any) -> list[Any]:
    """The values of all processes, by rank. Every process gets the list."""
    _, world = rank_and_world()
    if world == 1:
        return [value]
    values = [None] * world
    _collective(dist.all_gather_object, values, value)
    return values


def _collective(function: Callable, *args: Any) -> None:
    try:
        function(*args)
    except RuntimeError:  # gloo's "connection closed by peer", in its many wordings
        raise RunError("another process has ended; see its own message") from None
