"""How much damping this model wants, with this solver, grid and number of steps: found by trying.

There are two numbers for each step. The damping lambda_k says how far LML extrapolates: the first
step, which has no anchor, has none. The length l_k multiplies g'. What is minimised is the distance
between the samples and the fine-step solutions from the same noise, a sum of squares, by the
Levenberg-Marquardt method over c_k = 1 / lambda_k >= 0, and then over c and l: to first order g' is
l (g + c (g - u)), so that samples are nearly linear in both, and c = 0 leaves a step without LML.
The derivative by a number of step k costs the steps after k alone: networks that are `memoised` are
not evaluated again where nothing has changed.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from diffusers import SchedulerMixin
from scipy.optimize import lsq_linear
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lml.correction import LMLCorrection
from lml.processes import gather, rank_and_world

SMALLEST = 1e-3  # c below it is 0
STARTS = (0.0, 0.125, 0.25, 0.5, 1.0)  # c of all steps, beside the default's
TRIES = 6  # step lengths in a round
ENOUGH = 0.01  # a relative gain below which the search ends


@dataclass(frozen=True)
class Kind:
    """A kind of number that is searched: its range, and what derivatives are taken by.

    Differences are so large that what a few samples do is smoothed.
    """

    low: float
    high: float
    difference: float


C = Kind(0.0, 8.0, 0.3)  # at a damping of 1/8 nearly all of the anchors' part is gone
LENGTH = Kind(0.5, 1.5, 0.02)


class CalibrationError(ValueError):
    """There is nothing that a calibration could be measured by."""


@dataclass(frozen=True)
class Choice:
    """LML's options: `rank` 0 is off; `damping` and `length` are one a step.

    A `damping` of None is the scheduler's default, a `length` of None is 1.
    """

    rank: int
    damping: tuple[float | None, ...] | None = None
    length: tuple[float, ...] | None = None

    def options(self) -> dict[str, Any]:
        """As a scheduler takes them."""
        return {
            "rank": self.rank,
            "damping": None if self.damping is None else list(self.damping),
            "damping_scale": "relative",
            "length": 1.0 if self.length is None else list(self.length),
        }

    def apply(self, scheduler: SchedulerMixin) -> SchedulerMixin:
        """A scheduler like `scheduler`, one of `lml.schedulers`, with these options."""
        return type(scheduler).from_config(scheduler.config, **self.options())


OFF = Choice(0)


def adds_noise(scheduler: SchedulerMixin, step_options: Mapping[str, Any]) -> bool:
    """Whether the scheduler adds noise as it goes: then no fine solution has the same noise."""
    known = inspect.signature(type(scheduler)).parameters
    own = {key: value for key, value in scheduler.config.items() if key in known}
    return bool(
        step_options.get("eta")
        or step_options.get("s_churn")
        or str(own.get("algorithm_type")).startswith("sde")
        or own.get("stochastic_sampling")
    )


@dataclass
class Calibration:
    """What a calibration found.

    `errors` are root mean squared distances to the fine solution, by "off", "default" and
    "calibrated", each on the `searched` and on the `unseen` samples. `chosen` is the one of the
    three that is best on the unseen ones, and `choice` its options. `tries` and `evaluations` are
    trajectories and network evaluations of one sample.
    """

    chosen: str
    choice: Choice
    calibrated: Choice
    errors: dict[str, dict[str, float]]
    tries: int
    evaluations: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Of plain values, for JSON."""
        return asdict(self)


@dataclass
class Objective:
    """What samples are compared by.

    `search` maps samples (B, ...) to numbers (B, K) that change smoothly; `report` to those whose
    distance is reported.
    """

    name: str
    search: Callable[[Tensor], Tensor]
    report: Callable[[Tensor], Tensor]


@dataclass
class Problem:
    """What is calibrated.

    Args:
        sample: `sample(scheduler, steps, indices)` makes the samples (B, ...) of these indices,
            the same from the same arguments: noise and prompt belong to the index.
        network: the one that `sample` evaluates.
        scheduler: one of `lml.schedulers`.
        steps: for its `set_timesteps`.
        fine_scheduler, fine_steps: of the fine solution.
        objective: what samples are compared by.
        batch_size: samples at a time.
    """

    sample: Callable[[SchedulerMixin, int, Sequence[int]], Tensor]
    network: nn.Module
    scheduler: SchedulerMixin
    steps: int
    fine_scheduler: SchedulerMixin
    fine_steps: int
    objective: Objective
    batch_size: int = 48


