"""Tables and figures from run folders."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import json
import math
import shutil
import statistics

import numpy as np
import pytest
import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from omegaconf import OmegaConf
from PIL import Image

from lml import configs, report
from lml.correction import METHOD_VERSION
from lml.data.assets import ROOT
from lml.errors import UserError
from lml.files import dump_yaml, read_json, write_json
from lml.metrics.base import class_by_name, declared
from lml.report import figures, labels, results, tables
from lml.report.results import Cell, Result
from lml.report.tables import Entry
from lml.report.text import latex, markdown, to_csv
from lml.runs.records import read_config
from lml.runs.store import RunFolder
from lml.seals import canonical, sealed, settings_hash

CONFIG = OmegaConf.to_container(OmegaConf.load(ROOT / "configs/lml/default.yaml"))
DEFAULT = {**CONFIG, "method_version": METHOD_VERSION}  # as results say it
LML = {"off": {**DEFAULT, "rank": 0}, "default": DEFAULT, "other": {**DEFAULT, "damping": 16.0}}
RESULT = {
    "run": "abc",
    "model": "m",
    "model_sha256": "0123456789",
    "size": "8x8",
    "solver": "ddim",
    "grid": "default",
    "nfe": 5,
    "seed": 0,
    "num_images": 10,
    "dtype": "float32",
    "metric": "fd",
    "value": 1.0,
    "protocol": '{"extractor":"e"}',
    "steps": "",
    "warning": "",
    "images_per_second": 1.0,
}


def options(solver):
    config = OmegaConf.to_container(OmegaConf.load(ROOT / f"configs/solver/{solver}.yaml"))
    return canonical({key: config.get(key) or {} for key in ("scheduler", "step")})


def result(lml="off", **more):
    values = {**RESULT, "lml": canonical(LML[lml]), **more}
    return Result(**{"solver_options": options(values["solver"]), **values})


def several(lml, values, **more):
    """A result a seed, far enough apart."""
    return [
        result(lml, seed=10 * k, value=v, run=f"{lml}{k}", **more) for k, v in enumerate(values)
    ]


def line_of(text, *cells):
    """The one line of a Markdown table that has these cells."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    (found,) = (line for line in lines if all(cell in line for cell in cells))
    return found


# --- statistics and tables ---------------------------------------------------------------------


def test_mean_and_standard_deviation_over_seeds():
    values = [1.0, 2.0, 4.0]
    table = tables.build("fd", several("off", values))
    ((entry,),) = (columns.values() for columns in table.rows.values())
    assert entry.mean == statistics.mean(values) and entry.std == statistics.stdev(values)
    assert str(entry) == "2.333 ± 1.5" and table.columns == [5] and table.notes == []
    alone = Entry({0: 1.0}, 10)
    assert math.isnan(alone.std) and str(alone) == "1.000"


def test_seeds_that_share_noise_have_no_spread():
    """Image i is made from seed + i, so that seeds 0 and 1 are nearly the same images."""
    values = {0: 1.0, 9: 1.2}
    table = tables.build("fd", [result(seed=s, value=v) for s, v in values.items()])
    (entry,) = table.rows.popitem()[1].values()
    assert entry.overlaps and math.isnan(entry.std) and entry.mean == 1.1
    assert any("share noise" in note for note in table.notes)
    assert not Entry({0: 1.0, 10: 1.2}, 10).overlaps


@pytest.mark.parametrize(
    ("base", "ours", "others", "metric", "bold"),
    [
        ([1.0, 1.1], [0.5, 0.6], [], "fd", "default"),
        ([1.0, 1.1], [0.9, 1.0], [], "fd", None),  # better, but within the spread
        ([1.0], [0.5], [], "fd", None),  # no spread is known
        ([1.0, 1.1], [2.0, 2.1], [], "fd", "off"),
        ([1.0, 1.1], [2.0, 2.1], [], "clip_score", "default"),  # higher is better
        ([1.0, 1.1], [0.5, 0.6], [0.55, 0.65], "fd", None),  # another is as good
        ([1.0, 1.1], [0.5, 0.6], [0.8, 0.9], "fd", "default"),  # the best alone, not all that gain
        ([], [0.5, 0.6], [], "fd", None),  # nothing to compare with
    ],
)
def test_bold_is_what_beats_all_others_beyond_the_spread(base, ours, others, metric, bold):
    given = several("off", base) + several("default", ours) + several("other", others)
    given = [dataclasses.replace(r, metric=metric) for r in given]
    table = tables.build(metric, given)
    assert [row.lml for row, _ in table.bold()] == ([bold] if bold else [])
    text = markdown(table, []).split("\n\n")[0]
    marked = [line for line in text.splitlines() if "**" in line]
    assert [line.split("|")[3].strip() for line in marked] == ([bold] if bold else [])
    assert latex(table).count("\\textbf") == len(marked)


def test_the_gain_is_over_its_own_base():
    given = [result(value=2.0), result("default", value=1.5, run="b")]
    given += [result(solver="unipc", value=1.0, run="c")]
    given += [result("default", solver="unipc", value=1.2, run="d")]
    given += [result("default", solver="unipc", grid="karras", value=1.2, run="e")]  # has no base
    given += [result("default", solver="unipc", nfe=6, value=1.2, run="f")]  # nor has this
    text = markdown(tables.build("fd", given), [])
    assert line_of(text, "ddim", "default", "1.500 (-25.0 %)")
    assert line_of(text, "unipc", "karras", "1.200")
    assert "1.200 (+20.0 %)" in text and text.count("%)") == 2
    assert latex(tables.build("fd", given)).count("\\%") == 2


def test_the_gain_is_over_the_seeds_that_both_have():
    given = several("off", [1.0, 2.0, 30.0]) + several("default", [0.9, 1.8])
    table = tables.build("fd", given)
    assert "(-10.0 ± 0.0 %)" in markdown(table, [])
    assert any("the change is over seeds 0, 10, which" in note for note in table.notes)
    apart = [*several("off", [1.0]), result("default", seed=50, run="x")]
    table = tables.build("fd", apart)
    assert "%)" not in markdown(table, [])
    assert any("no seed" in note for note in table.notes)


def test_the_spread_of_the_gain_is_that_of_each_seed_against_itself():
    """Seeds that differ much in both settings alike say much about the gain."""
    base, ours = Entry({0: 10.0, 50: 20.0}, 10), Entry({0: 9.0, 50: 17.0}, 10)
    assert tables.change(ours, base) == f"-13.3 ± {statistics.stdev([10.0, 15.0]):.1f} %"
    assert tables.change(ours, dataclasses.replace(base, num_images=100)).endswith("± 3.5 %")
    near = Entry({0: 9.0, 50: 17.0}, 100)  # seeds that share noise
    assert tables.change(near, base) == "-13.3 %"


def test_a_base_that_is_not_positive_has_no_per_cent():
    base, ours = Entry({0: -0.5}, 1), Entry({0: 0.25}, 1)
    assert tables.change(ours, base) == "+0.75"
    two = Entry({0: -0.5, 1: 1.5}, 1), Entry({0: 0.5, 1: 2.5}, 1)
    assert tables.change(two[1], two[0]) == "+1 ± 0"
    assert tables.change(base, ours) == "-300.0 %"
    assert tables.change(ours, Entry({0: 0.0}, 1)) == ""


