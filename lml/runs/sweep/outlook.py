"""The work that a sweep has to do, and its time, estimated before the first cell is made."""

from __future__ import annotations

import math
import shutil
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lml.device import find_device, use_device
from lml.errors import UserError
from lml.files import read_json
from lml.processes import rank_and_world
from lml.runs.records import read_config
from lml.runs.sweep.cells import DONE, MISSING, REFUSED, Cell
from lml.runs.worker import Worker
from lml.schema import RunConfig, Timing
from lml.seals import canonical

BLOCK = 4096  # bytes that the smallest file takes, on most file systems


@dataclass(frozen=True)
class Outlook:
    """One line about `cells`. `name` is the name of the sweep, used if no cell has one.

    `trials` is the number of cells if the sweeper chooses them one by one. `final_images` is the
    number of images in each run at the end of a search. `local` says that cells are made in this
    process. `rate` is the number of evaluations per second, or None, if it is to be measured.
    """

    cells: Sequence[Cell]
    name: str | None
    local: bool
    trials: int | None = None
    final_images: int = 0
    rate: float | None = None

    def __str__(self) -> str:
        todo, images = self._to_make()
        most = " at most" if self.trials else ""
        work = [number * cell.config["nfe"] for number, cell in zip(images, todo, strict=True)]
        names = dict.fromkeys(cell.name for cell in self.cells if cell.config)
        line = f"{', '.join(names) or self.name}: {self._counts()}; "
        if sum(work):
            line += f"to make{most}: {sum(images):,} images, {sum(work):,} evaluations, "
            line += self._duration(todo, work)
        else:
            line += f"to score: {len(todo)}" if todo else "nothing to make"
        if self.final_images:
            line += f"; then {self.final_images:,} images each with the best and with lml=off"
        return line

    def check_room(self) -> None:
        """UserError if a disk has too little space for the images that go there.

        A PNG is assumed to take half of the pixels' bytes. Images are not counted if their size is
        not known before the network is loaded.
        """
        needed, counts, places = defaultdict(int), defaultdict(int), {}
        for cell, images in zip(*self._to_make(), strict=True):
            if (size := cell.plan.model.image_size()) is None:
                continue
            folder = cell.plan.folder.path.absolute()
            there = next(path for path in (folder, *folder.parents) if path.exists())
            disk = there.stat().st_dev
            places.setdefault(disk, there)
            needed[disk] += images * max(BLOCK, 3 * math.prod(size) // 2)
            counts[disk] += images
        for disk, place in places.items():
            if needed[disk] > (free := shutil.disk_usage(place).free):
                raise UserError(
                    f"{place}: {free / 1e9:.1f} GB free, but {counts[disk]:,} images need at "
                    f"least {needed[disk] / 1e9:.1f} GB; free some space, or make fewer images"
                )

    def _to_make(self) -> tuple[list[Cell], list[int]]:
        """The cells that are not finished, and the number of missing images of each."""
        if self.trials:  # later cells differ from these, but have the same number of images
            todo = [cell for cell in self.cells if cell.plan is not None][:1] * self.trials
            return todo, [cell.config["num_images"] for cell in todo]
        todo = [cell for cell in self.cells if cell.status == MISSING]
        return todo, [cell.images_to_make for cell in todo]

    def _counts(self) -> str:
        if self.trials:
            return f"a search of {self.trials} trials"
        parts = [f"{len(self.cells)} cell{'s' if len(self.cells) > 1 else ''}"]
        for status, word in ((DONE, "finished"), (REFUSED, "refused")):
            if count := sum(cell.status == status for cell in self.cells):
                parts.append(f"{count} {word}")
        return ", ".join(parts)

    def _duration(self, cells: Sequence[Cell], work: Sequence[int]) -> str:
        seconds = sum(work) / self.rate if self.rate else self._seconds(cells, work)
        if seconds is None:
            return "time not known yet (give rate=, in evaluations/s)"
        each, rate = "" if self.local else " in one process", sum(work) / seconds
        rate = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
        return f"about {_in_words(seconds)}{each} at {rate} evaluations/s"

    def _seconds(self, cells: Sequence[Cell], work: Sequence[int]) -> float | None:
        """The seconds that `work` evaluations of each cell take; None if unknown."""
        rates: dict[str, float | None] = {}
        total = 0.0
        for cell, evaluations in zip(cells, work, strict=True):
            if not evaluations:
                continue
            kind = _kind(cell.config, cell.plan.folder.settings)
            if kind not in rates:
                # Only the first cell's network is measured: a second would replace it in memory.
                measure = _measure if self.local and not rates else lambda _: None
                rates[kind] = _recall(cell, self.local) or measure(cell)
            if rates[kind] is None:
                return None
            total += evaluations / rates[kind]
        return total


def _recall(cell: Cell, local: bool) -> float | None:
    """Evaluations per second of the newest runs of the same kind under outputs/<name>."""
    kind = _kind(cell.config, cell.plan.folder.settings)
    here = _machine(cell.config) if local else {}
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
        except (UserError, KeyError, TypeError):  # somebody changed the folder
            continue
        if len(rates) == 5:
            break
    return statistics.median(rates) if rates else None


def _measure(cell: Cell) -> float | None:
    """Evaluations per second of one batch, made now; None if it fails (the cell will fail, too)."""
    device = use_device(cell.config["device"], cell.config["threads"])
    try:
        return Worker(cell.plan, device).measure() * rank_and_world()[1]
    except UserError:
        return None


def _kind(config: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """The settings that the time of an evaluation depends on."""
    asked = {key: config[key] for key in ("device", "threads")}
    return canonical({**asked, **{key: settings[key] for key in ("model", "dtype", "compile")}})


def _machine(config: Mapping[str, Any]) -> dict[str, Any]:
    """The conditions on this machine that the time depends on, with the keys of timing.json."""
    return {
        "device": str(find_device(config["device"])),
        "threads": config["threads"] or torch.get_num_threads(),
        "processes": rank_and_world()[1],
    }


def _in_words(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
