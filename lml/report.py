"""Run folders as tables and figures: mean ± standard deviation over seeds, and LML's gain."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lml.data.assets import ROOT
from lml.errors import UserError
from lml.store import read_config, read_json, write_atomic

HIGHER_IS_BETTER = ("inception_score", "clip_score", "image_reward", "precision_recall")
OFF = "off"


@dataclass(frozen=True)
class Result:
    """One metric of one finished run."""

    run: str  # the run's hash
    model: str
    solver: str
    grid: str
    lml: str  # "off", "default", or how it differs from the default
    nfe: int
    seed: int
    num_images: int
    dtype: str
    metric: str
    value: float
    warning: str
    images_per_second: float


@dataclass(frozen=True)
class Entry:
    """A metric over the seeds of one setting: mean, and standard deviation (nan for one seed)."""

    mean: float
    std: float
    seeds: int

    def __str__(self) -> str:
        spread = "" if math.isnan(self.std) else f" ± {self.std:.2g}"
        return f"{self.mean:.4g}{spread}"


def collect(folder: Path) -> list[Result]:
    """Every metric of every complete run in the folders directly under `folder`."""
    default = OmegaConf.to_container(OmegaConf.load(ROOT / "configs/lml/default.yaml"))
    results = []
    for run in sorted(path.parent for path in folder.glob("*/manifest.json")):
        if not read_json(run / "manifest.json").get("complete"):
            continue
        config = read_config(run)
        speed = read_json(run / "timing.json").get("images_per_second", math.nan)
        for metric, entry in read_json(run / "metrics.json").items():
            value = entry["value"]
            values = value if isinstance(value, dict) else {"": value}
            results += [
                Result(
                    run=run.name,
                    model=config["model"]["name"],
                    solver=config["solver"]["name"],
                    grid=config["grid"].get("name", "default"),
                    lml=_label(config["lml"], default),
                    nfe=config["nfe"],
                    seed=config["seed"],
                    num_images=config["num_images"],
                    dtype=config["dtype"],
                    metric="/".join(filter(None, (metric, part))),
                    value=float(number),
                    warning=entry.get("warning", ""),
                    images_per_second=speed,
                )
                for part, number in values.items()
            ]
    return results


def _label(lml: dict[str, Any], default: dict[str, Any]) -> str:
    if lml["rank"] == 0:
        return OFF
    changed = [f"{key}={lml[key]}" for key in default if lml.get(key) != default[key]]
    return ", ".join(changed) or "default"


Row = tuple[str, str, str]  # solver, grid, lml


def table(results: Sequence[Result]) -> tuple[list[int], dict[Row, dict[int, Entry]]]:
    """The numbers of evaluations, and the entries of each solver, grid and correction by them."""
    groups: dict[Row, dict[int, list[float]]] = {}
    for r in results:
        groups.setdefault((r.solver, r.grid, r.lml), {}).setdefault(r.nfe, []).append(r.value)
    rows = {
        row: {
            nfe: Entry(
                statistics.mean(values),
                statistics.stdev(values) if len(values) > 1 else math.nan,
                len(values),
            )
            for nfe, values in columns.items()
        }
        for row, columns in sorted(groups.items(), key=lambda item: _order(item[0]))
    }
    return sorted({r.nfe for r in results}), rows


def _order(row: Row) -> tuple[str, str, bool, str]:
    return (*row[:2], row[2] != OFF, row[2])


def better(entry: Entry, base: Entry, higher: bool) -> bool:
    """Whether `entry` beats `base` by more than both spreads together; never with one seed."""
    gain = (entry.mean - base.mean) * (1 if higher else -1)
    return gain > entry.std + base.std  # False when a spread is nan


def markdown(results: Sequence[Result], command: str) -> str:
    """The table in Markdown, its protocol under it."""
    nfes, rows = table(results)
    higher = _higher(results[0].metric)
    lines = [
        f"| solver | grid | LML | {' | '.join(map(str, nfes))} | paper |",
        "|---|---|---|" + "---:|" * len(nfes) + "---|",
    ]
    for (solver, grid, lml), entries in rows.items():
        base = rows.get((solver, grid, OFF), {})
        cells = [_cell(entries.get(nfe), base.get(nfe), lml, higher) for nfe in nfes]
        lines.append(f"| {solver} | {grid} | {lml} | {' | '.join(cells)} | |")
    return "\n".join([*lines, "", _protocol(results, command)]) + "\n"


def _cell(entry: Entry | None, base: Entry | None, lml: str, higher: bool) -> str:
    if entry is None:
        return ""
    text = str(entry)
    if lml == OFF or base is None:
        return text
    text = f"**{text}**" if better(entry, base, higher) else text
    return f"{text} ({100 * (entry.mean / base.mean - 1):+.1f} %)"


def _higher(metric: str) -> bool:
    return metric.split("/")[0] in HIGHER_IS_BETTER or metric.endswith("cosine")


def _protocol(results: Sequence[Result], command: str) -> str:
    def of(key: str) -> str:
        return ", ".join(sorted({str(getattr(r, key)) for r in results}))

    better_is = "higher" if _higher(results[0].metric) else "lower"
    counts = {(r.solver, r.grid, r.lml, r.nfe): 0 for r in results}
    for r in results:
        counts[r.solver, r.grid, r.lml, r.nfe] += 1
    seeds = " to ".join(map(str, sorted({min(counts.values()), max(counts.values())})))
    text = (
        f"{results[0].metric} ({better_is} is better) by network evaluations; model {of('model')}, "
        f"{of('num_images')} images, {seeds} seed(s) a cell, {of('dtype')}. In brackets the change "
        "that LML makes to its own base; bold where it is an improvement beyond both spreads "
        f"(never with one seed). `{command}`"
    )
    warnings = sorted({r.warning for r in results if r.warning})
    return text + "".join(f"\n\nWarning: {warning}." for warning in warnings)


def latex(results: Sequence[Result]) -> str:
    """The table as a LaTeX tabular (booktabs)."""
    nfes, rows = table(results)
    higher = _higher(results[0].metric)
    lines = [
        f"\\begin{{tabular}}{{lll{'r' * len(nfes)}}}",
        "\\toprule",
        f"solver & grid & LML & {' & '.join(map(str, nfes))} \\\\",
        "\\midrule",
    ]
    for (solver, grid, lml), entries in rows.items():
        base = rows.get((solver, grid, OFF), {})
        cells = []
        for nfe in nfes:
            text = str(entries.get(nfe, "")).replace("±", "$\\pm$")
            bold = nfe in entries and nfe in base and better(entries[nfe], base[nfe], higher)
            cells.append(f"\\textbf{{{text}}}" if bold else text)
        names = " & ".join(name.replace("_", "\\_") for name in (solver, grid, lml))
        lines.append(f"{names} & {' & '.join(cells)} \\\\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"]) + "\n"


def as_csv(results: Sequence[Result]) -> str:
    """Every result on a line."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(asdict(results[0])), lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(result) for result in results)
    return buffer.getvalue()