@pytest.mark.parametrize(
    "other",
    [
        {"num_images": 20},
        {"dtype": "bfloat16"},
        {"model": "n"},
        {"model_sha256": "another"},  # the same name, retrained
        {"size": "16x16"},
        {"protocol": '{"extractor":"f"}'},
        {"solver_options": options("ddim").replace('"eta":0', '"eta":1')},
    ],
)
def test_what_differs_is_not_averaged(other):
    table = tables.build("fd", [result(value=1.0), result(value=3.0, seed=50, run="b", **other)])
    means = [entry.mean for columns in table.rows.values() for entry in columns.values()]
    assert sorted(means) == [1.0, 3.0]
    head, rule, *lines = markdown(table, []).split("\n\n")[0].splitlines()
    assert len(lines) == 2 and len(set(lines)) == 2 and head.count("|") == rule.count("|")
    assert lines[0].split("|")[1:-4] != lines[1].split("|")[1:-4]


def test_what_a_reader_can_tell_apart_needs_no_number():
    given = [result(), result(size="16x16", model_sha256="another", run="b")]
    text = markdown(tables.build("fd", given), [])
    assert text.startswith("| size | solver |") and "weights" not in text
    assert "Only what has the same size is compared" in text
    assert [line.split("|")[1].strip() for line in text.splitlines()[2:4]] == ["8x8", "16x16"]


def test_runs_that_no_column_tells_apart_are_said():
    table = tables.build("fd", [result(value=1.0), result(value=2.0, run="b")])
    (entry,) = table.rows.popitem()[1].values()
    assert entry.values == {0: 1.5} and "several runs of one seed" in table.notes[0]


def test_the_best_with_lml_against_the_best_without():
    given = several("off", [2.0, 2.2]) + several("default", [1.9, 2.1])
    given += several("off", [1.0, 1.1], solver="unipc")
    given += several("other", [0.5, 0.55], solver="unipc")
    text = markdown(tables.build("fd", given), [])
    contest = text.split("| evaluations |")[1].splitlines()[2]
    assert contest == (
        "| 5 | 1.050 ± 0.071 (unipc) | 0.5250 ± 0.035 (unipc, LML damping=16) | **-50.0 ± 0.0 %** |"
    )


def test_markdown_and_csv_have_all_of_it():
    given = several("off", [1.0, 2.0]) + several("default", [0.5, 0.7], nfe=8)
    table = tables.build("fd", given)
    text = markdown(table, ["the command"], ["Warning: few.", "Warning: few."])
    assert text.splitlines()[0] == "| solver | grid | LML | 5 | 8 | paper |"
    assert text.count("Warning: few.") == 1 and "`the command`" in text
    for part in ("fd (lower is better)", "model m", "weights 0123456789", "8x8", "10 images"):
        assert part in text
    assert "2 seed(s) a cell (0, 10)" in text and "extractor e" in text
    rows = list(csv.DictReader(io.StringIO(to_csv(table))))
    assert [(row["lml"], row["nfe"], row["mean"], row["seeds"], row["paper"]) for row in rows] == [
        ("off", "5", "1.5", "2", ""),
        ("default", "8", "0.6", "2", ""),
    ]


# --- labels ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "label"),
    [
        ({}, "default"),
        ({"rank": 0}, "off"),
        ({"rank": 0, "damping": 16.0}, "off"),
        ({"damping": 8}, "damping=8"),
        ({"rank": 2.0}, "default"),  # a number is a number
        ({"rank": 3, "damping": 16.0}, "rank=3, damping=16"),
        ({"target": "increment"}, "target=increment"),
        ({"damping": [0.5, None, 16.0]}, "damping=[0.5, None, 16]"),
    ],
)
def test_labels_of_what_differs_from_the_default(changes, label):
    options = canonical({**DEFAULT, **changes})
    assert labels.lml_label(options, "dpmsolverpp", 5, "cifar10") == label


@pytest.mark.parametrize(("solver", "target"), [("ddim", "direction"), ("unipc", "increment")])
def test_the_published_setting_is_told_by_its_solver_and_evaluations(solver, target):
    config = OmegaConf.to_container(OmegaConf.load(ROOT / "configs/lml/published.yaml"))
    options = {**DEFAULT, **config, "target": target, "damping": 8e-4}

    def label(nfe: int, model: str = "cifar10", solver: str = solver) -> str:
        return labels.lml_label(canonical(options), solver, nfe, model)

    assert label(5) == label(10, "cifar10_ddpm") == "published"
    assert label(8) == label(5, "gaussian") == label(5, "sd15") == "published, damping=0.0008"
    options["damping"] = 1e-3
    assert label(8) == label(11) == label(5, "sd15") == label(5, "of_a_plugin") == "published"
    options["damping"] = 6e-3
    assert label(10, "sdxl") == "published"
    assert label(10, "sd15") == "published, damping=0.006"
    options["target"] = "increment"
    assert label(10, "sd15", "authors_compbench_dpm_lm") == "published"


def test_a_solver_is_told_by_its_options():
    assert labels.solver_label("unipc", options("unipc")) == "unipc"
    other = options("unipc").replace('"solver_order":3', '"solver_order":2')
    assert labels.solver_label("unipc", other) == "unipc, solver_order=2"
    assert labels.solver_label("of_a_plugin", "{}") == "of_a_plugin"
    name = "lml.schedulers.released.ReleasedDPMSolverMultistepScheduler"  # on top of dpmsolver
    released = options("dpmsolver").replace("lml.schedulers.LMLDPMSolverMultistepScheduler", name)
    assert labels.solver_label("authors_dpm_lm", released) == "authors_dpm_lm"
    changed = "authors_dpm, _target_=ReleasedDPMSolverMultistepScheduler"
    assert labels.solver_label("authors_dpm", released) == changed


def forget():
    labels.lml_label.cache_clear()
    labels._option.cache_clear()


def test_labels_follow_the_defaults_of_today(tmp_path, monkeypatch):
    monkeypatch.setattr(configs, "CONFIGS", tmp_path)
    (tmp_path / "lml").mkdir()
    for name in labels.PRESETS:
        changed = {**CONFIG, "damping": "${nfe}"} | ({"rank": 9} if name != "default" else {})
        OmegaConf.save(changed, tmp_path / f"lml/{name}.yaml")
    forget()
    try:
        options = canonical({**DEFAULT, "damping": 8})
        assert labels.lml_label(options, "ddim", 8, "cifar10") == "default"
        assert labels.lml_label(canonical(DEFAULT), "ddim", 9, "cifar10") == "damping=None"
    finally:
        forget()


def test_rows_are_in_an_order_that_is_read():
    names = [
        "off",
        "published",
        "default",
        "default, method 1",
        "rank=2, damping=8",
        "rank=2, damping=16",
        "rank=10",
    ]
    assert sorted(reversed(names), key=labels.order) == names


