"""What a sweep of runs does around its cells: what there is to do, what became of it, what is best.

Every cell of `python scripts/sample.py -m ...` is an ordinary run. Before one is made, all are
composed and checked without loading a network, so that it is known which are finished, which are
refused and how long the others take. outputs/<name>/sweep.yaml keeps what became of each:

    commands: [...]     every command line that added to it
    cells:              of these and of earlier sweeps of that name, by the hash of their runs
      - overrides, run (the name of its folder), solver, grid, lml, nfe, seed, num_images, model,
        dtype, status (done, missing, failed or refused), reason (of the last two)
"""

from __future__ import annotations

import math
import os
import socket
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from lml import processes, runner
from lml.device import find_device, use_device
from lml.errors import UserError, nearest, say
from lml.files import dump_yaml, read_object
from lml.metrics.direction import higher_is_better
from lml.pipelines import find
from lml.schema import RunConfig, Score, SweepFile, Timing
from lml.store import canonical, disk_error, read_config, read_json, why_not_sealed, write_atomic
from lml.tracking import Progress

MISSING, DONE, FAILED, REFUSED = "missing", "done", "failed", "refused"
# Of metrics that say more than one number; without a part, the mean is meant.
PARTS = {
    "inception_score": ("mean", "std"),
    "kid": ("mean", "std"),
    "image_reward": ("mean", "std"),
    "precision_recall": ("precision", "recall", "f_score"),
    "convergence": ("rmse", "cosine"),
}

# Makes the cells of these overrides; returns why each failed, or None, and its objective.
Make = Callable[[list[list[str]]], list[tuple[str | None, float | None]]]


# --- what is searched for ----------------------------------------------------------------------


def find_objective(cfg: Mapping[str, Any]) -> str:
    """The metric, or metric/part, that the search `cfg["sweep"]` is about. UserError if unclear."""
    asked, metrics = cfg["sweep"]["objective"], list(cfg["metrics"])
    if asked is None and len(metrics) != 1:
        choice = f"one of {', '.join(metrics)}" if metrics else "metrics=NAME"
        raise UserError(f"sweep.objective=null: {choice} is asked")
    name, _, part = (asked or metrics[0]).partition("/")
    if name not in metrics:
        known = nearest(name, metrics) or "none"
        raise UserError(f"sweep.objective={asked}: not one of the run's metrics; nearest: {known}")
    parts = PARTS.get(name, ())
    part = part or ("mean" if "mean" in parts else "")
    if parts and part not in parts:
        choice = " or ".join(f"{name}/{part}" for part in parts)
        raise UserError(f"sweep.objective={asked or 'null'}: {choice} is asked")
    return f"{name}/{part}" if part else name


def read_objective(cfg: Mapping[str, Any], folder: Path) -> float | None:
    """The objective of the finished run in `folder`; None when nothing is searched for."""
    if not cfg.get("sweep"):
        return None
    name, _, part = (objective := find_objective(cfg)).partition("/")
    file = folder / "metrics.json"
    entry = read_object(file, dict[str, Score]).get(name, {})
    owner = str(read_json(folder / "manifest.json").get("settings_sha256"))
    if reason := why_not_sealed(entry, owner, name):
        raise UserError(f"run_dir={folder}: metrics.json: {name} {reason}; nothing is chosen by it")
    value = entry["value"]
    if isinstance(value, Mapping) != bool(part) or (part and part not in value):
        parts = " or ".join(f"{name}/{key}" for key in value) if isinstance(value, dict) else name
        raise UserError(f"sweep.objective={objective}: {parts} is asked")
    return float(value[part] if part else value)


# --- the cells ---------------------------------------------------------------------------------


