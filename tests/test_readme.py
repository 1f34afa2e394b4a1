"""What the README and the studies' pages say: commands that compose, numbers that were measured."""

from __future__ import annotations

import re
import shlex
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
    "DDIM": ("ddim", "default"),
    "DPM-Solver++(3M)": ("dpmsolverpp", "default"),
    "UniPC-3": ("unipc", "default"),
    "iPNDM-4": ("ipndm", "default"),
    "DEIS-3": ("deis", "default"),
    "DPM-Solver++(3M), Karras": ("dpmsolverpp", "karras"),
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
    for group in ("model", "grid", "prompts", "protocol", "sweep", "metrics"):
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


def study(name: str, metric: str) -> dict[tuple[str, str, str], dict[str, str]]:
    """The rows of a study's table, by solver, grid and LML."""
    header, _, *rows = tables(ROOT / "experiments" / name / f"{metric}.md")[0]
    rows = [dict(zip(header, row, strict=True)) for row in rows]
    return {(row["solver"], row["grid"], row["LML"]): row for row in rows}


def number_and_change(cell: str) -> tuple[float, str]:
    """Of a cell such as "0.2026 ± 0.0008 (-17.8 ± 0.2 %)": 0.2026 and "-17.8 %", or ""."""
    change = re.search(r"\(([+-][\d.]+)", cell)
    return float(cell.split()[0].strip("*")), f"{change[1]} %" if change else ""


@pytest.mark.parametrize("nfe", ["5", "10"])
def test_what_lml_is_worth_is_what_the_study_found(nfe):
    (table,) = [t for t in tables(README) if t[0][0] == f"{nfe} evaluations"]
    studies = [study("calibrated_cifar10", metric) for metric in ("convergence_rmse", "fd_cifar")]
    for name, *cells in table[2:]:
        cells = [cell.strip("*") for cell in cells]
        for known, digits, mine in zip(studies, (4, 2), (cells[:3], cells[3:]), strict=True):
            off, *changes = (
                number_and_change(known[(*SOLVERS[name], lml)][nfe])
                for lml in ("off", "default", "calibrated")
            )
            assert mine == [f"{off[0]:.{digits}f}", *(change for _, change in changes)]


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
    counts, first = study("count_cifar10", "fd_cifar"), study("table1_cifar10", "fd_cifar")
    for solver, *cells in table[2:]:
        rows = [known[(*SOLVERS[solver], "default")] for known in (counts, first)]
        theirs = [number_and_change(row[nfe])[1] for row in rows for nfe in ("5", "10")]
        assert cells == theirs
