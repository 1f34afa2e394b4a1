"""Figures: quality against evaluations and step by step, maps of damping and rank, strips."""

from __future__ import annotations

import io
import itertools
import json
import math
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from lml.report.labels import DEFAULT, OFF, PUBLISHED
from lml.report.results import Result
from lml.report.tables import Entry, Group, Row, Table, describe, order, row_of, varying

OTHERS = 12  # strips show other settings than those with a look if they are no more
MOST = 6  # lines of a legend
PANELS = 15  # at most, where each has a setting of its own
WIDTH = 10.6  # inches at most: 1,590 pixels
COLUMNS = 5  # of panels that make no table
DPI = 150
STRIP_IMAGES = 8
LARGEST = 128  # pixels; larger images are shrunk to it in a strip, the others doubled
LIMIT = 0.5  # the change where a map's colours end


class Look(NamedTuple):
    """Of a line: it is told by its dashes and marker, too, where it is printed in grey."""

    color: str
    linestyle: str | tuple
    marker: str


# The colours are Okabe and Ito's, which the colour-blind can tell.
LOOKS = {
    OFF: Look("#000000", "--", "o"),
    DEFAULT: Look("#0072B2", "-", "s"),
    PUBLISHED: Look("#CC79A7", ":", "X"),
}
CALIBRATED_LOOKS = {
    "calibrated": Look("#D55E00", "-", "^"),
    "calibrated (features)": Look("#009E73", "-.", "v"),
    "calibrated (timesteps)": Look("#332288", (0, (5, 1, 1, 1)), "<"),
    "calibrated (features, timesteps)": Look("#999933", (0, (2, 1)), ">"),
}
LOOKS |= CALIBRATED_LOOKS
OTHER_LOOKS = [  # of other settings, in their order
    Look("#E69F00", "-.", "D"),
    Look("#56B4E9", (0, (5, 1)), "P"),
    Look("#882255", (0, (3, 1, 1, 1, 1, 1)), "p"),
    Look("#44AA99", (0, (1, 1)), "*"),
    *(LOOKS[label] for label in (PUBLISHED, *CALIBRATED_LOOKS)),
]
BEST = {"color": "#BBBBBB", "linewidth": 4, "solid_capstyle": "round", "zorder": 1}
BEST_LABEL = "best of all solvers, LML off"
THIS = "LML with the change in the title"
Setting = str  # of LML, as the legend says it


def encode(drawn: Figure) -> dict[str, bytes]:
    """The figure as PNG and SVG, the same bytes whenever it is drawn."""
    made = {}
    # else matplotlib puts random names and the date into an SVG
    with matplotlib.rc_context({"svg.hashsalt": "lml"}):
        for suffix, metadata in {"png": {"Software": None}, "svg": {"Date": None}}.items():
            drawn.savefig(buffer := io.BytesIO(), format=suffix, dpi=drawn.dpi, metadata=metadata)
            made[suffix] = buffer.getvalue()
    pictures = [image.get_array() for axes in drawn.axes for image in axes.images]
    if not any(picture.ndim == 3 for picture in pictures):  # lines and flat areas, no photographs
        made["png"] = _small(made["png"])
    return made


def _small(png: bytes) -> bytes:
    """The same in 64 colours, a third of the bytes."""
    with Image.open(io.BytesIO(png)) as image:
        median = image.convert("RGB").quantize(64, Image.Quantize.MEDIANCUT, dither=0)
    median.save(buffer := io.BytesIO(), format="png", optimize=True)
    return buffer.getvalue()


# --- small multiples ---------------------------------------------------------------------------


@dataclass
class Panel:
    """One picture of several: where it stands, what it is called, and the rows in it."""

    line: tuple  # what panels of one line have in common
    column: tuple
    title: list[str]
    rows: dict[Setting, Row] = field(default_factory=dict)


def looks(settings: Iterable[str]) -> dict[Setting, Look]:
    """Of each of LML's labels: the look of its preset, whatever the method's version; or a spare.

    In the order of a legend.
    """
    found, spare = {}, iter(OTHER_LOOKS)
    for label in sorted(set(settings), key=labels.order):
        plain, _ = labels.version_of(label)
        look = LOOKS.get(plain)
        if look is None or look in found.values():  # the preset of two versions
            look = next(look for look in spare if look not in found.values())
        found[label] = look
    return found