@pytest.mark.parametrize(
    ("version", "label"),
    [
        ({}, "default"),
        ({"method_version": 1}, "default"),
        ({"method_version": 2}, "default, method 2"),
        ({"method_version": 2, "damping": 8.0}, "damping=8, method 2"),
        ({"method_version": 2, "rank": 0}, "off"),
    ],
)
def test_another_version_of_the_method_is_another_setting(monkeypatch, version, label):
    """Runs that do not say theirs are from before there was another."""
    monkeypatch.setattr(labels, "METHOD_VERSION", 1)
    forget()
    assert labels.lml_label(canonical({**CONFIG, **version}), "ddim", 5, "cifar10") == label
    monkeypatch.setattr(labels, "METHOD_VERSION", 2)
    forget()
    assert (labels.lml_label(canonical(CONFIG), "ddim", 5, "cifar10")) == "default, method 1"
    forget()


# --- run folders, seals, results.csv -----------------------------------------------------------


@pytest.fixture
def make_run(tmp_path):
    """`make_run(lml="off", value=1.0, …)` leaves a finished run of two images in outputs/study."""

    def make(lml="off", value=1.0, metrics=None, timing=None, solver="ddim", **more):
        options = {"nfe": 5, "seed": 0, "num_images": 2, "dtype": "float32", **more}
        options.setdefault("method_version", METHOD_VERSION)
        solver = OmegaConf.to_container(OmegaConf.load(ROOT / f"configs/solver/{solver}.yaml"))
        lml = {**DEFAULT, **lml} if isinstance(lml, dict) else LML[lml]
        lml = {key: value for key, value in lml.items() if key != "method_version"}
        config = {
            "model": {"name": "cifar10"},
            "solver": solver,
            "grid": {"name": "default"},
            "lml": lml,
            **options,
        }
        settings = {**config, "model": {"network": "abc"}}
        name = settings_hash(settings)[:10]
        run = RunFolder(tmp_path / "outputs/study" / name, settings)
        run.open(config)
        for i in range(options["num_images"]):
            random = np.random.default_rng([options["seed"] + i, options["nfe"], lml["rank"]])
            run.write_image(i, random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        run.write_manifest(options["num_images"])
        run.close()
        if metrics is None:
            metrics = {"fd": {"value": value, "protocol": {"extractor": "e", "images": 2}}}
        entries = {name: sealed(entry, run.hash, name) for name, entry in metrics.items()}
        if entries:
            write_json(run.path / "metrics.json", entries)
        if timing is not None:
            write_json(run.path / "timing.json", sealed(timing, run.hash, "timing"))
        return run.path

    return make


@pytest.fixture
def tabulate(tmp_path, monkeypatch, capsys):
    """`tabulate()` of outputs/study in `tmp_path`: the folder, and what was said on stderr."""
    monkeypatch.chdir(tmp_path)

    def run(**options):
        keys = ("runs", "out", "show", "evaluations")
        cfg = {"name": "study", **dict.fromkeys(keys), **options}
        capsys.readouterr()
        out = report.tabulate(OmegaConf.create(cfg))
        return tmp_path / out, capsys.readouterr().err

    return run


def edit(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_an_edited_value_is_said_and_not_used(make_run, tabulate, tmp_path):
    edited, good = make_run(value=1.0), make_run("default", value=2.0)
    edit(edited / "metrics.json", lambda entries: entries["fd"].update(value=0.5))
    out, said = tabulate()
    line = f"outputs/study/{edited.name}/metrics.json: fd was edited after it was written; not used"
    assert said == f"{line}\n"
    text = (out / "fd.md").read_text()
    assert f"- {line}" in text
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert [(row["run"], row["value"]) for row in rows] == [(good.name, "2.0")]


def test_every_kind_of_damping_is_tabulated(make_run, tabulate):
    """None given, a number, one a step, or none because LML is off."""
    make_run("off", value=3.0)
    make_run("default", value=2.0)
    make_run({"damping": [8.0, None, 2, 0.5, 1]}, value=1.0)
    for rank, damping in ((1, 4.0), (2, 8.0), (1, 8.0)):
        make_run({"rank": rank, "damping": damping}, value=1.5)
    out, said = tabulate()
    assert said == ""
    text = (out / "fd.md").read_text()
    assert line_of(text, "default", "2.000 (-33.3 %)")
    assert line_of(text, "damping=[8, None, 2, 0.5, 1]", "1.000 (-66.7 %)")
    assert line_of(text, "rank=1, damping=4", "1.500 (-50.0 %)")
    assert (out / "fd_map.png").is_file()  # of those that are numbers


def test_versions_of_the_method_are_not_averaged(make_run, tabulate):
    ours, other = labels.METHOD_VERSION, labels.METHOD_VERSION + 1
    make_run("off", value=3.0)
    for version, value in ((ours, 1.0), (other, 2.0)):
        make_run("default", value=value, method_version=version)
    out, said = tabulate()
    text = (out / "fd.md").read_text()
    assert said == "" and "several runs" not in text
    assert line_of(text, "default", "1.000 (-66.7 %)")
    assert line_of(text, f"default, method {other}", "2.000 (-33.3 %)")


@pytest.mark.parametrize(
    "study", sorted(path.parent.name for path in ROOT.glob("experiments/*/results.csv"))
)
def test_committed_results_are_read_and_named(study):
    """They name runs as these were named then."""
    said = []
    found = results.from_csv(ROOT / "experiments" / study / "results.csv", [], said.append)
    assert found and said == []
    names = {tables.row_of(result).lml for result in found}
    assert not any("unset" in name for name in names)


def test_an_entry_of_another_run_or_metric_is_noticed(make_run, tabulate):
    a, b = make_run(value=1.0), make_run("default", value=2.0)
    shutil.copy(a / "metrics.json", b / "metrics.json")
    edit(a / "metrics.json", lambda entries: entries.update(fid=entries["fd"]))
    out, said = tabulate()
    assert f"{a.name}/metrics.json: fid was edited" in said
    assert f"{b.name}/metrics.json: fd was edited" in said
    assert len(list(csv.DictReader((out / "results.csv").open()))) == 1


@pytest.mark.parametrize("seal", ["removed", None, "", 0])
def test_what_has_no_seal_is_said_and_not_used(make_run, tabulate, seal):
    """Or else an edited number is one without it."""

    def spoil(values):
        values.pop("seal")
        values |= {} if seal == "removed" else {"seal": seal}

    run = make_run(value=1.25, timing=timing())
    make_run("default", value=2.0)
    edit(run / "metrics.json", lambda entries: spoil(entries["fd"]))
    edit(run / "timing.json", spoil)
    out, said = tabulate()
    assert said.splitlines() == [
        f"outputs/study/{run.name}/timing.json: has no seal; not used",
        f"outputs/study/{run.name}/metrics.json: fd has no seal; not used",
    ]
    rows = csv.DictReader((out / "results.csv").open())
    assert {row["value"] for row in rows} == {"2.0"}


def test_an_edited_config_or_timing_is_not_used(make_run, tabulate):
    make_run(value=1.0)
    a, b = make_run("default", value=2.0), make_run("other", timing=timing())
    config = (a / "config.yaml").read_text()
    (a / "config.yaml").write_text(config.replace("damping: null", "damping: 9.0"))
    edit(b / "timing.json", lambda entries: entries.update(images_per_second=1e9))
    out, said = tabulate()
    assert f"{a.name}/config.yaml: was edited after the run" in said
    assert f"{b.name}/timing.json: was edited" in said and len(said.splitlines()) == 2
    assert {row["value"] for row in csv.DictReader((out / "results.csv").open())} == {"1.0"}


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"fd": 1}',
        '{"fd": {"value": "x", "protocol": {}}}',
        '{"fd": {"value": 1}}',
        "\xff",
    ],
)
def test_a_broken_file_is_named_and_the_others_go_on(make_run, tabulate, content):
    broken = make_run(value=1.0)
    make_run("default", value=2.0)
    file = broken / "metrics.json"
    file.write_bytes(content.encode("latin1"))
    if isinstance(entry := read_json(file).get("fd"), dict):
        sha256 = read_json(broken / "manifest.json")["settings_sha256"]
        write_json(file, {"fd": sealed(entry, sha256, "fd")})
    (broken / "timing.json").write_text("{")
    out, said = tabulate()
    first, second = said.splitlines()
    assert f"{broken.name}/timing.json: broken" in first
    assert f"{broken.name}/metrics.json" in second and "broken; not used" in second
    assert "| 2.000 |" in (out / "fd.md").read_text()