def figure(results: Sequence[Result], formats: Sequence[str] = ("png", "svg")) -> dict[str, bytes]:
    """Quality against evaluations, solid with LML and dashed without, by format."""
    from matplotlib.figure import Figure

    nfes, rows = table(results)
    drawn = Figure(figsize=(6, 4), layout="constrained")
    axes = drawn.add_subplot()
    colors = {row[:2]: f"C{k}" for k, row in enumerate(dict.fromkeys(r[:2] for r in rows))}
    for (solver, grid, lml), entries in rows.items():
        known = sorted(entries)
        axes.errorbar(
            known,
            [entries[nfe].mean for nfe in known],
            [0 if math.isnan(entries[nfe].std) else entries[nfe].std for nfe in known],
            color=colors[solver, grid],
            linestyle="--" if lml == OFF else "-",
            marker="o" if lml == OFF else "s",
            markersize=4,
            label=f"{solver}{'' if grid == 'default' else f' ({grid})'}, LML {lml}",
        )
    axes.set(xlabel="network evaluations", ylabel=results[0].metric, xscale="log", yscale="log")
    axes.set_xticks(nfes, [str(nfe) for nfe in nfes])
    axes.xaxis.set_minor_formatter(lambda *_: "")
    axes.legend(fontsize=7)
    made = {}
    for name in formats:
        drawn.savefig(buffer := io.BytesIO(), format=name, dpi=150)
        made[name] = buffer.getvalue()
    return made


def tabulate(cfg: DictConfig) -> Path:
    """Write the study's results.csv and, of each metric, a table and a figure; return the folder.

    `cfg` (configs/tabulate.yaml) is the study's: its `name` is that of the folders, unless `runs`
    or `out` say otherwise. UserError when there is no finished run with a metric.
    """
    runs = Path(cfg.runs or Path("outputs", str(cfg.name)))
    if not runs.is_dir():
        raise UserError(f"runs={runs}: no such folder; experiment=NAME of a study that was run")
    results = collect(runs)
    if not results:
        raise UserError(f"runs={runs}: no complete run with a metric in it")
    out = Path(cfg.out or Path("experiments", runs.name))
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "results.csv", as_csv(results))
    command = f"python scripts/sample.py -m experiment={runs.name}"
    for metric in sorted({result.metric for result in results}):
        chosen = [result for result in results if result.metric == metric]
        stem = metric.replace("/", "_")
        write_atomic(out / f"{stem}.md", text := markdown(chosen, command))
        write_atomic(out / f"{stem}.tex", latex(chosen))
        for suffix, data in figure(chosen).items():
            write_atomic(out / f"{stem}.{suffix}", data)
        print(text)
    return out
