"""Figures: quality against evaluations and step by step, maps of damping and rank, strips."""

from __future__ import annotations

import io
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from PIL import Image

from lml.data.images import read
from lml.report.labels import CALIBRATIONS, DEFAULT, OFF, PUBLISHED
from lml.report.results import Result
from lml.report.tables import Entry, Group, Row, Table, describe, name, order, row_of, varying

OTHERS = 12  # the most rows of settings without a style that are drawn
MARKERS = "vD*p^hXP"  # one for each setting without a style
STYLES = {OFF: ("--", "o"), PUBLISHED: (":", "x"), DEFAULT: ("-", "s")}
STYLES |= dict(zip(CALIBRATIONS, [("-.", "^"), ("-.", "v")], strict=True))
TAB20 = matplotlib.colormaps["tab20"].colors
COLORS = TAB20[::2] + TAB20[1::2]  # matplotlib's ten colours, and a lighter one of each
STRIP_IMAGES = 8
LEGEND = {"fontsize": 7, "handlelength": 4, "loc": "outside right upper"}
LEGEND_LINE = 0.15  # inches
LARGEST = 128  # pixels; a strip shrinks larger images to this size and doubles the others
LIMIT = 0.5  # the change where a map's colours end


def encode(drawn: Figure) -> dict[str, bytes]:
    """The figure as PNG and SVG, with the same bytes each time."""
    made = {}
    # otherwise matplotlib puts random names and the date into an SVG
    with matplotlib.rc_context({"svg.hashsalt": "lml"}):
        for suffix, metadata in {"png": {"Software": None}, "svg": {"Date": None}}.items():
            drawn.savefig(buffer := io.BytesIO(), format=suffix, dpi=drawn.dpi, metadata=metadata)
            made[suffix] = buffer.getvalue()
    return made


def worth_drawing(rows: Sequence[Row]) -> list[Row]:
    """The rows that a reader can tell apart: the presets of LML, and a few other settings.

    It is empty if there are too many other settings and only the base would be left.
    """
    known = [row for row in rows if row.lml in STYLES]
    settings = {row.lml for row in rows} - set(STYLES)
    if len(rows) - len(known) <= OTHERS and len(settings) <= len(MARKERS):
        return list(rows)
    return known if any(row.lml != OFF for row in known) else []


def curves(table: Table) -> Figure | None:
    """Quality against evaluations: dashed without LML, solid at its default.

    None for fewer than two numbers of evaluations, or for too many settings of LML.
    """
    known = {
        row: {nfe: entry for nfe, entry in sorted(entries.items()) if math.isfinite(entry.mean)}
        for row, entries in table.rows.items()
    }
    known = {row: known[row] for row in worth_drawing([row for row in known if known[row]])}
    nfes = sorted({nfe for entries in known.values() for nfe in entries})
    if len(nfes) < 2:
        return None
    groups = list(dict.fromkeys(row.group for row in known))
    size = (2.5 + 4.5 * len(groups), max(4.5, LEGEND_LINE * len(known)))
    drawn = Figure(figsize=size, dpi=150, layout="constrained")
    panels = drawn.subplots(1, len(groups), squeeze=False)[0]
    # one colour for each solver or, with one solver, for each setting
    parts = slice(1, 3) if len({row[1:3] for row in known}) > 1 else slice(1, None)
    hues = list(dict.fromkeys(row[parts] for row in known))
    others = sorted({row.lml for row in known} - set(STYLES))
    styles = {**STYLES, **dict(zip(others, itertools.product(["-."], MARKERS), strict=False))}
    lines = {}
    for group, axes in zip(groups, panels, strict=True):
        for row, entries in known.items():
            if row.group == group:
                style, marker = styles[row.lml]
                bars = axes.errorbar(
                    list(entries),
                    [entry.mean for entry in entries.values()],
                    [np.nan_to_num(entry.std) for entry in entries.values()],
                    color=COLORS[hues.index(row[parts]) % len(COLORS)],
                    linestyle=style,
                    marker=marker,
                    markersize=4,
                    capsize=2,
                )
                lines[name(row)] = bars.lines[0]
        positive = all(e.mean > 0 for r in known if r.group == group for e in known[r].values())
        axes.set(xlabel="network evaluations", ylabel=table.metric, title=_title(group, groups))
        axes.set(xscale="log", yscale="log" if positive else "linear")
        axes.set_xticks(nfes, [str(nfe) for nfe in nfes])
        if positive:
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
            axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    drawn.legend(lines.values(), lines, **LEGEND)
    return drawn


def _title(group: Group, groups: Sequence[Group]) -> str:
    return ", ".join(describe(group, varying(groups)))