def _panels(rows: Sequence[Row], spare: int) -> tuple[list[Panel], dict[Setting, Look]]:
    """A panel a solver and grid, with a line a setting; a panel a setting where these are too many.

    With the looks of the legend, which leave `spare` of its lines. If even those panels are too
    many, then of the presets alone; without panels if that leaves nothing but the base.
    """
    names = _names(rows)
    settings = {row.lml for row in rows}
    panels: dict[Row, Panel] = {}
    if len(settings) + spare <= MOST:
        for row in rows:
            place = row._replace(lml="")
            panel = Panel((row.group, row.grid), (row.solver,), names[place])
            panels.setdefault(place, panel).rows[row.lml] = row
        return list(panels.values()), looks(settings)
    presets = {label for label in settings if labels.version_of(label)[0] in LOOKS}
    changed = [row for row in rows if row.lml not in presets]
    if len(changed) > PANELS or len(presets) + 1 + spare > MOST:
        kept = presets if changed else LOOKS
        shown = [row for row in rows if row.lml in kept]
        return _panels(shown, spare) if any(row.lml != OFF for row in shown) else ([], {})
    one_version = len({labels.version_of(label)[1] for label in settings - {OFF}}) == 1
    for row in changed:
        setting = labels.version_of(row.lml)[0] if one_version else row.lml
        title = [*names[row._replace(lml="")], labels.lml_name(setting)]
        panels[row] = Panel((row[:3],), labels.order(row.lml), title, {THIS: row})
        beside = {label: row._replace(lml=label) for label in presets}
        panels[row].rows |= {label: other for label, other in beside.items() if other in rows}
    return list(panels.values()), {**looks(presets), THIS: OTHER_LOOKS[0]}


def _names(rows: Iterable[Row]) -> dict[Row, list[str]]:
    """What a solver, its grid and its group are called, by the row without LML.

    Only where the grid has to be told from another: see `_shared_grid`.
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
    """ ", trailing grid" where all have that and it is not the default; else nothing."""
    grids = {row.grid for row in rows}
    return f", {labels.grid_name(*grids)} grid" if len(grids) == 1 and grids != {"default"} else ""


def _axes(panels: Sequence[Panel], height: float = 1.5) -> tuple[Figure, list[Axes]]:
    """A figure with axes for each panel, all of one scale, and room for the legend above.

    They make a table where that is nearly full; else they follow one another.
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
    width = max(5.0, min(WIDTH, 0.8 + 2.6 * across))
    letters = int((width - 0.8) / across / 0.068)
    titles = [[", ".join(panel.title)] for panel in panels]
    if any(len(title) > letters for (title,) in titles):
        titles = [[panel.title[0], ", ".join(panel.title[1:])] for panel in panels]
    titles = [[line for part in title for line in textwrap.wrap(part, letters)] for title in titles]
    height += 0.17 + 0.14 * max(map(len, titles))
    size = (width, max(3.2, 1.0 + height * down))
    drawn = Figure(figsize=size, dpi=DPI, layout="constrained")
    drawn.get_layout_engine().set(w_pad=0.04, h_pad=0.04)
    grid = drawn.add_gridspec(down, across)
    # numbers at every panel where the edge has gaps: else the panels would not be even
    left = any((line, 0) not in places for line in range(down))
    bottom = any((down - 1, column) not in places for column in range(across))
    made: list[Axes] = []
    for title, (line, column) in zip(titles, places, strict=True):
        first = made[0] if made else None
        axes = drawn.add_subplot(grid[line, column], sharex=first, sharey=first)
        axes.set_title("\n".join(title), fontsize=8.5)
        axes.tick_params(
            labelsize=8, labelbottom=bottom or line == down - 1, labelleft=left or not column
        )
        axes.grid(alpha=0.25, linewidth=0.6)
        made.append(axes)
    return drawn, made


THIN = (THIS, OFF)  # lie above the others, and leave them to be seen where they are the same


def _from_below(found: Mapping[Setting, Look]) -> Iterator[tuple[Setting, Look]]:
    """In the order of drawing."""
    yield from ((setting, look) for setting, look in found.items() if setting not in THIN)
    yield from ((setting, found[setting]) for setting in THIN if setting in found)


def _size(setting: Setting, factor: float = 1.0) -> dict[str, float]:
    """Of a line."""
    width, marker = (1.1, 2.5) if setting in THIN else (1.6, 4.5)
    return {"linewidth": width * factor, "markersize": marker * factor}


