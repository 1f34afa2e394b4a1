"""Finds the damping for one model, solver, grid and number of steps, by a search.

Each step k has two numbers. The damping lambda_k says how far LML extrapolates; the first step has
no anchor and no damping. The length l_k multiplies g'. The search minimises the distance between
the samples and the fine-step solutions from the same noise, a sum of squares. It uses the
Levenberg-Marquardt method over c_k = 1 / lambda_k >= 0, and then over c and l. To first order g' is
l (g + c (g - u)), so samples are nearly linear in c and l, and c = 0 is a step without LML. The
derivative with respect to a number of step k needs only the steps after k: a `memoised` network is
not evaluated again for the same inputs.

The timesteps may be searched, too: first alone, without LML; then c and l on the timesteps that
were found; then all three together, from the better of this result and that on the solver's grid.
"""

from __future__ import annotations

import functools
import itertools
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
from lml.damping import GRIDS
from lml.processes import gather, rank_and_world
from lml.schedulers import LMLSchedulerMixin, aligned

SMALLEST = 1e-3  # a smaller c counts as 0
STARTS = (0.0, 0.125, 0.25, 0.5, 1.0)  # c of all steps to start from, beside the default's
TRIES = 6  # values of mu in a round
ENOUGH = 0.01  # the search ends when the relative gain is smaller


@dataclass(frozen=True)
class Kind:
    """A kind of number that is searched: its range, and the difference for its derivatives.

    The differences are large, to smooth over what a few samples do.
    """

    low: float
    high: float
    difference: float


KINDS = {
    # c; at a damping of 1/8 nearly all of the anchors' part is gone
    "damping": Kind(0.0, 8.0, 0.3),
    "length": Kind(0.5, 1.5, 0.02),
}
NUMBERS = tuple(KINDS)
# A timestep moves by at most FAR of the way to its nearer neighbour in a round, and by NEAR of it
# for a derivative.
FAR, NEAR = 0.4, 0.15


class CalibrationError(ValueError):
    """There is nothing to measure a calibration with."""


@dataclass(frozen=True)
class Choice:
    """LML's options: `rank` 0 is off; `damping` and `length` have one number for each step.

    A `damping` of None is the scheduler's default; a `length` of None is 1. `timesteps` of None are
    those of the scheduler's grid.
    """

    rank: int
    damping: tuple[float | None, ...] | None = None
    length: tuple[float, ...] | None = None
    timesteps: tuple[int, ...] | None = None

    def options(self) -> dict[str, Any]:
        """The options as keyword arguments of a scheduler."""
        return {
            "rank": self.rank,
            "damping": None if self.damping is None else list(self.damping),
            "damping_scale": "relative",
            "length": 1.0 if self.length is None else list(self.length),
        }

    def grid(self, scheduler: SchedulerMixin) -> dict[str, Any]:
        """The options of the grid, in place of those that `scheduler` has; {} if it stays."""
        if self.timesteps is None:
            return {}
        others = [key for key in GRIDS if scheduler.config.get(key)]
        return {**dict.fromkeys(others, False), aligned.OPTION.name: list(self.timesteps)}

    def apply(self, scheduler: SchedulerMixin) -> SchedulerMixin:
        """A copy of `scheduler`, one of `lml.schedulers`, with these options."""
        options = {**self.options(), **self.grid(scheduler)}
        return type(scheduler).from_config(scheduler.config, **options)


OFF = Choice(0)


def adds_noise(scheduler: LMLSchedulerMixin, step_options: Mapping[str, Any]) -> bool:
    """Whether the scheduler adds noise. Then no fine solution has the same noise."""
    return bool(scheduler.adds_noise or step_options.get("eta") or step_options.get("s_churn"))


@dataclass
class Calibration:
    """The result of a calibration.

    `errors` are root mean squared distances to the fine solution, for "off", "default" and
    "calibrated", each on the `searched` and on the `unseen` samples. If timesteps were searched,
    "timesteps" is LML off on those that were found. `chosen` is the best of them on the unseen
    samples, and `choice` has its options. `tries` and `evaluations` are the numbers of trajectories
    and of network evaluations for one sample.
    """

    chosen: str
    choice: Choice
    calibrated: Choice
    errors: dict[str, dict[str, float]]
    tries: int
    evaluations: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """The same in plain values, for JSON."""
        return asdict(self)


