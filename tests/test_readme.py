"""What the README and the studies' pages say: commands that compose, numbers that were measured."""

from __future__ import annotations

import csv
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser

from lml.configs import CONFIGS
from lml.data.assets import ROOT
from lml.quoting import gathered

README = ROOT / "README.md"
STUDY = ROOT / "experiments/calibrated_cifar10"
PAGES = [
    README,
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "experiments").glob("**/README.md")),
]
COMMAND = re.compile(r"python scripts/(\w+)\.py([^`#]*)")
SOLVERS = {
    "DDIM": "ddim",
    "DPM-Solver++(3M)": "dpmsolverpp",
    "UniPC-3": "unipc",
    "iPNDM-4": "ipndm",
    "DEIS-3": "deis",
    "DPM-Solver-3": "dpmsolver",
    "DPM-Solver++(3S)": "dpmsolver_singlestep",
    "PNDM": "pndm",
    "Euler": "euler",
    "Heun": "heun",
}
LABEL = re.compile(r"(.+?)(?:, (\w+))?(?: \((\d+)\))?")  # of a row
METRICS = {
    "error": "convergence_rmse",
    "FD-CIFAR": "fd_cifar",
    "at matched contrast": "fd_cifar_matched",
}
LMLS = {"LML off": "off", "with timesteps": "calibrated (timesteps)"}
# Tables of the README and of the studies' own pages: the study, and how the first header begins.
SUMMARIES = {
    "calibrated_cifar10": r"\d+ evaluations",
    "calibrated_others_cifar10": r"\d+ evaluations, other solvers",
    "calibrated_20_cifar10": "20 evaluations",
    "timesteps_cifar10": "evaluations, DEIS-3, trailing",
}


def commands(page: Path) -> list[tuple[str, ...]]:
    """The script and the arguments of every command on a page, in blocks and in sentences."""
    text = re.sub(r"\\\n\s*", "", page.read_text())
    lines = [
        line for block in re.findall(r"```sh\n(.*?)```", text, re.S) for line in block.split("\n")
    ]
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    lines += [" ".join(quoted.split()) for quoted in re.findall(r"`([^`]+)`", prose)]
    found = [match for line in lines if (match := COMMAND.search(line))]
    return [(match[1], *shlex.split(match[2])) for match in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.stem}")
def test_every_link_on_a_page_leads_to_a_file(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.stem}")
def test_every_command_on_a_page_composes(page):
    assert commands(page)
    for script, *arguments in commands(page):
        overrides = [a.replace("=NAME", "=audit") for a in arguments if a[0] != "-"]
        overrides = [a for a in overrides if not a.startswith("hydra")]
        overrides = gathered(overrides, "run_dirs") if script == "compare" else overrides
        parsed = OverridesParser.create().parse_overrides(overrides)
        choices = [
            [f"{o.get_key_element()}={value}" for value in o.sweep_string_iterator()]
            if o.is_sweep_override()
            else [o.input_line]
            for o in parsed
        ]
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            # every value of every axis, if not each with each
            for k in range(max(map(len, choices), default=1)):
                compose(script, [values[k % len(values)] for values in choices])


def test_the_docs_name_every_option_of_the_groups():
    text = (ROOT / "docs/running.md").read_text()
    for group in ("model", "grid", "prompts", "protocol", "sweep", "objective", "metrics"):
        (row,) = re.findall(rf"^\| `{group}` \| (.*) \|$", text, re.M)
        options = {file.stem for file in (CONFIGS / group).glob("*.yaml")} - {"none"}
        assert options <= set(re.findall(r"`(\w+)`", row)), group


