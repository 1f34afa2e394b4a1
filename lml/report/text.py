"""Tables as Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lml.report.labels import OFF
from lml.report.tables import TIMING, Group, Row, Table, change, describe, name, varying

Text = tuple[str, bool]  # a cell's text, and whether it is bold


def _cells(table: Table) -> tuple[list[str], list[list[Text]]]:
    """Header and rows, with a column for each number of evaluations."""
    keys, bold = varying(table.groups), table.bold()
    header = [*keys, "solver", "grid", "LML", *map(str, table.columns), "paper"]
    lines = []
    for row, entries in table.rows.items():
        line = [(text, False) for text in (*describe(row.group, keys), *row[1:])]
        for nfe in table.columns:
            entry, base = entries.get(nfe), table.base(row, nfe)
            text = "" if entry is None else str(entry)
            gain = change(entry, base) if entry and base else ""
            line.append((f"{text} ({gain})" if gain else text, (row, nfe) in bold))
        lines.append([*line, (in_the_paper(table, row), False)])
    return header, lines


def in_the_paper(table: Table, row: Row) -> str:
    """The paper's numbers of a row, in the order of the columns; "" if it has none."""
    paper = table.published(row)
    numbers = [f"{paper[nfe].value:g}" if nfe in paper else "–" for nfe in table.columns]
    return " / ".join(numbers) if paper else ""


def markdown(table: Table, commands: Sequence[str], notes: Sequence[str] = ()) -> str:
    """The table in Markdown; under it the protocol, the best with and without LML, and notes."""
    header, lines = _cells(table)
    numbers = {str(column) for column in table.columns}
    marks = ["---:" if text in numbers else "---" for text in header]
    text = [_line(header), _line(marks)]
    text += [_line(f"**{cell}**" if bold else cell for cell, bold in line) for line in lines]
    text += ["", caption(table), "", *(f"`{command}`  " for command in commands)]
    if table.at is None and (contest := list(_contest(table))):
        keys = varying(table.groups)
        columns = [*keys, "evaluations", "best without LML", "best with LML", "change"]
        text += ["", _line(columns), _line(["---"] * len(columns)), *map(_line, contest)]
        counts = Counter(row.lml == OFF for row in table.rows)
        text += [
            "",
            f"The best of {counts[True]} settings without LML and of {counts[False]} with it, "
            "chosen by these very numbers; the change bold where it exceeds both spreads.",
        ]
    if everything := [*table.notes, *notes]:
        text += ["", *(f"- {note}" for note in dict.fromkeys(everything))]
    return "\n".join(text).rstrip() + "\n"


def _line(cells: Iterator[str] | Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def caption(table: Table) -> str:
    """What the numbers are, and by which protocol they were measured."""
    groups = table.groups
    known = {key: {getattr(group, key) for group in groups} - {""} for key in Group._fields}
    keys = [key for key in Group._fields if len(known[key]) == 1]
    words = {
        "model": "model {}",
        "weights": "weights {}",
        "images": "{} images",
    }
    shared = [words.get(k, "{}").format(*known[k]) for k in keys if k != "protocol"]
    entries = [e for columns in table.rows.values() for e in columns.values() if e.values]
    counts = sorted({len(entry.values) for entry in entries})
    seeds = sorted({seed for entry in entries for seed in entry.values})
    many = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
    better = "higher" if table.higher else "lower"
    what = f"{table.metric} ({better} is better) by network evaluations"
    bold = (
        "; bold what beats every other setting of its column by more than both spreads (never with "
        "one seed)"
    )
    if table.metric == TIMING:
        what = (
            f"Milliseconds per image and evaluation at {table.at} evaluations (scheduler is "
            "correction and solver), and shares of the network's time"
        )
        bold = ""
    elif table.at is not None:
        what = f"{table.metric} ({better} is better) by category at {table.at} network evaluations"
    lines = [
        f"{what}; {', '.join(shared)}; {many} seed(s) a cell ({', '.join(map(str, seeds))}). "
        "Mean ± standard deviation over seeds; in brackets the change that LML makes to its own "
        f"base, its deviation that of each seed against itself{bold}."
    ]
    if keys := varying(groups):
        lines.append(f"Only what has the same {', '.join(keys)} is compared or averaged.")
    for protocol in sorted(known["protocol"]):
        (short,) = describe(groups[0]._replace(protocol=protocol), ["protocol"])
        which = f" {short}" if "protocol" in keys else ""
        lines.append(f"Protocol{which}: {', '.join(_flat(json.loads(protocol)))}.")
    if sources := sorted({entry.source for entry in table.paper}):
        lines.append(
            f"The paper's numbers, in the order of the columns, are from: {'; '.join(sources)}."
        )
    return "\n\n".join(lines)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key} ")
        else:
            short = str(value)[:10] if key.endswith("sha256") else value
            yield f"{prefix}{key} {short}"


def _contest(table: Table) -> Iterator[list[str]]:
    """The best setting with LML and the best without, by group and number of evaluations."""
    keys = varying(table.groups)
    for group in table.groups:
        rows = [row for row in table.rows if row.group == group]
        for nfe in table.columns:
            base = table.best([row for row in rows if row.lml == OFF], nfe)
            ours = table.best([row for row in rows if row.lml != OFF], nfe)
            if base is None or ours is None:
                continue
            ours_entry, base_entry = table.rows[ours][nfe], table.rows[base][nfe]
            gain = change(ours_entry, base_entry) or "no seed in common"
            better = table.beats(ours_entry, base_entry) or table.beats(base_entry, ours_entry)
            yield [
                *describe(group, keys),
                str(nfe),
                f"{base_entry} ({name(base).removesuffix(', LML off')})",
                f"{ours_entry} ({name(ours)})",
                f"**{gain}**" if better else gain,
            ]


def latex(table: Table) -> str:
    """The table as a LaTeX tabular (booktabs)."""

    def escape(text: str) -> str:
        text = re.sub(r"([_%&#])", r"\\\1", text)
        return text.replace("±", "$\\pm$")

    header, lines = _cells(table)
    numbers = {str(column) for column in table.columns}
    columns = "".join("r" if text in numbers else "l" for text in header)
    text = [f"\\begin{{tabular}}{{{columns}}}", "\\toprule"]
    text += [f"{' & '.join(map(escape, header))} \\\\", "\\midrule"]
    for line in lines:
        cells = [f"\\textbf{{{escape(t)}}}" if bold else escape(t) for t, bold in line]
        text.append(f"{' & '.join(cells)} \\\\")
    return "\n".join([*text, "\\bottomrule", "\\end{tabular}"]) + "\n"


def to_csv(table: Table) -> str:
    """One line for each setting and number of evaluations (or time, or category)."""
    buffer = io.StringIO()
    column = "nfe" if table.at is None else "time" if table.metric == TIMING else "category"
    columns = ("solver", "grid", "lml", column, "mean", "std", "seeds", "change", "status", "paper")
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*Group._fields, *columns])
    for row, entries in table.rows.items():
        for nfe in filter(entries.__contains__, table.columns):
            entry, base = entries[nfe], table.base(row, nfe)
            gain = change(entry, base) if base else ""
            numbers = ["" if math.isnan(x) else x for x in (entry.mean, entry.std)]
            paper = table.published(row)
            theirs = paper[nfe].value if nfe in paper else ""
            values = [nfe, *numbers, len(entry.values), gain, entry.status, theirs]
            writer.writerow([*row.group, *row[1:], *values])
    return buffer.getvalue()
