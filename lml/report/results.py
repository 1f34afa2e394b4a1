"""Reads run folders into the rows of a study's results.csv."""

from __future__ import annotations

import csv
import hashlib
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from lml.data.images import open_image
from lml.errors import UserError, first_line, nearest
from lml.files import file_hash, open_regular, read_object
from lml.report import compbench
from lml.report.compbench import Evaluations
from lml.report.labels import is_off, lml_of_run
from lml.runs.names import image_name
from lml.runs.records import read_config
from lml.schema import Cell, Manifest, RunConfig, Score, SweepFile, Timing, find_problem
from lml.seals import canonical, sealed, why_not_sealed

Say = Callable[[str], None]  # is called with a line about a file that cannot be used


@dataclass(frozen=True)
class Result:
    """One number of one finished run, and all that tables need to know about it."""

    run: str  # name of its folder
    model: str
    model_sha256: str  # 10 digits, over the model's settings, its weights and the prompts
    size: str  # of the images, "32x32"
    solver: str
    solver_options: str  # JSON
    grid: str
    lml: str  # JSON; {"rank":0} when it is off
    nfe: int
    seed: int
    num_images: int
    dtype: str
    metric: str  # "fd_cifar", "convergence/rmse", "timing/network"
    value: float
    protocol: str  # JSON
    steps: str  # JSON: {"timestep": […], "value": […]}, if the metric has values at each step
    warning: str
    images_per_second: float


def is_timing(metric: str) -> bool:
    """Whether the metric comes from timing.json."""
    return metric.startswith("timing/")


# --- run folders -------------------------------------------------------------------------------


def collect(folder: Path, say: Say, evaluations: Evaluations | None = None) -> list[Result]:
    """Every number of every complete run in the folders directly under `folder`, as `read_run`."""
    runs = sorted(path.parent for path in folder.glob("*/manifest.json"))
    return [result for run in runs for result in read_run(run, say, evaluations)]


def read_run(run: Path, say: Say, evaluations: Evaluations | None = None) -> list[Result]:
    """Every number of the run in the folder `run`; none of an incomplete one.

    Files that cannot be read, or were edited after they were written, are left out; `say` is
    called for each. UserError for scores in `evaluations` that are not those of the run.
    """
    manifest = _read(run / "manifest.json", say, Manifest)
    if not manifest.get("complete"):
        return []
    try:
        if file_hash(run / "config.yaml") != manifest["config_sha256"]:
            say(f"{run / 'config.yaml'}: was edited after the run; the run is not used")
            return []
        setting = _setting(run, read_config(run, RunConfig))
    except (OSError, UserError) as error:
        say(f"{first_line(error)}; the run is not used")
        return []
    sha256 = manifest["settings_sha256"]
    timing = _read(run / "timing.json", say, Timing)
    if timing and (reason := why_not_sealed(timing, sha256, "timing")):
        say(f"{run / 'timing.json'}: {reason}; not used")
        timing = {}
    values = list(_timing(timing, say, run / "timing.json"))
    setting["images_per_second"] = timing.get("images_per_second", math.nan)
    for name, entry in _read(run / "metrics.json", say).items():
        if isinstance(entry, dict) and (reason := why_not_sealed(entry, sha256, name)):
            say(f"{run / 'metrics.json'}: {name} {reason}; not used")
            continue
        if problem := find_problem(Score, entry, name):
            say(f"{run / 'metrics.json'}: {name} is broken; not used ({problem})")
            continue
        values += _parts(name, entry)
    if evaluations is not None:
        scores = evaluations.scores(run, manifest, say)
        for name, entry in compbench.as_metrics(scores).items():
            values += _parts(name, entry)
    return [Result(**setting, **value) for value in values]


def _read(path: Path, say: Say, schema: Any = None) -> dict[str, Any]:
    """The JSON object in `path`; {} if there is no file, or if it is broken (then with `say`)."""
    try:
        return read_object(path, schema)
    except FileNotFoundError:
        return {}
    except UserError as error:
        say(f"{path}: broken; not used ({_reason(path, error)})")
        return {}


def _reason(path: Path, error: UserError) -> str:
    """What is wrong with a file, without its name."""
    return str(error).removeprefix(f"{path}: ")