def tables(page: Path) -> list[list[list[str]]]:
    """Every table of a Markdown page, as rows of cells."""
    found, rows = [], []
    for line in [*page.read_text().splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
        elif rows:
            found, rows = [*found, rows], []
    return found


def results(name: str, *metrics: str) -> dict[tuple[str, ...], dict[str, str]]:
    """The rows of a study's tables, by metric, solver, grid, LML and number of evaluations."""
    rows = {}
    for metric in metrics:
        with (ROOT / "experiments" / name / f"{metric}.csv").open() as file:
            for row in csv.DictReader(file):
                key = (metric, *(row[column] for column in ("solver", "grid", "lml", "nfe")))
                assert key not in rows
                rows[key] = row
    return rows


def columns(header: list[str]) -> Iterator[tuple[str, str]]:
    """Metric and LML of each column but the first: "error, LML off", then "calibrated" ..."""
    metric = ""
    for cell in header[1:]:
        *named, lml = cell.split(", ")
        metric = METRICS[named[0]] if named else metric
        yield metric, LMLS.get(lml, lml)


def in_short(row: dict[str, str], like: str) -> str:
    """A row's mean, its change or both, as the cell `like` has them, with as many digits."""
    mean, change = re.match(r"\d+\.(\d+)", like), re.search(r"[+-]\d+\.?(\d*) %", like)
    words = []
    if mean:
        words.append(f"{float(row['mean']):.{len(mean[1])}f}")
    if change:
        words.append(f"{float(row['change'].split()[0]):+.{len(change[1])}f} %")
    return f"{words[0]} ({words[1]})" if len(words) == 2 else words[0]


@pytest.mark.parametrize("name", SUMMARIES)
def test_a_table_in_short_is_what_its_study_found(name):
    found, seen = results(name, *METRICS.values()), 0
    for page in (README, ROOT / "experiments" / name / "README.md"):
        for header, _, *rows in tables(page):
            if not re.fullmatch(SUMMARIES[name], header[0]):
                continue
            for label, *cells in rows:
                # "UniPC-3, karras"; "Heun (9)"; or the evaluations, if the header has the solver
                named = f"{header[0].partition(', ')[2]} ({label})" if label.isdigit() else label
                solver, grid, nfe = LABEL.fullmatch(named).groups()
                nfe = nfe or header[0].split()[0]
                for (metric, lml), cell in zip(columns(header), cells, strict=True):
                    row = found.get((metric, SOLVERS[solver], grid or "default", lml, nfe))
                    text = cell.replace("*", "")
                    assert text == (in_short(row, text) if row else ""), (page, label, metric, lml)
                    seen += 1
    assert seen >= 20


@pytest.mark.parametrize("page", [README, ROOT / "experiments/calibrated_cifar10/README.md"])
def test_the_best_with_and_without_are_those_of_the_study(page):
    (table,) = [t for t in tables(page) if t[0][0] == "evaluations"]
    best = {
        metric: {row[0]: row for row in tables(STUDY / f"{metric}.md")[1][2:]}
        for metric in ("convergence_rmse", "fd_cifar", "fd_cifar_matched")
    }
    for nfe, *cells in table[2:]:
        for metric, digits, (off, on, change) in (
            ("convergence_rmse", 4, cells[:3]),
            ("fd_cifar", 1, cells[3:6]),
        ):
            _, theirs_off, theirs_on, theirs = best[metric][nfe]
            for mine, other in ((off, theirs_off), (on, theirs_on)):
                assert re.match(r"[\d.]+", mine)[0] == f"{float(other.split()[0]):.{digits}f}"
            assert change == f"{float(theirs.strip('*').split()[0]):+.0f} %"
        theirs = best["fd_cifar_matched"][nfe][3]
        assert cells[6] == f"{float(theirs.strip('*').split()[0]):+.0f} %"


def test_the_changes_with_more_images_are_those_of_its_results():
    (table,) = tables(ROOT / "experiments/count_cifar10/README.md")
    known = [results(name, "fd_cifar") for name in ("count_cifar10", "table1_cifar10")]
    for solver, *cells in table[2:]:
        rows = [
            study["fd_cifar", SOLVERS[solver], "default", "default", nfe]
            for study in known
            for nfe in ("5", "10")
        ]
        assert cells == [in_short(*pair) for pair in zip(rows, cells, strict=True)]