@dataclass
class Objective:
    """The space that samples are compared in.

    `search` maps samples (B, ...) to numbers (B, K) that change smoothly. `report` maps them to
    the numbers whose distance is reported.
    """

    name: str
    search: Callable[[Tensor], Tensor]
    report: Callable[[Tensor], Tensor]


@dataclass
class Problem:
    """A problem to calibrate.

    Args:
        sample: `sample(scheduler, steps, indices)` makes the samples (B, ...) with these indices.
            The same arguments give the same samples: noise and prompt belong to the index.
        network: the network that `sample` evaluates.
        scheduler: one of `lml.schedulers`.
        steps: the argument of its `set_timesteps`.
        fine_scheduler, fine_steps: the same for the fine solution.
        objective: the space that samples are compared in.
        batch_size: the number of samples at a time.
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
    """A network's outputs along one trajectory; see `memoised`."""

    def __init__(self) -> None:
        self.calls: list[tuple[list, Any]] = []
        self.position = 0
        self.evaluations = 0

    def begin(self) -> None:
        """The next call is the first of a trajectory."""
        self.position = 0

    def answer(self, forward: Callable, args: tuple, kwargs: dict) -> Any:
        """`forward(*args, **kwargs)`, from memory if this call and all before it are the same."""
        given = tree_leaves((args, kwargs))
        if self.position < len(self.calls):
            known, output = self.calls[self.position]
            if len(known) == len(given) and all(map(_same, known, given)):
                self.position += 1
                return output
            del self.calls[self.position :]
        kept = [self._kept(index, value) for index, value in enumerate(given)]
        output = forward(*args, **kwargs)
        self.calls.append((kept, output))
        self.position += 1
        self.evaluations += 1
        return output

    def _kept(self, index: int, value: Any) -> Any:
        """A copy of an input; that of the call before, or before that, if it is the same.

        The embeddings of a prompt may be larger than all else. With guidance, two may take turns.
        """
        for known, _ in reversed(self.calls[-2:]):
            if index < len(known) and _same(known[index], value):
                return known[index]
        return value.clone() if isinstance(value, Tensor) else value


def _same(x: Any, y: Any) -> bool:
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        return x.shape == y.shape and x.dtype == y.dtype and torch.equal(x, y)
    return x is y or (type(x) is type(y) and bool(x == y))


@contextmanager
def memoised(network: nn.Module, memo: Memo) -> Iterator[None]:
    """Inside, `network` is not evaluated if `memo` has its output for the same inputs."""
    # After `network.compile()` nn.Module calls this, which has `forward` compiled inside it.
    name = "_compiled_call_impl" if vars(network).get("_compiled_call_impl") else "forward"
    function, owned = getattr(network, name), name in vars(network)
    setattr(network, name, lambda *args, **kwargs: memo.answer(function, args, kwargs))
    try:
        yield
    finally:
        if owned:
            setattr(network, name, function)
        else:
            delattr(network, name)


@dataclass
class _Batch:
    """Some samples, the network's outputs on the last trajectory, and the fine solution's values
    in each part of the objective."""

    indices: list[int]
    memo: Memo = field(default_factory=Memo)
    fine: dict[str, Tensor] = field(default_factory=dict)


