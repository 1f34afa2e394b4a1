"""Figures: quality against evaluations and step by step, maps of damping and rank, strips."""

from __future__ import annotations

import io
import itertools
import json
import math
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator
from PIL import Image

from lml.data.images import read
from lml.report import labels
from lml.report.labels import CALIBRATIONS, DEFAULT, OFF, PUBLISHED
from lml.report.results import Result
from lml.report.tables import Entry, Group, Row, Table, describe, order, row_of, varying

OTHERS = 12  # the most rows of settings without a look that are drawn
MOST = 6  # the most lines of a legend
PANELS = 32
WIDTH = 10.6  # the most inches: 1,590 pixels
COLUMNS = 5  # of panels that do not form a table
DPI = 150
STRIP_IMAGES = 8
LARGEST = 128  # pixels; a strip shrinks larger images to this size and doubles the others
LIMIT = 0.5  # the change where a map's colours end


class Look(NamedTuple):
    """The look of a line. In grey print, its dashes and marker still tell it from others."""

    color: str
    linestyle: str | tuple
    marker: str


# The colours are Okabe and Ito's, which colour-blind people can tell apart.
LOOKS = {
    OFF: Look("#000000", "--", "o"),
    DEFAULT: Look("#0072B2", "-", "s"),
    PUBLISHED: Look("#CC79A7", ":", "X"),
}
LOOKS |= dict(
    zip(CALIBRATIONS, [Look("#D55E00", "-", "^"), Look("#009E73", "-.", "v")], strict=True)
)
OTHER_LOOKS = [  # for other settings, in their order
    Look("#E69F00", "-.", "D"),
    Look("#56B4E9", (0, (5, 1)), "P"),
    Look("#882255", (0, (3, 1, 1, 1, 1, 1)), "p"),
    Look("#44AA99", (0, (1, 1)), "*"),
    *(LOOKS[label] for label in (PUBLISHED, *CALIBRATIONS)),
]
BEST = {"color": "#BBBBBB", "linewidth": 4, "solid_capstyle": "round", "zorder": 1}
BEST_LABEL = "best of all solvers, LML off"
THIS = "LML with the change in the title"
Setting = str  # a setting of LML, as in the legend


def encode(drawn: Figure) -> dict[str, bytes]:
    """The figure as PNG and SVG, with the same bytes each time."""
    made = {}
    # otherwise matplotlib puts random names and the date into an SVG
    with matplotlib.rc_context({"svg.hashsalt": "lml"}):
        for suffix, metadata in {"png": {"Software": None}, "svg": {"Date": None}}.items():
            drawn.savefig(buffer := io.BytesIO(), format=suffix, dpi=drawn.dpi, metadata=metadata)
            made[suffix] = buffer.getvalue()
    pictures = [image.get_array() for axes in drawn.axes for image in axes.images]
    if not any(picture.ndim == 3 for picture in pictures):  # lines and flat areas, no photographs
        made["png"] = _small(made["png"])
    return made


def _small(png: bytes) -> bytes:
    """The picture in 256 colours, with a third of the bytes."""
    with Image.open(io.BytesIO(png)) as image:
        median = image.convert("RGB").quantize(256, Image.Quantize.MEDIANCUT, dither=0)
    median.save(buffer := io.BytesIO(), format="png", optimize=True)
    return buffer.getvalue()


# --- small multiples ---------------------------------------------------------------------------


@dataclass
class Panel:
    """One panel of a figure: its place, its title, and the rows in it."""

    line: tuple  # equal for all panels in one line
    column: tuple
    title: list[str]
    rows: dict[Setting, Row] = field(default_factory=dict)


def worth_drawing(rows: Sequence[Row]) -> list[Row]:
    """The rows that a reader can tell apart: the presets of LML, and a few other settings.

    It is empty if there are too many other settings and only the base would be left.
    """
    known = [row for row in rows if labels.version_of(row.lml)[0] in LOOKS]
    settings = {row.lml for row in rows} - {row.lml for row in known}
    if len(rows) - len(known) <= OTHERS and len(settings) <= OTHERS:
        return list(rows)
    return known if any(row.lml != OFF for row in known) else []


