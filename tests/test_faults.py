"""Faults of the disk and of the power: at every moment at which a tool writes, whatever it writes.

What is told of every operation is Python's own audit hook: a file opened to be written, a name that
is changed, made or removed, in whatever module. So a new file is among the moments by itself.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from lml import export, files, report
from lml.configs import compose
from lml.data import prompts as prompt_sets
from lml.errors import UserError
from lml.pipelines import pixel
from lml.report import figures
from lml.runs import generate
from lml.runs.observer import Observer
from lml.runs.records import read_config
from lml.runs.sample import run
from lml.runs.score import evaluate_folder, is_finished
from lml.runs.store import RunFolder
from lml.runs.sweep.ledger import Ledger
from lml.schedulers import LMLDDIMScheduler

CHANGES = ("os.mkdir", "os.remove", "os.rename", "os.link", "os.rmdir", "os.truncate")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Killed(BaseException):
    """Nothing is written any more, not even what tidies up."""


@dataclass
class Disk:
    """The folder in which operations are counted; from number `stop` on each raises `error`."""

    folder: str | None = None
    only: tuple[str, ...] = ()
    error: Callable[[], BaseException] | None = None
    stop: int = 0
    count: int = 0

    def hear(self, event: str, args: tuple) -> None:
        """What Python tells of an operation."""
        if self.folder is None or event not in ("open", *CHANGES):
            return
        if not str(os.fspath(args[0]) if hasattr(args[0], "__fspath__") else args[0]).startswith(
            self.folder
        ):
            return
        if event == "open" and not (args[2] or 0) & WRITING:
            return
        if self.only and event not in self.only:
            return
        self.count += 1
        if self.error is not None and self.count > self.stop:
            raise self.error()


DISK = Disk()
sys.addaudithook(
    lambda event, args: DISK and DISK.hear(event, args)
)  # there is no way to remove one


def full() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read_only() -> OSError:
    return OSError(errno.EROFS, os.strerror(errno.EROFS))


class HalfWritten(io.FileIO):
    """A file for which the disk has no room: its first half is there."""

    def write(self, data: bytes) -> int:
        super().write(bytes(data)[: len(data) // 2])
        raise full()


# What goes wrong: which operations raise what; in "space", writing a file's content.
FAULTS = {
    "kill": ((), Killed),
    "inodes": (("open", "os.mkdir"), full),
    "read-only": ((), read_only),
    "space": (("open",), None),
}


@contextlib.contextmanager
def fault(kind: str, folder: Path, stop: int) -> Iterator[Disk]:
    """From the operation number `stop` in `folder` on, the disk fails."""
    only, error = FAULTS[kind]
    DISK.folder, DISK.only, DISK.error = f"{folder}{os.sep}", only, error
    DISK.stop, DISK.count = stop, 0
    with pytest.MonkeyPatch.context() as patch:
        if kind == "space":
            opened = iter(range(10**9))

            def narrow(path: Path, mode: str) -> io.IOBase:
                if mode == "rb" or next(opened) < stop:
                    return open(path, mode)
                return io.BufferedWriter(HalfWritten(path, mode))

            patch.setattr(files, "open", narrow, raising=False)
        try:
            yield DISK
        finally:
            DISK.folder = None


# --- what is done ------------------------------------------------------------------------------

MODEL = ["model=gaussian", "model.network.sample_size=4", "batch_size=2", "nfe=2", "device=cpu"]
MODEL += ["progress=false", "num_images=2", "threads=1"]
SCORED = ["metrics=[convergence]", "metrics.convergence.nfe=3"]


class Silent(Observer):
    def say(self, line: str) -> None:
        pass


def sample(*overrides: str) -> Callable[[Path], None]:
    configs = {}

    def act(folder: Path) -> None:
        if folder not in configs:
            configs[folder] = compose(*MODEL, *overrides, f"run_dir={folder}/run", config="sample")
        run(configs[folder], Silent())

    return act


plain = sample("metrics=none")


def evaluate(folder: Path) -> None:
    reference = f"metrics.convergence.reference={folder}/run/images"
    asked = ["metrics=convergence", f"run_dir={folder}/run", reference, "device=cpu", "threads=1"]
    evaluate_folder(compose(*asked, config="evaluate"), Silent())


def prompted(folder: Path) -> None:
    """A run of prompts, of a model that takes no time and that they say nothing to."""
    entry = {"prompt": "a cat", "category": "color", "prompt_index": 0}
    made = prompt_sets.PromptSet("text", tuple({**entry, "sample": k} for k in range(2)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "choose_prompts", lambda cfg, model: made)
        patch.setattr(pixel.PixelSampler, "cut", lambda self, texts: [], raising=False)
        plain(folder)


def tabulate(folder: Path) -> None:
    paths = {"runs": str(folder), "out": str(folder / "tables")}
    report.tabulate(OmegaConf.create({"name": "study", "show": None, "evaluations": None, **paths}))


def lay_out(folder: Path) -> None:
    layout = {"_target_": "lml.export.T2ICompBench", "model": "m", "sampler": "s"}
    paths = {"run_dir": str(folder / "run"), "out": str(folder / "out")}
    export.export(OmegaConf.create({"layout": layout, "prompts": {}, **paths}))


def keep_ledger(folder: Path) -> None:
    ledger = Ledger(folder / "run")
    try:
        cell = {"run": "abc", "overrides": ["nfe=2"], "status": "done", "reason": None}
        cell |= {"solver": "ddim", "grid": "default", "lml": {"rank": 0}, "model": "gaussian"}
        cell |= {"nfe": 2, "seed": 0, "num_images": 2, "dtype": "float32"}
        ledger.write([cell])
    finally:
        ledger.close()


# Each by what was done before it and what it does, to folder/run.
ACTS = {
    "overwritten": (sample("metrics=none", "seed=7"), sample("metrics=none", "overwrite=true")),
    "scored": (plain, evaluate),
    "prompts": (None, prompted),
    "tables": (plain, tabulate),
    "layout": (prompted, lay_out),
    "ledger": (None, keep_ledger),
}


def contents(folder: Path) -> dict[str, bytes]:
    """What is the same whenever it is made, and the names of what isn't."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and not path.name.startswith("."):
            changes = path.suffix in (".json", ".yaml")  # they have times in them
            found[name] = b"" if changes else path.read_bytes()
    return found