def steps(table: Table, results: Sequence[Result]) -> Figure | None:
    """The metric at each step, as the mean over seeds, with a panel for each number of evaluations.

    None for a metric without values at each step.
    """
    panels = defaultdict(lambda: defaultdict(list))
    for result in results:
        if result.metric == table.metric and result.steps:
            panels[result.nfe][row_of(result)].append(json.loads(result.steps))
    rows = worth_drawing([row for row in table.rows if any(row in p for p in panels.values())])
    if not rows:
        return None
    keys = varying(list(dict.fromkeys(row.group for row in rows)))
    drawn = Figure(figsize=(2.5 + 3.5 * len(panels), 3.5), dpi=150, layout="constrained")
    lines = {}
    axes = drawn.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for (nfe, panel), ax in zip(sorted(panels.items()), axes, strict=True):
        for k, row in enumerate(rows):
            # null, for a step without a number, becomes nan
            runs = [np.array(run["value"], dtype=float) for run in panel.get(row, [])]
            if runs:
                label = ", ".join([*describe(row.group, keys), name(row)])
                style, _ = STYLES.get(row.lml, ("-.", ""))
                x = panel[row][0]["timestep"]
                (lines[label],) = ax.plot(
                    x,
                    np.mean(runs, axis=0),
                    f"C{k % 10}",
                    linestyle=style,
                    marker=".",
                    markersize=4,
                )
        ax.set(xlabel="timestep", title=f"{nfe} evaluations")
        ax.invert_xaxis()  # a trajectory begins with noise
        ax.grid(alpha=0.3)
    axes[0].set_ylabel(table.metric)
    drawn.legend(lines.values(), lines, **LEGEND)
    return drawn


def maps(table: Table, results: Sequence[Result]) -> Figure | None:
    """The metric by damping and rank, in a grid of maps.

    Rows are the other settings, columns the numbers of evaluations. Colours show the change to the
    base, if that was run; blue is better. None unless both damping and rank vary.
    """
    panels = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    for result in results:
        lml = json.loads(result.lml)
        if result.metric != table.metric or not lml["rank"]:
            continue
        if not isinstance(lml["damping"], (int, float)):  # the default, or a list
            continue
        place = lml.pop("rank"), lml.pop("damping")
        key = (row_of(result)._replace(lml=OFF), json.dumps(lml, sort_keys=True))
        panels[key][result.nfe][place][result.seed] = result.value
    keys = sorted(
        filter(lambda key: _is_map(panels[key]), panels), key=lambda k: (order(k[0]), k[1])
    )
    panels = {key: panels[key] for key in keys}
    if not panels:
        return None
    ranks, dampings = set(), defaultdict(set)  # dampings by the number of evaluations
    for panel in panels.values():
        for nfe, values in panel.items():
            ranks |= {rank for rank, _ in values}
            dampings[nfe] |= {damping for _, damping in values}
    ranks, nfes = sorted(ranks), sorted(dampings)
    widths = [0.6 + 0.75 * len(dampings[nfe]) for nfe in nfes]
    size = (1.2 + sum(widths), len(panels) * (1 + 0.5 * len(ranks)))
    drawn = Figure(figsize=size, dpi=150, layout="constrained")
    grid = drawn.subplots(len(panels), len(nfes), squeeze=False, width_ratios=widths)
    groups = list(dict.fromkeys(row.group for row, _ in panels))
    lmls = [json.loads(lml) for _, lml in panels]
    differing = [key for key in lmls[0] if len({str(lml.get(key)) for lml in lmls}) > 1]
    for (row, _), lml, panel, line in zip(panels, lmls, panels.values(), grid, strict=True):
        others = [f"{key}={lml.get(key)}" for key in differing]
        setting = [_title(row.group, groups), name(row).removesuffix(", LML off"), *others]
        title = ", ".join(filter(None, setting))
        for nfe, axes in zip(nfes, line, strict=True):
            values = {place: Entry(seeds, row.group.images) for place, seeds in panel[nfe].items()}
            base = table.rows.get(row, {}).get(nfe)
            _map(axes, values, base, ranks, sorted(dampings[nfe]), table.higher)
            axes.set_title(f"{title}, {nfe} evaluations", fontsize=7)
    drawn.suptitle(f"{table.metric} by damping and rank", fontsize=9)
    return drawn


def _is_map(panel: Mapping[int, Mapping[tuple[int, float], object]]) -> bool:
    places = {place for values in panel.values() for place in values}
    return all(len(set(axis)) > 1 for axis in zip(*places, strict=True))


