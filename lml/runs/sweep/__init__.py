"""A sweep of runs: plans its cells, records their results, and finds the best setting.

Every cell of `python scripts/sample.py -m ...` is an ordinary run. Before the first is made, all
cells are composed and checked without loading a network. So the sweep knows which are finished,
which are refused, and how long the others take. outputs/<name>/sweep.yaml records every cell:

    commands: [...]     every command line that added cells
    cells:              of this and of earlier sweeps of that name, one for each run
      - overrides, run (the name of its folder), solver, grid, lml, nfe, seed, num_images, model,
        dtype, status (done, missing, failed or refused), reason (of the last two)
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lml.calibration.stored import NoCalibrationError
from lml.device import find_device
from lml.errors import UserError, say
from lml.metrics.base import class_of, is_higher_better
from lml.pipelines import find_model
from lml.processes import is_first, joined
from lml.runs.plan import choose_prompts, plan
from lml.runs.progress import Progress
from lml.runs.score import is_finished
from lml.runs.sweep.cells import DONE, FAILED, MISSING, REFUSED, Cell, split_lml
from lml.runs.sweep.ledger import Ledger
from lml.runs.sweep.objective import find_objective, read_objective
from lml.runs.sweep.outlook import Outlook
from lml.seals import canonical

# Makes the cells of these overrides. Returns for each why it failed, or None, and its objective.
Make = Callable[[list[list[str]]], list[tuple[str | None, float | None]]]


class Sweep:
    """The cells of one sweep, over all launches of its sweeper; a context.

    `compose(overrides)` returns the resolved config of a cell; `config` is the config without a
    cell's overrides. `trials` is the number of cells if the sweeper chooses them one by one.
    `local` says that cells are made in this process. With several processes, all decide alike, and
    only the first writes and prints. Use:

        with Sweep(...) as sweep:
            sweep.launch(overrides of each cell, make)    # as often as the sweeper wants
            sweep.conclude(make)
    """

    def __init__(
        self,
        compose: Callable[[Sequence[str]], dict[str, Any]],
        config: Mapping[str, Any],
        local: bool,
        trials: int | None = None,
    ):
        self.compose, self.local, self.trials = compose, local, trials
        self.rate = config.get("rate")
        self.base = config.get("name")
        self.search = config.get("sweep")
        self.objective = find_objective(config) if self.search else None
        name, _, part = (self.objective or "").partition("/")
        metric = class_of(config["metrics"][name]) if name else None
        self.higher_is_better = is_higher_better(metric, part)
        self.cells: dict[tuple, Cell] = {}
        self.first = is_first()
        self.show = self.first and bool(config.get("progress", True))
        self._ledgers: dict[str, Ledger] = {}
        self._final_images = 0  # in each run at the end of a search
        self._found: dict[str, tuple] = {}

    def __enter__(self) -> Sweep:
        # Joined once for all cells: processes that part cannot join again at the same address.
        self._joined = joined()
        self._joined.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._joined.__exit__(*exception)
        for cell in self.cells.values():
            if cell.status == MISSING and is_finished(cell.plan.folder, cell.config["metrics"]):
                cell.status = DONE  # before the sweep was interrupted
        self._write()
        for ledger in self._ledgers.values():
            ledger.close()
        failed = [cell for cell in self.cells.values() if cell.status == FAILED]
        if failed and self.first:
            count = "1 cell" if len(failed) == 1 else f"{len(failed)} cells"
            lines = [f"{cell}: {cell.reason}" for cell in failed]
            say("\n  ".join([f"{count} failed; the same command makes them:", *lines]))

    def launch(self, job_overrides: Sequence[Sequence[str]], make: Make) -> list[Cell]:
        """The cells of these overrides; `make` makes those that are neither finished nor refused.

        `make(overrides)` makes cells and returns, for each, why it failed (or None) and its value.
        UserError if another sweep of the same name is running, or if a search uses the seeds that
        are kept for its final runs.
        """
        begins = not self.cells
        cells = self._plan(job_overrides)
        if self.first:
            self._say_refused(cell for cell in cells if cell.key not in self.cells)
        cells = [self.cells.setdefault(cell.key, cell) for cell in cells]
        if begins and self.search:
            self._check_seeds(cells)
        for name in dict.fromkeys(cell.name for cell in cells if cell.plan is not None):
            if self.first and name not in self._ledgers:
                self._ledgers[name] = Ledger(Path("outputs", name))
        self._write()
        if begins:
            outlook = self._outlook()
            if self.first:
                print(outlook, flush=True)
            outlook.check_room()
        todo = list({cell.key: cell for cell in cells if cell.status == MISSING}.values())
        if todo:
            made = make([cell.overrides for cell in todo])
            for cell, (cell.reason, cell.value) in zip(todo, made, strict=True):
                cell.status = FAILED if cell.reason else DONE
        self._write()
        return cells

    @property
    def are_refused(self) -> bool:
        """Whether every cell is refused."""
        return {cell.status for cell in self.cells.values()} == {REFUSED}

    @property
    def are_lost(self) -> bool:
        """Whether every cell is refused or failed."""
        return {cell.status for cell in self.cells.values()} <= {REFUSED, FAILED}

    def _plan(self, job_overrides: Sequence[Sequence[str]]) -> list[Cell]:
        bar = Progress(len(job_overrides), self.show and len(job_overrides) > 1, "cell")
        cells = []
        try:
            for overrides in job_overrides:
                cells.append(self._cell(list(overrides)))
                bar.update(1)
        finally:
            bar.close()
        return cells

    def _cell(self, overrides: list[str]) -> Cell:
        cell = Cell(overrides, {})
        try:
            cell.config = config = self.compose(overrides)
            if self.local:
                find_device(config["device"])
            # Weights are read for their hash, so only once.
            key = canonical({key: config[key] for key in ("model", "prompts", "num_images")})
            if key not in self._found:
                model = find_model(config["model"])
                self._found[key] = model, choose_prompts(config, model)
            planned = plan(config, *self._found[key])
            finished = is_finished(planned.folder, config["metrics"])
            if finished and not config["overwrite"]:
                cell.status, cell.value = DONE, read_objective(config, planned.folder.path)
            cell.plan = planned
        except UserError as error:
            cell.status, cell.reason = REFUSED, str(error)
            cell.lacks_calibration = isinstance(error, NoCalibrationError)
        return cell

    @staticmethod
    def _say_refused(cells: Iterable[Cell]) -> None:
        reasons: dict[str, list[Cell]] = {}
        lacking = []
        for cell in cells:
            if cell.lacks_calibration:
                lacking.append(cell.config)
            elif cell.status == REFUSED:
                reasons.setdefault(cell.reason, []).append(cell)
        if lacking:
            say(f"{NoCalibrationError(lacking)}; skipped")
        for reason, (cell, *others) in reasons.items():
            more = f" (and {len(others)} more)" if others else ""
            say(f"{cell}{more}: {reason}; skipped")

    def _write(self) -> None:
        for name, ledger in self._ledgers.items():
            ledger.write([cell.entry() for cell in self.cells.values() if cell.name == name])

    def conclude(self, make: Make) -> None:
        """Make the final runs: the best setting and LML off, on seeds that the search did not see.

        There is one such pair for every setting of the other options, such as the solver.
        """
        if not self.search:
            return
        choose = max if self.higher_is_better else min
        groups: dict[tuple, dict[tuple, list[float]]] = {}
        for cell in self.cells.values():
            if cell.value is not None and math.isfinite(cell.value):
                rest, lml = split_lml(cell.overrides)
                groups.setdefault(tuple(rest), {}).setdefault(tuple(lml), []).append(cell.value)
        means = [
            {lml: statistics.fmean(values) for lml, values in settings.items()}
            for settings in groups.values()
        ]
        best = [choose(settings, key=settings.get) for settings in means]
        pairs = [
            [self._final(rest, lml), self._final(rest, ["lml=off"])]
            for rest, lml in zip(groups, best, strict=True)
        ]
        cells = iter(self.launch([overrides for pair in pairs for overrides in pair], make))
        for rest, lml, settings in zip(groups, best, means, strict=True):
            ours, base = next(cells), next(cells)
            setting = " ".join(o for o in rest if any(o not in others for others in groups))
            numbers = [
                "not made" if cell.value is None else f"{cell.value:.5g}" for cell in (ours, base)
            ]
            if self.first:
                print(
                    f"{setting}{': ' if setting else ''}{self.objective} was best of "
                    f"{len(settings)} with {' '.join(lml)} ({settings[lml]:.5g}); on "
                    f"{ours.config['num_images']:,} images of seed {ours.config['seed']}: "
                    f"{numbers[0]}, with lml=off {numbers[1]}"
                )

    def _final(self, rest: Sequence[str], lml: Sequence[str]) -> list[str]:
        """The overrides of a final run."""
        count = self.search["num_images"]
        more = [] if count is None else [f"num_images={count}"]
        return [*rest, *lml, *more, f"seed={self.search['final_seed']}"]

    def _outlook(self) -> Outlook:
        cells = list(self.cells.values())
        return Outlook(cells, self.base, self.local, self.trials, self._final_images, self.rate)

    def _check_seeds(self, cells: Sequence[Cell]) -> None:
        cells = [cell for cell in cells if cell.config]
        if not cells:
            return  # all cells are refused
        final = self.compose(self._final(split_lml(cells[0].overrides)[0], ["lml=off"]))
        self._final_images = final["num_images"]
        begin, end = final["seed"], final["seed"] + final["num_images"]
        for cell in cells:
            seed = cell.config["seed"]
            if begin < seed + cell.config["num_images"] and seed < end:
                raise UserError(
                    f"sweep.final_seed={begin}: the {final['num_images']} final images share seeds "
                    f"with the search's, which start at {seed}; choose another sweep.final_seed"
                )