class _Samples:
    """The samples with `indices`: their errors and derivatives. Processes share the work.

    Sums are added in the order of the batches, so that they do not depend on the number of
    processes.
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
        """The number of network evaluations times samples, in all processes."""
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

    def _difference(self, batch: _Batch, choice: Choice, part: str) -> Tensor:
        """(B K,) float64: `part` of the objective for a batch, minus the fine solution's."""
        p = self.problem
        if not batch.fine:
            self._solve(batch)
        fine = batch.fine[part]
        try:
            samples = self._sample(batch, choice.apply(p.scheduler), p.steps)
            values = _values(getattr(p.objective, part), samples)
        except FloatingPointError:  # it diverges
            values = torch.full_like(fine, math.inf)
        return (values - fine).flatten()

    def error(self, choice: Choice, part: str = "report") -> float:
        """The root mean squared distance to the fine solution; inf in place of NaN."""
        sums = []
        for batch in self.batches:
            difference = self._difference(batch, choice, part)
            sums.append((difference.square().sum(), len(difference)))
        self.tries += 1
        error = _rms(self._gather(sums))
        return error if math.isfinite(error) else math.inf

    def derivatives(self, choice: Choice, others: Sequence[Choice]) -> tuple[Tensor, Tensor]:
        """JᵀJ (n, n) and Jᵀr (n,) of the mean square, for the n `others` near `choice`.

        Column k of J is the difference between the kth of them and `choice`.
        """
        sums = []
        for batch in self.batches:
            r = self._difference(batch, choice, "search")
            J = torch.stack([self._difference(batch, other, "search") for other in others], dim=1)
            J.sub_(r[:, None]).nan_to_num_(0.0, 0.0, 0.0)  # none where a trajectory diverges
            sums.append((torch.cat([J.T @ J, (J.T @ r)[:, None]], 1), len(r)))
        self.tries += 1 + len(others)
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
    """The state of a search, from which it can continue.

    `values` are "damping" (c of all steps but the first), "length" and "timesteps" (numbers that
    need not be whole), those of them that are known. `searched` are the names of those that move.
    """

    rank: int
    values: dict[str, list[float]]
    searched: list[str]
    error: float = math.inf
    mu: float = 0.01
    rounds: int = 0
    is_done: bool = False

    @property
    def vector(self) -> Tensor:
        """The values that are searched."""
        numbers = [x for name in self.searched for x in self.values[name]]
        return torch.tensor(numbers, dtype=torch.float64)

    def moved(self, vector: Tensor) -> dict[str, list[float]]:
        """The values, with those that are searched from `vector`."""
        sizes = [len(self.values[name]) for name in self.searched]
        parts = [part.tolist() for part in vector.split(sizes)]
        return {**self.values, **dict(zip(self.searched, parts, strict=True))}

    def choice(self, vector: Tensor | None = None) -> Choice:
        """The options for `vector`, or for the state's own values."""
        values = self.values if vector is None else self.moved(vector)
        damping = [1 / c if c >= SMALLEST else None for c in values.get("damping", ())]
        return Choice(
            self.rank,
            (None, *damping) if damping else None,
            tuple(values.get("length", ())) or None,
            _falling(values.get("timesteps", ())) or None,
        )

    def bounds(self, train_steps: int) -> tuple[Tensor, Tensor, Tensor]:
        """The least and the largest vector in a round, and the differences for its derivatives."""
        rows = [row for name in self.searched for row in self._bounds(name, train_steps)]
        low, high, unit = torch.tensor(rows, dtype=torch.float64).T
        return low, high, unit

    def _bounds(self, name: str, train_steps: int) -> list[tuple[float, float, float]]:
        values = self.values[name]
        if name != "timesteps":
            kind = KINDS[name]
            return [(kind.low, kind.high, kind.difference)] * len(values)
        gaps = [t - after for t, after in itertools.pairwise([*values, 0.0])]
        ways = [min(pair) for pair in itertools.pairwise([gaps[0], *gaps])]
        return [
            (t - FAR * way, min(t + FAR * way, train_steps - 1), max(1.0, NEAR * way))
            for t, way in zip(values, ways, strict=True)
        ]

    def last_first(self) -> list[int]:
        """Indices of values, those of the last steps first: the memo then knows the early steps."""
        first = {"damping": 1, "length": 0, "timesteps": -1}  # a timestep changes its own input
        steps = [k + first[name] for name in self.searched for k in range(len(self.values[name]))]
        return sorted(range(len(steps)), key=lambda k: -steps[k])

    def with_lengths(self) -> Progress:
        """A search of dampings and lengths that starts from this one's result."""
        values = {**self.values, "length": [1.0] * (len(self.values["damping"]) + 1)}
        return Progress(self.rank, values, ["damping", "length"], self.error)


def _falling(values: Sequence[float]) -> tuple[int, ...]:
    """`values`, rounded, as timesteps that fall and end above 0."""
    found: list[int] = []
    for left, value in zip(range(len(values), 0, -1), values, strict=True):
        t = max(round(value), left)  # there must be room for those that are left
        found.append(min(t, found[-1] - 1) if found else t)
    return tuple(found)


