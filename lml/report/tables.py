"""Tables: mean ± standard deviation over seeds, LML's gain over its own base, what is missing."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from lml.metrics.base import class_by_name, is_higher_better
from lml.report import compbench, labels
from lml.report.labels import OFF
from lml.report.paper import Published
from lml.report.results import Cell, Result, is_timing

TIMING = "timing"  # the metric of a table of several times


class Group(NamedTuple):
    """The fields that must be equal in all that is compared or averaged."""

    model: str
    size: str
    weights: str  # 10 digits of the sha256 over them, the model's settings and the prompts
    images: int
    dtype: str
    protocol: str  # JSON


class Row(NamedTuple):
    """A setting, for all numbers of evaluations. The names are those that tables show."""

    group: Group
    solver: str
    grid: str
    lml: str


@dataclass(frozen=True)
class Entry:
    """A metric of one setting, by seed. If it has no values, `status` says why."""

    values: Mapping[int, float]
    num_images: int  # of each seed
    status: str = ""

    @property
    def mean(self) -> float:
        """The mean over the seeds; nan without any."""
        return statistics.fmean(self.values.values()) if self.values else math.nan

    @property
    def std(self) -> float:
        """The standard deviation over the seeds; nan for one seed, or if seeds share noise."""
        if len(self.values) < 2 or self.overlaps:
            return math.nan
        return statistics.stdev(self.values.values())

    @property
    def overlaps(self) -> bool:
        """Whether two seeds are so close that images share noise (image i has seed + i)."""
        pairs = itertools.pairwise(sorted(self.values))
        return any(b - a < self.num_images for a, b in pairs)

    def __str__(self) -> str:
        if not self.values:
            return self.status
        spread = "" if math.isnan(self.std) else f" ± {self.std:.2g}"
        return f"{self.mean:#.4g}".rstrip(".") + spread


@dataclass
class Table:
    """One metric: its entries by row and number of evaluations, and the notes under the table.

    A table of several times, or of several categories of T2I-CompBench, is for one number of
    evaluations (`at`), and its columns are these.
    """

    metric: str
    rows: dict[Row, dict[int | str, Entry]]
    notes: list[str] = field(default_factory=list)
    paper: list[Published] = field(default_factory=list)  # the paper's numbers
    at: int | None = None

    @property
    def columns(self) -> list[int | str]:
        """All numbers of evaluations, times, or categories."""
        known = {column for entries in self.rows.values() for column in entries}
        in_the_paper = [category for category in compbench.EVALUATORS if category in known]
        return in_the_paper or sorted(known)

    @property
    def higher(self) -> bool:
        """Whether higher is better. For times, which no class declares, lower is better."""
        name, _, part = self.metric.partition("/")
        return name == compbench.METRIC or is_higher_better(class_by_name(name), part)

    @property
    def groups(self) -> list[Group]:
        """All groups, in the order of the rows."""
        return list(dict.fromkeys(row.group for row in self.rows))

    def published(self, row: Row) -> dict[int, Published]:
        """The paper's numbers of the row, by the number of evaluations."""
        cell = (row.group.model, row.solver)
        return {entry.nfe: entry for entry in self.paper if (entry.model, entry.solver) == cell}

    def base(self, row: Row, nfe: int) -> Entry | None:
        """The entry with LML off and all else equal."""
        entry = self.rows.get(row._replace(lml=OFF), {}).get(nfe)
        return entry if row.lml != OFF and entry is not None and entry.values else None

    def beats(self, entry: Entry, other: Entry) -> bool:
        """Whether `entry` is better by more than both spreads together; False if one is nan."""
        gain = (entry.mean - other.mean) * (1 if self.higher else -1)
        return gain > entry.std + other.std

    def best(self, rows: Sequence[Row], nfe: int) -> Row | None:
        """The row with the best mean."""
        means = {row: self.rows[row][nfe].mean for row in rows if nfe in self.rows[row]}
        means = {row: mean for row, mean in means.items() if not math.isnan(mean)}
        return (max if self.higher else min)(means, key=means.get) if means else None

    def bold(self) -> set[tuple[Row, int]]:
        """The entries that beat every other setting of their column, if there is another."""
        found = set()
        if self.metric == TIMING:  # LML off is always the cheapest
            return found
        for group, nfe in itertools.product(self.groups, self.columns):
            entries = {
                row: columns[nfe]
                for row, columns in self.rows.items()
                if row.group == group and nfe in columns and columns[nfe].values
            }
            best = self.best(list(entries), nfe)
            others = [entry for row, entry in entries.items() if row != best]
            if best and others and all(self.beats(entries[best], other) for other in others):
                found.add((best, nfe))
        return found


