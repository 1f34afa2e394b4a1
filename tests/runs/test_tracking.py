"""What a run shows and logs: a bar or lines, and Weights & Biases."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from lml.runs.loggers import WandbLogger
from lml.runs.progress import Progress

# --- Weights & Biases --------------------------------------------------------------------------


@pytest.fixture
def wandb(monkeypatch, tmp_path):
    module = pytest.importorskip("wandb")
    for variable in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(variable)
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(WandbLogger, "is_unreachable", False)
    module.teardown()  # it reads its variables once
    yield module
    module.teardown()


@pytest.fixture
def started(script, toy, wandb, monkeypatch):
    """`started(*arguments)`: the settings that W&B starts with, before it would connect."""

    def start(*arguments: str):
        seen = []

        def init(settings, config, **given):
            names = {"group": "run_group", "name": "run_name", "tags": "run_tags"}
            merged = wandb.setup().settings.model_copy()
            for key, value in given.items():
                if value is not None:
                    value = tuple(value) if key == "tags" else value
                    setattr(settings, names.get(key, key), value)
            merged.update_from_settings(settings)
            seen.append(merged)
            return SimpleNamespace(log=print, finish=lambda exit_code: None)

        with monkeypatch.context() as patch:
            patch.setattr(wandb, "init", init)
            outcome = script("sample", *toy, "logger=wandb", "run_dir=run", *arguments)
        assert outcome.code == 0
        return seen[0] if seen else outcome.err

    return start


def test_wandb_is_offline_without_a_key_and_always_finished(
    script, toy, tmp_path, wandb, monkeypatch
):
    codes = []
    finish = wandb.Run.finish
    monkeypatch.setattr(
        wandb.Run,
        "finish",
        lambda self, exit_code=None: codes.append(exit_code) or finish(self, exit_code),
    )
    outcome = script("sample", *toy, "logger=wandb", "run_dir=run")
    assert (outcome.code, outcome.err) == (0, "")
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    assert list(run.glob("*.wandb"))
    outcome = script("sample", *toy, "logger=wandb", "nfe=5", "run_dir=run")
    assert outcome.code == 2 and codes == [0, 1] and wandb.run is None


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_a_wandb_that_fails_is_one_warning(script, toy, tmp_path, wandb, monkeypatch, broken):
    class Run:
        def __getattr__(self, name):
            def call(*args, **kwargs):
                if name == broken:
                    raise RuntimeError("no network\nat all")

            return call

    def init(**kwargs):
        if broken == "init":
            raise RuntimeError("no network\nat all")
        return Run()

    monkeypatch.setattr(wandb, "init", init)
    outcome = script("sample", *toy, "logger=wandb", "run_dir=run")
    assert outcome.code == 0
    assert outcome.err == "logger=wandb: no network; the run goes on without it\n"
    assert json.loads((tmp_path / "run/manifest.json").read_text())["complete"]


@pytest.mark.parametrize("error", [SystemExit(3), ImportError("No module"), OSError("broken")])
@pytest.mark.parametrize("broken", ["Image", "Settings", "init"])
def test_nothing_in_wandb_stops_a_run(script, toy, tmp_path, wandb, monkeypatch, broken, error):
    def fail(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(wandb, broken, fail)
    outcome = script("sample", *toy, "logger=wandb", "run_dir=run")
    assert outcome.code == 0
    assert outcome.err == f"logger=wandb: {error}; the run goes on without it\n"


def test_a_wandb_that_is_not_installed_is_one_warning(script, toy, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    outcome = script("sample", *toy, "logger=wandb", "run_dir=run")
    assert outcome.code == 0 and outcome.err.count("\n") == 1
    assert re.match(r"logger=wandb: .*wandb.*; the run goes on without it", outcome.err)
    assert json.loads((tmp_path / "run/manifest.json").read_text())["complete"]


@pytest.mark.parametrize("mode", ["auto", "online"])
def test_a_server_that_does_not_answer_is_told_once(
    script, toy, tmp_path, wandb, monkeypatch, mode
):
    """Every run of a sweep would wait for it."""
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    arguments = [*toy, "logger=wandb", f"logger.mode={mode}", "name=study", "seed=0,100,200"]
    start = time.monotonic()
    outcome = script("sample", "-m", *arguments)
    lines = [line for line in outcome.err.splitlines() if not line.startswith("wandb: ")]
    assert outcome.code == 0 and len(lines) == 1, outcome.err
    assert re.match(r"logger=wandb: .*; runs are logged offline from now on", lines[0])
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 3
    assert time.monotonic() - start < 20
    outcome = script("sample", *toy, "logger=wandb", "logger.mode=disabled", "run_dir=run")
    assert (outcome.code, outcome.err) == (0, "")
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 3


# All that the installed W&B knows, those with a key would be "online" without the variable.
@pytest.mark.parametrize("mode", ["online", "offline", "shared", "disabled", "dryrun", "run"])
@pytest.mark.parametrize("key", ["", "a" * 40])
def test_the_variable_of_wandbs_mode_wins_over_auto(started, monkeypatch, mode, key):
    monkeypatch.setenv("WANDB_MODE", mode)
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    assert started().mode == mode


def test_wandbs_mode_in_the_config_wins_over_the_variable(started, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert started("logger.mode=offline").mode == "offline"


def test_the_mode_that_wandb_was_put_into_wins_over_auto(started, tmp_path, monkeypatch):
    """As `wandb offline` writes it."""
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb/settings").write_text("[default]\nmode = offline\n")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    assert started().mode == "offline"


def with_key(folder: Path) -> dict[str, str]:
    return {"WANDB_API_KEY": "a" * 40}


def with_netrc(folder: Path) -> dict[str, str]:
    (folder / ".netrc").touch(0o644)  # which Python's netrc would not read, and W&B does
    (folder / ".netrc").write_text("machine api.wandb.ai login user password " + "a" * 40)
    return {}


def with_another_netrc(folder: Path) -> dict[str, str]:
    (folder / "keys").write_text("machine api.wandb.ai login user password " + "a" * 40)
    return {"NETRC": str(folder / "keys")}


def with_a_server(folder: Path) -> dict[str, str]:
    (folder / ".netrc").write_text("machine logs.example.org login user password " + "a" * 40)
    return {"WANDB_BASE_URL": "https://logs.example.org"}


def with_a_token(folder: Path) -> dict[str, str]:
    (folder / "token").write_text("token")
    return {"WANDB_IDENTITY_TOKEN_FILE": str(folder / "token")}


def with_anothers_key(folder: Path) -> dict[str, str]:
    (folder / ".netrc").write_text("machine github.com login user password " + "a" * 40)
    return {}


@pytest.mark.parametrize(
    ("give", "mode"),
    [
        (lambda folder: {}, "offline"),
        (with_key, "online"),
        (with_netrc, "online"),
        (with_another_netrc, "online"),
        (with_a_server, "online"),
        (with_a_token, "online"),
        (with_anothers_key, "offline"),
    ],
)
def test_auto_is_online_where_there_is_a_key(started, tmp_path, monkeypatch, give, mode):
    for variable, value in give(tmp_path).items():
        monkeypatch.setenv(variable, value)
    assert started().mode == mode


def test_other_variables_of_wandb_win_over_our_defaults(started, monkeypatch):
    plain = started()
    assert (plain.project, plain.run_name, plain.init_timeout) == ("lml", "cifar10-dpmsolverpp", 30)
    variables = {"PROJECT": "p", "NAME": "n", "TAGS": "a,b", "RUN_GROUP": "g", "ENTITY": "e"}
    for name, value in {**variables, "INIT_TIMEOUT": "5", "SILENT": "false"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    sys.modules["wandb"].teardown()
    theirs = started()
    assert (theirs.project, theirs.run_name, theirs.run_tags) == ("p", "n", ("a", "b"))
    assert (theirs.run_group, theirs.entity) == ("g", "e")
    assert (theirs.init_timeout, theirs.silent) == (5, False)
    given = started("logger.project=q", "logger.tags=[c]", "logger.group=h", "logger.entity=f")
    assert (given.project, given.run_tags, given.run_group, given.entity) == ("q", ("c",), "h", "f")


@pytest.mark.parametrize("where", ["variable", "config"])
def test_a_mode_that_wandb_does_not_know_is_one_warning(script, toy, wandb, monkeypatch, where):
    arguments = ["logger.mode=ofline"] if where == "config" else []
    if where == "variable":
        monkeypatch.setenv("WANDB_MODE", "ofline")
    outcome = script("sample", *toy, "logger=wandb", *arguments)
    assert outcome.code == 0 and outcome.err.count("\n") == 1
    assert re.match(r"logger=wandb: mode=ofline: .*offline.*; the run goes on", outcome.err)


def test_wandb_disabled_by_its_variable_writes_nothing(script, toy, tmp_path, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    outcome = script("sample", *toy, "logger=wandb")
    assert (outcome.code, outcome.err) == (0, "") and not list(tmp_path.glob("wandb/*run-*"))


def test_progress_is_a_bar_in_a_terminal_and_lines_elsewhere(monkeypatch, capfd):
    monkeypatch.setattr("lml.runs.progress.LINE_SECONDS", 0.0)
    progress = Progress(10)
    for _ in range(5):
        progress.update(2)
    progress.close()
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 4 and lines[0].startswith("2 of 10 images, ") and " left" in lines[0]

    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    progress = Progress(10)
    progress.update(10)
    progress.close()
    err = capfd.readouterr().err
    assert "10/10" in err and "image/s" in err
    progress = Progress(10, show=False)
    progress.update(10)
    progress.close()
    assert capfd.readouterr().err == ""
