"""The paper's own numbers, from a study's paper.csv, beside ours in its tables."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lml import configs
from lml.errors import UserError, nearest
from lml.files import read_text
from lml.report.labels import METRICS

FILE = "paper.csv"
COLUMNS = ("metric", "model", "solver", "nfe", "value", "source")


@dataclass(frozen=True)
class Published:
    """A published number: its cell in the table, and where it was printed."""

    metric: str
    model: str
    solver: str
    nfe: int
    value: float
    source: str


def read_paper(path: Path) -> list[Published]:
    """The numbers in `path`, a CSV with `COLUMNS`; [] without the file. Rows may have no value.

    UserError, with the line, for a metric, model or solver that does not exist, a solver that is
    not the authors', and a value without a source.
    """
    try:
        rows = list(csv.reader(io.StringIO(read_text(path)), strict=True))
    except FileNotFoundError:
        return []
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path}: not a CSV file ({error})") from None
    if not rows or tuple(rows[0]) != COLUMNS:
        raise UserError(f"{path}: expected the columns {', '.join(COLUMNS)}")
    found = {}
    for number, row in enumerate(rows[1:], start=2):
        if not row:
            continue
        entry = _parse(row, f"{path}: line {number}")
        key = (entry.metric, entry.model, entry.solver, entry.nfe)
        if key in found:
            raise UserError(f"{path}: line {number}: an earlier line has the same cell")
        found[key] = entry
    return [entry for entry in found.values() if not math.isnan(entry.value)]


def _parse(row: Sequence[str], where: str) -> Published:
    if len(row) != len(COLUMNS):
        raise UserError(f"{where}: {len(row)} cells; expected {len(COLUMNS)}")
    metric, model, solver, nfe, value, source = map(str.strip, row)
    authors = [name for name in configs.names("solver") if name.startswith("authors_")]
    known = {"metric": METRICS, "model": configs.names("model"), "solver": authors}
    for key, name in (("metric", metric), ("model", model), ("solver", solver)):
        if name not in known[key]:
            raise UserError(f"{where}: {key}={name}: unknown; nearest: {nearest(name, known[key])}")
    if not (nfe.isascii() and nfe.isdigit() and 0 < len(nfe) < 7 and int(nfe) > 0):
        raise UserError(f"{where}: nfe={nfe}: expected a number of evaluations")
    try:
        number = float(value) if value else math.nan
    except ValueError:
        number = math.inf
    if math.isinf(number) or (value and math.isnan(number)):
        raise UserError(f"{where}: value={value}: expected a number, or nothing")
    if value and not source:
        raise UserError(f"{where}: the value has no source; say where it is printed")
    return Published(metric, model, solver, int(nfe), number, source)