def looks(settings: Iterable[str]) -> dict[Setting, Look]:
    """The look for each of LML's labels, in the order of a legend.

    It is the look of its preset, for any version of the method, or one of the other looks.
    """
    known = sorted(set(settings), key=lambda label: labels.order(labels.version_of(label)[0]))
    found, spare = {}, iter(OTHER_LOOKS)
    for label in known:
        plain, _ = labels.version_of(label)
        look = LOOKS.get(plain)
        if look is None or look in found.values():  # a preset in two versions
            look = next(look for look in spare if look not in found.values())
        found[label] = look
    return found


def _panels(rows: Sequence[Row], spare: int) -> tuple[list[Panel], dict[Setting, Look]]:
    """A panel for each solver and grid, with a line for each setting; and the looks of the legend.

    If there are too many settings, each setting has its own panel. If there are still too many,
    there are no panels. The legend keeps `spare` lines free.
    """
    names = _names(rows)
    settings = {row.lml for row in rows}
    panels: dict[tuple, Panel] = {}
    if len(settings) + spare <= MOST:
        for row in rows:
            place = row._replace(lml="")
            panel = Panel((row.group, row.grid), (row.solver,), names[place])
            panels.setdefault(place, panel).rows[row.lml] = row
        return list(panels.values()), looks(settings)
    presets = {label for label in settings if labels.version_of(label)[0] in LOOKS}
    found = looks(presets)
    if len(presets) + 1 + spare > MOST:
        return [], {}
    for row in rows:
        if row.lml not in presets:
            title = [*names[row._replace(lml="")], labels.lml_name(labels.version_of(row.lml)[0])]
            place = (row[:3],), labels.order(row.lml)
            panel = panels[row] = Panel(*place, title, {THIS: row})
            for label in found:
                if (preset := row._replace(lml=label)) in rows:
                    panel.rows[label] = preset
    found[THIS] = OTHER_LOOKS[0]
    return list(panels.values()) if len(panels) <= PANELS else [], found


def _names(rows: Iterable[Row]) -> dict[Row, list[str]]:
    """The names of solver, grid and group, by the row without LML.

    The grid is named only if there are several: see `_shared_grid`.
    """
    places = list(dict.fromkeys(row._replace(lml="") for row in rows))
    keys = varying(list(dict.fromkeys(row.group for row in places)))
    grids, several = {row.grid for row in places}, {r.solver for r in places if r.grid != "default"}
    found = {}
    for row in places:
        grid = len(grids) > 1 and (row.grid != "default" or row.solver in several)
        parts = [labels.solver_name(row.solver), labels.grid_name(row.grid) if grid else ""]
        for key, text in zip(keys, describe(row.group, keys), strict=True):
            parts.append(labels.MODELS.get(text, text) if key == "model" else text)
        found[row] = list(filter(None, parts))
    return found


def _shared_grid(rows: Iterable[Row]) -> str:
    """ ", trailing grid" if all rows have this grid and it is not the default; otherwise ""."""
    grids = {row.grid for row in rows}
    return f", {labels.grid_name(*grids)} grid" if len(grids) == 1 and grids != {"default"} else ""


def _axes(panels: Sequence[Panel], height: float = 1.5) -> tuple[Figure, list[Axes]]:
    """A figure with axes for each panel, all with one scale, and room for the legend above.

    The panels form a table if that is nearly full; otherwise they follow one another.
    """
    lines = list(dict.fromkeys(panel.line for panel in panels))
    columns = sorted({panel.column for panel in panels})
    full = len(panels) >= 0.75 * len(lines) * len(columns)
    if full and len(lines) > 1 and 1 < len(columns) <= COLUMNS + 1:
        places = [(lines.index(p.line), columns.index(p.column)) for p in panels]
    else:
        rows = math.ceil(len(panels) / COLUMNS)
        places = [divmod(k, math.ceil(len(panels) / rows)) for k in range(len(panels))]
    down, across = (max(place) + 1 for place in zip(*places, strict=True))
    width = min(WIDTH, 0.8 + 2.6 * across)
    width = max(width, 5.0)
    size = (width, max(3.2, 1.0 + (height + 0.45) * down))
    drawn = Figure(figsize=size, dpi=DPI, layout="constrained")
    drawn.get_layout_engine().set(w_pad=0.04, h_pad=0.04)
    grid = drawn.add_gridspec(down, across)
    letters = int((width - 0.8) / across / 0.068)
    in_one_line = all(len(", ".join(panel.title)) <= letters for panel in panels)
    # if some panels are beside a gap, all have numbers, so that all have the same size
    left = any(column and (line, column - 1) not in places for line, column in places)
    bottom = any(line < down - 1 and (line + 1, column) not in places for line, column in places)
    made: list[Axes] = []
    for panel, (line, column) in zip(panels, places, strict=True):
        first = made[0] if made else None
        axes = drawn.add_subplot(grid[line, column], sharex=first, sharey=first)
        parts = [panel.title[0], ", ".join(panel.title[1:])]
        parts = [", ".join(panel.title)] if in_one_line else parts
        title = [text for part in parts for text in textwrap.wrap(part, letters)]
        axes.set_title("\n".join(title), fontsize=8.5)
        axes.tick_params(
            labelsize=8, labelbottom=bottom or line == down - 1, labelleft=left or not column
        )
        axes.grid(alpha=0.25, linewidth=0.6)
        made.append(axes)
    return drawn, made


