"""Tables and figures of run folders: mean ± standard deviation over seeds, and LML's gain."""

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
    """Write the study's results.csv, and tables and figures of each metric; return the folder.

    `cfg` (configs/tabulate.yaml) is the config of the study. Its `name` gives the two folders,
    unless `runs` or `out` set them. Results in an older results.csv stay if their runs are gone.
    Files that could not be used are named on stderr and under the tables. UserError if no finished
    run has anything to show, if the folder cannot be written to, or if it has files of these names
    that are not a study's.
    """
    runs = Path(cfg.runs or Path("outputs", str(cfg.name)))
    out = Path(cfg.out or Path("experiments", runs.name))
    check_output(out, "out")
    if not runs.is_dir() and not (out / "results.csv").is_file():
        raise UserError(f"runs={runs}: no such folder; use experiment=NAME of a study that was run")
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
    """All that is known about the runs of a study."""

    runs: Path
    found: list[results.Result]  # in the folder of runs
    known: list[results.Result]  # these, and those of an older results.csv
    sweep: Path
    commands: list[str]
    cells: list[Cell]
    notes: list[str]  # about files that could not be used


def _read(runs: Path, out: Path) -> _Study:
    """Read all results. UserError if there is nothing to show."""
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
    """Write `files` to `out`. UserError if it has files of these names but no file `kept`."""
    if not (out / "results.csv").exists():
        for name in files:
            if name != kept and (out / name).exists():
                raise UserError(
                    f"out={out}: {name} in it is not of a study (it has no results.csv beside it); "
                    "choose another folder"
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
