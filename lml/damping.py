"""How much damping: the default where none is given, and the damping of each step.

The default is for a relative damping, lambda / mean |u|^2. To first order, with the last r
directions as anchors, g' is g + sum_i (g - u_i) / lambda: the larger the damping, the less LML
extrapolates. The default is the product of

    rank (rank + 1)     turns g by half a step's change: what a solver of first order lacks

and, for solvers of a higher order, which extrapolate on their own, of

    (steps / 5)^3       above 5 steps: what they lack shrinks that fast; so they keep their order
    SOLVERS[...]        what kind of solver it is
    GRIDS[...]          16 where the grid is even in log-SNR

The factors are chosen by their worst case: on two networks, the ideal denoiser, a mixture and a
Gaussian, 5 to 20 steps, ranks 1 to 3, LML at its default raises the error to the fine solution by
4 % at most (experiments/README.md). What one model can gain above that is found by
`lml.calibration`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

SOLVERS = {
    "plain": 2.0,  # singlestep, or multistep in the predicted noise, which is what LML extrapolates
    "multistep in x0": 8.0,  # the predicted image that a turn of the noise amounts to turns further
    "predictor-corrector": 16.0,  # the corrector uses each prediction a second time
    "Heun": 32.0,  # every other prediction is at the end of a step, which LML would overshoot
    "Adams-Bashforth": 256.0,  # the formula of fourth order multiplies what the correction adds
}
# By the option that chooses the grid. Their steps in the middle of a trajectory, where the image is
# decided, are so long that solvers of higher orders extrapolate too far on their own.
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
    """The relative damping where none is given.

    Args:
        rank: the number of anchors.
        steps: of the trajectory.
        order: with which the solver converges.
        solver: a key of `SOLVERS`.
        grid: a key of `GRIDS`, or None for one that is even in time.
    """
    half_a_step = max(1, rank * (rank + 1))
    if order == 1:
        return float(half_a_step)
    return half_a_step * max(1.0, steps / 5) ** 3 * SOLVERS[solver] * GRIDS.get(grid, 1.0)


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