def test_an_unfinished_run_is_left_out(make_run, tabulate):
    make_run(value=1.0)
    (make_run("default", value=2.0) / "manifest.json").unlink()
    edit(make_run("other") / "manifest.json", lambda manifest: manifest.update(complete=False))
    out, said = tabulate()
    assert said == "" and len(list(csv.DictReader((out / "results.csv").open()))) == 1


def test_results_of_runs_that_are_gone_are_kept(make_run, tabulate):
    gone, stays = make_run(value=1.0), make_run("default", value=0.5)
    tabulate()
    shutil.rmtree(gone)
    sha256 = read_json(stays / "manifest.json")["settings_sha256"]
    edit(  # measured again
        stays / "metrics.json",
        lambda entries: entries.update(fd=sealed({**entries["fd"], "value": 0.4}, sha256, "fd")),
    )
    new = make_run("other", value=0.25)
    out, said = tabulate()
    assert said == ""
    rows = {row["run"]: row["value"] for row in csv.DictReader((out / "results.csv").open())}
    assert rows == {gone.name: "1.0", stays.name: "0.4", new.name: "0.25"}
    assert "0.4000 (-60.0 %)" in (out / "fd.md").read_text()
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    tabulate()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    shutil.rmtree(stays.parent)  # as in a clone
    tabulate()
    after = {path.name: path.read_bytes() for path in out.iterdir()}
    # the page has lost its samples
    assert after.pop("index.html") != before.pop("index.html") and after == before


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        (",1.0,", ",0.1,", "line 2 was edited after it was written; not used"),
        (",float32,", ",bfloat16,", "line 2 was edited"),
        (",1.0,", ",0.1,7,", "line 2 was edited"),
        ("run,model", "run,models", "1 rows with other columns"),
        (",seal", "", "1 rows with other columns"),
    ],
)
def test_an_edited_results_file_is_said_and_not_used(make_run, tabulate, old, new, line):
    gone, stays = make_run(value=1.0), make_run("default", value=0.5)
    out, _ = tabulate()
    file = out / "results.csv"
    header, *rows = file.read_text().splitlines(keepends=True)
    rows = sorted(rows, key=lambda row: not row.startswith(gone.name))
    file.write_text("".join([header, *rows]).replace(old, new, 1))
    shutil.rmtree(gone)
    _, said = tabulate()
    assert "experiments/study/results.csv: " in said and line in said
    assert {row["run"] for row in csv.DictReader(file.open())} == {stays.name}


@pytest.mark.parametrize("content", ["", "# Notes", "a,b\n1,2\n", "run,metric\n", "\0", "\xff"])
def test_what_is_no_file_of_results_is_not_replaced(make_run, tabulate, tmp_path, content):
    make_run(value=1.0)
    file = tmp_path / "experiments/study/results.csv"
    file.parent.mkdir(parents=True)
    file.write_bytes(content.encode("latin1"))
    with pytest.raises(
        UserError, match=r"^out=experiments/study: results\.csv in it is no file of"
    ):
        tabulate()
    assert [path.read_bytes() for path in file.parent.iterdir()] == [content.encode("latin1")]


@pytest.mark.parametrize("name", ["fd.md", "fd.tex", "fd.csv", "samples_nfe5.png"])
def test_files_of_others_are_not_replaced(make_run, tabulate, tmp_path, name):
    """Wherever somebody points it to."""
    make_run(value=1.0)
    make_run("default", value=2.0)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/notes.md").write_text("mine")
    (tmp_path / "docs" / name).write_text("mine")
    with pytest.raises(UserError, match=rf"^out=docs: {name} in it is not of a study"):
        tabulate(out="docs")
    assert {path.name: path.read_text() for path in (tmp_path / "docs").iterdir()} == {
        name: "mine",
        "notes.md": "mine",
    }
    (tmp_path / "docs" / name).unlink()
    tabulate(out="docs")
    assert tabulate(out="docs")[1] == "" and (tmp_path / "docs/notes.md").read_text() == "mine"


def test_the_committed_files_of_an_older_version_are_no_trouble(make_run, tabulate, tmp_path):
    run = make_run(value=1.0)
    (tmp_path / "experiments/study").mkdir(parents=True)
    file = tmp_path / "experiments/study/results.csv"
    file.write_text(f"run,metric,value\n{run.name},fd,3.0\n")
    assert tabulate()[1] == ""
    file.write_text(f"run,metric,value\n{run.name},fd,3.0\ngone,fd,3.0\n")
    _, said = tabulate()
    assert said == (
        "experiments/study/results.csv: 1 rows with other columns, of an older version; not used\n"
    )


def test_results_survive_their_file(make_run, tmp_path):
    make_run(value=1 / 3, timing=timing())
    made = results.collect(tmp_path / "outputs/study", pytest.fail)
    (tmp_path / "results.csv").write_text(results.to_csv(made))
    assert results.from_csv(tmp_path / "results.csv", [], pytest.fail) == made


# --- what is expected --------------------------------------------------------------------------


def cell(status="missing", reason=None, run=None, lml="default", **more):
    values = {"solver": "ddim", "grid": "default", "lml": LML[lml], "nfe": 5, "seed": 0}
    values |= {"num_images": 2, "model": "cifar10", "dtype": "float32", **more}
    overrides = [f"lml={lml}", f"nfe={values['nfe']}", f"seed={values['seed']}"]
    return {"overrides": overrides, "run": run, **values, "status": status, "reason": reason}