@dataclass
class Cell:
    """One setting, as it was asked for and composed; without a `plan` when it is refused."""

    overrides: list[str]
    config: dict[str, Any]
    plan: runner.Plan | None = None
    status: str = MISSING
    reason: str | None = None
    value: float | None = None  # of a search's objective

    @property
    def name(self) -> str:
        """Of the sweep that it belongs to; "" where the config is none that can be."""
        return self.config.get("name", "")

    @property
    def key(self) -> tuple:
        """What is made once: the run, in its folder, with its metrics."""
        if self.plan is None:
            return tuple(self.overrides)
        folder = self.plan.folder
        return str(folder.path), folder.hash, canonical(self.config["metrics"])

    @property
    def images_to_make(self) -> int:
        """How many are not stored, by their files alone."""
        images = () if self.config["overwrite"] else self.plan.folder.images.glob("*.png")
        stored = sum(1 for _ in images)
        return max(0, self.config["num_images"] - stored)

    def entry(self) -> dict[str, Any]:
        """What sweep.yaml says of it."""
        config = self.config
        return {
            "overrides": [o for o in self.overrides if _key(o) != "experiment"],
            "run": None if self.plan is None else self.plan.folder.path.name,
            "solver": config["solver"]["name"],
            "grid": config["grid"].get("name", "default"),
            "lml": config["lml"],
            "nfe": config["nfe"],
            "seed": config["seed"],
            "num_images": config["num_images"],
            "model": config["model"]["name"],
            "dtype": config["dtype"],
            "status": self.status,
            "reason": self.reason,
        }

    def __str__(self) -> str:
        return " ".join(self.overrides)


