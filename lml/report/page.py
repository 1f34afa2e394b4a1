"""A page to look at: charts, samples and tables of runs in one HTML file that needs no network."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lml.data.images import decode
from lml.errors import UserError
from lml.files import read_bytes, read_json
from lml.report import labels, tables, text
from lml.report.results import Result, Say, is_timing
from lml.report.tables import Group, Row, Table
from lml.runs.names import image_name
from lml.schema import Manifest

HERE = Path(__file__).parent
MARK = b"<!doctype html>\n<!-- a page of lml -->"  # what every page begins with
IMAGES = 64  # of a run, or as many as fit
COLUMNS = 8  # images side by side
DIGITS = 10  # of a run's hash, as in the name of its folder
LARGEST = 128  # pixels; larger images are shrunk to it
SPRITES = 17 * 10**6  # bytes of all of them in the page, so that it stays under 20 MB
RUNS = 200  # with more runs, the samples of one seed are shown


@dataclass(frozen=True)
class Sprite:
    """The first `count` images of a run in one picture, lossless, as a data URL."""

    count: int
    width: int
    height: int
    url: str


def render(
    title: str,
    results: Sequence[Result],
    shown: Sequence[tuple[Table, Sequence[Result]]],
    folders: Mapping[str, Path],
    commands: Sequence[str],
    notes: Sequence[str],
) -> str:
    """The page, the same bytes whenever it is made.

    `results` are all that is known, `shown` has the table of each metric that is to be seen and the
    results it was made of; a warning of theirs is a note, as `notes` are. `folders` are those of
    the runs that are still there, by the runs' names; a run without images in it has no samples.
    """
    warnings = {result.warning for _, several in shown for result in several} - {""}
    notes = [*(f"Warning: {warning}." for warning in sorted(warnings)), *notes]
    data = {
        "title": title,
        "metrics": [_metric(table, several) for table, several in shown],
        "samples": _samples(results, folders, notes.append),
        "hashes": _hashes(folders),
        "commands": list(commands),
    }
    data["notes"] = list(dict.fromkeys(notes))
    parts = {
        "title": html.escape(title).encode("ascii", "xmlcharrefreplace").decode(),
        "data": _json(data),
        "chart_style": (HERE / "uplot/uPlot.min.css").read_text().strip(),
        "chart_licence": (HERE / "uplot/LICENSE").read_text().strip(),
        "chart": (HERE / "uplot/uPlot.iife.min.js").read_text().strip(),
    }
    template = (HERE / "page.html").read_text()
    (script,) = re.findall(r"<script>(?!{)(.*?)</script>", template, re.S)
    # a browser runs these two scripts and nothing else, whatever is in the data
    hashes = [hashlib.sha256(code.encode()).digest() for code in (parts["chart"], script)]
    parts["scripts"] = " ".join(f"'sha256-{base64.b64encode(h).decode()}'" for h in hashes)
    return re.sub(r"{{(\w+)}}", lambda match: parts[match[1]], template)


def is_page(path: Path) -> bool:
    """Whether the file `path` was made by `render`. OSError when it cannot be read."""
    return read_bytes(path).startswith(MARK)


def _json(data: Any) -> str:
    """`data` as JSON that cannot end the script element it is in."""
    raw = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return re.sub("[<>&]", lambda letter: f"\\u{ord(letter[0]):04x}", raw)


def _hashes(folders: Mapping[str, Path]) -> dict[str, str]:
    """The hash of what determines a run's images, where the run is called otherwise."""
    hashes = {}
    for name, folder in sorted(folders.items()):
        sha256 = read_json(folder / "manifest.json", Manifest).get("settings_sha256", "")
        if name != sha256[:DIGITS]:
            hashes[name] = sha256[:DIGITS]
    return hashes


# --- numbers -----------------------------------------------------------------------------------


def _metric(table: Table, results: Sequence[Result]) -> dict[str, Any]:
    runs = defaultdict(list)
    for result in results:
        runs[tables.row_of(result), result.nfe].append([result.run, result.seed, result.value])
    keys = tables.varying(table.groups)
    # to be the cheapest is no merit
    bold = set() if is_timing(table.metric) else table.bold()
    rows = []
    for row, entries in table.rows.items():
        cells = {}
        for nfe, entry in entries.items():
            base = table.base(row, nfe)
            cells[nfe] = {
                "text": str(entry),
                "mean": _finite(entry.mean),
                "std": _finite(entry.std),
                "change": tables.change(entry, base) if base else "",
                "bold": (row, nfe) in bold,
                "runs": [[*run, _finite(value)] for *run, value in sorted(runs[row, nfe])],
            }
        group, paper = table.groups.index(row.group), text.in_the_paper(table, row)
        rows.append({"group": group, **_names(row), "cells": cells, "paper": paper})
    return {
        "name": _name(table.metric),
        "higher": table.higher,
        "columns": table.columns,
        "groups": [_group(group, keys) for group in table.groups],
        "rows": rows,
        "caption": text.caption(table),
        "notes": table.notes,
    }