def _map(
    axes: matplotlib.axes.Axes,
    values: Mapping[tuple[int, float], Entry],
    base: Entry | None,
    ranks: Sequence[int],
    dampings: Sequence[float],
    higher: bool,
) -> None:
    picture = np.full((len(ranks), len(dampings)), np.nan)
    relative = base is not None and base.mean > 0
    for (i, rank), (k, damping) in itertools.product(enumerate(ranks), enumerate(dampings)):
        entry = values.get((rank, damping))
        if entry is None:
            axes.text(k, i, "–", ha="center", va="center", fontsize=6)
            continue
        gain = entry.mean / base.mean - 1 if relative else None
        picture[i, k] = entry.mean if gain is None else gain
        text = f"{entry.mean:.3g}" + ("" if gain is None else f"\n{100 * gain:+.0f} %")
        axes.text(k, i, text, ha="center", va="center", fontsize=6)
    # light colours, on which black numbers can be read
    colors = "cividis" if not relative else "RdBu" if higher else "RdBu_r"
    colors = matplotlib.colormaps[colors].with_extremes(bad="0.8")
    if relative:
        axes.imshow(picture, cmap=colors, vmin=-LIMIT, vmax=LIMIT, alpha=0.7, aspect="auto")
    else:
        axes.imshow(picture, cmap=colors, alpha=0.5, aspect="auto")
    axes.set_xticks(range(len(dampings)), [f"{damping:g}" for damping in dampings], fontsize=7)
    axes.set_yticks(range(len(ranks)), [str(rank) for rank in ranks], fontsize=7)
    axes.set_xlabel("damping", fontsize=7)
    axes.set_ylabel("rank", fontsize=7)


def strips(results: Sequence[Result], runs: Path) -> dict[str, Figure]:
    """Images from the same noise, one row for each setting; returns figures by file name.

    They are the first images of the runs under `runs` that still have them, with the lowest of the
    seeds that most settings share.
    """
    settings = defaultdict(lambda: defaultdict(dict))  # by model and evaluations, seed, row: run
    for result in results:
        if (runs / result.run / "images").is_dir():
            row = row_of(result)
            # images do not depend on the metric
            row = row._replace(group=row.group._replace(protocol=""))
            settings[row.group, result.nfe][result.seed][row] = result.run
    groups = list(dict.fromkeys(group for group, _ in settings))
    made = {}
    for (group, nfe), seeds in sorted(settings.items()):
        seed = min(seeds, key=lambda seed: (-len(seeds[seed]), seed))
        rows = worth_drawing(sorted(seeds[seed], key=order))
        pictures = {name(row): _images(runs / seeds[seed][row] / "images") for row in rows}
        pictures = {label: images for label, images in pictures.items() if images is not None}
        if len(pictures) > 1:
            parts = ["samples", *describe(group, varying(groups)), f"nfe{nfe}"]
            made["_".join(parts)] = strip(
                pictures, f"{nfe} evaluations, from the noise of seed {seed}"
            )
    return made


def _images(folder: Path) -> np.ndarray | None:
    """The first images side by side, (H, W, 3); None if they cannot be read."""
    files = sorted(file for file in folder.glob("*.png"))[:STRIP_IMAGES]
    try:
        images = [_resized(Image.fromarray(read(file).permute(1, 2, 0).numpy())) for file in files]
        return np.concatenate(
            [np.pad(i, ((0, 2), (0, 2), (0, 0)), constant_values=255) for i in images], axis=1
        )
    except (OSError, ValueError):
        return None


def _resized(image: Image.Image) -> np.ndarray:
    if max(image.size) <= LARGEST:
        return np.asarray(image).repeat(2, axis=0).repeat(2, axis=1)
    image.thumbnail((LARGEST, LARGEST), Image.Resampling.BOX)
    return np.asarray(image)


def strip(pictures: Mapping[str, np.ndarray], title: str) -> Figure:
    """Labelled pictures (H, W, 3) under one another, each pixel one pixel of the PNG."""
    dpi, head = 100, 20
    margin = 10 + 6 * max(map(len, pictures))
    width = margin + max(picture.shape[1] for picture in pictures.values())
    height = head + sum(picture.shape[0] for picture in pictures.values())
    drawn = Figure(figsize=(width / dpi, height / dpi), dpi=dpi)
    drawn.text(5 / width, 1 - 10 / height, title, fontsize=7, va="center")
    top = height - head
    for label, picture in pictures.items():
        h, w, _ = picture.shape
        axes = drawn.add_axes([margin / width, (top - h) / height, w / width, h / height])
        axes.imshow(picture, interpolation="none", aspect="auto")
        axes.set_axis_off()
        drawn.text(5 / width, (top - h / 2) / height, label, fontsize=7, va="center")
        top -= h
    return drawn