def search(samples: _Samples, progress: Progress, rounds: int) -> Iterator[Progress]:
    """Levenberg-Marquardt steps from `progress`; yields the state after each, at most `rounds`."""
    train_steps = samples.problem.scheduler.config.num_train_timesteps
    while not progress.is_done and progress.rounds < rounds:
        values, order = progress.vector, progress.last_first()
        low, high, unit = progress.bounds(train_steps)
        sign = torch.where(values + unit <= high, 1.0, -1.0)
        others = []
        for k in order:
            other = values.clone()
            other[k] += sign[k] * unit[k]
            others.append(progress.choice(other))
        JJ, Jr = samples.derivatives(progress.choice(), others)
        back = torch.tensor(order).argsort()
        JJ, Jr = JJ[back][:, back] * torch.outer(sign, sign), Jr[back] * sign
        mu, found, error = progress.mu, None, progress.error
        for _ in range(TRIES):
            step = _step(JJ, Jr, mu, (low - values) / unit, (high - values) / unit)
            candidate = (values + unit * step).clamp(low, high)
            new = samples.error(progress.choice(candidate), "search")
            if new < error:
                found, error, mu = candidate, new, mu / 4
                break
            mu *= 8
        progress = replace(
            progress,
            values=progress.values if found is None else progress.moved(found),
            error=error,
            mu=mu,
            rounds=progress.rounds + 1,
            is_done=found is None or error > (1 - ENOUGH) * progress.error,
        )
        yield progress


@dataclass
class _Searches:
    """The searches of a calibration. Those of `states`, by their keys, continue."""

    samples: _Samples
    rounds: int
    numbers: Sequence[str]
    states: dict[str, Progress]
    save: Callable[[dict[str, Progress]], None]

    def _run(self, key: str, start: Callable[[], Progress]) -> Progress:
        progress = self.states.get(key) or start()
        for progress in search(self.samples, progress, self.rounds):  # noqa: B020
            self.states[key] = progress
            self.save(self.states)
        return progress

    def of_numbers(self, rank: int) -> list[Progress]:
        """The results of two searches: of dampings; of dampings and lengths. Or of one number."""
        first = self._run(f"{rank}, {self.numbers[0]}", lambda: self._start(rank))
        if len(self.numbers) == 1:
            return [first]
        return [first, self._run(f"{rank}, damping, length", first.with_lengths)]

    def of_timesteps(self) -> Progress:
        """The result of a search of timesteps, with LML off."""
        values = {"timesteps": self.own_timesteps}
        return self._run("timesteps", lambda: self._measured(Progress(0, values, ["timesteps"])))

    def with_timesteps(self, rank: int, alone: Progress) -> list[Progress]:
        """The results of `of_numbers`, and of two more searches.

        One is of the same numbers on the timesteps of `alone`. The last is of these and timesteps,
        from the better of the two.
        """
        *firsts, own = self.of_numbers(rank)
        names = ", ".join(self.numbers)

        def start() -> Progress:
            progress = self._start(rank, **alone.values)
            return progress if len(self.numbers) == 1 else progress.with_lengths()

        there = self._run(f"{rank}, {names} on other timesteps", start)
        best = own if own.error < there.error else there
        values = {"timesteps": self.own_timesteps, **best.values}
        joint = Progress(rank, values, [*self.numbers, "timesteps"])
        every = self._run(f"{rank}, {names}, timesteps", lambda: self._measured(joint))
        return [*firsts, own, there, every]

    @functools.cached_property
    def own_timesteps(self) -> list[float]:
        """The timesteps of the scheduler's own grid, one for each of the steps."""
        scheduler, steps = self.samples.problem.scheduler, self.samples.problem.steps
        if not aligned.takes_option(type(scheduler)):
            raise CalibrationError(f"the timesteps of {type(scheduler).__name__} are fixed")
        _count_steps(scheduler, steps)
        known = scheduler.timesteps.double()
        if len(known) != steps:  # Heun has all but the first twice
            known = known.unique_consecutive()
        return [float(t) for t in _falling(known.tolist())]

    def _start(self, rank: int, **values: list[float]) -> Progress:
        """The best of the default and of some dampings that are equal for all steps.

        Without dampings among the numbers, LML off.
        """
        problem = self.samples.problem
        scheduler = Choice(rank).apply(problem.scheduler)
        steps = _count_steps(scheduler, problem.steps)
        if "damping" not in self.numbers:
            values = {**values, "damping": [0.0] * (steps - 1), "length": [1.0] * steps}
            return self._measured(Progress(rank, values, ["length"]))
        high = KINDS["damping"].high
        default = [min(1 / damping, high) if damping else 0.0 for damping in scheduler.dampings[1:]]
        tried = [
            self._measured(Progress(rank, {**values, "damping": damping}, ["damping"]))
            for damping in (*([c] * (steps - 1) for c in STARTS), default)
        ]
        best = min(tried, key=lambda progress: progress.error)
        if not math.isfinite(best.error):
            raise CalibrationError("the samples have values that are not finite")
        return best

    def _measured(self, progress: Progress) -> Progress:
        return replace(progress, error=self.samples.error(progress.choice(), "search"))