def _size(setting: Setting, factor: float = 1.0) -> dict[str, float]:
    """The sizes of a line. LML off is thin, so that it does not hide other lines."""
    width, marker = (1.1, 2.5) if setting == OFF else (1.6, 4.5)
    return {"linewidth": width * factor, "markersize": marker * factor}


def _finish(
    drawn: Figure, table: Table, xlabel: str, found: Mapping[Setting, Look], best: bool
) -> Figure:
    """Add the legend and the names of the axes."""
    handles = {}
    for label, look in found.items():
        name = label if label == THIS else f"LML {labels.lml_name(label)}"
        handles[name] = Line2D([], [], **look._asdict(), **_size(label))
    if best:
        handles[BEST_LABEL] = Line2D([], [], **BEST)
    longest = max(len(label) for label in handles)
    across = max(1, int(drawn.get_figwidth() / (0.7 + 0.065 * longest)))
    across = math.ceil(len(handles) / math.ceil(len(handles) / across))
    drawn.legend(
        handles.values(),
        handles,
        loc="outside upper center",
        ncols=across,
        fontsize=8.5,
        handlelength=3.2,
        frameon=False,
    )
    drawn.supxlabel(xlabel, fontsize=9.5)
    name = f"{labels.metric_name(table.metric)} {'↑' if table.higher else '↓'}"
    letters = int((drawn.get_figheight() - 1.0) / 0.075)
    drawn.supylabel("\n".join(textwrap.wrap(name, letters)), fontsize=9.5)
    return drawn


SUBS = [
    (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9),
    (1, 1.5, 2, 3, 4, 5, 7),
    (1, 2, 3, 5),
    (1, 2, 5),
    (1, 3),
    (1,),
]


def _y_scale(axes: Axes, values: Sequence[float]) -> None:
    """Make the axis logarithmic, with readable ticks, if the values are positive and far apart."""
    low, high = min(values), max(values)
    if low <= 0 or high < 1.5 * low:
        return
    axes.set_yscale("log")
    margin = (high / low) ** 0.05
    axes.set_ylim(low / margin, high * margin)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for subs, step in [*((subs, 1) for subs in SUBS), ((1,), 2), ((1,), 4)]:
        every = [float(f"{sub}e{k}") for k in decades if k % step == 0 for sub in subs]
        ticks = [tick for tick in every if low / margin <= tick <= high * margin]
        if len(ticks) <= 6:
            break
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.yaxis.set_minor_locator(NullLocator())


def _x_ticks(axes: Axes, nfes: Sequence[int], width: float) -> None:
    """A tick at each number of evaluations, with a number if there is room in `width` inches."""
    axes.set_xscale("log")
    margin = (nfes[-1] / nfes[0]) ** 0.06
    axes.set_xlim(nfes[0] / margin, nfes[-1] * margin)
    span, last, shown = math.log(nfes[-1] / nfes[0] * margin**2), -math.inf, []
    for nfe in nfes:
        place = math.log(nfe) / span * width
        is_free = place - last > 0.1 + 0.04 * len(str(nfe))
        last = place if is_free else last
        shown.append(str(nfe) if is_free else "")
    axes.set_xticks(nfes, shown)
    axes.xaxis.set_minor_locator(NullLocator())


