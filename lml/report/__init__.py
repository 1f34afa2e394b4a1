"""Run folders as tables and figures: mean ± standard deviation over seeds, and LML's gain."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from lml.errors import UserError
from lml.files import disk_error, write_atomic
from lml.report import figures, results, tables, text
from lml.runs.records import check_output


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
    show = OmegaConf.to_container(cfg.show) if OmegaConf.is_config(cfg.show) else cfg.show
    metrics = results.choose(known, show)
    for note in notes:
        print(note, file=sys.stderr)

    commands = commands or [f"python scripts/sample.py -m experiment={runs.name}"]
    files = {}
    rows = [r for r in known if r.metric in metrics or not results.is_timing(r.metric)]
    files["results.csv"] = results.to_csv(rows)
    if cells:
        files["sweep.yaml"] = sweep.read_bytes()
    drawn, times = {}, []
    for metric in metrics:
        stem = metric.replace("/", "_")
        chosen = [result for result in known if result.metric == metric]
        table = tables.build(metric, chosen, cells)
        if results.is_timing(metric):
            times.append(table)
            continue
        warnings = sorted({f"Warning: {result.warning}." for result in chosen if result.warning})
        files |= _texts(stem, table, commands, [*warnings, *notes])
        drawn[stem] = figures.curves(table)
        drawn[f"{stem}_map"] = figures.maps(table, chosen)
        drawn[f"{stem}_steps"] = figures.steps(table, chosen)
    for table in tables.times(times):
        files |= _texts(f"timing_nfe{table.times_at}", table, commands, notes)
    if not all(map(results.is_timing, metrics)):
        drawn |= figures.strips(found, runs)
    for stem, figure in drawn.items():
        if figure is not None:
            pictures = figures.encode(figure).items()
            files |= {f"{stem}.{suffix}": data for suffix, data in pictures}
    if not (out / "results.csv").exists():
        for name in files:
            if name != sweep.name and (out / name).exists():
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
    print("\n".join(data for name, data in files.items() if name.endswith(".md")), end="")
    return out


def _texts(
    stem: str, table: tables.Table, commands: Sequence[str], notes: Sequence[str]
) -> dict[str, str]:
    return {
        f"{stem}.md": text.markdown(table, commands, notes),
        f"{stem}.tex": text.latex(table),
        f"{stem}.csv": text.to_csv(table),
    }
