"""Grids that were found for a model, such as those of Align Your Steps (arXiv 2404.14507)."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Sequence
from numbers import Integral

import numpy as np
from torch import Tensor

OPTION = inspect.Parameter("aligned_timesteps", inspect.Parameter.KEYWORD_ONLY, default=None)


def takes_grid(scheduler: type) -> bool:
    """Whether the class, one of diffusers', can have any timesteps of a noise schedule of betas.

    It takes them in `set_timesteps`, or its grid can be replaced after that (UniPC and DEIS).
    """
    options = inspect.signature(scheduler).parameters
    return "beta_start" in options and (takes_timesteps(scheduler) or "solver_order" in options)


def takes_option(scheduler: type) -> bool:
    """Whether the class, one of `lml.schedulers`, takes `aligned_timesteps`."""
    return OPTION.name in inspect.signature(scheduler).parameters


def takes_timesteps(scheduler: type) -> bool:
    """Whether `set_timesteps` of the class takes `timesteps`."""
    return "timesteps" in inspect.signature(scheduler.set_timesteps).parameters


def check_grid(timesteps: object, num_train_timesteps: int) -> list[int] | None:
    """`timesteps` as a list, None as it is. ValueError unless they fall from below T to above 0."""
    if timesteps is None:
        return None
    whole = isinstance(timesteps, Sequence) and all(
        isinstance(t, Integral) and not isinstance(t, bool) for t in timesteps
    )
    ends = [num_train_timesteps, *timesteps, 0] if whole and timesteps else [0, 0]
    if any(a <= b for a, b in itertools.pairwise(ends)):
        raise ValueError(
            f"{OPTION.name}={timesteps}: must be whole numbers that fall, from below "
            f"{num_train_timesteps} to above 0"
        )
    return [int(t) for t in timesteps]


def interpolate(timesteps: Sequence[int], steps: int, alphas_cumprod: Tensor) -> list[int]:
    """A grid of so many steps like `timesteps`, which it is where there are as many.

    The noise levels, sqrt((1 - a) / a) of the noise schedule `alphas_cumprod` (T,), are
    interpolated in their logarithms, the last one being that of timestep 0, where the grid ends.

    Raises:
        ValueError: the noise schedule has no timesteps for so many steps.
    """
    a = alphas_cumprod.double().numpy(force=True)
    levels = np.log((1 - a) / a) / 2  # of timestep 0, 1, ...
    known = levels[[*timesteps, 0]]
    wanted = np.interp(np.linspace(0, 1, steps + 1), np.linspace(0, 1, len(known)), known)
    found = np.interp(wanted[:-1], levels, np.arange(len(levels))).round().astype(int).tolist()
    if len({*found, 0}) <= steps:
        raise ValueError(f"{OPTION.name}: there are no timesteps for so many steps")
    return found