def test_missing_cells_are_shown(make_run, tabulate, tmp_path):
    run = make_run(value=1.0)
    cells = [
        cell("done", run=run.name, lml="off"),
        cell("missing", run="nowhere"),
        cell("failed", "out of memory", nfe=8),
        cell("refused", "nfe=6: heun can make 5 or 7", nfe=6, lml="off"),
        cell("done", run="gone", seed=50, lml="off"),
    ]
    sweep = {"commands": ["first command", "second command"], "cells": cells}
    file = tmp_path / "outputs/study/sweep.yaml"
    file.write_text(dump_yaml(sweep))
    out, said = tabulate()
    assert said == ""
    text = (out / "fd.md").read_text()
    assert line_of(text, "off") == ["ddim", "default", "off", "1.000", "refused", "", ""]
    assert line_of(text, "missing") == ["ddim", "default", "default", "missing", "", "failed", ""]
    assert "- failed (1): lml=default nfe=8 seed=0: out of memory." in text
    assert "- refused (1): lml=off nfe=6 seed=0: nfe=6: heun can make 5 or 7." in text
    assert "- missing (2): lml=default nfe=5 seed=0; lml=off nfe=5 seed=50." in text
    assert "`first command`" in text and "`second command`" in text and "experiment=" not in text
    assert "weights" not in text.splitlines()[0]  # the cells are in the group of what is found
    assert (out / "sweep.yaml").read_bytes() == file.read_bytes()
    assert "failed" in (out / "fd.tex").read_text() and "failed" in (out / "fd.csv").read_text()


def test_a_cell_may_fit_several_groups():
    asked = Cell(**cell("missing", num_images=10, model="m"))
    given = [result(), result(size="16x16", run="b")]
    table = tables.build("fd", given, [asked])
    (row,) = (row for row, columns in table.rows.items() if str(columns[5]) == "missing")
    assert row.group.model == "m" and row.group.size == ""
    assert markdown(table, []).splitlines()[0].startswith("| size | solver |")


def test_the_name_of_a_run_is_no_number(tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump({"commands": [], "cells": [cell(run="12345e6789")]}))
    assert results.read_sweep(file, pytest.fail)[1][0].run == "12345e6789"


@pytest.mark.parametrize("content", ["cells: [{}]", "a: [", "[]", "commands: []"])
def test_a_broken_sweep_file_is_said(make_run, tabulate, tmp_path, content):
    make_run(value=1.0)
    (tmp_path / "outputs/study/sweep.yaml").write_text(content)
    out, said = tabulate()
    assert said.startswith("outputs/study/sweep.yaml: broken; not used")
    assert not (out / "sweep.yaml").exists() and "broken" in (out / "fd.md").read_text()


# --- times -------------------------------------------------------------------------------------


def timing(network=8.0, correction=0.5, solver=1.0):
    return {
        "images": 100,
        "images_per_second": 10.0,
        "evaluations_per_image": 5,
        "seconds": {"network": network, "correction": correction, "solver": solver},
        "device": "cpu",
        "threads": 1,
        "processes": 1,
    }


def test_times_per_image_and_evaluation(make_run, tmp_path):
    make_run(metrics={}, timing=timing())
    made = results.collect(tmp_path / "outputs/study", pytest.fail)
    assert {r.metric.removeprefix("timing/"): r.value for r in made} == pytest.approx(
        {
            "network": 16.0,  # 8 s over 500 evaluations
            "correction": 1.0,
            "solver": 2.0,
            "scheduler": 3.0,
            "correction_share": 1 / 16,
            "correction_to_solver": 0.5,
            "scheduler_share": 3 / 16,
        }
    )


def test_times_are_shown_when_asked_or_alone(make_run, tabulate):
    make_run(value=1.0, timing=timing(correction=0.0))
    make_run("default", value=1.0, timing=timing(), metrics={})
    make_run("off", metrics={}, timing=timing(correction=0.0, solver=0.9), seed=1)
    make_run("default", metrics={}, timing=timing(solver=0.9), seed=1)
    out, _ = tabulate()
    assert {path.stem for path in out.glob("*.md")} == {"fd"}
    out, _ = tabulate(show=["timing/scheduler", "timing/correction"], out="asked")
    assert {path.stem for path in out.glob("*.md")} == {"timing_nfe5"}
    table = (out / "timing_nfe5.md").read_text()
    assert table.startswith("| solver | grid | LML | correction ms | scheduler ms | paper |")
    assert line_of(table, "default", "1.000 ± 0") == [
        *("ddim", "default", "default", "1.000 ± 0", "2.900 ± 0.14 (+52.6 ± 3.9 %)", "")
    ]
    assert "Milliseconds" in table and "at 5 evaluations" in table and "threads 1" in table
    assert "best" not in table and "**" not in table
    assert {row["metric"] for row in csv.DictReader((out / "results.csv").open())} == {
        "fd",
        "timing/correction",
        "timing/scheduler",
    }
    for run in (out.parent / "outputs/study").glob("*/metrics.json"):
        run.unlink()
    out, _ = tabulate(out="alone")
    assert {path.name for path in out.iterdir()} == {
        *("results.csv", "timing_nfe5.md", "timing_nfe5.csv", "timing_nfe5.tex", "index.html")
    }


# --- figures -----------------------------------------------------------------------------------


def grid_of_settings():
    return [
        result(lml, nfe=nfe, value=nfe / 10, run=f"{lml}{nfe}{solver}", solver=solver)
        for lml in ("off", "default")
        for nfe in (5, 8)
        for solver in ("ddim", "unipc")
    ]


def lines_of(axes):
    """The lines of a panel by their colours; without the grey one of the best base."""
    return {line.get_color(): line for line in axes.lines if line.get_color() != GREY}


def legend_of(drawn):
    """What the legend says, and how it looks."""
    (legend,) = drawn.legends
    texts = [text.get_text() for text in legend.get_texts()]
    return dict(zip(texts, legend.get_lines(), strict=True))


GREY = figures.BEST["color"]
OFF_COLOR, DEFAULT_COLOR = (figures.LOOKS[lml].color for lml in ("off", "default"))


def test_a_panel_a_solver_and_grid():
    given = grid_of_settings()
    given += [dataclasses.replace(r, grid="karras", run=f"{r.run}k") for r in given[:2]]
    given = [r for r in given if (r.solver, r.grid) != ("unipc", "karras")]
    drawn = figures.curves(tables.build("fd", given))
    titles = [axes.get_title().replace("\n", ", ") for axes in drawn.axes]
    assert titles == ["DDIM, default grid", "DDIM, Karras", "UniPC-3"]
    assert len(titles) == len({(r.solver, r.grid) for r in given})
    assert {(axes.get_xscale(), axes.get_yscale()) for axes in drawn.axes} == {("log", "log")}
    first, *others = drawn.axes
    assert all(first.get_shared_y_axes().joined(first, axes) for axes in others)
    assert figures.curves(tables.build("fd", several("off", [1.0]))) is None