def of_run(names: Iterable[str]) -> set[str]:
    """What a run has when it is complete."""
    return {name for name in names if name.startswith("run/")} - {"run/metrics.json"}


def partials(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(".*") if path.name.endswith(".tmp")]


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setattr(generate, "provenance", dict)  # which asks git
    monkeypatch.setattr(os, "fsync", lambda number: None)
    monkeypatch.setattr(figures, "encode", lambda drawn: {"png": b"", "svg": b""})
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("name", ACTS)
def test_whenever_it_is_cut_the_same_command_completes_it(tmp_path, name, kind):
    before, act = ACTS[name]
    whole, start = (tmp_path / name / "study" for name in ("whole", "start"))
    start.mkdir(parents=True)
    if before is not None:
        before(start)
    shutil.copytree(start, whole)
    old = contents(start)
    act(whole)
    expected, stop = contents(whole), 0
    while True:
        folder = tmp_path / "cut/study"
        shutil.copytree(start, folder)
        with fault(kind, folder, stop) as disk:
            try:
                act(folder)
            except Killed:
                assert kind == "kill"
            except UserError as error:
                line = str(error)
                assert "\n" not in line and (
                    full().strerror in line or read_only().strerror in line
                )
        if disk.count <= stop:
            break
        left = contents(folder)
        if kind != "kill":
            assert partials(folder) == [] or kind == "read-only"
        if stop == 0:
            assert left == old  # nothing is lost where nothing could be begun
        if (folder / "run/manifest.json").exists():
            config = read_config(folder / "run")
            owner = RunFolder(folder / "run", config["settings"])
            if is_finished(owner, {}):  # what says that it is complete is
                assert of_run(left) in (of_run(old), of_run(expected))
                assert {owner.holds(i) for i in range(2)} == {True}
        if kind == "read-only":  # all that is left is what a kill leaves
            shutil.rmtree(folder)
            stop += 1
            continue
        act(folder)
        assert contents(folder) == expected and partials(folder) == [], stop
        shutil.rmtree(folder)
        stop += 1
    assert stop > 0 or (name, kind) == ("layout", "space")  # it links, and writes nothing


# --- many images -------------------------------------------------------------------------------


class Started(BaseException):
    """The first batch is made."""


@pytest.mark.parametrize("again", [False, True])
def test_a_run_of_a_million_images_starts_at_once(tmp_path, monkeypatch, again):
    class Watching(Silent):
        def made(self, count: int) -> None:
            raise Started

    arguments = [*MODEL, "num_images=1000000", "metrics=none", f"run_dir={tmp_path}/run"]
    cfg = compose(*arguments, config="sample")
    for _ in range(2 if again else 1):
        start = time.process_time()
        with pytest.raises(Started):
            run(cfg, Watching())
        assert time.process_time() - start < 5
    assert len(list((tmp_path / "run/images").glob("*.png"))) == (4 if again else 2)


# --- a decoder that fails ----------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("weight", ["decoder.conv_out.bias", "post_quant_conv.bias"])
@pytest.mark.parametrize("model", ["celebahq_ldm", "sd15"])
def test_what_a_decoder_returns_is_finite_or_not_stored(
    script, pipelines, prompts, tmp_path, model, weight, value
):
    """Images would be black for NaN, and white where a pipeline cuts infinity to one."""
    folder = shutil.copytree(pipelines / model, tmp_path / "model")
    (file,) = (*folder.glob("vae/*.safetensors"), *folder.glob("vqvae/*.safetensors"))
    weights = load_file(file)
    weights[weight][0] = value
    save_file(weights, file)
    arguments = [f"model={model}", f"model.path={folder}", "num_images=2", "batch_size=2", "nfe=2"]
    arguments += ["metrics=none", "device=cpu", "run_dir=run", "solver=ddim", "threads=1"]
    arguments += ["model.height=16", "model.width=16", *prompts] if model == "sd15" else []
    outcome = script("sample", *arguments)
    assert outcome.code == 2, outcome
    assert outcome.err == (
        f"model={model}: the decoder returned NaN or inf; images 0 to 1 not stored\n"
    )
    assert not any((tmp_path / "run/images").iterdir())


def test_a_solver_that_ends_in_nan_stores_nothing(script, toy, tmp_path, monkeypatch):
    """Though the network's outputs are finite."""
    step = LMLDDIMScheduler.step

    def spoiled(self, *args, **options):
        sample = step(self, *args, **options)[0]
        return (sample * float("nan"),) if args[1] == self.timesteps[-1] else (sample,)

    monkeypatch.setattr(LMLDDIMScheduler, "step", functools.wraps(step)(spoiled))
    outcome = script("sample", *toy, "solver=ddim", "run_dir=run", "lml=off")
    assert outcome.code == 2 and "the solver returned NaN or inf; images 0 to 3" in outcome.err
    assert not any((tmp_path / "run/images").iterdir())
