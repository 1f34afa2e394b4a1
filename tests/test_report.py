"""Tables from run folders."""

from __future__ import annotations

import csv
import math
import statistics

import pytest

from lml import report
from lml.report import Entry, Result


def result(lml="off", nfe=5, seed=0, value=1.0, **more):
    values = {
        "run": "abc",
        "model": "m",
        "solver": "ddim",
        "grid": "default",
        "lml": lml,
        "nfe": nfe,
        "seed": seed,
        "num_images": 10,
        "dtype": "float32",
        "metric": "fd",
        "value": value,
        "warning": "",
        "images_per_second": 1.0,
    }
    return Result(**{**values, **more})


def test_mean_and_standard_deviation_over_seeds():
    values = [1.0, 2.0, 4.0]
    nfes, rows = report.table([result(seed=s, value=v) for s, v in enumerate(values)])
    entry = rows["ddim", "default", "off"][5]
    assert nfes == [5] and entry == Entry(statistics.mean(values), statistics.stdev(values), 3)
    (alone,) = report.table([result()])[1].values()
    assert math.isnan(alone[5].std) and str(alone[5]) == "1"


@pytest.mark.parametrize(
    ("with_lml", "metric", "bold"),
    [
        ([0.5, 0.6], "fd", True),
        ([0.9, 1.0], "fd", False),  # better, but within the spread
        ([0.5], "fd", False),  # no spread is known
        ([2.0, 2.1], "fd", False),
        ([2.0, 2.1], "clip_score", True),  # higher is better
    ],
)
def test_bold_only_beyond_the_spread(with_lml, metric, bold):
    base = [result(seed=s, value=v, metric=metric) for s, v in enumerate([1.0, 1.1])]
    ours = [result("default", seed=s, value=v, metric=metric) for s, v in enumerate(with_lml)]
    assert ("**" in report.markdown(base + ours, "it").splitlines()[3]) == bold
    assert ("\\textbf" in report.latex(base + ours)) == bold


def test_the_gain_is_over_its_own_base():
    results = [result(value=2.0), result("default", value=1.5)]
    results += [result(solver="unipc", value=1.0), result("default", solver="unipc", value=1.2)]
    lines = report.markdown(results, "it").splitlines()
    assert "1.5 (-25.0 %)" in lines[3] and "1.2 (+20.0 %)" in lines[5]


def test_runs_become_tables(script, toy, tmp_path):
    arguments = ["nfe=3,4", "lml.rank=0,2", "seed=0,1", "name=study", "metrics=[convergence]"]
    more = ["metrics.convergence.nfe=8"]
    assert script("sample", "-m", *toy, *arguments, *more).code == 0
    unfinished = next((tmp_path / "outputs/study").iterdir())
    (unfinished / "manifest.json").unlink()
    outcome = script("tabulate", "name=study")
    assert (outcome.code, outcome.err) == (0, "")
    out = tmp_path / "experiments/study"
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert len(rows) == 7 * 2  # rmse and cosine
    assert {row["run"] for row in rows} == {
        path.name for path in (tmp_path / "outputs/study").iterdir() if path != unfinished
    }
    assert {row["lml"] for row in rows} == {"off", "default"}
    for metric in ("convergence_rmse", "convergence_cosine"):
        for suffix in ("md", "tex", "png", "svg"):
            assert (out / f"{metric}.{suffix}").stat().st_size > 0
    table = (out / "convergence_rmse.md").read_text()
    assert "10 images" in table and "1 to 2 seed(s)" in table and "experiment=study" in table


def test_bad_input(script, tmp_path):
    for argument, message in {
        "runs=nowhere": "runs=nowhere: no such folder",
        "experiment=table1_cifar10": "runs=outputs/table1_cifar10: no such folder",
        "experiment=tabel1_cifar10": "experiment=tabel1_cifar10: unknown; nearest: table1_cifar10",
        f"runs={tmp_path}": f"runs={tmp_path}: no complete run with a metric",
    }.items():
        outcome = script("tabulate", argument)
        assert outcome.code == 2 and len(outcome.err.splitlines()) == 1
        assert outcome.err.startswith(message)