def test_the_axes_say_what_people_say():
    given = [with_metric(r, "fd_cifar") for r in grid_of_settings()]
    drawn = figures.curves(tables.build("fd_cifar", given))
    assert drawn.get_supylabel() == "FD-CIFAR ↓"
    assert drawn.get_supxlabel() == "network evaluations"
    assert [axes.get_title() for axes in drawn.axes] == ["DDIM", "UniPC-3"]
    given = [dataclasses.replace(with_metric(r), grid="trailing") for r in given]
    drawn = figures.curves(tables.build("clip_score", given))
    assert drawn.get_supylabel() == "CLIP score ↑"
    assert drawn.get_supxlabel() == "network evaluations, trailing grid"


def with_metric(result, metric="clip_score"):
    return dataclasses.replace(result, metric=metric)


def test_a_setting_looks_the_same_in_every_panel_and_every_study():
    presets = ["off", "default", "published", *figures.CALIBRATED_LOOKS]
    assert set(figures.CALIBRATED_LOOKS) <= set(labels.CALIBRATIONS)
    alone = {lml: figures.looks([lml])[lml] for lml in presets}
    assert figures.looks(presets) == alone
    for part in zip(*alone.values(), strict=True):
        assert len(set(part)) >= len(presets) - 1  # two lines are solid
    older = figures.looks(["off", "default, method 1", "damping=8, method 1"])
    assert older["default, method 1"] == alone["default"]
    both = figures.looks(["off", "default", "default, method 1", "damping=8"])
    assert both["default"] == alone["default"] and len(set(both.values())) == 4

    drawn = figures.curves(tables.build("fd", grid_of_settings()))
    assert [set(lines_of(axes)) for axes in drawn.axes] == [{OFF_COLOR, DEFAULT_COLOR}] * 2
    legend = legend_of(drawn)
    assert list(legend) == ["LML off", "LML default", figures.BEST_LABEL]
    for axes in drawn.axes:
        for label, color in {"LML off": OFF_COLOR, "LML default": DEFAULT_COLOR}.items():
            line = lines_of(axes)[color]
            assert legend[label].get_color() == color
            assert legend[label].get_linestyle() == line.get_linestyle()
            assert legend[label].get_marker() == line.get_marker()


def test_the_grey_line_is_the_best_base_of_its_group():
    given = []
    for solver, values in {"ddim": (4.0, 1.0), "unipc": (3.0, 2.0)}.items():
        for nfe, value in zip((5, 8), values, strict=True):
            run = f"{solver}{nfe}"
            given.append(result(solver=solver, nfe=nfe, value=value, run=run))
            given.append(result("default", solver=solver, nfe=nfe, value=0.1, run=f"{run}d"))
            # of another model, whose numbers are not compared with these
            more = {"model": "n", "solver": solver, "nfe": nfe, "run": f"{run}n"}
            given.append(result(value=10 * value, **more))
    drawn = figures.curves(tables.build("fd", given))
    found = {}
    for axes in drawn.axes:
        (line,) = (line for line in axes.lines if line.get_color() == GREY)
        found[axes.get_title().replace("\n", ", ")] = line.get_xydata().tolist()
    best = [[5, 3], [8, 1]], [[5, 30], [8, 10]]
    assert found == {
        f"{solver}, {model}": line
        for model, line in zip("mn", best, strict=True)
        for solver in ("DDIM", "UniPC-3")
    }
    # higher is better
    drawn = figures.curves(tables.build("clip_score", [with_metric(r) for r in given]))
    (line,) = (line for line in drawn.axes[0].lines if line.get_color() == GREY)
    assert line.get_ydata().tolist() == [4, 2]
    # at 7 there is nothing to be better than: Heun makes an odd number of evaluations
    odd = [result(solver="heun", nfe=7, value=90, run="odd")]
    drawn = figures.curves(tables.build("fd", [*(r for r in given if r.model == "m"), *odd]))
    for axes in drawn.axes:
        (line,) = (line for line in axes.lines if line.get_color() == GREY)
        assert line.get_xydata().tolist() == best[0]
    # one solver is its own best
    drawn = figures.curves(tables.build("fd", [r for r in given if r.solver == "ddim"]))
    assert not any(line.get_color() == GREY for axes in drawn.axes for line in axes.lines)
    assert figures.BEST_LABEL not in legend_of(drawn)


def test_the_spread_over_seeds_is_a_band():
    given = several("off", [1.0, 3.0]) + several("off", [2.0], nfe=8)
    (axes,) = figures.curves(tables.build("fd", given)).axes
    (band,) = axes.collections
    (path,) = band.get_paths()
    at_five = path.vertices[path.vertices[:, 0] == 5][:, 1]
    assert (min(at_five), max(at_five)) == pytest.approx((2 - math.sqrt(2), 2 + math.sqrt(2)))
    assert set(path.vertices[path.vertices[:, 0] == 8][:, 1]) == {2.0}  # one seed has none


def with_options(given, **changes):
    """The same with other options of LML."""
    lml = canonical({**DEFAULT, **changes})
    tag = canonical(changes)
    return [dataclasses.replace(r, lml=lml, run=f"{r.run}{tag}") for r in given]


@pytest.mark.parametrize("settings", range(10))
@pytest.mark.parametrize("solvers", [("ddim",), ("ddim", "unipc")])
def test_no_legend_is_longer_than_six_lines(settings, solvers):
    off = [result(solver=s, nfe=n, run=f"{s}{n}") for s in solvers for n in (5, 8)]
    given = list(off)
    for k in range(settings):
        given += with_options(off, damping=k + 1.0)
    drawn = figures.curves(tables.build("fd", given))
    if drawn is None:
        assert settings * len(solvers) > figures.PANELS
        return
    legend = legend_of(drawn)
    assert len(legend) <= 6
    looks = {
        (line.get_color(), line.get_linestyle(), line.get_marker()) for line in legend.values()
    }
    assert len(looks) == len({look[0] for look in looks}) == len(legend)
    if figures.THIS not in legend:
        assert len(drawn.axes) == len(solvers)
    else:  # a panel a setting, beside LML off
        assert len(drawn.axes) == settings * len(solvers)
        assert "damping 1" in drawn.axes[0].get_title()
        assert all(len(lines_of(axes)) == 2 for axes in drawn.axes)
    FigureCanvasAgg(drawn).draw()
    (legend,) = drawn.legends
    box = legend.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= drawn.bbox.x1 and box.y1 <= drawn.bbox.y1
    assert all(axes.get_window_extent().y1 < box.y0 for axes in drawn.axes)


def test_too_many_settings_leave_those_that_have_a_name():
    off = [result(nfe=nfe, run=f"{nfe}") for nfe in (5, 8)]
    assert figures.curves(tables.build("fd", off)) is not None  # there is nothing else
    many = list(off)
    for k in range(figures.PANELS + 1):
        many += with_options(off, damping=k + 1.0)
    assert figures.curves(tables.build("fd", many)) is None
    named = [*many, *with_options(off)]
    assert list(legend_of(figures.curves(tables.build("fd", named)))) == ["LML off", "LML default"]