def _name(metric: str) -> str:
    if not is_timing(metric):
        return labels.metric_name(metric)
    part = metric.removeprefix("timing/").replace("_", " ")
    return part if " " in part else f"{part}, ms per image and evaluation"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _names(row: Row) -> dict[str, str]:
    return {
        "solver": labels.solver_name(row.solver),
        "grid": labels.grid_name(row.grid),
        "lml": labels.lml_name(row.lml),
    }


def _group(group: Group, keys: Sequence[str]) -> str:
    values = dict(zip(keys, tables.describe(group, keys), strict=True))
    words = {"images": "{} images", "protocol": "protocol {}", "weights": "weights {}"}
    return ", ".join(words.get(key, "{}").format(value) for key, value in values.items() if value)


# --- samples -----------------------------------------------------------------------------------


def _samples(results: Sequence[Result], folders: Mapping[str, Path], say: Say) -> list[dict]:
    """Each run's settings and sprite, in the order of the tables."""
    runs = {result.run: result for result in results}
    # the size is known of runs whose images are still there
    runs = {run: result for run, result in runs.items() if run in folders and result.size}
    if len(runs) > RUNS:
        runs = _of_one_seed(runs)
    rows = {}
    for run, result in runs.items():
        row = tables.row_of(result)
        # what tells metrics apart tells no images apart
        rows[run] = row._replace(group=row.group._replace(protocol=""))
    order = sorted(
        runs, key=lambda run: (tables.order(rows[run]), runs[run].nfe, runs[run].seed, run)
    )
    sprites = _sprites({run: folders[run] for run in order}, say)
    keys = tables.varying([rows[run].group for run in sprites])
    return [
        {
            "run": run,
            **_names(rows[run]),
            "nfe": runs[run].nfe,
            "seed": runs[run].seed,
            # the same noise is the same seed and shape; the rest of the group is said beside it
            "noise": f"{runs[run].seed} {rows[run].group.size}",
            "group": _group(rows[run].group, keys),
            **vars(sprite),
        }
        for run, sprite in sprites.items()
    ]


def _of_one_seed(runs: Mapping[str, Result]) -> dict[str, Result]:
    """Those of the seed that most runs have, the lowest of several, of each model."""
    seeds = defaultdict(lambda: defaultdict(dict))
    for run, result in runs.items():
        seeds[result.model_sha256, result.size][result.seed][run] = result
    chosen = {}
    for several in seeds.values():
        chosen |= several[min(several, key=lambda seed: (-len(several[seed]), seed))]
    return chosen


def _sprites(folders: Mapping[str, Path], say: Say) -> dict[str, Sprite]:
    """A sprite of each run, of as many images as fit; `say` is told of runs that have none."""
    count = IMAGES
    while True:
        sprites, told, size = {}, [], 0
        for run, folder in folders.items():
            try:
                sprite = _sprite(_read(folder, count))
            except (OSError, ValueError, UserError) as error:
                told.append(f"Run {run} has no samples here: {error}.")
                continue
            size += len(sprite.url)
            if size > SPRITES:
                break
            sprites[run] = sprite
        if size <= SPRITES or count == 1:
            break
        done = len(sprites) + len(told) + 1
        fits = int(count * SPRITES / size * done / len(folders))
        fits -= fits % COLUMNS if fits > COLUMNS else 0  # no line that is not full
        count = max(1, min(fits, count - 1))
    if size > SPRITES:
        told.append(f"The samples of {len(folders) - len(sprites)} runs had no place in this page.")
    for note in told:
        say(note)
    return sprites


def _read(folder: Path, count: int) -> list[np.ndarray]:
    """The first images of a run, (H, W, 3). ValueError for one that is not the run's own."""
    manifest = read_json(folder / "manifest.json", Manifest)
    images = []
    for index in range(min(count, manifest.get("num_images", 0))):
        name = image_name(index, manifest["num_images"])
        data = read_bytes(folder / "images" / name)
        if hashlib.sha256(data).hexdigest() != manifest["images"].get(name):
            raise ValueError(f"{name} was edited after the run")
        image = Image.fromarray(decode(io.BytesIO(data), name).permute(1, 2, 0).numpy())
        image.thumbnail((LARGEST, LARGEST), Image.Resampling.BOX)
        images.append(np.asarray(image))
    if len({image.shape for image in images}) != 1:
        raise ValueError("no images of one size")
    return images


def _sprite(images: Sequence[np.ndarray]) -> Sprite:
    height, width, _ = images[0].shape
    columns = min(COLUMNS, len(images))
    lines = -(-len(images) // columns)
    # transparent where the last line has no image
    canvas = np.zeros((lines * height, columns * width, 4), np.uint8)
    for k, image in enumerate(images):
        line, column = divmod(k, columns)
        place = canvas[line * height :, column * width :][:height, :width]
        place[..., :3], place[..., 3] = image, 255
    picture = Image.fromarray(canvas)
    if len(images) == lines * columns:
        picture = picture.convert("RGB")
    picture.save(buffer := io.BytesIO(), format="WEBP", lossless=True, method=2)
    url = f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return Sprite(len(images), picture.width, picture.height, url)
