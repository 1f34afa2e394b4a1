"""Run folders as tables and figures: mean ± standard deviation over seeds, and LML's gain."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from lml.errors import UserError
from lml.files import disk_error, write_atomic
from lml.report import figures, results, tables, text
from lml.runs.records import check_output
from lml.schema import Cell


def tabulate(cfg: DictConfig) -> Path:
    """Write the study's results.csv and, of each metric, tables and figures; return the folder.

    `cfg` (configs/tabulate.yaml) is the study's: its `name` is that of the folders, unless `runs`
    or `out` say otherwise. Results of an older results.csv whose runs are no longer there are kept.
    What could not be used is said on stderr and under the tables. UserError when there is no
    finished run with anything to show, when the folder cannot be written to, and when it has files
    of these names that are not a study's.
    """
    runs = Path(cfg.runs or Path("outputs", str(cfg.name)))
    out = Path(cfg.out or Path("experiments", runs.name))
    check_output(out, "out")
    if not runs.is_dir() and not (out / "results.csv").is_file():
        raise UserError(f"runs={runs}: no such folder; experiment=NAME of a study that was run")
    study = _read(runs, out)
    show = OmegaConf.to_container(cfg.show) if OmegaConf.is_config(cfg.show) else cfg.show
    metrics = results.choose(study.known, show)
    for note in study.notes:
        print(note, file=sys.stderr)
    files = _render(study, metrics)
    _write(files, out, kept=study.sweep.name)
    print("\n".join(data for name, data in files.items() if name.endswith(".md")), end="")
    return out


@dataclass(frozen=True)
class _Study:
    """What is known of the runs in a folder."""

    runs: Path
    found: list[results.Result]  # in that folder
    known: list[results.Result]  # and in the results.csv of an earlier time
    sweep: Path
    commands: list[str]
    cells: list[Cell]
    notes: list[str]  # on what could not be used


def _read(runs: Path, out: Path) -> _Study:
    """UserError when there is nothing to show."""
    results.check_kept(out / "results.csv", f"out={out}")
    notes = []
    found = results.collect(runs, notes.append)
    older = results.from_csv(out / "results.csv", found, notes.append)
    known = results.merge(found, older, runs)
    if not known:
        for note in notes:
            print(note, file=sys.stderr)
        raise UserError(f"runs={runs}: no complete run with a metric or a time in it")
    sweep = (runs if (runs / "sweep.yaml").is_file() else out) / "sweep.yaml"
    commands, cells = results.read_sweep(sweep, notes.append)
    commands = commands or [f"python scripts/sample.py -m experiment={runs.name}"]
    return _Study(runs, found, known, sweep, commands, cells, notes)


def _render(study: _Study, metrics: Sequence[str]) -> dict[str, str | bytes]:
    """The files of the study, by name."""
    files = {}
    rows = [r for r in study.known if r.metric in metrics or not results.is_timing(r.metric)]
    files["results.csv"] = results.to_csv(rows)
    if study.cells:
        files["sweep.yaml"] = study.sweep.read_bytes()
    drawn, times = {}, []
    for metric in metrics:
        stem = metric.replace("/", "_")
        chosen = [result for result in study.known if result.metric == metric]
        table = tables.build(metric, chosen, study.cells)
        if results.is_timing(metric):
            times.append(table)
            continue
        warnings = sorted({f"Warning: {result.warning}." for result in chosen if result.warning})
        files |= _texts(stem, table, study.commands, [*warnings, *study.notes])
        drawn[stem] = figures.curves(table)
        drawn[f"{stem}_map"] = figures.maps(table, chosen)
        drawn[f"{stem}_steps"] = figures.steps(table, chosen)
    for table in tables.times(times):
        files |= _texts(f"timing_nfe{table.times_at}", table, study.commands, study.notes)
    if not all(map(results.is_timing, metrics)):
        drawn |= figures.strips(study.found, study.runs)
    for stem, figure in drawn.items():
        if figure is not None:
            pictures = figures.encode(figure).items()
            files |= {f"{stem}.{suffix}": data for suffix, data in pictures}
    return files


def _write(files: Mapping[str, str | bytes], out: Path, kept: str) -> None:
    """UserError for a folder that has files of these names, but for `kept`, and is no study's."""
    if not (out / "results.csv").exists():
        for name in files:
            if name != kept and (out / name).exists():
                raise UserError(
                    f"out={out}: {name} in it is not of a study (there is no results.csv beside "
                    "it); choose another folder"
                )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(out, error, "out") from None
    for name, data in files.items():
        write_atomic(out / name, data, "out")


def _texts(
    stem: str, table: tables.Table, commands: Sequence[str], notes: Sequence[str]
) -> dict[str, str]:
    return {
        f"{stem}.md": text.markdown(table, commands, notes),
        f"{stem}.tex": text.latex(table),
        f"{stem}.csv": text.to_csv(table),
    }