def test_settings_of_many_versions_are_no_endless_search():
    off = [result(nfe=nfe, run=f"{nfe}") for nfe in (5, 8)]
    given = [*off, *with_options(off)]
    for version in range(METHOD_VERSION + 1, METHOD_VERSION + 9):
        given += with_options(off, method_version=version)
    drawn = figures.curves(tables.build("fd", given))
    assert list(legend_of(drawn)) == ["LML off", "LML default"]


def test_values_below_zero_are_not_on_a_logarithmic_axis():
    given = [result(value=-1.0), result(nfe=8, run="b")]
    assert figures.curves(tables.build("fd", given)).axes[0].get_yscale() == "linear"


@pytest.mark.parametrize(
    "values", [(1.0, 1.6), (3.1, 12.0), (0.02, 9.0), (1e-5, 100.0), (1.0, 1e9)]
)
def test_a_logarithmic_axis_has_a_few_numbers(values):
    given = [result(nfe=nfe, value=v, run=f"{nfe}") for nfe, v in zip((5, 8), values, strict=True)]
    (axes,) = figures.curves(tables.build("fd", given)).axes
    FigureCanvasAgg(axes.figure).draw()
    low, high = axes.get_ylim()
    texts = [t.get_text() for t in axes.get_yticklabels() if low <= t.get_position()[1] <= high]
    assert low < values[0] and values[1] < high and 3 <= len(texts) <= 6, texts
    assert all(float(text) > 0 for text in texts)


def test_panels_of_many_evaluations_leave_out_numbers_without_room():
    given = [
        result(nfe=nfe, run=f"{solver}{nfe}", solver=solver)
        for nfe in (*range(5, 21), 30, 50, 100)
        for solver in ("ddim", "deis", "ipndm", "pndm", "unipc")
    ]
    drawn = figures.curves(tables.build("fd", given))
    FigureCanvasAgg(drawn).draw()
    axes = drawn.axes[0]
    shown = [text for text in axes.get_xticklabels() if text.get_text()]
    boxes = [text.get_window_extent() for text in shown]
    assert len(shown) > 4 and all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes))


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "configs/solver").glob("*")))
def test_every_solver_has_a_name_that_people_write(name):
    written = labels.solver_name(name)
    assert written not in ("", name) and "{" not in written and "_" not in written


def test_the_name_of_a_solver_has_its_order():
    assert labels.solver_name("dpmsolverpp") == "DPM-Solver++(3M)"
    assert labels.solver_name("dpmsolverpp, solver_order=2") == "DPM-Solver++(2M)"
    assert labels.solver_name("unipc, solver_order=2, eta=1") == "UniPC-2, eta 1"
    assert labels.solver_name("authors_dpm_lm") == "DPM-Solver-3, released LML"
    assert labels.solver_name("ddim, solver_order=2") == "DDIM, solver order 2"
    # results of a solver whose config is gone
    assert labels.solver_name("of_a_{plugin}") == "of_a_{plugin}"


def test_every_metric_has_a_name_that_people_write():
    for path in (ROOT / "configs/metrics").glob("*.yaml"):
        if (cls := class_by_name(path.stem)) is None:
            continue
        parts = [f"{path.stem}/{part}" for part in declared(cls).parts] or [path.stem]
        assert set(parts) <= set(labels.METRICS)
    assert labels.metric_name("of_a_plugin/part") == "of a plugin, part"


def searched(dampings=(4.0, 8.0), ranks=(1, 2), base=True):
    given = [result(value=1.0)] if base else []
    for rank in ranks:
        for damping in dampings:
            lml = canonical({**DEFAULT, "rank": rank, "damping": damping})
            value = 1 + (rank - 1.5) * damping / 8
            given.append(dataclasses.replace(result(value=value, run=f"{rank}{damping}"), lml=lml))
    return given


def test_what_a_metric_says_step_by_step(make_run, tabulate):
    steps = {"timestep": [900.0, 500.0, 0.0], "cosine": [0.5, None, 0.25]}
    for seed in (0, 10):
        entry = {"value": {"cosine": 0.5, "min": 0.0}, "protocol": {}, "steps": steps}
        make_run("default", seed=seed, metrics={"c": entry})
        steps = {**steps, "cosine": [1.0, 0.5, 0.75]}
    out, _ = tabulate()
    assert (out / "c_cosine_steps.png").exists() and not (out / "c_min_steps.png").exists()
    made = results.from_csv(out / "results.csv", [], pytest.fail)
    drawn = figures.steps(tables.build("c/cosine", made), made)
    (axes,) = drawn.axes
    (line,) = axes.lines
    assert list(line.get_xdata()) == [900, 500, 0] and axes.xaxis_inverted()
    assert np.array_equal(line.get_ydata(), [0.75, np.nan, 0.5], equal_nan=True)
    assert figures.steps(tables.build("c/min", made), made) is None
    assert drawn.get_supxlabel() == "timestep (5 network evaluations)"


def with_steps(given):
    steps = canonical({"timestep": [900.0, 500.0], "value": [0.5, 0.25]})
    return [dataclasses.replace(r, steps=steps) for r in given]


def test_steps_have_a_panel_a_solver_and_number_of_evaluations():
    given = with_steps(grid_of_settings())
    drawn = figures.steps(tables.build("fd", given), given)
    titles = [axes.get_title().replace("\N{NO-BREAK SPACE}", " ") for axes in drawn.axes]
    assert titles == ["DDIM, NFE 5", "DDIM, NFE 8", "UniPC-3, NFE 5", "UniPC-3, NFE 8"]
    assert all(set(lines_of(axes)) == {OFF_COLOR, DEFAULT_COLOR} for axes in drawn.axes)
    assert list(legend_of(drawn)) == ["LML off", "LML default"]


def test_steps_of_a_search_have_a_panel_a_rank_and_a_line_a_damping():
    given = with_steps(searched(dampings=(0.5, 4.0, 16.0), ranks=(1, 2, 3), base=False))
    drawn = figures.steps(tables.build("fd", given), given)
    assert [axes.get_title() for axes in drawn.axes] == [f"DDIM, rank {rank}" for rank in (1, 2, 3)]
    assert list(legend_of(drawn)) == ["LML damping 0.5", "LML damping 4", "LML damping 16"]
    assert all(len(axes.lines) == 3 for axes in drawn.axes)


@pytest.mark.parametrize("base", [True, False])
def test_a_map_of_damping_and_rank(base):
    given = searched(base=base)
    drawn = figures.maps(tables.build("fd", given), given)
    (axes,) = (axes for axes in drawn.axes if axes.images)
    (image,) = axes.images
    expected = np.array([[-0.25, -0.5], [0.25, 0.5]]) + (0 if base else 1)
    assert np.allclose(image.get_array(), expected)
    if base:  # white is the base's value, blue what is better
        below, at, above = (image.cmap(image.norm(value)) for value in (-0.3, 0.0, 0.3))
        assert below[2] > below[0] and above[0] > above[2] and min(at) > 0.95
    assert [text.get_text() for text in axes.get_xticklabels()] == ["4", "8"]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["1", "2"]


def test_no_map_unless_both_vary():
    for given in (searched(ranks=(2,)), searched(dampings=(8.0,)), [result()]):
        assert figures.maps(tables.build("fd", given), given) is None