class Sweep:
    """The cells of one sweep, over as many launches as its sweeper makes; a context.

    `compose(overrides)` is the resolved config of a cell, `config` that of no cell, and `trials`
    how many cells there will be where the sweeper chooses them one after the other. `local` says
    that cells are made in this process. Of several processes all decide alike, and the first writes
    and speaks. Use:

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
        self.base = config.get("name")
        self.search = config.get("sweep")
        self.objective = find_objective(config) if self.search else None
        self.higher_is_better = bool(self.search) and higher_is_better(self.objective)
        self.cells: dict[tuple, Cell] = {}
        self.first = int(os.environ.get("RANK", 0)) == 0
        self.show = self.first and bool(config.get("progress", True))
        self._ledgers: dict[str, Ledger] = {}
        self._final_images = 0  # of each run at the end of a search
        self._found: dict[str, tuple] = {}

    def __enter__(self) -> Sweep:
        # For all cells at once: processes that part cannot meet again at the same address.
        self._joined = processes.joined()
        self._joined.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._joined.__exit__(*exception)
        for cell in self.cells.values():
            if cell.status == MISSING and runner.is_finished(
                cell.plan.folder, cell.config["metrics"]
            ):
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
        """The cells of these overrides, made by `make` where they were not finished or refused.

        `make(overrides)` makes cells and returns, for each, why it failed (or None) and its value.
        UserError when another sweep has the same name, or the seeds of a search are those of its
        end.
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
        if begins and self.first:
            print(self._outlook(list(self.cells.values())), flush=True)
        todo = list({cell.key: cell for cell in cells if cell.status == MISSING}.values())
        if todo:
            made = make([cell.overrides for cell in todo])
            for cell, (cell.reason, cell.value) in zip(todo, made, strict=True):
                cell.status = FAILED if cell.reason else DONE
        self._write()
        return cells

    @property
    def are_refused(self) -> bool:
        """Whether every cell is."""
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
            # Weights are read to know them by their hash, so once.
            key = canonical({key: config[key] for key in ("model", "prompts", "num_images")})
            if key not in self._found:
                model = find(config["model"])
                self._found[key] = model, runner.choose_prompts(config, model)
            plan = runner.plan(config, *self._found[key])
            finished = runner.is_finished(plan.folder, config["metrics"])
            if finished and not config["overwrite"]:
                cell.status, cell.value = DONE, read_objective(config, plan.folder.path)
            cell.plan = plan
        except UserError as error:
            cell.status, cell.reason = REFUSED, str(error)
        return cell

    @staticmethod
    def _say_refused(cells: Iterable[Cell]) -> None:
        reasons: dict[str, list[Cell]] = {}
        for cell in cells:
            if cell.status == REFUSED:
                reasons.setdefault(cell.reason, []).append(cell)
        for reason, (cell, *others) in reasons.items():
            more = f" (and {len(others)} more)" if others else ""
            say(f"{cell}{more}: {reason}; skipped")

    def _write(self) -> None:
        for name, ledger in self._ledgers.items():
            ledger.write([cell.entry() for cell in self.cells.values() if cell.name == name])

    # --- how long it takes ---------------------------------------------------------------------

    def _outlook(self, cells: Sequence[Cell]) -> str:
        """One line: how many cells there are, what is to be made, and how long that takes."""
        todo = [cell for cell in cells if cell.status == MISSING]
        images = [cell.images_to_make for cell in todo]
        parts = [f"{len(cells)} cell{'s' if len(cells) > 1 else ''}"]
        most = ""
        if self.trials:  # which are others than these, and as many images each
            todo = [cell for cell in cells if cell.plan is not None][:1] * self.trials
            images = [cell.config["num_images"] for cell in todo]
            parts, most = [f"a search of {self.trials} trials"], " at most"
        for status, word in ((DONE, "finished"), (REFUSED, "refused")):
            if (count := sum(cell.status == status for cell in cells)) and not self.trials:
                parts.append(f"{count} {word}")
        work = [number * cell.config["nfe"] for number, cell in zip(images, todo, strict=True)]
        names = dict.fromkeys(cell.name for cell in cells if cell.config)
        line = f"{', '.join(names) or self.base}: {', '.join(parts)}; "
        if sum(work):
            line += f"to make{most}: {sum(images):,} images, {sum(work):,} evaluations, "
            line += self._duration(todo, work)
        else:
            line += f"to score: {len(todo)}" if todo else "nothing to make"
        if self._final_images:
            line += f"; then, of the best and of lml=off, {self._final_images:,} images each"
        return line

    def _duration(self, cells: Sequence[Cell], work: Sequence[int]) -> str:
        seconds = self._seconds(cells, work)
        if seconds is None:
            return "in a time that is not known yet"
        each, rate = "" if self.local else " in one process", sum(work) / seconds
        rate = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
        return f"about {_duration(seconds)}{each} at {rate} evaluations/s"

    def _seconds(self, cells: Sequence[Cell], work: Sequence[int]) -> float | None:
        """How long so many evaluations of each cell take; None when that is not known."""
        rates: dict[str, float | None] = {}
        total = 0.0
        for cell, evaluations in zip(cells, work, strict=True):
            if not evaluations:
                continue
            kind = _kind(cell.config, cell.plan.folder.settings)
            if kind not in rates:
                # Only the network of the first cell: a second one would have it loaded again.
                measure = self._measure if self.local and not rates else lambda _: None
                rates[kind] = self._recall(cell) or measure(cell)
            if rates[kind] is None:
                return None
            total += evaluations / rates[kind]
        return total

    def _recall(self, cell: Cell) -> float | None:
        """Evaluations per second of the newest runs of the same kind under outputs/<name>."""
        kind = _kind(cell.config, cell.plan.folder.settings)
        here = _machine(cell.config) if self.local else {}
        files = Path("outputs", cell.name).glob("*/timing.json")
        rates = []
        for file in sorted(files, key=lambda file: file.stat().st_mtime, reverse=True):
            timing = read_json(file, Timing)
            if any(timing.get(key) != value for key, value in here.items()):
                continue
            try:
                config = read_config(file.parent, RunConfig)
                if _kind(config, config["settings"]) == kind:
                    rates.append(timing["images_per_second"] * timing["evaluations_per_image"])
            except (UserError, KeyError, TypeError):  # a folder that something else was done to
                continue
            if len(rates) == 5:
                break
        return statistics.median(rates) if rates else None

    def _measure(self, cell: Cell) -> float | None:
        """The same of one batch, made now; None when that fails, as the cell itself then will."""
        device = use_device(cell.config["device"], cell.config["threads"])
        share = runner.Share(device=device, **vars(cell.plan), stored=set())
        try:
            return share.measure() * processes.rank_and_world()[1]
        except UserError:
            return None

    # --- the end of a search -------------------------------------------------------------------

    def conclude(self, make: Make) -> None:
        """Make the best setting and LML off at the full count, on seeds the search has not seen.

        That is for every setting of what is not LML's, such as the solver.
        """
        if not self.search:
            return
        choose = max if self.higher_is_better else min
        groups: dict[tuple, dict[tuple, list[float]]] = {}
        for cell in self.cells.values():
            if cell.value is not None and math.isfinite(cell.value):
                rest, lml = _split(cell.overrides)
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
        """The overrides of a run at the end of the search."""
        count = self.search["num_images"]
        more = [] if count is None else [f"num_images={count}"]
        return [*rest, *lml, *more, f"seed={self.search['final_seed']}"]

    def _check_seeds(self, cells: Sequence[Cell]) -> None:
        cells = [cell for cell in cells if cell.config]
        if not cells:
            return  # nothing comes of what is refused
        final = self.compose(self._final(_split(cells[0].overrides)[0], ["lml=off"]))
        self._final_images = final["num_images"]
        begin, end = final["seed"], final["seed"] + final["num_images"]
        for cell in cells:
            seed = cell.config["seed"]
            if begin < seed + cell.config["num_images"] and seed < end:
                raise UserError(
                    f"sweep.final_seed={begin}: {final['num_images']} images from it on share "
                    f"seeds with the search's, from {seed} on"
                )


