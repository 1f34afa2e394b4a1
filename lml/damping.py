"""How much damping: the default where none is given, and the damping of each step.

The default is for a relative damping, lambda / mean |u|^2. It is the product of

    rank (rank + 1)     turns g by half a step's change: what a solver of first order lacks
    (steps / 5)^2       above 5 steps, in solvers of a higher order: these lack less, the shorter
                        their steps are, and so keep their order, up to the third
    SOLVERS[...]        where the solver extrapolates much already
    GRIDS[...]          where the grid does

With anchors that are g of the last r steps, g' is to first order g + sum_i (g - u_i) / lambda: the
larger the damping, the less LML extrapolates. The numbers are measured (experiments/README.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

SOLVERS = {
    "plain": 1.0,
    "predictor-corrector": 2.0,  # the corrector does half of the work
    "Adams-Bashforth": 16.0,  # the formula of fourth order multiplies what the correction adds
}
# By the option that chooses the grid. Their steps in the middle of a trajectory, where the image is
# decided, are so long that solvers of higher orders extrapolate too far on their own.
GRIDS = {
    "use_karras_sigmas": 8.0,
    "use_exponential_sigmas": 8.0,
    "use_beta_sigmas": 8.0,
    "use_lu_lambdas": 8.0,
}


def default_damping(
    rank: int, steps: int = 0, order: int = 1, solver: str = "plain", grid: str | None = None
) -> float:
    """The relative damping where none is given.

    Args:
        rank: the number of anchors.
        steps: of the trajectory.
        order: with which the solver converges.
        solver: a key of `SOLVERS`.
        grid: a key of `GRIDS`, or None for one that is even in time.
    """
    growth = max(1.0, steps / 5) ** 2 if order > 1 else 1.0
    return max(1, rank * (rank + 1)) * growth * SOLVERS[solver] * GRIDS.get(grid, 1.0)


def damping_of_steps(
    damping: float | Sequence[float | None], last: float, timesteps: Sequence[float]
) -> tuple[float | None, ...]:
    """The damping of each step; None for a step that is left as it is.

    Args:
        damping: one for all steps, or one for each.
        last: the timestep at and above which nothing is corrected.
        timesteps: of the steps.

    Raises:
        ValueError: `damping` is a list for another number of steps.
    """
    dampings = one_for_each_step("damping", damping, len(timesteps))
    return tuple(
        None if timestep >= last else value
        for timestep, value in zip(timesteps, dampings, strict=True)
    )


def one_for_each_step(name: str, value: object, steps: int) -> tuple:
    """The list `value`, or `value` for every step. ValueError: a list for another number of steps.

    `name` is what the option is called.
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
    """Whether `value` is a real number, of whatever library."""
    return isinstance(value, Real) and not isinstance(value, bool)
