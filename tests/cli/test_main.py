"""What scripts share: one line per error, sweeps that go on, interruptions."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from lml.cli.main import main
from lml.cli.values import PATHS, complete
from lml.configs import CONFIGS, compose
from lml.data.assets import ROOT
from lml.errors import UserError, say
from lml.runs import sample
from lml.runs.store import RunFolder


@pytest.fixture
def crash(monkeypatch):
    """Makes the run fail with this exception."""

    def arm(error: BaseException, when=lambda cfg: True) -> None:
        run = sample.run

        def failing(cfg, observer=None):
            if when(cfg):
                raise error
            return run(cfg, observer)

        monkeypatch.setattr("lml.runs.sample.run", failing)

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
    say("a")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    say("b")
    assert capfd.readouterr().err == "a\n[rank 1] b\n"


def test_an_error_that_the_first_process_tells_is_not_told_again(script, toy, crash):
    error = UserError("told")
    error.elsewhere = True
    crash(error)
    outcome = script("sample", *toy)
    assert (outcome.code, outcome.err) == (2, "")


def test_interrupted_outside_of_sampling(script, toy, monkeypatch):
    monkeypatch.setattr(
        "lml.runs.sample.evaluate", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM)
    )
    arguments = ["metrics=convergence", "metrics.convergence.reference=x"]
    outcome = script("sample", *toy, *arguments)
    assert (outcome.code, outcome.err) == (143, "interrupted\n")


def test_an_error_is_told_even_when_its_way_out_is_cut_short(script, toy, monkeypatch):
    def run(cfg, observer=None):
        try:
            raise UserError("nfe=0: what went wrong")
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("lml.runs.sample.run", run)
    outcome = script("sample", *toy)
    assert (outcome.code, outcome.err) == (143, "nfe=0: what went wrong\n")


def test_a_second_signal_does_not_end_the_tidying_up(script, toy, tmp_path, monkeypatch):
    write_manifest = RunFolder.write_manifest

    def impatient(self, *args, **options):
        os.kill(os.getpid(), signal.SIGINT)
        return write_manifest(self, *args, **options)

    monkeypatch.setattr(RunFolder, "write_manifest", impatient)
    outcome = script("sample", *toy, "run_dir=run")
    assert outcome.code == 130 and "interrupted: 10 of 10 images stored" in outcome.err
    assert (tmp_path / "run/manifest.json").exists()


# --- what was typed ----------------------------------------------------------------------------

# Two overrides of each script, and what it cannot do without.
OVERRIDES = {
    "benchmark": ("threads=3", "nfe=7"),
    "calibrate": ("threads=3", "nfe=7"),
    "compare": ("out=there", "show=fd_cifar", "run_dirs=[here]"),
    "evaluate": ("threads=3", "batch_size=7"),
    "export": ("run_dir=there", "out=here", "layout=t2i_compbench"),
    "sample": ("threads=3", "nfe=7"),
    "tabulate": ("threads=3", "nfe=7"),
    "train": ("threads=3", "device=cpu"),
}


@pytest.fixture
def composed(monkeypatch, tmp_path, script):
    """`composed("sample", *arguments)`: the configs that the body of a script is given."""

    def run(name: str, *arguments: str) -> list[dict]:
        seen = []
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as end:
            main(name)(lambda cfg: seen.append(OmegaConf.to_container(cfg)))()
        assert end.value.code == 0
        return seen

    return run


# Each script with one place of the option, and with all those whose arguments are read in their own
# way: of `sample` they are a run's, of `compare` they may be words without a key.
PLACES = [(name, k % 3) for k, name in enumerate(sorted(OVERRIDES))]
PLACES = sorted({*PLACES, *((name, k) for name in ("sample", "compare") for k in range(3))})


@pytest.mark.parametrize(("name", "place"), PLACES)
def test_an_option_stands_before_between_or_after_overrides(script, tmp_path, name, place):
    assert set(OVERRIDES) == {file.stem for file in (ROOT / "scripts").glob("*.py")}
    (tmp_path / "more").mkdir()
    arguments = list(OVERRIDES[name])
    arguments[place:place] = ["--config-dir", "more", "-c", "job"]
    outcome = script(name, *arguments)
    assert (outcome.code, outcome.err) == (0, "")
    for override in OVERRIDES[name][:2]:
        assert f"{override.replace('=', ': ')}\n" in outcome.out
    arguments = list(OVERRIDES[name])
    arguments[place:place] = ["--help"]
    outcome = script(name, *arguments)
    assert not outcome.code and "== Config ==" in outcome.out and not outcome.err
    arguments[place] = "--multirum"
    outcome = script(name, *arguments)
    assert outcome.code == 2 and outcome.err.count("\n") == 1
    assert outcome.err.startswith("unrecognized arguments: --multirum")


@pytest.mark.parametrize(("name", "place"), [case for case in PLACES if case[0] != "sample"])
def test_a_sweep_takes_overrides_on_both_sides_of_its_option(composed, name, place):
    first, *others = OVERRIDES[name]
    arguments = [f"{first},{first.split('=')[1]}", *others]
    arguments.insert(place, "-m")
    seen = composed(name, *arguments)
    assert len(seen) == 2 and seen[0] == seen[1] == composed(name, first, *others)[0]


def test_a_sweep_of_runs_takes_overrides_on_both_sides_of_its_option(script, toy, tmp_path):
    outcome = script("sample", *toy, "seed=0,1", "-m", "lml.rank=1,2")
    assert (outcome.code, outcome.err) == (0, "")
    assert len(list(tmp_path.glob("outputs/*/*/manifest.json"))) == 4
    outcome = script("sample", *toy, "seed=0,1", "--multirun", "lml.rank=1,2")
    assert (outcome.code, outcome.err) == (0, "") and "1 cell" not in outcome.out


# What Hydra's grammar refuses, or takes for something else than a text.
TEXTS = [
    *("out=1", "=", "a=", "=a", "a=b=c"),
    *("データ", "é", "Übung", "a—b", "😀"),
    *("~", "~/x", "~someone/x", "a~b"),
    *("a#b", "#", "a!b", "a&b", "a;b", "a<b>c", "a^b", "a`b`", "a§b"),
    *("a(1)", "a (copy)", "(", ")", "f(x)", "int(x)"),
    *("a,b", "1,2", ",", "a, b", "range(1,3)", "choice(a,b)"),
    *('a"b', "it's", '"', "'", "\\'", '\\"#', "a#\\", "'a' \"b\""),
    *("{a", "a}", "{a}", "a{b}", "[a", "a]", "a[1]", "[1]]"),
    *("a\tb#", "a\nb", "a\x1b[0m'\\"),
]


@pytest.mark.parametrize("text", TEXTS, ids=repr)
def test_a_text_that_hydra_refuses_is_shown_quoted(script, composed, tmp_path, monkeypatch, text):
    """As it is typed in a shell, which then gives that very text."""
    outcome = script("evaluate", f"out={text}", "images=nowhere", "batch_size=0")
    assert outcome.code == 2 and outcome.err.count("\n") == 1
    assert "Lexer" not in outcome.err and "mismatched" not in outcome.err.split("; quote ")[0][:20]
    typed = re.search(r"; quote text with (?:such characters|a comma): (.*)$", outcome.err)[1]
    command = ["bash", "-c", f"printf '%s\\0' {typed}"]
    word, end = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split(
        "\0"
    )
    assert word.startswith("out=") and not end
    assert OverridesParser.create().parse_override(word).value() == text
    monkeypatch.setenv("HOME", "/home/me")
    assert composed("evaluate", word)[0]["out"] == os.path.expanduser(text)


# No key, no value, or half an interpolation, which OmegaConf takes for no text.
@pytest.mark.parametrize(
    "override", ["データ=1", "out", "a b=1", "=a#b", "out put=a#b", "out=a${b", "out=${a#"]
)
def test_where_no_quotes_help_none_are_shown(script, override):
    outcome = script("evaluate", override)
    assert outcome.code == 2 and outcome.err.count("\n") == 1
    assert "expected KEY=VALUE" in outcome.err and "; quote" not in outcome.err


# --- paths -------------------------------------------------------------------------------------

KEYS = [
    ("sample", "run_dir"),
    ("sample", "reference"),
    ("sample", "model.path"),
    ("sample", "model.network.path", "model=ideal_cifar10"),
    ("sample", "model.controlnet.path", "model=sd15_canny"),
    ("sample", "model.control_image", "model=sd15_canny"),
    ("sample", "model.control_photo", "model=sd15_canny"),
    ("sample", "model.control_map.path", "model=sd15_depth"),
    ("sample", "prompts.file", "prompts=text"),
    ("sample", "prompts.file", "prompts=table"),
    ("sample", "prompts.file", "prompts=captions"),
    ("sample", "prompts.file", "prompts=coco14_30k"),
    ("sample", "prompts.path", "prompts=t2i_compbench"),
    ("sample", "metrics.fd_cifar.features"),
    ("sample", "metrics.fd_cifar.reference"),
    ("sample", "metrics.fid.weights", "metrics=fid"),
    ("sample", "metrics.convergence.reference", "metrics=convergence"),
    ("sample", "metrics.clip_score.model", "metrics=clip_score"),
    ("sample", "metrics.clip_cosine.model", "metrics=clip_cosine"),
    ("sample", "metrics.cmmd.model", "metrics=cmmd"),
    ("sample", "metrics.fd_dinov2.model", "metrics=fd_dinov2"),
    ("sample", "metrics.image_reward.weights", "metrics=image_reward"),
    ("sample", "metrics.image_reward.tokenizer", "metrics=image_reward"),
    ("compare", "out", "run_dirs=[x]"),
    ("evaluate", "run_dir"),
    ("evaluate", "images"),
    ("evaluate", "reference"),
    ("evaluate", "out"),
    ("export", "run_dir", "out=x"),
    ("export", "out"),
    ("export", "layout.images", "layout=coco_reference", "out=x"),
    ("tabulate", "runs"),
    ("tabulate", "out"),
    ("train", "run_dir"),
    ("train", "run_dir", "train=features"),
    ("train", "data.path"),
    ("benchmark", "out"),
]


def value_at(cfg: dict, key: str):
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


@pytest.mark.parametrize(("name", "key", "others"), [(n, k, o) for n, k, *o in KEYS])
def test_a_home_folder_in_every_path(monkeypatch, name, key, others):
    """By what every script begins with."""
    monkeypatch.setenv("HOME", "/home/me")
    others = ["layout=t2i_compbench", *others] if name == "export" else others
    cfg = compose(*others, f'{key}="~/x"', config=name)
    complete(cfg, name)
    assert value_at(cfg, key) == "/home/me/x"
    cfg = compose(*others, f"{key}=2024_10", config=name)
    with pytest.raises(UserError, match=rf"^{key}=202410: expected a path"):
        complete(cfg, name)


@pytest.mark.parametrize(
    ("text", "path"),
    [("~", "/home/me"), ("~/", "/home/me/"), ("x/~", "x/~"), ("~nobody-at-all", "~nobody-at-all")],
)
def test_a_tilde_is_what_it_is_in_a_shell(composed, monkeypatch, text, path):
    monkeypatch.setenv("HOME", "/home/me")
    assert composed("evaluate", f'out="{text}"')[0]["out"] == path


@pytest.mark.parametrize("value", ["7", "2024_10", "1e3", "1.10", "true", "[a]", "[a,b]"])
def test_what_reads_as_no_text_is_no_path(script, composed, value):
    """Else 2024_10 would be the folder 202410, and 1.10 the folder 1.1."""
    outcome = script("evaluate", f"images={value}")
    assert outcome.code == 2 and outcome.err.count("\n") == 1
    assert ": expected a path; quote a path that reads as another type, as in" in outcome.err
    (typed,) = shlex.split(outcome.err.rpartition(" as in ")[2])
    (cfg,) = composed("evaluate", typed)
    assert outcome.err.startswith(f"images={cfg['images']}: ")


def test_every_key_of_a_path_is_one_of_those():
    """By what the configs say of their keys."""
    about = re.compile(r"^ *(\w+):.*#.*\b(folder|file|path|FOLDER|FILE)\b", re.M)
    texts = [file.read_text() for file in CONFIGS.rglob("*.yaml")]
    found = {match[1] for text in texts for match in about.finditer(text)}
    # what is said of files that another key gives; `model` is one of a metric alone
    others = {"hub_id", "model", "name", "overwrite", "scheduler"}
    assert {key for key in found if not PATHS.fullmatch(key)} == others


def test_the_home_folder_is_where_runs_and_scores_are(script, toy, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert script("sample", *toy, 'run_dir="~/run"').code == 0
    outcome = script("sample", "-m", *toy, 'run_dir="~/a","~/b"')
    assert (outcome.code, outcome.err) == (0, "")
    assert {f.name for f in (tmp_path / "home").iterdir()} == {"run", "a", "b"}
    arguments = ['run_dir="~/run"', 'out="~/out.json"', "metrics=convergence", "threads=1"]
    arguments += ["metrics.convergence.nfe=5"]
    assert script("evaluate", *arguments).code == 0
    assert (tmp_path / "home/out.json").exists() and not (tmp_path / "~").exists()


def test_a_text_with_a_tilde_that_is_no_path_stays(composed, monkeypatch):
    arguments = ["model=sd15", 'model.negative_prompt="~/x"', 'name="~/x"']
    (cfg,) = composed("sample", *arguments)
    assert cfg["model"]["negative_prompt"] == cfg["name"] == "~/x"


@pytest.mark.parametrize("file", sorted((ROOT / "scripts").glob("*.py")), ids=lambda f: f.stem)
def test_scripts_hide_no_module_of_their_name(monkeypatch, file):
    """torch.compile imports `tabulate`; Python puts a script's folder before everything else."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "scripts"), *sys.path])
    runpy.run_path(str(file), run_name="imported")
    assert str(ROOT / "scripts") not in sys.path and sys.path[0] == str(ROOT)