# --- what is kept ------------------------------------------------------------------------------


class Ledger:
    """sweep.yaml in the folder of a sweep, held against other sweeps until `close`."""

    def __init__(self, folder: Path):
        self.path = folder / "sweep.yaml"
        holder = folder / ".sweep.holder"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(folder / ".sweep.lock")
            self._lock.acquire(timeout=0)
        except Timeout:
            by = holder.read_text() if holder.exists() else "another process"
            raise UserError(
                f"name={folder.name}: {by} is sweeping in {folder}; wait for it, or choose "
                "another name"
            ) from None
        except OSError as error:
            raise disk_error(folder, error) from None
        command = runner.command_line()
        write_atomic(holder, f"process {os.getpid()} on {socket.gethostname()} (`{command}`)")
        self._written: list[dict[str, Any]] | None = None
        self.commands, self.cells = self._read()
        self.commands = list(dict.fromkeys([*self.commands, command]))

    def _read(self) -> tuple[list[str], list[dict[str, Any]]]:
        try:
            kept = read_object(self.path, SweepFile)
            return kept["commands"], kept["cells"]
        except FileNotFoundError:
            return [], []
        except UserError as error:
            aside = self.path.with_name(f"{self.path.name}.broken")
            os.replace(self.path, aside)
            say(
                f"{self.path}: not a sweep's; kept as {aside.name}, and written anew "
                f"({str(error).partition(': ')[2]})"
            )
            return [], []

    def write(self, cells: Sequence[dict[str, Any]]) -> None:
        """These cells, and those of earlier sweeps that they do not replace."""
        if cells == self._written:
            return
        self._written = list(cells)
        runs = {cell["run"] for cell in cells}
        asked = [cell["overrides"] for cell in cells]
        kept = [
            cell
            for cell in self.cells
            if cell["run"] not in runs - {None}
            and (cell["status"] == DONE or cell["overrides"] not in asked)
        ]
        value = {"commands": self.commands, "cells": [*kept, *cells]}
        write_atomic(self.path, dump_yaml(value))

    def close(self) -> None:
        """Let others sweep."""
        self._lock.release()


# --- overrides and kinds of run ----------------------------------------------------------------


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def _split(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Overrides of what stays in the end, and of LML; neither has those that only a search has."""
    lml = [o for o in overrides if _key(o) == "lml" or _key(o).startswith("lml.")]
    return [o for o in overrides if o not in lml and _key(o) not in ("seed", "num_images")], lml


def _kind(config: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """What the time of an evaluation depends on, as it is asked for."""
    asked = {key: config[key] for key in ("device", "threads")}
    return canonical({**asked, **{key: settings[key] for key in ("model", "dtype", "compile")}})


def _machine(config: Mapping[str, Any]) -> dict[str, Any]:
    """What it depends on here, by the names of timing.json."""
    return {
        "device": str(find_device(config["device"])),
        "threads": config["threads"] or torch.get_num_threads(),
        "processes": processes.rank_and_world()[1],
    }


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