def change(entry: Entry, base: Entry) -> str:
    """The change from `base` to `entry`, over the seeds that both have; "" without any.

    It is in per cent, or a plain difference unless the base is positive for every seed; "" if the
    base is zero. The standard deviation is that of the change at each seed: both begin from the
    same noise, so an effect of the seed on both cancels.
    """
    seeds = sorted(entry.values.keys() & base.values.keys())
    ours, theirs = ([e.values[seed] for seed in seeds] for e in (entry, base))
    if not seeds or statistics.fmean(theirs) == 0:
        return ""
    relative = min(theirs) > 0
    changes = [100 * (a / b - 1) if relative else a - b for a, b in zip(ours, theirs, strict=True)]
    mean = statistics.fmean(ours) - statistics.fmean(theirs)
    mean *= 100 / statistics.fmean(theirs) if relative else 1
    std = Entry(dict(zip(seeds, changes, strict=True)), entry.num_images).std
    spread = "" if math.isnan(std) else f" ± {std:.1f}" if relative else f" ± {std:.2g}"
    return f"{mean:+.1f}{spread} %" if relative else f"{mean:+.3g}{spread}"


# --- from results to a table -------------------------------------------------------------------


def row_of(result: Result) -> Row:
    """The row of a result."""
    group = Group(
        result.model,
        result.size,
        result.model_sha256,
        result.num_images,
        result.dtype,
        result.protocol,
    )
    lml = labels.lml_label(result.lml, result.solver, result.nfe, result.model)
    return Row(group, labels.solver_label(result.solver, result.solver_options), result.grid, lml)


def build(
    metric: str,
    results: Sequence[Result],
    cells: Sequence[Cell] = (),
    paper: Sequence[Published] = (),
) -> Table:
    """The table of one metric, from `results`, `cells` (the planned runs) and the paper's numbers.

    If only some seeds of a cell are missing, a note says so.
    """
    found = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    runs = {}
    for result in results:
        if result.metric == metric:
            row = runs[result.run] = row_of(result)
            found[row][result.nfe][result.seed].append(result.value)
    notes = []
    entries = defaultdict(dict)
    for row, columns in found.items():
        for nfe, seeds in columns.items():
            values = {seed: statistics.fmean(seeds[seed]) for seed in sorted(seeds)}
            # a time has a spread even if images share noise
            entries[row][nfe] = Entry(values, 1 if is_timing(metric) else row.group.images)
            if any(len(several) > 1 for several in seeds.values()):
                notes.append(
                    f"{name(row)} at {nfe} has several runs of one seed, which differ in what "
                    "is no column here (batch_size, say): of these the mean is taken."
                )
    absent = [cell for cell in cells if cell.run not in runs]
    for cell in absent:
        columns = entries[_row_of_cell(cell, list(found))]
        status = _status(cell)
        columns.setdefault(cell.nfe, Entry({}, cell.num_images, status))
    rows = dict(sorted(entries.items(), key=lambda item: order(item[0])))
    table = Table(metric, rows, notes, [entry for entry in paper if entry.metric == metric])
    table.notes += [*_seed_notes(table), *_absence_notes(absent)]
    return table


def times(tables: Sequence[Table]) -> list[Table]:
    """Joins tables of times: one for each number of evaluations, with a column for each time."""
    names = {table.metric: table.metric.removeprefix("timing/") for table in tables}
    units = {metric: name if "_" in name else f"{name} ms" for metric, name in names.items()}
    return _join(TIMING, tables, units)