class Memo:
    """A network's answers along one trajectory; see `memoised`."""

    def __init__(self) -> None:
        self.calls: list[tuple[list, Any]] = []
        self.position = 0
        self.evaluations = 0

    def begin(self) -> None:
        """The next call is the first of a trajectory."""
        self.position = 0

    def answer(self, forward: Callable, args: tuple, kwargs: dict) -> Any:
        """`forward(*args, **kwargs)`, or what it was, if all calls up to it are the same."""
        given = tree_leaves((args, kwargs))
        if self.position < len(self.calls):
            known, output = self.calls[self.position]
            if len(known) == len(given) and all(map(_same, known, given)):
                self.position += 1
                return output
            del self.calls[self.position :]
        output = forward(*args, **kwargs)
        self.calls.append(([v.clone() if isinstance(v, Tensor) else v for v in given], output))
        self.position += 1
        self.evaluations += 1
        return output


def _same(x: Any, y: Any) -> bool:
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        return x.shape == y.shape and x.dtype == y.dtype and torch.equal(x, y)
    return x is y or (type(x) is type(y) and bool(x == y))


@contextmanager
def memoised(network: nn.Module, memo: Memo) -> Iterator[None]:
    """Inside, `network` is not evaluated where `memo` has its answer to the same inputs."""
    forward, owned = network.forward, "forward" in vars(network)
    network.forward = lambda *args, **kwargs: memo.answer(forward, args, kwargs)
    try:
        yield
    finally:
        if owned:
            network.forward = forward
        else:
            del network.forward


@dataclass
class _Batch:
    """Some samples, what the network answered on the last trajectory, and the fine solution's
    values, as the objective's parts have them."""

    indices: list[int]
    memo: Memo = field(default_factory=Memo)
    fine: dict[str, Tensor] = field(default_factory=dict)


