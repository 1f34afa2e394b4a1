"""Run folders as tables, figures, pages: mean ± standard deviation over seeds, and LML's gain."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from lml.errors import UserError
from lml.files import disk_error, write_atomic
from lml.report import compbench, figures, page, paper, results, tables, text
from lml.runs.records import check_output, read_config
from lml.schema import Cell


def tabulate(cfg: DictConfig) -> Path:
    """Write the study's results.csv, tables and figures of each metric, and its page, index.html.

    Returns the folder.

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
    study = _read(runs, out, _evaluations(cfg.evaluations, runs))
    metrics = results.choose(study.known, _plain(cfg.show))
    for note in study.notes:
        print(note, file=sys.stderr)
    files = _render(study, metrics)
    _write(files, out, kept=study.sweep.name)
    print("\n".join(data for name, data in files.items() if name.endswith(".md")), end="")
    return out


def compare(cfg: DictConfig) -> Path:
    """Write one page of the runs in the folders `cfg.run_dirs` (configs/compare.yaml); return it.

    A run that cannot be used is said on stderr and on the page. UserError when none can be, when
    `cfg.out` cannot be written, when there is a file that is no such page, and when no score in
    `cfg.evaluations` is of these runs.
    """
    out, folders = Path(cfg.out), _named([Path(run) for run in cfg.run_dirs])
    check_output(out, "out")
    _check_page(out)
    # the runs of one folder share what T2I-CompBench's evaluators wrote
    scored = functools.cache(functools.partial(_evaluations, cfg.evaluations))
    notes, known, commands = [], [], []
    for name, folder in folders.items():
        evaluations = scored(folder.parent)
        found = results.read_run(folder, notes.append, evaluations) if folder.is_dir() else []
        if not found:
            notes.append(f"{folder}: no complete run with a metric or a time in it; not used")
            continue
        known += [dataclasses.replace(result, run=name) for result in found]
        command = read_config(folder).get("provenance", {}).get("command")
        commands += [str(command)] if command else []
    if not known:
        raise UserError(f"run_dirs: no complete run to show ({'; '.join(notes)})")
    if cfg.evaluations is not None:
        _check_scored(cfg.evaluations, known, "run_dirs")
    for note in notes:
        print(note, file=sys.stderr)
    shown = _shown(known, results.choose(known, _plain(cfg.show)))
    title = f"{len({result.run for result in known})} runs"
    made = page.render(title, known, shown, folders, list(dict.fromkeys(commands)), notes)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(out.parent, error, "out") from None
    write_atomic(out, made, "out")
    print(out)
    return out


def _named(folders: Sequence[Path]) -> dict[str, Path]:
    """The folders by their names; by their paths where two have one name."""
    folders = list(dict.fromkeys(folders))
    names = [folder.name for folder in folders]
    return {
        folder.name if names.count(folder.name) == 1 else str(folder): folder for folder in folders
    }


def _check_page(path: Path) -> None:
    """UserError when there is something at `path` that is no page of ours."""
    try:
        if page.is_page(path):
            return
    except FileNotFoundError:
        return
    except OSError as error:
        raise disk_error(path, error, "out") from None
    raise UserError(f"out={path}: is there and no page of runs; choose another name")


def _plain(show: object) -> object:
    return OmegaConf.to_container(show) if OmegaConf.is_config(show) else show


def _shown(
    known: Sequence[results.Result],
    metrics: Sequence[str],
    cells: Sequence[Cell] = (),
    published: Sequence[paper.Published] = (),
) -> list[tuple[tables.Table, list[results.Result]]]:
    """Of each metric the table and the results it is made of."""
    chosen = {metric: [r for r in known if r.metric == metric] for metric in metrics}
    return [
        (tables.build(metric, found, cells, published), found) for metric, found in chosen.items()
    ]


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
    published: list[paper.Published]


def _evaluations(folder: str | None, runs: Path) -> compbench.Evaluations | None:
    """What T2I-CompBench's evaluators wrote; None without a folder of it."""
    usual = runs / "evaluations"
    if folder is None and not usual.is_dir():
        return None
    return compbench.Evaluations(Path(folder or usual))


def _check_scored(
    evaluations: str | Path, found: Sequence[results.Result], runs: str | Path
) -> None:
    """UserError if none of the results `found` of `runs` is a score in the folder `evaluations`."""
    if not any(compbench.is_score(result.metric) for result in found):
        raise UserError(
            f"evaluations={evaluations}: no scores of the runs in {runs}; export them "
            "there with layout=t2i_compbench, and run T2I-CompBench's evaluators"
        )


def _read(runs: Path, out: Path, evaluations: compbench.Evaluations | None) -> _Study:
    """Read all results. UserError if there is nothing to show, or no score in `evaluations`."""
    results.check_kept(out / "results.csv", f"out={out}")
    notes = []
    found = results.collect(runs, notes.append, evaluations)
    if evaluations:
        _check_scored(evaluations.folder, found, runs)
    older = results.from_csv(out / "results.csv", found, notes.append)
    known = results.merge(found, older, runs)
    if not known:
        for note in notes:
            print(note, file=sys.stderr)
        raise UserError(f"runs={runs}: no complete run with a metric or a time in it")
    sweep = (runs if (runs / "sweep.yaml").is_file() else out) / "sweep.yaml"
    commands, cells = results.read_sweep(sweep, notes.append)
    commands = commands or [f"python scripts/sample.py -m experiment={runs.name}"]
    published = paper.read_paper(out / paper.FILE)
    return _Study(runs, found, known, sweep, commands, cells, notes, published)


def _render(study: _Study, metrics: Sequence[str]) -> dict[str, str | bytes]:
    """The files of the study, by name."""
    files = {}
    rows = [r for r in study.known if r.metric in metrics or not results.is_timing(r.metric)]
    files["results.csv"] = results.to_csv(rows)
    if study.cells:
        files["sweep.yaml"] = study.sweep.read_bytes()
    drawn, times, shown = {}, [], _shown(study.known, metrics, study.cells, study.published)
    for table, chosen in shown:
        metric, stem = table.metric, table.metric.replace("/", "_")
        if results.is_timing(metric):
            times.append(table)
            continue
        warnings = sorted({f"Warning: {result.warning}." for result in chosen if result.warning})
        files |= _texts(stem, table, study.commands, [*warnings, *study.notes])
        drawn[stem] = figures.curves(table)
        drawn[f"{stem}_map"] = figures.maps(table, chosen)
        drawn[f"{stem}_steps"] = figures.steps(table, chosen)
    scores = [table for table, _ in shown if compbench.is_score(table.metric)]
    for table in [*tables.times(times), *tables.categories(scores)]:
        files |= _texts(f"{table.metric}_nfe{table.at}", table, study.commands, study.notes)
    if not all(map(results.is_timing, metrics)):
        drawn |= figures.strips(study.found, study.runs)
    for stem, figure in drawn.items():
        if figure is not None:
            pictures = figures.encode(figure).items()
            files |= {f"{stem}.{suffix}": data for suffix, data in pictures}
    folders = {result.run: study.runs / result.run for result in study.found}
    files["index.html"] = page.render(
        study.runs.name, study.known, shown, folders, study.commands, study.notes
    )
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