def _setting(run: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    settings, lml = config["settings"], lml_of_run(config)
    model = {key: settings.get(key) for key in ("model", "prompts")}
    solver = {key: config["solver"].get(key) or {} for key in ("scheduler", "step")}
    return {
        "run": run.name,
        "model": config["model"]["name"],
        "model_sha256": hashlib.sha256(canonical(model).encode()).hexdigest()[:10],
        "size": _size(run, config["num_images"]),
        "solver": config["solver"]["name"],
        "solver_options": canonical(solver),
        "grid": config["grid"].get("name", "default"),
        "lml": canonical({"rank": 0} if is_off(lml) else lml),
        **{key: config[key] for key in ("nfe", "seed", "num_images", "dtype")},
    }


def _size(run: Path, num_images: int) -> str:
    try:
        with open_image(run / "images" / image_name(0, num_images)) as image:
            return f"{image.width}x{image.height}"
    except (OSError, ValueError):  # a run's images may have been deleted
        return ""


def _parts(name: str, entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    protocol = {key: value for key, value in entry["protocol"].items() if key != "images"}
    shared = {"protocol": canonical(protocol), "warning": str(entry.get("warning", ""))}
    values = entry["value"] if isinstance(entry["value"], dict) else {"": entry["value"]}
    steps = dict(entry.get("steps", {}))
    timesteps = steps.pop("timestep", [])
    along = {
        part: canonical({"timestep": timesteps, "value": numbers})
        for part, numbers in steps.items()
    }
    return [
        {
            "metric": "/".join(filter(None, (name, part))),
            "value": float(value),
            "steps": along.get(part, ""),
            **shared,
        }
        for part, value in values.items()
    ]


def _timing(timing: Mapping[str, Any], say: Say, path: Path) -> Iterator[dict[str, Any]]:
    """Milliseconds per image and evaluation, and their ratios."""
    if not timing:
        return
    try:
        evaluations = timing["images"] * timing["evaluations_per_image"]
        parts = ("network", "correction", "solver")
        network, correction, solver = (
            1000 * timing["seconds"][part] / evaluations for part in parts
        )
        values = {
            "network": network,
            "correction": correction,
            "solver": solver,
            "scheduler": correction + solver,  # the whole step without the network
            "correction_share": correction / network,
            "correction_to_solver": correction / solver,
            "scheduler_share": (correction + solver) / network,
        }
        protocol = canonical({key: timing[key] for key in ("device", "threads", "processes")})
    except (TypeError, KeyError, ZeroDivisionError):
        say(f"{path}: broken; not used")
        return
    for name, value in values.items():
        yield {
            "metric": f"timing/{name}",
            "value": float(value),
            "protocol": protocol,
            "steps": "",
            "warning": "",
        }


def read_sweep(path: Path, say: Say) -> tuple[list[str], list[Cell]]:
    """The commands that make the study, and its cells, from sweep.yaml; empty without the file."""
    if not path.exists():
        return [], []
    try:
        # OmegaConf is not used: it takes some names of runs for numbers, such as 12345e6789
        sweep = read_object(path, SweepFile)
    except UserError as error:
        reason = _reason(path, error)
        say(f"{path}: broken; not used, so that no cell is known to be missing ({reason})")
        return [], []
    keys = [field.name for field in fields(Cell)]
    cells = [Cell(**{key: cell[key] for key in keys}) for cell in sweep["cells"]]
    return sweep["commands"], cells


# --- results.csv -------------------------------------------------------------------------------


def to_csv(results: Sequence[Result]) -> str:
    """One line for each result, sealed."""
    buffer = io.StringIO()
    columns = [*(field.name for field in fields(Result)), "seal"]
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    for result in results:
        writer.writerow(sealed({key: str(value) for key, value in asdict(result).items()}))
    return buffer.getvalue()


def from_csv(path: Path, found: Sequence[Result], say: Say) -> list[Result]:
    """The rows of an older results.csv with valid seals; `say` is called for the others.

    It is not called for a row without a seal if its run is among the `found` ones.
    """
    kinds = {"int": int, "float": float}
    columns = {field.name: kinds.get(field.type, str) for field in fields(Result)}
    results, older, runs = [], 0, {result.run for result in found}
    try:
        with io.TextIOWrapper(open_regular(path), encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            for row in reader:
                if set(reader.fieldnames) != {*columns, "seal"}:
                    older += row.get("run") not in runs
                elif reason := why_not_sealed(row):
                    say(f"{path}: line {reader.line_num} {reason}; not used")
                else:
                    results.append(Result(**{k: kind(row[k]) for k, kind in columns.items()}))
    except FileNotFoundError:
        return []
    except (OSError, ValueError, csv.Error):
        say(f"{path}: broken; not used")
        return []
    if older:
        say(f"{path}: {older} rows with other columns, of an older version; not used")
    return results


def check_kept(path: Path, key: str) -> None:
    """UserError, beginning with `key`, if `path` exists and is no results.csv of any version.

    Writing to it would destroy its content.
    """
    try:
        with io.TextIOWrapper(open_regular(path), encoding="utf-8", newline="") as file:
            columns = next(csv.reader(file), [])
    except FileNotFoundError:
        return
    except (OSError, ValueError, csv.Error):
        columns = []
    if not {"run", "metric", "value"} <= set(columns):
        raise UserError(f"{key}: {path.name} in it is no file of results; mend it, or move it away")


def merge(found: Sequence[Result], older: Sequence[Result], runs: Path) -> list[Result]:
    """`found`, and the older results whose run has no folder under `runs` any more."""
    kept = [result for result in older if not (runs / result.run).is_dir()]
    return sorted([*found, *kept], key=lambda result: (result.run, result.metric))


def choose(results: Sequence[Result], names: Sequence[str] | None) -> list[str]:
    """The metrics to show: those in `names` (or that begin with one), or all that were measured.

    "All" includes times only if there is nothing else. UserError for a name that no run has.
    """
    known = sorted({result.metric for result in results})
    if names is None:
        return [name for name in known if not is_timing(name)] or known
    chosen = []
    for name in [names] if isinstance(names, str) else names:
        fitting = [metric for metric in known if name in (metric, metric.split("/")[0])]
        if not fitting:
            raise UserError(f"show={name}: in none of the runs; nearest: {nearest(name, known)}")
        chosen += fitting
    return list(dict.fromkeys(chosen))