class _Samples:
    """The samples with `indices`: errors and derivatives, shared between processes.

    Sums are added in the order of the batches, so that any number of processes has the same.
    """

    def __init__(self, problem: Problem, indices: Sequence[int], tell: Callable[[int], None]):
        size = problem.batch_size
        batches = [list(indices[i : i + size]) for i in range(0, len(indices), size)]
        rank, world = rank_and_world()
        self.problem, self.tell = problem, tell
        self.batches = [_Batch(batch) for batch in batches[rank::world]]
        self.tries = 0

    @property
    def evaluations(self) -> int:
        """Of the network, times samples; in all processes."""
        fine = _count_steps(self.problem.fine_scheduler, self.problem.fine_steps)
        own = sum((b.memo.evaluations + fine) * len(b.indices) for b in self.batches)
        return sum(gather(own))

    def _sample(self, batch: _Batch, scheduler: SchedulerMixin, steps: int) -> Tensor:
        before = batch.memo.evaluations
        batch.memo.begin()
        with memoised(self.problem.network, batch.memo):
            samples = self.problem.sample(scheduler, steps, batch.indices)
        self.tell((batch.memo.evaluations - before) * len(batch.indices))
        return samples

    def _solve(self, batch: _Batch) -> None:
        p = self.problem
        try:
            samples = p.sample(p.fine_scheduler, p.fine_steps, batch.indices)
            for part in ("search", "report"):
                batch.fine[part] = _values(getattr(p.objective, part), samples)
        except FloatingPointError as error:
            raise CalibrationError(f"the fine solution: {error}") from None
        self.tell(_count_steps(p.fine_scheduler, p.fine_steps) * len(batch.indices))

    def _differences(self, choice: Choice, part: str) -> list[Tensor]:
        """Of each batch, (B K,) float64: `part` of the objective, less the fine solution's."""
        p, differences = self.problem, []
        for batch in self.batches:
            if not batch.fine:
                self._solve(batch)
            fine = batch.fine[part]
            try:
                samples = self._sample(batch, choice.apply(p.scheduler), p.steps)
                values = _values(getattr(p.objective, part), samples)
            except FloatingPointError:  # it diverges
                values = torch.full_like(fine, math.inf)
            differences.append((values - fine).flatten())
        self.tries += 1
        return differences

    def error(self, choice: Choice, part: str = "report") -> float:
        """The root mean squared distance to the fine solution; infinite if it is NaN."""
        differences = self._differences(choice, part)
        error = _rms(self._gather([(d.square().sum(), len(d)) for d in differences]))
        return error if math.isfinite(error) else math.inf

    def derivatives(self, choice: Choice, others: Sequence[Choice]) -> tuple[Tensor, Tensor]:
        """JᵀJ (n, n) and Jᵀr (n,) of the mean square, for the n `others` near `choice`.

        Column k of J is the difference that the kth of them makes.
        """
        base = self._differences(choice, "search")
        columns = [self._differences(other, "search") for other in others]
        sums = []
        for number, difference in enumerate(base):
            J = torch.stack([column[number] - difference for column in columns], dim=1)
            J = J.nan_to_num(0.0, 0.0, 0.0)  # where a trajectory diverges there is no derivative
            sums.append((torch.cat([J.T @ J, (J.T @ difference)[:, None]], 1), len(difference)))
        parts = self._gather(sums)
        total = sum(part for part, _ in parts) / sum(count for _, count in parts)
        return total[:, :-1], total[:, -1]

    @staticmethod
    def _gather(own: list) -> list:
        shares = gather([(value.cpu(), count) for value, count in own])
        world = len(shares)
        return [shares[i % world][i // world] for i in range(sum(map(len, shares)))]


def _values(function: Callable[[Tensor], Tensor], samples: Tensor) -> Tensor:
    if not samples.isfinite().all():  # before rounding hides it
        raise FloatingPointError("samples have values that are not finite")
    return function(samples).cpu().double()  # not all devices have float64


def _rms(parts: list[tuple[Tensor, int]]) -> float:
    return math.sqrt(sum(total.item() for total, _ in parts) / sum(count for _, count in parts))


@dataclass
class Progress:
    """Where a search stands; enough to go on from.

    `values` are c of all steps but the first, and, if lengths are searched, those of all steps.
    """

    rank: int
    steps: int
    values: list[float]
    error: float
    mu: float = 0.01
    rounds: int = 0
    is_done: bool = False

    @property
    def key(self) -> str:
        """What tells the searches of a calibration apart."""
        return f"{self.rank}, {len(self.values)}"

    def choice(self, values: Sequence[float] | None = None) -> Choice:
        """The options that these values, or its own, stand for."""
        values = self.values if values is None else values
        c, lengths = values[: self.steps - 1], values[self.steps - 1 :]
        damping = (None, *(1 / value if value >= SMALLEST else None for value in c))
        return Choice(self.rank, damping, tuple(lengths) or None)

    def kinds(self) -> list[Kind]:
        """Of each value."""
        return [C if k < self.steps - 1 else LENGTH for k in range(len(self.values))]

    def last_first(self) -> list[int]:
        """The values in the order of their steps, the last first: earlier steps are then known."""
        steps = [*range(1, self.steps), *range(self.steps)][: len(self.values)]
        return sorted(range(len(self.values)), key=lambda k: -steps[k])

    def with_lengths(self) -> Progress:
        """A search of lengths, too, from where this one ended."""
        return Progress(self.rank, self.steps, [*self.values, *[1.0] * self.steps], self.error)


def search(samples: _Samples, progress: Progress, rounds: int) -> Iterator[Progress]:
    """Levenberg-Marquardt steps from `progress`, each yielded; at most `rounds` in all."""
    kinds, order = progress.kinds(), progress.last_first()
    low, high, unit = (
        torch.tensor([getattr(kind, name) for kind in kinds], dtype=torch.float64)
        for name in ("low", "high", "difference")
    )
    while not progress.is_done and progress.rounds < rounds:
        values = torch.tensor(progress.values, dtype=torch.float64)
        sign = torch.where(values + unit <= high, 1.0, -1.0)
        others = []
        for k in order:
            other = values.clone()
            other[k] += sign[k] * unit[k]
            others.append(progress.choice(other.tolist()))
        JJ, Jr = samples.derivatives(progress.choice(), others)
        back = torch.tensor(order).argsort()
        JJ, Jr = JJ[back][:, back] * torch.outer(sign, sign), Jr[back] * sign
        mu, found, error = progress.mu, None, progress.error
        for _ in range(TRIES):
            step = _step(JJ, Jr, mu, (low - values) / unit, (high - values) / unit)
            candidate = (values + unit * step).clamp(low, high)
            new = samples.error(progress.choice(candidate.tolist()), "search")
            if new < error:
                found, error, mu = candidate, new, mu / 4
                break
            mu *= 8
        progress = replace(
            progress,
            values=progress.values if found is None else found.tolist(),
            error=error,
            mu=mu,
            rounds=progress.rounds + 1,
            is_done=found is None or error > (1 - ENOUGH) * progress.error,
        )
        yield progress


def _step(JJ: Tensor, Jr: Tensor, mu: float, low: Tensor, high: Tensor) -> Tensor:
    """The damped Gauss-Newton step: s in [low, high] with the least |r + J s|² + mu |s|²_D.

    D is the diagonal of JᵀJ, with a floor under it.
    """
    diagonal = JJ.diagonal()
    floor = (0.01 * diagonal.mean()).clamp_min(1e-30)
    # |r + J s|² is |Lᵀ s + L⁻¹ Jᵀr|² and what does not depend on s, where L Lᵀ = JᵀJ
    L = torch.linalg.cholesky(JJ + torch.diag(mu * (diagonal + floor) + 1e-9 * floor))
    rest = -torch.linalg.solve_triangular(L, Jr[:, None], upper=False)[:, 0]
    found = lsq_linear(L.T.numpy(), rest.numpy(), (low.numpy(), high.numpy()), method="bvls")
    return torch.from_numpy(found.x)


def calibrate(
    problem: Problem,
    searched: Sequence[int],
    unseen: Sequence[int],
    ranks: Sequence[int] = (1,),
    rounds: int = 2,
    states: Mapping[str, Progress] | None = None,
    save: Callable[[Progress], None] = lambda progress: None,
    tell: Callable[[int], None] = lambda evaluations: None,
) -> Calibration:
    """Find the dampings of `problem` on the samples `searched`, and check them on `unseen` ones.

    Raises CalibrationError for a single step, which LML does not change, for a fine solution with
    values that are not finite, and for no samples.

    Args:
        ranks: those that are tried.
        rounds: at most so many steps of each search; of each rank there is one of dampings, and
            one of dampings and lengths.
        states: where each of them goes on, by its key.
        save: is called with where it stands after each of them.
        tell: is called with every number of network evaluations that were made.
    """
    clock = time.perf_counter()
    if not searched or not unseen:
        raise CalibrationError("there must be at least one sample to search and one to check")
    if set(searched) & set(unseen):
        raise CalibrationError("samples that were searched can't be checked as unseen")
    count = _count_steps(problem.scheduler, problem.steps)
    if count < 2:
        raise CalibrationError("a single step has no anchor: there is no damping to choose")
    states = dict(states or {})
    samples = _Samples(problem, searched, tell)

    def go_on(start: Callable[[], Progress], key: str) -> Progress:
        progress = states.get(key) or start()
        for progress in search(samples, progress, rounds):  # noqa: B020
            save(progress)
        return progress

    ended = []
    for rank in ranks:
        plain = go_on(lambda rank=rank: _start(samples, rank, count), f"{rank}, {count - 1}")
        lengths = go_on(plain.with_lengths, f"{rank}, {2 * count - 1}")
        ended += [plain, lengths]
    check = _Samples(problem, unseen, tell)
    default = Choice(LMLCorrection().rank)
    options = min((progress.choice() for progress in ended), key=check.error)
    candidates = {"off": OFF, "default": default, "calibrated": options}
    errors = {
        name: {"searched": samples.error(choice), "unseen": check.error(choice)}
        for name, choice in candidates.items()
    }
    chosen = min(errors, key=lambda name: (errors[name]["unseen"], name != "off"))
    return Calibration(
        chosen,
        candidates[chosen],
        options,
        errors,
        samples.tries + check.tries,
        samples.evaluations + check.evaluations,
        round(time.perf_counter() - clock, 1),
    )


def fine_steps(steps: int) -> int:
    """How many steps the fine solution has for a calibration of `steps` steps.

    Its own error must be small beside that of the calibrated solver, which shrinks with the steps.
    """
    return max(40, 5 * steps)


def most_evaluations(
    problem: Problem, searched: int, unseen: int, ranks: Sequence[int], rounds: int
) -> int:
    """At most so many network evaluations, times samples, does `calibrate` make."""
    count = _count_steps(problem.scheduler, problem.steps)
    fine = _count_steps(problem.fine_scheduler, problem.fine_steps)
    after = count * (count - 1) // 2  # evaluations after a step, over all steps
    rounds_of_both = 2 * (1 + TRIES) * count + 2 * after
    search = len(ranks) * ((len(STARTS) + 1) * count + rounds * rounds_of_both) + 3 * count
    check = (2 * len(ranks) + 3) * count
    return (searched + unseen) * fine + searched * search + unseen * check


def _count_steps(scheduler: SchedulerMixin, steps: int) -> int:
    """The number of evaluations for `set_timesteps(steps)`, which is called."""
    # With dynamic shifting the pipeline gives mu, which does not change their number.
    mu = {"mu": 1.0} if scheduler.config.get("use_dynamic_shifting") else {}
    scheduler.set_timesteps(steps, **mu)
    return len(scheduler.timesteps)


def _start(samples: _Samples, rank: int, steps: int) -> Progress:
    """From the best of some dampings that are the same for all steps, and the default's."""
    scheduler = Choice(rank).apply(samples.problem.scheduler)
    _count_steps(scheduler, samples.problem.steps)
    default = [min(1 / damping, C.high) if damping else 0.0 for damping in scheduler.dampings[1:]]
    starts = [*([c] * (steps - 1) for c in STARTS), default]
    found = [Progress(rank, steps, values, math.inf) for values in starts]
    for progress in found:
        progress.error = samples.error(progress.choice(), "search")
    best = min(found, key=lambda progress: progress.error)
    if not math.isfinite(best.error):
        raise CalibrationError("the samples have values that are not finite")
    return best