def _step(JJ: Tensor, Jr: Tensor, mu: float, low: Tensor, high: Tensor) -> Tensor:
    """The damped Gauss-Newton step: s in [low, high] that minimises |r + J s|² + mu |s|²_D.

    D is the diagonal of JᵀJ, with a lower bound.
    """
    diagonal = JJ.diagonal()
    floor = (0.01 * diagonal.mean()).clamp_min(1e-30)
    # |r + J s|² is |Lᵀ s + L⁻¹ Jᵀr|² plus a constant, with L Lᵀ = JᵀJ
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
    timesteps: bool = False,
    numbers: Sequence[str] = NUMBERS,
    states: Mapping[str, Progress] | None = None,
    save: Callable[[dict[str, Progress]], None] = lambda states: None,
    tell: Callable[[int], None] = lambda evaluations: None,
) -> Calibration:
    """Find the dampings of `problem` on the samples `searched`, and check them on `unseen` ones.

    Raises CalibrationError for a single step, which LML does not change, for a fine solution that
    is not finite, for no samples, and for `timesteps` if the scheduler's grid is fixed.

    Args:
        ranks: the ranks to try. For each there are two searches: of dampings, and of dampings and
            lengths.
        numbers: what a step has; "damping" alone keeps the norm of g, as published, and "length"
            alone uses no anchors.
        rounds: the largest number of steps of each search.
        timesteps: whether to search timesteps, too, for a scheduler with `aligned_timesteps`.
        states: the states of interrupted searches, by key, to continue from.
        save: is called with the states of all searches after each step.
        tell: is called with the number of network evaluations since its last call.
    """
    clock = time.perf_counter()
    if not searched or not unseen:
        raise CalibrationError("expected at least one sample to search and one to check")
    if set(searched) & set(unseen):
        raise CalibrationError("some samples are both searched and unseen; use different ones")
    count = _count_steps(problem.scheduler, problem.steps)
    if count < 2:
        raise CalibrationError("a single step has no anchor: there is no damping to choose")
    samples = _Samples(problem, searched, tell)
    ordered = [name for name in NUMBERS if name in numbers]
    searches = _Searches(samples, rounds, ordered, dict(states or {}), save)
    candidates = {"off": OFF, "default": Choice(LMLCorrection().rank)}
    if timesteps:
        alone = searches.of_timesteps()
        candidates["timesteps"] = alone.choice()
        ended = [found for rank in ranks for found in searches.with_timesteps(rank, alone)]
    else:
        ended = [found for rank in ranks for found in searches.of_numbers(rank)]
    check = _Samples(problem, unseen, tell)
    options = min((progress.choice() for progress in ended), key=check.error)
    candidates["calibrated"] = options
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
    """The number of steps of the fine solution for a calibration of `steps` steps.

    Its own error must be much smaller than the calibrated solver's, which falls with the steps.
    """
    return max(40, 5 * steps)


def most_evaluations(
    problem: Problem,
    searched: int,
    unseen: int,
    ranks: Sequence[int],
    rounds: int,
    timesteps: bool = False,
    numbers: Sequence[str] = NUMBERS,
) -> int:
    """The largest number of network evaluations times samples that `calibrate` makes."""
    count = _count_steps(problem.scheduler, problem.steps)
    fine = _count_steps(problem.fine_scheduler, problem.fine_steps)
    after = count * (count - 1) // 2  # evaluations after a step, over all steps
    tried = (1 + TRIES) * count
    start = (len(STARTS) + 1) * count
    each = len(numbers)  # also the number of searches: the kth moves k numbers a step
    a_rank = start + rounds * (each * tried + each * (each + 1) // 2 * after)
    once, searches, choices = 0, each, 3
    if timesteps:
        a_rank += start + count + rounds * (2 * tried + (2 * each + 1) * after + count)
        once, searches, choices = count + rounds * (tried + after + count), each + 2, 4
    search = len(ranks) * a_rank + once + choices * count
    check = (len(ranks) * searches + choices) * count
    return (searched + unseen) * fine + searched * search + unseen * check


def _count_steps(scheduler: SchedulerMixin, steps: int) -> int:
    """Call `set_timesteps(steps)`, and return the number of evaluations."""
    # With dynamic shifting, the pipeline passes mu, which does not change their number.
    mu = {"mu": 1.0} if scheduler.config.get("use_dynamic_shifting") else {}
    scheduler.set_timesteps(steps, **mu)
    return len(scheduler.timesteps)