def test_a_map_for_each_of_the_other_settings():
    given = searched()
    for r in searched(base=False):
        lml = canonical({**json.loads(r.lml), "target": "increment"})
        given.append(dataclasses.replace(r, lml=lml, run=r.run + "i"))
    given.remove(given[1])  # one of the first map's cells
    drawn = figures.maps(tables.build("fd", given), given)
    titles = [axes.get_title() for axes in drawn.axes if axes.images]
    assert titles == [
        "DDIM, target increment, 5 evaluations",
        "DDIM, target prediction, 5 evaluations",
    ]
    assert "–" in [text.get_text() for text in drawn.axes[1].texts]


def test_a_damping_that_grows_with_the_steps_has_axes_of_its_own():
    more = searched(dampings=(16.0, 32.0, 64.0))
    given = [*searched(), *(dataclasses.replace(r, nfe=8, run=r.run + "8") for r in more)]
    five, eight = figures.maps(tables.build("fd", given), given).axes
    assert [text.get_text() for text in five.get_xticklabels()] == ["4", "8"]
    assert [text.get_text() for text in eight.get_xticklabels()] == ["16", "32", "64"]


def test_strips_show_the_same_noise_at_every_setting(make_run, tmp_path):
    off, ours = (make_run(lml, num_images=10, nfe=5) for lml in ("off", "default"))
    make_run("default", num_images=10, nfe=5, seed=50)  # of other noise: not beside these
    make_run("off", num_images=10, nfe=8)  # nothing to compare with
    runs = tmp_path / "outputs/study"
    made = figures.strips(results.collect(runs, pytest.fail), runs)
    assert list(made) == ["samples_nfe5"]
    pictures = figures.encode(made["samples_nfe5"])
    drawn = np.asarray(Image.open(io.BytesIO(pictures["png"])).convert("RGB"))
    top = 20  # of the title
    for run in (off, ours):
        for k in range(8):
            image = np.asarray(Image.open(run / f"images/{k:06d}.png"))
            left = drawn.shape[1] - 8 * 18 + 18 * k
            shown = drawn[top : top + 16, left : left + 16]
            assert np.array_equal(shown, image.repeat(2, axis=0).repeat(2, axis=1))
        top += 18
    assert drawn.shape[0] == top


def test_hundreds_of_settings_are_no_strip():
    rows = list(tables.build("fd", [result(), result("default", run="b")]).rows)
    rows[1] = rows[1]._replace(lml="default, method 1")
    many = [rows[0]._replace(lml=f"rank={k}") for k in range(figures.OTHERS + 1)]
    assert figures.worth_drawing([*rows, *many]) == rows
    assert figures.worth_drawing([*rows, *many[1:]]) == [*rows, *many[1:]]
    assert figures.worth_drawing([rows[0], *many]) == []


def test_large_images_are_shrunk():
    assert figures._resized(Image.new("RGB", (512, 256))).shape == (64, 128, 3)


def test_figures_are_the_same_bytes_every_time():
    given = [*searched(), result(nfe=8, run="b")]
    for draw in (figures.curves, lambda table: figures.maps(table, given)):
        first, second = (figures.encode(draw(tables.build("fd", given))) for _ in range(2))
        assert first == second and set(first) == {"png", "svg"}
        assert b"<dc:date>" not in first["svg"]


def test_a_figure_of_many_panels_is_small():
    solvers = ("ddim", "deis", "dpmsolver", "dpmsolverpp", "ipndm", "unipc")
    given = [
        result(lml, solver=s, grid=grid, nfe=nfe, value=value / nfe, run=f"{s}{grid}{nfe}{lml}")
        for s in solvers
        for grid in ("leading", "trailing", "karras", "exponential", "linspace")
        for nfe in (5, 8, 20)
        for lml, value in {"off": 3.0, "default": 2.0, "other": 1.0}.items()
    ]
    drawn = figures.curves(tables.build("fd", given))
    assert len(drawn.axes) == 30
    png = figures.encode(drawn)["png"]
    assert len(png) < 200_000 and Image.open(io.BytesIO(png)).width <= 1600


# --- the whole ---------------------------------------------------------------------------------


def test_runs_become_tables(script, toy, tmp_path):
    arguments = ["nfe=3,4", "lml.rank=0,2", "name=study", "metrics=[convergence]"]
    more = ["metrics.convergence.nfe=5"]
    assert script("sample", "-m", *toy, *arguments, *more).code == 0
    runs = tmp_path / "outputs/study"
    folders = {path for path in runs.iterdir() if path.is_dir()}
    unfinished = next(path for path in folders if read_config(path)["nfe"] == 3)
    (unfinished / "manifest.json").unlink()
    outcome = script("tabulate", "name=study")
    assert (outcome.code, outcome.err) == (0, "")
    out = tmp_path / "experiments/study"
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert len(rows) == 3 * 2  # rmse and cosine
    assert {row["run"] for row in rows} == {path.name for path in folders - {unfinished}}
    for metric in ("convergence_rmse", "convergence_cosine"):
        for suffix in ("md", "tex", "csv", "png", "svg"):
            assert (out / f"{metric}.{suffix}").stat().st_size > 0
    table = (out / "convergence_rmse.md").read_text()
    assert "10 images" in table and "1 seed(s)" in table and "8x8" in table
    assert "default" in table and "off" in table and (out / "samples_nfe4.png").exists()

    done = next(path for path in folders - {unfinished})
    edit(done / "metrics.json", lambda entries: entries["convergence"]["value"].update(rmse=0.0))
    outcome = script("tabulate", "name=study", "show=[timing/correction_share,convergence]")
    assert outcome.code == 0 and outcome.err.count("convergence was edited") == 1
    assert len(list(out.glob("timing_nfe*.md"))) == 2
    # measured anew, as it is in the sweep's own command
    assert script("evaluate", f"run_dir={done}", "metrics=[convergence]", *more).code == 0
    outcome = script("tabulate", "name=study")
    assert (outcome.code, outcome.err) == (0, "")


def test_bad_input(script, make_run, tmp_path):
    make_run(value=1.0)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "taken/results.csv/x").mkdir(parents=True)
    for arguments, message in {
        "runs=nowhere": "runs=nowhere: no such folder",
        "experiment=table1_cifar10": "runs=outputs/table1_cifar10: no such folder",
        "experiment=tabel1_cifar10": "experiment=tabel1_cifar10: unknown; nearest: table1_cifar10",
        "runs=empty": "runs=empty: no complete run with a metric",
        "name=study show=[fdd]": "show=fdd: in none of the runs; nearest: fd",
        "name=study show=timing": "show=timing: in none of the runs; nearest: fd",
        "name=study out=file": "out=file: ",
        "name=study out=file/below": "out=file/below: ",
        "name=study out=taken": "out=taken: ",
    }.items():
        outcome = script("tabulate", *arguments.split())
        said = [line for line in outcome.err.splitlines() if "results.csv: broken" not in line]
        assert outcome.code == 2 and len(said) == 1, (arguments, outcome.err)
        assert said[0].startswith(message)
