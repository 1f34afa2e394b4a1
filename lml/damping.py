"""How much damping: the default, and the damping of each step.

The default is a relative damping, lambda / mean |u|^2. To first order, with the last r directions
as anchors, g' is g + sum_i (g - u_i) / lambda: the larger the damping, the less LML extrapolates.
For solvers of first order, the default is

    rank (rank + 1)     turns g by half a step's change, which is what such a solver lacks

Solvers of higher order extrapolate on their own. For them it is the product of this and

    (steps / 5)^3       above 5 steps, so that they keep their order: what they lack shrinks as fast
    SOLVERS[...]        for the kind of solver
    GRIDS[...]          16 if the grid is even in log-SNR

The factors were chosen by their worst case: on two networks, the ideal denoiser, a mixture and a
Gaussian, with 5 to 20 steps and ranks 1 and 2, the default raises the error to the fine solution by
4 % at most (experiments/README.md). `lml.calibration` finds what one model can gain.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

SOLVERS = {
    "plain": 2.0,  # singlestep, or multistep in the noise, which LML extrapolates, too
    "multistep in x0": 8.0,  # when the noise turns, the predicted image turns further
    "predictor-corrector": 16.0,  # the corrector uses each prediction a second time
    "Heun": 32.0,  # every other prediction is at the end of a step, which LML would overshoot
    "Adams-Bashforth": 256.0,  # the formula of fourth order multiplies what the correction adds
}
# By the option that chooses the grid. These grids have long steps in the middle of a trajectory,
# where the image is decided. There, solvers of higher order already extrapolate too far.
GRIDS = {
    "use_karras_sigmas": 16.0,
    "use_exponential_sigmas": 16.0,
    "use_beta_sigmas": 16.0,
    "use_lu_lambdas": 16.0,
    "aligned_timesteps": 16.0,
}


def default_damping(
    rank: int, steps: int = 0, order: int = 1, solver: str = "plain", grid: str | None = None
) -> float:
    """The relative damping that is used if the option `damping` is None.

    Args:
        rank: the number of anchors.
        steps: the number of steps.
        order: the solver's order of convergence.
        solver: a key of `SOLVERS`.
        grid: a key of `GRIDS`, or None for a grid that is even in time.
    """
    half_a_step = max(1, rank * (rank + 1))
    if order == 1:
        return float(half_a_step)
    return half_a_step * max(1.0, steps / 5) ** 3 * SOLVERS[solver] * GRIDS.get(grid, 1.0)


def damping_of_steps(
    damping: float | Sequence[float | None], last: float, timesteps: Sequence[float]
) -> tuple[float | None, ...]:
    """The damping of each step; None for a step without correction.

    Args:
        damping: one number for all steps, or a list with one for each step.
        last: no correction at timesteps >= last.
        timesteps: the timestep of each step.

    Raises:
        ValueError: `damping` is a list of another length.
    """
    dampings = one_for_each_step("damping", damping, len(timesteps))
    return tuple(
        None if timestep >= last else value
        for timestep, value in zip(timesteps, dampings, strict=True)
    )


def one_for_each_step(name: str, value: object, steps: int) -> tuple:
    """`value` if it is a list, otherwise `value` for every step. ValueError: a list not of `steps`.

    `name` is the name of the option.
    """
    if not isinstance(value, Sequence):
        return (value,) * steps
    if len(value) != steps:
        raise ValueError(f"{name}={list(value)}: has {len(value)} entries for {steps} steps")
    return tuple(value)


def is_damping(value: object) -> bool:
    """Whether `value` is a finite number > 0."""
    return is_real(value) and math.isfinite(value) and value > 0


def is_real(value: object) -> bool:
    """Whether `value` is a real number, of any library."""
    return isinstance(value, Real) and not isinstance(value, bool)
