"""The paper's numbers beside ours: experiments/paper_.../paper.csv."""

from __future__ import annotations

import csv
import io

import pytest
from omegaconf import OmegaConf
from test_configs import composed
from test_page import data_of
from test_report import result

from lml import configs
from lml.data.assets import ROOT
from lml.errors import UserError
from lml.report import page, tables, text
from lml.report.paper import COLUMNS, read_paper
from lml.seals import canonical

HEAD = ",".join(COLUMNS)


def written(tmp_path, *lines):
    path = tmp_path / "paper.csv"
    path.write_text("\n".join([HEAD, *lines]) + "\n")
    return path


def test_a_number_stands_beside_ours_with_its_source(tmp_path):
    path = written(
        tmp_path,
        'fid,cifar10_ddpm,authors_ddim,5,12.5,"Table 9, page 99"',
        "fid,cifar10_ddpm,authors_ddim,6,,",
        "fid,cifar10_ddpm,authors_dpm,5,7,elsewhere",
        "clip_score,sd15,authors_ddim,5,30,of another metric",
    )
    ddim = OmegaConf.to_container(configs.option("solver", "ddim"))
    options = canonical({key: ddim[key] for key in ("scheduler", "step")})
    shared = {"metric": "fid", "model": "cifar10_ddpm", "solver_options": options}
    made = [
        result(solver=solver, nfe=nfe, run=f"{solver}{nfe}", **shared)
        for solver in ("authors_ddim", "ddim")
        for nfe in (5, 6)
    ]
    table = tables.build("fid", made, paper=read_paper(path))
    lines = {line.split(" |")[0]: line for line in text.markdown(table, []).splitlines()}
    assert lines["| authors_ddim"].endswith("| 12.5 / – |")
    assert lines["| ddim"].endswith("|  |")
    assert "are from: Table 9, page 99; elsewhere." in text.markdown(table, [])
    rows = list(csv.DictReader(io.StringIO(text.to_csv(table))))
    theirs = {(row["solver"], row["nfe"]): row["paper"] for row in rows}
    assert theirs == {
        ("authors_ddim", "5"): "12.5",
        **dict.fromkeys([("authors_ddim", "6"), ("ddim", "5"), ("ddim", "6")], ""),
    }
    shown = page.render("study", made, [(table, made)], {}, [], [])
    (metric,) = data_of(shown)["metrics"]
    assert {row["solver"]: row["paper"] for row in metric["rows"]} == {
        "DDIM, authors'": "12.5 / –",
        "DDIM": "",
    }
    assert "are from: Table 9, page 99; elsewhere." in metric["caption"]
    assert read_paper(tmp_path / "none.csv") == []


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("fd,cifar10_ddpm,authors_ddim,5,1,x", "line 2: metric=fd: unknown; nearest: fid"),
        ("fid,cifar11,authors_ddim,5,1,x", "line 2: model=cifar11: unknown; nearest: cifar10"),
        ("fid,cifar10,authors_dim,5,1,x", "line 2: solver=authors_dim: unknown; nearest: auth"),
        ("fid,cifar10,ddim,5,1,x", "line 2: solver=ddim: unknown; nearest: authors_ddim"),
        ("fid,cifar10,authors_ddim,five,1,x", "line 2: nfe=five: expected a number of evalu"),
        ("fid,cifar10,authors_ddim,0,1,x", "line 2: nfe=0: expected a number of evaluations"),
        ("fid,cifar10,authors_ddim,5,low,x", "line 2: value=low: expected a number, or nothing"),
        ("fid,cifar10,authors_ddim,5,nan,x", "line 2: value=nan: expected a number, or nothing"),
        ("fid,cifar10,authors_ddim,5,1,", "line 2: the value has no source; say where"),
        ("fid,cifar10,authors_ddim,5,1", "line 2: 5 cells; expected 6"),
        ('fid,cifar10,"authors_ddim,5,1,x', "not a CSV file"),
    ],
)
def test_a_row_that_is_none_is_one_line(tmp_path, line, why):
    with pytest.raises(UserError, match=f"^{tmp_path}/paper.csv: {why}") as error:
        read_paper(written(tmp_path, line))
    assert "\n" not in str(error.value)


def test_a_cell_twice_and_other_columns_are_refused(tmp_path):
    cell = "fid,cifar10,authors_ddim,5,1,x"
    with pytest.raises(UserError, match="line 3: an earlier line has the same cell"):
        read_paper(written(tmp_path, cell, cell))
    (tmp_path / "paper.csv").write_text("model,value\n")
    with pytest.raises(UserError, match="expected the columns metric, model, solver, nfe"):
        read_paper(tmp_path / "paper.csv")


@pytest.mark.parametrize(
    "file", sorted(ROOT.glob("experiments/*/paper.csv")), ids=lambda f: f.parent.name
)
def test_the_file_of_a_table_has_a_row_for_each_of_the_authors_cells(file):
    """Nothing is typed in from elsewhere: all values are empty."""
    assert read_paper(file) == []
    study = f"experiment={file.parent.name}"
    with file.open() as lines:
        rows = list(csv.DictReader(lines))
    cfg = composed(study, "prompts=none", "reference=x")
    assert {int(row["nfe"]) for row in rows} == {
        int(n) for n in str(cfg["paper"]["nfe"]).split(",")
    }
    assert all(not row["value"] and not row["source"] for row in rows)