def _finish(
    drawn: Figure, table: Table, xlabel: str, found: Mapping[Setting, Look], best: bool
) -> Figure:
    """The legend and what the axes are called."""
    handles = {}
    for label, look in found.items():
        name = label if label == THIS else f"LML {labels.lml_name(label)}"
        handles[name] = Line2D([], [], **look._asdict(), **_size(label))
    if best:
        handles[BEST_LABEL] = Line2D([], [], **BEST)
    across = len(handles)
    if sum(0.75 + 0.068 * len(label) for label in handles) > drawn.get_figwidth():
        across = max(1, int(drawn.get_figwidth() / (0.75 + 0.068 * max(map(len, handles)))))
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


# Ticks within a decade, from fine to coarse.
SUBS = [
    (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9),
    (1, 1.5, 2, 3, 4, 5, 7),
    (1, 2, 3, 5),
    (1, 2, 5),
    (1, 3),
    (1,),
]


def _y_scale(axes: Axes, values: Sequence[float]) -> None:
    """Logarithmic, with ticks that can be read, where the values are positive and far apart."""
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
    """A tick at each number of evaluations; numbers where there is room, in axes `width` inches."""
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
    """Quality against evaluations: a panel a solver and grid, a line a setting of LML.

    In grey the best of all solvers without LML, of the same group. None with less than two numbers
    of evaluations, and where LML's settings are too many to draw.
    """
    known = {
        row: {nfe: entry for nfe, entry in sorted(entries.items()) if math.isfinite(entry.mean)}
        for row, entries in table.rows.items()
    }
    known = {row: entries for row, entries in known.items() if entries}
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
        for setting, look in _from_below(found):
            if (row := panel.rows.get(setting)) is None:
                continue
            x, means, stds = zip(
                *((nfe, e.mean, np.nan_to_num(e.std)) for nfe, e in known[row].items()), strict=True
            )
            low, high = np.subtract(means, stds), np.add(means, stds)
            axes.plot(x, means, **look._asdict(), **_size(setting))
            axes.fill_between(x, low, high, color=look.color, alpha=0.15, linewidth=0)
            values += [*means, *high, *low[(low > 0) | (np.array(means) <= 0)]]
    _y_scale(made[0], values)
    across = len({axes.get_subplotspec().colspan.start for axes in made})
    _x_ticks(made[0], nfes, (drawn.get_figwidth() - 0.8) / across - 0.2)
    xlabel = f"network evaluations{_shared_grid(known)}"
    return _finish(drawn, table, xlabel, found, bool(best))


def _best_bases(table: Table, nfes: Sequence[int]) -> dict[Group, dict[int, float]]:
    """Of each group, the best mean without LML at each number that several rows have."""
    found: dict[Group, dict[int, float]] = {}
    for group in table.groups:
        bases = [row for row in table.rows if row.group == group and row.lml == OFF]
        several = [nfe for nfe in nfes if sum(nfe in table.rows[row] for row in bases) > 1]
        best = {nfe: table.best(bases, nfe) for nfe in several}
        found[group] = {n: table.rows[row][n].mean for n, row in best.items() if row}
    return {group: line for group, line in found.items() if line}


def steps(table: Table, results: Sequence[Result]) -> Figure | None:
    """What the metric is step by step, as the mean over seeds.

    A line of panels a solver and grid, a column a number of evaluations; where damping and rank
    both vary, a column a rank and a line a damping. None for a metric that does not say.
    """
    runs = defaultdict(lambda: defaultdict(list))
    searched = {}  # rank and damping of a row
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
        # a space that no line breaks at
        Panel((p.line, p.column), (nfe,), [*p.title, f"NFE\N{NO-BREAK SPACE}{nfe}"])
        for nfe, p in places
    ]
    drawn, made = _axes(several if len(nfes) > 1 else panels, height=1.2)
    values = []
    for axes, (nfe, panel) in zip(made, places, strict=True):
        for setting, look in _from_below(found):
            row = panel.rows.get(setting)
            # null, where a step has no number, is nan
            curves = [np.array(run["value"], dtype=float) for run in runs[row][nfe]] if row else []
            if curves:
                mean = np.mean(curves, axis=0)
                x = runs[row][nfe][0]["timestep"]
                axes.plot(x, mean, **look._asdict(), **_size(setting, 0.8))
                values += [*mean[np.isfinite(mean)]]
    _y_scale(made[0], values)
    made[0].invert_xaxis()  # a trajectory begins with noise
    note = "NFE: network evaluations" if len(nfes) > 1 else f"{nfes[0]} network evaluations"
    xlabel = f"timestep ({note}){_shared_grid(rows)}"
    return _finish(drawn, table, xlabel, found, best=False)


