"""What scripts share: one line per error, sweeps that go on, interruptions, loggers."""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys

import pytest

from lml import cli, runner, tracking
from lml.data.assets import ROOT
from lml.errors import UserError


@pytest.fixture
def crash(monkeypatch):
    """Makes the run fail with this exception."""

    def arm(error: BaseException, when=lambda cfg: True) -> None:
        run = runner.run

        def failing(cfg, observer=None):
            if when(cfg):
                raise error
            return run(cfg, observer)

        monkeypatch.setattr(runner, "run", failing)

    return arm


def test_what_is_no_users_error_keeps_its_traceback(script, toy, crash):
    crash(ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError):
        script("sample", *toy)


def test_a_value_error_of_ours_is_no_users_error(script, toy, crash):
    crash(ValueError("a bug"))
    with pytest.raises(ValueError, match="a bug"):
        script("sample", *toy)


@pytest.mark.parametrize("arguments", [["lml.damping=-1"], ["solver=dimm"]])
def test_every_traceback_on_demand(script, toy, monkeypatch, arguments):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # so that it is as it was in the end
    monkeypatch.setattr(monkeypatch, "setenv", lambda *_: os.environ.update(HYDRA_FULL_ERROR="1"))
    with pytest.raises(Exception, match=r"damping|dimm"):
        script("sample", *toy, *arguments)


def test_a_sweep_makes_every_cell(script, toy, tmp_path):
    outcome = script("sample", "-m", *toy, "nfe=4,5", "lml=default,off")
    assert (outcome.code, outcome.err) == (0, "")
    runs = tmp_path.glob("outputs/cifar10-dpmsolverpp/*/manifest.json")
    assert [json.loads(run.read_text())["complete"] for run in runs] == [True] * 4
    assert {f.name for f in tmp_path.iterdir()} == {"outputs"}


def test_a_crash_in_a_cell_is_named_and_the_others_are_made(script, toy, tmp_path, crash, capfd):
    crash(ZeroDivisionError("a bug"), when=lambda cfg: cfg.nfe == 4)
    with pytest.raises(ZeroDivisionError):
        script("sample", "-m", *toy, "nfe=4,5")
    err = capfd.readouterr().err
    assert ": a bug\n" in err and "nfe=4" in err.split(": a bug")[0]
    assert len(list(tmp_path.glob("outputs/cifar10-dpmsolverpp/*/manifest.json"))) == 1


def test_help_shows_groups_and_keys(script):
    outcome = script("sample", "--help")
    assert not outcome.code and "solver: " in outcome.out and "dpmsolverpp" in outcome.out
    assert "damping: null" in outcome.out and "num_images: 64" in outcome.out


def test_lines_name_the_rank(monkeypatch, capfd):
    cli.say("a")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    cli.say("b")
    assert capfd.readouterr().err == "a\n[rank 1] b\n"


def test_an_error_that_the_first_process_tells_is_not_told_again(script, toy, crash):
    error = UserError("told")
    error.elsewhere = True
    crash(error)
    outcome = script("sample", *toy)
    assert (outcome.code, outcome.err) == (2, "")


def test_interrupted_outside_of_sampling(script, toy, monkeypatch):
    monkeypatch.setattr(runner, "evaluate", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    arguments = ["metrics=convergence", "metrics.convergence.reference=x"]
    outcome = script("sample", *toy, *arguments)
    assert (outcome.code, outcome.err) == (143, "interrupted\n")


def test_an_error_is_told_even_when_its_way_out_is_cut_short(script, toy, monkeypatch):
    def run(cfg, observer=None):
        try:
            raise UserError("nfe=0: what went wrong")
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(runner, "run", run)
    outcome = script("sample", *toy)
    assert (outcome.code, outcome.err) == (143, "nfe=0: what went wrong\n")


def test_a_second_signal_does_not_end_the_tidying_up(script, toy, tmp_path, monkeypatch):
    write_manifest = runner.RunFolder.write_manifest

    def impatient(self, count):
        os.kill(os.getpid(), signal.SIGINT)
        return write_manifest(self, count)

    monkeypatch.setattr(runner.RunFolder, "write_manifest", impatient)
    outcome = script("sample", *toy, "run_dir=run")
    assert outcome.code == 130 and "interrupted: 10 of 10 images stored" in outcome.err
    assert (tmp_path / "run/manifest.json").exists()


@pytest.fixture
def wandb(monkeypatch, tmp_path):
    module = pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    return module


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


def test_progress_is_a_bar_in_a_terminal_and_lines_elsewhere(monkeypatch, capfd):
    monkeypatch.setattr(tracking, "LINE_SECONDS", 0.0)
    progress = tracking.Progress(10)
    for _ in range(5):
        progress.update(2)
    progress.close()
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 4 and lines[0].startswith("2 of 10 images, ") and " left" in lines[0]

    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    progress = tracking.Progress(10)
    progress.update(10)
    progress.close()
    err = capfd.readouterr().err
    assert "10/10" in err and "image/s" in err
    progress = tracking.Progress(10, show=False)
    progress.update(10)
    progress.close()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("file", sorted((ROOT / "scripts").glob("*.py")), ids=lambda f: f.stem)
def test_scripts_hide_no_module_of_their_name(monkeypatch, file):
    """torch.compile imports `tabulate`; Python puts a script's folder before everything else."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "scripts"), *sys.path])
    runpy.run_path(str(file), run_name="imported")
    assert str(ROOT / "scripts") not in sys.path and sys.path[0] == str(ROOT)
