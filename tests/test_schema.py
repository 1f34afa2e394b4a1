"""Schemas: what they take and refuse, and that each config that ships is as they say."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any, get_args

import diffusers
import pytest
from omegaconf import OmegaConf

from lml import schema
from lml.configs import CONFIGS, compose
from lml.data.assets import ROOT
from lml.errors import UserError
from lml.files import DEPTH, check_path, load_json, read_object
from lml.runs.sampling import ATTENTION, DTYPES

DEEP = 100_000 * "[" + 100_000 * "]"


def config(script: str = "sample", *overrides: str) -> dict[str, Any]:
    return OmegaConf.to_container(compose(*overrides, config=script), resolve=True)


OPTIONS = [
    f"{group}={file.relative_to(CONFIGS / group).with_suffix('')}"
    for group in ("model", "solver", "grid", "lml", "metrics", "logger", "protocol", "sweep")
    for file in sorted((CONFIGS / group).rglob("*.yaml"))
]


@pytest.mark.parametrize("option", OPTIONS)
def test_every_config_is_as_its_schema_says(option):
    schema.check(config("sample", option), schema.Sample)


@pytest.mark.parametrize(
    ("script", "overrides"),
    [
        ("calibrate", []),
        ("calibrate", ["objective=features"]),
        ("train", []),
        ("train", ["train=features"]),
        ("evaluate", []),
        ("tabulate", []),
        ("benchmark", []),
        ("export", ["layout=t2i_compbench", "out=x"]),
    ],
)
def test_so_are_those_of_the_other_scripts(script, overrides):
    cfg = config(script, *overrides)
    schema.check(cfg, schema.of_script(script, cfg))


def test_names_of_types_and_attention_are_those_that_there_are():
    assert set(get_args(schema.Dtype)) == set(DTYPES)
    assert set(get_args(schema.Attention)) == set(ATTENTION)


REFUSED = {
    "num_images": (10**12, "10000000 (a run's files are listed and hashed one by one)"),
    "threads": (10**8, "1024 (the system starts no more, and the process ends)"),
    "nfe": (True, "nfe=True: expected a whole number of at least 1"),
    "seed": (2.0, "seed=2.0: expected a whole number of at least 0"),
    "name": ("../b", "name=../b: expected a folder's name"),
    "dtype": (None, "dtype=null: expected one of float32"),
    "compile": (1, "compile=1: expected true or false"),
    "metrics": ({"fd": 3}, "metrics.fd=3: expected a group with a _target_"),
    "prompts": ([], "prompts=[]: expected a group with a _target_ or an empty group"),
    "solver": ({"name": "x", "scheduler": None}, "solver.scheduler=null: expected a group with"),
    "device": ("a\nb", r"device='a\nb': expected text on one line"),
    "show": (["a", 3], "show[1]=3: expected text on one line"),
    "run_dir": ("x" * 5000 + "\0", "xxx...: expected null or a path"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_is_refused_and_what_is_said(key):
    value, line = REFUSED[key]
    with pytest.raises(UserError) as error:
        schema.check({**config(), key: value}, schema.Sample)
    assert line in str(error.value) and "\n" not in str(error.value)
    assert len(str(error.value)) < 300


def test_a_key_that_is_gone():
    cfg = config()
    del cfg["nfe"]
    with pytest.raises(UserError, match=r"^nfe: missing; expected a whole number of at least 1$"):
        schema.check(cfg, schema.Sample)


def function(count: int, part: float | None, names: tuple[str, ...] = (), other: Path = Path()):
    """Something that a `_target_` may name."""


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"count": "3"}, "f.count=3: expected a whole number"),
        ({"part": [1]}, r"f.part=\[1\]: expected null or a number"),
        ({"part": float("nan")}, "f.part=nan: expected a number"),
        ({"names": ["a", 1]}, r"f.names\[1\]=1: expected text"),
        ({"names": "a"}, r"f.names=a: expected a list \(each text\)"),
    ],
)
def test_arguments_are_held_against_hints(arguments, line):
    with pytest.raises(UserError, match=line):
        schema.check_call(function, arguments, "f")


def test_arguments_that_fit():
    made = {"_target_": "x", "anything": object()}
    schema.check_call(
        function, {"count": made, "part": 1, "names": ["a"], "other": "a", "more": 0}, "f"
    )


def test_no_scheduler_of_diffusers_is_refused_as_it_is_by_default():
    """Else hints are read more strictly than their authors mean them."""
    names = [name for name in dir(diffusers) if name.endswith("Scheduler")]
    assert len(names) > 20
    for name in names:
        parameters = inspect.signature(getattr(diffusers, name)).parameters
        given = {k: p.default for k, p in parameters.items() if p.default is not p.empty}
        schema.check_call(getattr(diffusers, name), given, name)


# --- files -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("a.json", '{"commands": [', "a.json: cannot be read"),
        ("a.json", DEEP, r"a.json: cannot be read \(nested too deep\)"),
        ("a.json", f'{{"a": {(DEPTH + 1) * "["}{(DEPTH + 1) * "]"}}}', "nested too deep"),
        ("a.yaml", DEEP, "nested too deep"),
        ("a.json", "[]", "a.json: not an object of keys and values"),
        ("a.json", '{"commands": [], "cells": {}}', "a.json: cells={}: expected a list"),
        ("a.yaml", "commands: [1]\ncells: []\n", r"a.yaml: commands\[0\]=1: expected text"),
        ("a.yaml", "cells: []\n", "a.yaml: commands: missing; expected a list"),
    ],
)
def test_a_file_that_is_not_as_it_should_be(tmp_path, name, content, line):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=line) as error:
        read_object(tmp_path / name, schema.SweepFile)
    assert "\n" not in str(error.value)


def test_files_are_read_in_one_way():
    """What else parses text parses what is in a table's row, or in a line of a file."""
    package = ROOT / "lml"
    parsing = {
        file.relative_to(package).as_posix()
        for file in package.rglob("*.py")
        if any(call in file.read_text() for call in ("json.load(", "yaml.load(", "json.loads("))
    }
    assert parsing == {"files.py", "report/figures.py", "report/labels.py", "report/text.py"}