def categories(tables: Sequence[Table]) -> list[Table]:
    """Joins tables of T2I-CompBench: one for each number of evaluations, a column a category."""
    names = {table.metric: table.metric.partition("/")[2] for table in tables}
    return _join(compbench.METRIC, tables, names)


def _join(metric: str, tables: Sequence[Table], names: Mapping[str, str]) -> list[Table]:
    made = {}
    for table in tables:
        for row, entries in table.rows.items():
            for nfe, entry in entries.items():
                at = made.setdefault(nfe, Table(metric, {}, at=nfe))
                at.rows.setdefault(row, {})[names[table.metric]] = entry
                at.notes = list(dict.fromkeys([*at.notes, *table.notes]))
    return [made[nfe] for nfe in sorted(made)]


def order(row: Row) -> tuple:
    """Key to sort rows."""
    # "8x8" comes before "16x16", and groups without results come last
    size = [int(side) for side in re.findall(r"\d+", row.group.size)]
    return (not size, row.group._replace(size=size), row.solver, row.grid, labels.order(row.lml))


def _row_of_cell(cell: Cell, rows: Sequence[Row]) -> Row:
    """The row of a cell. Its group is that of a fitting row, if there is one."""
    known = (cell.model, cell.num_images, cell.dtype)
    groups = {r.group for r in rows if (r.group.model, r.group.images, r.group.dtype) == known}
    group = Group(cell.model, "", "", cell.num_images, cell.dtype, "")
    if len(groups) == 1:
        (group,) = groups
    lml = labels.lml_label(json.dumps(cell.lml), cell.solver, cell.nfe, cell.model)
    return Row(group, cell.solver, cell.grid, lml)


def _status(cell: Cell) -> str:
    return cell.status if cell.status in ("failed", "refused") else "missing"


def _absence_notes(absent: Sequence[Cell], most: int = 5) -> Iterator[str]:
    """Notes on missing cells, by their status and reason."""
    kinds = defaultdict(list)
    for cell in absent:
        kinds[_status(cell), cell.reason or ""].append(" ".join(cell.overrides))
    for (status, reason), names in sorted(kinds.items()):
        more = f"; and {len(names) - most} more" if len(names) > most else ""
        because = f": {reason.rstrip('.')}" if reason else ""
        yield f"{status} ({len(names)}): {'; '.join(names[:most])}{more}{because}."


def _seed_notes(table: Table) -> Iterator[str]:
    everything = [
        (r, n, entry) for r, columns in table.rows.items() for n, entry in columns.items()
    ]
    if any(entry.overlaps for _, _, entry in everything):
        yield (
            "Seeds that are less than num_images apart share noise (image i is made from seed + "
            "i): of these no spread is given."
        )
    for row, nfe, entry in everything:
        base = table.base(row, nfe)
        if base is None or not entry.values or entry.values.keys() == base.values.keys():
            continue
        shared = sorted(entry.values.keys() & base.values.keys())
        over = f"over seeds {', '.join(map(str, shared))}" if shared else "not known: no seed"
        yield f"{name(row)} at {nfe}: the change is {over}, which its base has, too."


def name(row: Row) -> str:
    """The setting in a few words."""
    grid = "" if row.grid == "default" else f" ({row.grid})"
    return f"{row.solver}{grid}, LML {row.lml}"


def varying(groups: Sequence[Group]) -> list[str]:
    """The fields in which the groups differ, ignoring unknown values."""
    values = {key: {getattr(group, key) for group in groups} for key in Group._fields}
    keys = [key for key, known in values.items() if len(known - {""}) > 1]
    # the hash of the weights only if the other fields do not tell the groups apart
    plain = [key for key in keys if key != "weights"]
    return plain if len({tuple(describe(g, plain)) for g in groups}) == len(set(groups)) else keys


def describe(group: Group, keys: Sequence[str]) -> list[str]:
    """These fields of the group, in words."""
    known = {**group._asdict(), "protocol": ""}
    if group.protocol:
        known["protocol"] = hashlib.sha256(group.protocol.encode()).hexdigest()[:6]
    return [str(known[key]) for key in keys]