def curves(table: Table) -> Figure | None:
    """Quality against evaluations: a panel for each solver and grid, a line for each LML setting.

    The grey line is the best of all solvers without LML in the same group. None for fewer than two
    numbers of evaluations, or for too many settings of LML.
    """
    known = {
        row: {nfe: entry for nfe, entry in sorted(entries.items()) if math.isfinite(entry.mean)}
        for row, entries in table.rows.items()
    }
    known = {row: known[row] for row in worth_drawing([row for row in known if known[row]])}
    nfes = sorted({nfe for entries in known.values() for nfe in entries})
    if len(nfes) < 2:
        return None
    best = _best_bases(table, nfes)
    panels, found = _panels(list(known), len(best) > 0)
    if not panels:
        return None
    drawn, made = _axes(panels)
    values = [value for line in best.values() for value in line.values()]
    for axes, panel in zip(made, panels, strict=True):
        (group,) = {row.group for row in panel.rows.values()}
        if group in best:
            axes.plot(list(best[group]), list(best[group].values()), **BEST)
        # LML off is drawn last: without a gain, other lines would hide it
        for setting, look in reversed(found.items()):
            if (row := panel.rows.get(setting)) is None:
                continue
            x, means, stds = zip(
                *((nfe, e.mean, np.nan_to_num(e.std)) for nfe, e in known[row].items()), strict=True
            )
            low, high = np.subtract(means, stds), np.add(means, stds)
            axes.plot(x, means, **look._asdict(), **_size(setting))
            axes.fill_between(x, low, high, color=look.color, alpha=0.2, linewidth=0)
            values += [*means, *high, *low[(low > 0) | (np.array(means) <= 0)]]
    _y_scale(made[0], values)
    across = len({axes.get_subplotspec().colspan.start for axes in made})
    _x_ticks(made[0], nfes, (drawn.get_figwidth() - 0.8) / across - 0.2)
    xlabel = f"network evaluations{_shared_grid(known)}"
    return _finish(drawn, table, xlabel, found, bool(best))


def _best_bases(table: Table, nfes: Sequence[int]) -> dict[Group, dict[int, float]]:
    """For each group with several solvers or grids without LML: its best means by evaluations."""
    found: dict[Group, dict[int, float]] = {}
    for group in table.groups:
        bases = [row for row in table.rows if row.group == group and row.lml == OFF]
        if len(bases) > 1:
            best = {nfe: table.best(bases, nfe) for nfe in nfes}
            found[group] = {n: table.rows[row][n].mean for n, row in best.items() if row}
    return {group: line for group, line in found.items() if line}


def steps(table: Table, results: Sequence[Result]) -> Figure | None:
    """The metric at each step, as the mean over seeds.

    There is a line of panels for each solver and grid, and a column for each number of evaluations.
    If both damping and rank vary, there is a column for each rank, and a line for each damping.
    None for a metric without values at each step.
    """
    runs = defaultdict(lambda: defaultdict(list))
    searched = {}  # rank and damping by row
    for result in results:
        if result.metric == table.metric and result.steps:
            row, lml = row_of(result), json.loads(result.lml)
            runs[row][result.nfe].append(json.loads(result.steps))
            searched[row] = (lml["rank"], lml.get("damping"))
    nfes = sorted({nfe for columns in runs.values() for nfe in columns})
    rows = [row for row in table.rows if row in runs]
    panels, found = _step_panels(rows, searched)
    places = [
        (nfe, panel)
        for panel in panels
        for nfe in nfes
        if any(nfe in runs[row] for row in panel.rows.values())
    ]
    if not places:
        return None
    several = [
        Panel((p.line, p.column), (nfe,), [f"{p.title[0]}, NFE {nfe}", *p.title[1:]])
        for nfe, p in places
    ]
    drawn, made = _axes(several if len(nfes) > 1 else panels, height=1.2)
    values = []
    for axes, (nfe, panel) in zip(made, places, strict=True):
        for setting, look in reversed(found.items()):
            row = panel.rows.get(setting)
            # null, for a step without a number, becomes nan
            curves = [np.array(run["value"], dtype=float) for run in runs[row][nfe]] if row else []
            if curves:
                mean = np.mean(curves, axis=0)
                x = runs[row][nfe][0]["timestep"]
                axes.plot(x, mean, **look._asdict(), **_size(setting, 0.8))
                values += [*mean[np.isfinite(mean)]]
    _y_scale(made[0], values)
    made[0].invert_xaxis()  # a trajectory begins with noise
    note = "NFE: network evaluations" if len(nfes) > 1 else f"{nfes[0]} network evaluations"
    xlabel = f"timestep ({note}{_shared_grid(rows)})"
    return _finish(drawn, table, xlabel, found, best=False)