def test_what_is_deep_but_not_too_deep():
    assert load_json(DEPTH // 2 * "[" + DEPTH // 2 * "]")


@pytest.mark.parametrize("path", ["", "x" * 256, "a/" + "ä" * 128, "a/" * 2000, "\0"])
def test_paths_that_no_file_has(path):
    with pytest.raises(UserError, match=r"key=.*: expected a path"):
        check_path(path, "key")
    check_path("a\nb/" + "x" * 255, "key")


@pytest.mark.parametrize("name", ["~/x", "a", "a.b", "...", ".a", "a/..b", "データ"])
def test_names_of_folders(name):
    assert schema.find_problem(schema.Name, name, "name") is None


@pytest.mark.parametrize("name", ["", ".", "..", "a/..", "a/../b", "./a", "/a", "a\nb", "\0", 5])
def test_names_that_lead_elsewhere(name):
    assert schema.find_problem(schema.Name, name, "name")


# --- the command line --------------------------------------------------------------------------

TINY = ["model=gaussian", "model.network.sample_size=4", "num_images=2", "batch_size=2", "nfe=2"]
TINY += ["metrics=none", "threads=1", "device=cpu"]


@pytest.mark.parametrize("unread", [["stdout"], ["stdout", "stderr"]])
def test_a_pipe_that_nobody_reads_loses_nothing(spawn, tmp_path, unread):
    """As in `sample.py | true`, and `sample.py 2>&1 | true`."""
    process = spawn("sample", *TINY, "run_dir=run", new=len(unread) == 2)
    for stream in unread:
        getattr(process, stream).close()
    err = "" if "stderr" in unread else process.stderr.read()
    assert (process.wait(timeout=120), err) == (0, "")
    assert json.loads((tmp_path / "run/manifest.json").read_text())["complete"]


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE='abc': expected a whole number"),
        ({"RANK": ""}, "RANK='': expected a whole number"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2: torchrun sets other variables, too"),
    ],
)
def test_what_torchrun_would_set(script, tmp_path, monkeypatch, environment, line):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    ended = script("sample", *TINY, "run_dir=run")
    assert ended.code == 2 and ended.err.startswith(line), ended.err
    assert ended.err.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_sweep_where_nothing_can_be_written(script, tmp_path):
    (tmp_path / "outputs").write_text("a file")
    outcome = script("sample", *TINY, "-m", "seed=0,100")
    assert outcome.code == 2 and outcome.err.count("\n") == 1, outcome.err
    assert outcome.err.startswith("hydra.sweep.dir=") and "Not a directory" in outcome.err


BROKEN = [
    ("metrics.json", '{"fd_cifar": 3}'),
    ("metrics.json", DEEP),
    ("timing.json", '{"images_per_second": null}'),
    ("manifest.json", '{"complete": true}'),
    ("manifest.json", "null"),
    ("config.yaml", "5"),
    ("config.yaml", "settings: {}\nmodel: 3\n"),
]


def test_broken_neighbours_are_named_and_left_out(script, tmp_path):
    sweep = [*TINY, "metrics=correction_cosine", "name=study", "progress=false"]
    sweep.remove("metrics=none")
    seeds = range(0, 100 * (len(BROKEN) + 1), 100)  # the last stays whole
    assert script("sample", *sweep, "-m", f"seed={','.join(map(str, seeds))}").code == 0
    *broken, whole = sorted((tmp_path / "outputs/study").glob("*/manifest.json"))
    for neighbour, (name, content) in zip(broken, BROKEN, strict=True):
        neighbour.with_name(name).write_text(content)
    table = script("tabulate", "name=study", "show=[correction_cosine]")
    assert table.code == 0, table.err
    for neighbour, what in zip(broken, BROKEN, strict=True):
        assert neighbour.parent.name in table.err, what
    assert whole.parent.name not in table.err and "Traceback" not in table.err
    assert script("sample", *sweep, "-m", "seed=5000").code == 0


def test_one_bad_cell_is_named_and_the_others_are_made(script, tmp_path):
    outcome = script("sample", *TINY, "-m", "seed=0,x", "name=study", "progress=false")
    assert outcome.code == 0 and "seed=x: expected a whole number of at least 0" in outcome.err
    assert len(list((tmp_path / "outputs/study").glob("*/manifest.json"))) == 1
