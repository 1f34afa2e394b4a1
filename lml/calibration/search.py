"""How much damping this model wants, with this solver, grid and number of steps: found by trying.

For each step but the first, which has no anchor, one damping lambda_k. What is minimised is the
distance between the samples and the fine-step solutions from the same noise, a sum of squares, by
the Levenberg-Marquardt method over c_k = 1 / lambda_k >= 0: to first order LML adds
c (g - u) to g, so that samples are nearly linear in c, and c = 0 is a step that is left as it is.
The derivative by c_k costs the steps after k alone: `memoised` networks are not evaluated again
where nothing has changed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from diffusers import SchedulerMixin
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lml.processes import gather, rank_and_world

LARGEST = 8.0  # c, a damping of 1/8: beyond it nearly all of the anchors' part is gone
SMALLEST = 1e-3  # c below it is 0
DIFFERENCE = 0.3  # in c, of the derivatives: so large that what a few samples do is smoothed
TRIES = 6  # step lengths in a round
ENOUGH = 0.01  # a relative gain below which the search ends


class CalibrationError(ValueError):
    """There is nothing that a calibration could be measured by."""


@dataclass(frozen=True)
class Choice:
    """LML's options: `rank` 0 is off, `damping` one a step, and None is the scheduler's default."""

    rank: int
    damping: tuple[float | None, ...] | None = None

    def apply(self, scheduler: SchedulerMixin) -> SchedulerMixin:
        """A scheduler like `scheduler`, one of `lml.schedulers`, with these options."""
        damping = None if self.damping is None else list(self.damping)
        return type(scheduler).from_config(
            scheduler.config, rank=self.rank, damping=damping, damping_scale="relative"
        )


OFF = Choice(0)


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
    """Some samples, their fine solution and what the network answered on the last trajectory."""

    indices: list[int]
    memo: Memo = field(default_factory=Memo)
    fine: Tensor | None = None  # samples


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
        own = sum(b.memo.evaluations * len(b.indices) for b in self.batches)
        return sum(gather(own))

    def _sample(self, batch: _Batch, scheduler: SchedulerMixin, steps: int) -> Tensor:
        before = batch.memo.evaluations
        batch.memo.begin()
        with memoised(self.problem.network, batch.memo):
            samples = self.problem.sample(scheduler, steps, batch.indices)
        self.tell((batch.memo.evaluations - before) * len(batch.indices))
        return samples

    def _differences(self, choice: Choice, part: str) -> list[Tensor]:
        """Of each batch, (B K,) float64: `part` of the objective, less the fine solution's."""
        p, differences = self.problem, []
        values = getattr(p.objective, part)
        for batch in self.batches:
            if batch.fine is None:
                batch.fine = self._sample(batch, p.fine_scheduler, p.fine_steps)
                batch.memo.calls.clear()
                if not batch.fine.isfinite().all():
                    raise CalibrationError("the fine solution has values that are not finite")
            samples = self._sample(batch, choice.apply(p.scheduler), p.steps)
            difference = values(samples).double() - values(batch.fine).double()
            differences.append(difference.flatten())
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
            sums.append((torch.cat([J.T @ J, (J.T @ difference)[:, None]], 1), len(difference)))
        parts = self._gather(sums)
        total = sum(part for part, _ in parts) / sum(count for _, count in parts)
        return total[:, :-1], total[:, -1]

    @staticmethod
    def _gather(own: list) -> list:
        shares = gather([(value.cpu(), count) for value, count in own])
        world = len(shares)
        return [shares[i % world][i // world] for i in range(sum(map(len, shares)))]


def _rms(parts: list[tuple[Tensor, int]]) -> float:
    return math.sqrt(sum(total.item() for total, _ in parts) / sum(count for _, count in parts))


def _choice(rank: int, c: Sequence[float]) -> Choice:
    """The dampings 1 / c; of the first step, which has no anchor, None."""
    return Choice(rank, (None, *(1 / value if value >= SMALLEST else None for value in c)))


@dataclass
class Progress:
    """Where the search of one rank stands; enough to go on from."""

    rank: int
    c: list[float]
    error: float
    mu: float = 0.01
    rounds: int = 0
    is_done: bool = False


def search(samples: _Samples, progress: Progress, rounds: int) -> Iterator[Progress]:
    """Levenberg-Marquardt steps from `progress`, each yielded; at most `rounds` in all."""
    while not progress.is_done and progress.rounds < rounds:
        c, error, mu = torch.tensor(progress.c, dtype=torch.float64), progress.error, progress.mu
        here = _choice(progress.rank, progress.c)
        steps = [DIFFERENCE if value + DIFFERENCE <= LARGEST else -DIFFERENCE for value in c]
        others = []
        for k in reversed(range(len(c))):  # the last first: the steps before k are known
            other = list(progress.c)
            other[k] += steps[k]
            others.append(_choice(progress.rank, other))
        JJ, Jr = samples.derivatives(here, others)
        h = torch.tensor(steps, dtype=torch.float64)
        JJ, Jr = JJ.flip(0, 1) / torch.outer(h, h), Jr.flip(0) / h
        found = None
        for _ in range(TRIES):
            candidate = _step(c, JJ, Jr, mu)
            new = samples.error(_choice(progress.rank, candidate.tolist()), "search")
            if new < error:
                found, mu = candidate, mu / 4
                break
            mu *= 8
        gain = 0.0 if found is None else 1 - new / error
        progress = Progress(
            progress.rank,
            c.tolist() if found is None else found.tolist(),
            error if found is None else new,
            mu,
            progress.rounds + 1,
            gain < ENOUGH,
        )
        yield progress


def _step(c: Tensor, JJ: Tensor, Jr: Tensor, mu: float) -> Tensor:
    """The damped Gauss-Newton step from c in [0, LARGEST], along what is not held by a bound."""
    free = torch.ones(len(c), dtype=torch.bool)
    new = c.clone()
    scale = JJ.diagonal().mean().clamp_min(1e-30)
    for _ in range(len(c)):
        H = JJ[free][:, free]
        damped = H + mu * torch.diag(H.diagonal() + 0.01 * scale)
        held = (new - c).masked_fill(free, 0.0)
        delta = torch.linalg.solve(damped, -(Jr[free] + (JJ @ held)[free]))
        trial = new.clone()
        trial[free] = c[free] + delta
        outside = (trial < 0) | (trial > LARGEST)
        new = trial.clamp(0, LARGEST)
        if not (outside & free).any():
            break
        free &= ~outside
        if not free.any():
            break
    return new


def calibrate(
    problem: Problem,
    searched: Sequence[int],
    unseen: Sequence[int],
    ranks: Sequence[int] = (1, 2),
    rounds: int = 3,
    states: dict[int, Progress] | None = None,
    save: Callable[[Progress], None] = lambda progress: None,
    tell: Callable[[int], None] = lambda evaluations: None,
) -> Calibration:
    """Find the dampings of `problem` on the samples `searched`, and check them on `unseen` ones.

    Raises CalibrationError for a single step, which LML does not change, for a fine solution with
    values that are not finite, and for no samples.

    Args:
        ranks: those that are tried.
        rounds: at most so many steps of the search for each.
        states: where the search of each rank goes on.
        save: is called with where it stands after each of them.
        tell: is called with every number of network evaluations that were made.
    """
    clock = time.perf_counter()
    if not searched or not unseen:
        raise CalibrationError("there must be at least one sample to search and one to check")
    if set(searched) & set(unseen):
        raise CalibrationError("samples that were searched can't be checked as unseen")
    problem.scheduler.set_timesteps(problem.steps)
    count = len(problem.scheduler.timesteps)
    if count < 2:
        raise CalibrationError("a single step has no anchor: there is no damping to choose")
    states = dict(states or {})
    samples = _Samples(problem, searched, tell)
    default = Choice(type(problem.scheduler)().correction.rank)
    for rank in ranks:
        start = states.get(rank) or _start(samples, rank, problem.scheduler, problem.steps)
        states[rank] = start
        for states[rank] in search(samples, start, rounds):
            save(states[rank])
    check = _Samples(problem, unseen, tell)
    candidates = {"off": OFF, "default": default}
    options = {p.rank: _choice(p.rank, p.c) for p in states.values()}
    checked = {rank: check.error(choice) for rank, choice in options.items()}
    best_rank = min(checked, key=lambda rank: (checked[rank], rank))
    candidates["calibrated"] = options[best_rank]
    errors = {}
    for name, choice in candidates.items():
        unseen_error = checked[best_rank] if name == "calibrated" else check.error(choice)
        errors[name] = {"searched": samples.error(choice), "unseen": unseen_error}
    chosen = min(errors, key=lambda name: (errors[name]["unseen"], name != "off"))
    return Calibration(
        chosen,
        candidates[chosen],
        candidates["calibrated"],
        errors,
        samples.tries + check.tries,
        samples.evaluations + check.evaluations,
        round(time.perf_counter() - clock, 1),
    )


def most_evaluations(
    problem: Problem, searched: int, unseen: int, ranks: Sequence[int], rounds: int
) -> int:
    """At most so many network evaluations, times samples, does `calibrate` make."""
    problem.scheduler.set_timesteps(problem.steps)
    count = len(problem.scheduler.timesteps)
    problem.fine_scheduler.set_timesteps(problem.fine_steps)
    fine = len(problem.fine_scheduler.timesteps)
    a_round = count + count * (count - 1) // 2 + TRIES * count
    search = len(ranks) * (2 * count + rounds * a_round) + 3 * count
    return (searched + unseen) * fine + searched * search + unseen * (2 + len(ranks)) * count


def _start(samples: _Samples, rank: int, scheduler: SchedulerMixin, steps: int) -> Progress:
    """From the better of off and default."""
    like = Choice(rank).apply(scheduler)
    like.set_timesteps(steps)
    dampings = [1 / damping if damping else 0.0 for damping in like.dampings[1:]]
    starts = [[0.0] * len(dampings), dampings]
    errors = [samples.error(_choice(rank, c), "search") for c in starts]
    best = min(range(2), key=errors.__getitem__)
    if not math.isfinite(errors[best]):
        raise CalibrationError("the samples have values that are not finite")
    return Progress(rank, starts[best], errors[best])