def _step_panels(
    rows: Sequence[Row], searched: Mapping[Row, tuple[int, object]]
) -> tuple[list[Panel], dict[Setting, Look]]:
    """As `_panels`, but a panel for each rank and a line for each damping if only these differ."""
    dampings = {damping for _, damping in searched.values() if isinstance(damping, (int, float))}
    places = {(row._replace(lml=""), *searched[row]): row for row in rows}
    is_search = all(rank and damping in dampings for _, rank, damping in places)
    few = len({row.lml for row in rows}) <= MOST
    if few or not is_search or len(places) < len(rows) or len(dampings) > MOST:
        return _panels(worth_drawing(rows), 0)
    names, panels = _names(rows), {}
    for (place, rank, damping), row in places.items():
        panel = Panel((place,), (rank,), [*names[place], f"rank {rank}"])
        panels.setdefault((place, rank), panel).rows[f"damping={damping:g}"] = row
    made = sorted(panels.values(), key=lambda panel: (order(panel.line[0]), panel.column))
    return made, looks(f"damping={damping:g}" for damping in dampings)


# --- maps --------------------------------------------------------------------------------------


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
    names = _names(row for row, _ in panels)
    widths = [0.6 + 0.75 * len(dampings[nfe]) for nfe in nfes]
    if 0.6 + sum(widths) > WIDTH:  # then one column
        widths = [max(widths)]
    down = len(panels) * len(nfes) // len(widths)
    size = (min(WIDTH, max(5.0, 0.6 + sum(widths))), 0.5 + down * (0.8 + 0.45 * len(ranks)))
    drawn = Figure(figsize=size, dpi=DPI, layout="constrained")
    grid = drawn.subplots(down, len(widths), squeeze=False, width_ratios=widths)
    grid = grid.reshape(len(panels), len(nfes))
    lmls = [json.loads(lml) for _, lml in panels]
    differing = [key for key in lmls[0] if len({str(lml.get(key)) for lml in lmls}) > 1]
    for (row, _), lml, panel, line in zip(panels, lmls, panels.values(), grid, strict=True):
        others = [labels.lml_name(f"{key}={lml.get(key)}") for key in differing]
        title = ", ".join([*names[row._replace(lml="")], *others]) + _shared_grid(names)
        for nfe, axes in zip(nfes, line, strict=True):
            values = {place: Entry(seeds, row.group.images) for place, seeds in panel[nfe].items()}
            base = table.rows.get(row, {}).get(nfe)
            _map(axes, values, base, ranks, sorted(dampings[nfe]), table.higher)
            letters = int(axes.get_position().width * size[0] / 0.068)
            wrapped = textwrap.wrap(f"{title}, {nfe} evaluations", letters)
            axes.set_title("\n".join(wrapped), fontsize=8.5)
    what = labels.metric_name(table.metric)
    better = "↑" if table.higher else "↓"
    gain = ", and its change to LML off" if any(row in table.rows for row, _ in panels) else ""
    head = textwrap.wrap(f"{what} {better} by damping and rank{gain}", int(size[0] * 13))
    drawn.suptitle("\n".join(head), fontsize=9.5)
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
            axes.text(k, i, "–", ha="center", va="center", fontsize=8)
            continue
        gain = entry.mean / base.mean - 1 if relative else None
        picture[i, k] = entry.mean if gain is None else gain
        text = f"{entry.mean:.3g}" + ("" if gain is None else f"\n{100 * gain:+.0f} %")
        axes.text(k, i, text, ha="center", va="center", fontsize=7.5)
    # light colours, on which black numbers can be read
    colors = "cividis" if not relative else "RdBu" if higher else "RdBu_r"
    colors = matplotlib.colormaps[colors].with_extremes(bad="0.8")
    if relative:
        axes.imshow(picture, cmap=colors, vmin=-LIMIT, vmax=LIMIT, alpha=0.7, aspect="auto")
    else:
        axes.imshow(picture, cmap=colors, alpha=0.5, aspect="auto")
    axes.set_xticks(range(len(dampings)), [f"{damping:g}" for damping in dampings], fontsize=8.5)
    axes.set_yticks(range(len(ranks)), [str(rank) for rank in ranks], fontsize=8.5)
    axes.set_xlabel("damping", fontsize=8.5)
    axes.set_ylabel("rank", fontsize=8.5)


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
        names = _names(rows)
        pictures = {
            f"{', '.join(names[row._replace(lml='')])}, LML {labels.lml_name(row.lml)}": _images(
                runs / seeds[seed][row] / "images"
            )
            for row in rows
        }
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