def _step_panels(
    rows: Sequence[Row], searched: Mapping[Row, tuple[int, object]]
) -> tuple[list[Panel], dict[Setting, Look]]:
    """As `_panels`; but a panel a rank and a line a damping, where rows differ in these alone."""
    dampings = {damping for _, damping in searched.values() if isinstance(damping, (int, float))}
    places = {(row._replace(lml=""), *searched[row]): row for row in rows}
    is_search = all(rank and damping in dampings for _, rank, damping in places)
    few = len({row.lml for row in rows}) <= MOST
    if few or not is_search or len(places) < len(rows) or len(dampings) > MOST:
        return _panels(rows, 0)
    names, panels = _names(rows), {}
    for (place, rank, damping), row in places.items():
        panel = Panel((place,), (rank,), [*names[place], f"rank {rank}"])
        panels.setdefault((place, rank), panel).rows[f"damping={damping:g}"] = row
    made = sorted(panels.values(), key=lambda panel: (order(panel.line[0]), panel.column))
    return made, looks(f"damping={damping:g}" for damping in dampings)


# --- maps --------------------------------------------------------------------------------------


def maps(table: Table, results: Sequence[Result]) -> Figure | None:
    """The metric by damping and rank: a row a setting otherwise, a column a number of evaluations.

    Its colours are the change to the base where that was run, blue for better. None where not both
    of damping and rank vary.
    """
    panels = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    for result in results:
        lml = json.loads(result.lml)
        if result.metric != table.metric or not lml["rank"]:
            continue
        if not isinstance(lml["damping"], (int, float)):  # the default's, or one a step
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
    ranks, dampings = set(), defaultdict(set)  # of dampings those of the number of evaluations
    for panel in panels.values():
        for nfe, values in panel.items():
            ranks |= {rank for rank, _ in values}
            dampings[nfe] |= {damping for _, damping in values}
    ranks, nfes = sorted(ranks), sorted(dampings)
    names = _names(row for row, _ in panels)
    widths = [0.6 + 0.75 * len(dampings[nfe]) for nfe in nfes]
    if 0.6 + sum(widths) > WIDTH:  # the numbers of evaluations under one another
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
    head = [*textwrap.wrap(f"{what} {better}", int(size[0] * 13)), f"by damping and rank{gain}"]
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
        text = f"{entry.mean:#.3g}".rstrip(".") + ("" if gain is None else f"\n{100 * gain:+.0f} %")
        axes.text(k, i, text, ha="center", va="center", fontsize=7.5)
    # light colours, which black numbers can be read on
    colors = "cividis" if not relative else "RdBu" if higher else "RdBu_r"
    colors = matplotlib.colormaps[colors].with_extremes(bad="0.8")
    if relative:
        axes.imshow(picture, cmap=colors, vmin=-LIMIT, vmax=LIMIT, alpha=0.55, aspect="auto")
    else:
        axes.imshow(picture, cmap=colors, alpha=0.5, aspect="auto")
    axes.set_xticks(range(len(dampings)), [f"{damping:g}" for damping in dampings], fontsize=8.5)
    axes.set_yticks(range(len(ranks)), [str(rank) for rank in ranks], fontsize=8.5)
    axes.set_xlabel("damping", fontsize=8.5)
    axes.set_ylabel("rank", fontsize=8.5)


# --- strips ------------------------------------------------------------------------------------


def worth_drawing(rows: Sequence[Row]) -> list[Row]:
    """The rows that a reader can tell apart: LML as the presets have it, and a few others.

    None where the others are too many and nothing but the base would be left.
    """
    known = [row for row in rows if labels.version_of(row.lml)[0] in LOOKS]
    if len(rows) - len(known) <= OTHERS:
        return list(rows)
    return known if any(row.lml != OFF for row in known) else []


def strips(results: Sequence[Result], runs: Path) -> dict[str, Figure]:
    """The same noise at every setting, by the name of the file: a row a setting.

    The first images of the runs under `runs` that still have them and are of the lowest seed that
    most settings were run with.
    """
    settings = defaultdict(lambda: defaultdict(dict))  # model and evaluations, seed, row: run
    for result in results:
        if (runs / result.run / "images").is_dir():
            row = row_of(result)
            # what tells metrics apart tells no images apart
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
    """The first images side by side, (H, W, 3); None where they cannot be read."""
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
    """Labelled pictures (H, W, 3) under one another, a pixel of theirs a pixel of the PNG."""
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
