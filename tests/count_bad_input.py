"""How many bad inputs end in one line: `python tests/count_bad_input.py [GROUP ...]`.

A group is a script, models, runs or calibrations. Every key of every script, every value in the
JSON files of model folders, and every value in the files of run folders and calibrations becomes
what it should not be, one at a time, and the script is run on that, in a process of its own with
little memory and time. It ends well with exit code 0, or with exit code 2 and one line that says
something; never with a traceback, and no new file beside what was asked for. Prints how many did,
and those that didn't. `--every N` takes each Nth case alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import resource
import runpy
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
BARS = re.compile(r"[^\r\n]*\d+%\|[^\r\n]*[\r\n]*|^\n")  # of progress
SECONDS, BYTES = 60, 12 << 30  # of a script, at most
# What a key is set to on the command line; KEY=VALUE, but for the last.
WORDS = {
    "text": "{key}=abc",
    "nothing of ours": "{key}=lml.metrics.nothing",
    "number": "{key}=5",
    "real": "{key}=0.5",
    "flag": "{key}=true",
    "null": "{key}=null",
    "huge": "{key}=1000000000000",
    "negative": "{key}=-1",
    "not a number": "{key}=nan",
    "list": "{key}=[a,b]",
    "mapping": "{key}={{a:1}}",
    "long": "{key}=" + 300 * "x",
    "empty": "{key}=''",
    "control": "{key}='a\nb'",
    "none": "~{key}",
}
# What a value in a file is set to.
VALUES: dict[str, Any] = {
    "text": "abc",
    "number": 5,
    "flag": True,
    "null": None,
    "huge": 10**12,
    "negative": -1,
    "not a number": float("nan"),
    "list": ["a", "b"],
    "mapping": {"a": 1},
    "empty list": [],
    "long": 300 * "x",
    "empty": "",
}
# What a whole file is set to.
CONTENTS = {
    "nothing": b"",
    "half": b'{"a": ',
    "a list": b"[]",
    "null": b"null",
    "a number": b"5",
    "no text": b"\xff\xfe\x00",
    "nested deep": 100_000 * b"[" + 100_000 * b"]",
    "nested in a key": b'{"images": ' + 100_000 * b'{"a":' + b"1" + 100_000 * b"}" + b"}",
}


@dataclass
class Outcome:
    """What a script left."""

    code: int
    out: str
    err: str

    def fault(self) -> str | None:
        """What is wrong with how it ended; None when nothing is."""
        said = BARS.sub("", self.err)
        if "Traceback" in self.err:
            return "a traceback: " + self.err.strip().splitlines()[-1][:150]
        if self.code not in (0, 2):
            return f"exit code {self.code}: {self.err[-150:]!r}"
        if self.code == 2 and (said.count("\n") != 1 or len(said) < 15):
            return f"not one line: {said[:300]!r}"
        return None


@dataclass
class Case:
    """A script, its arguments, and what becomes of its folder (with `run`, `model` in it) first."""

    group: str
    script: str
    arguments: list[str]
    name: str
    damage: Callable[[Path], None] = lambda folder: None
    made: set[str] = field(default_factory=lambda: {"run", "outputs", "out"})


# --- command lines -----------------------------------------------------------------------------

SMALL = ["num_images=1", "batch_size=1", "nfe=2", "threads=1", "device=cpu", "metrics=none"]
PATCH = ["model.path=model", "model.patch=1"]
PIPE = ["model=sd15", "model.path=pipe", "prompts=text", "prompts.file=prompts.txt"]
LOOKED_UP = [*SMALL, "model=gaussian", "model.network.sample_size=4", "solver=ddim"]
LOOKED_UP += ["lml=calibrated", "lml.calibration=calibration"]
TINY_UNET = [
    "unet.layers_per_block=1",
    "unet.block_out_channels=[16]",
    "unet.down_block_types=[DownBlock2D]",
    "unet.up_block_types=[UpBlock2D]",
    "unet.norm_num_groups=4",
    "unet.attention_head_dim=8",
]
TRAIN = ["run_dir=run", "data.path=cifar10", "budget.images=8", "budget.batch_size=8"]
TRAIN += ["budget.compile=false", "budget.dtype=float32", "threads=1", "device=cpu"]
SHORT = ["nfe=2", "fine.nfe=2", "searched=1", "unseen=1", "ranks=[1]", "rounds=1", "batch_size=1"]
SHORT += ["threads=1", "device=cpu", "solver=ddim", "progress=false"]
GAUSSIAN = ["model=gaussian", "model.network.sample_size=4"]
# By script: arguments that are well, around which one is bad, and the keys that are tried there.
COMMANDS: dict[str, list[tuple[list[str], str | tuple[str, ...]]]] = {
    "sample": [
        ([*SMALL, *PATCH, "run_dir=run"], ""),
        ([*SMALL, "model=gaussian", "model.network.sample_size=4", "run_dir=run"], "model."),
        ([*SMALL, "model=mixture", "model.network.sample_size=4", "run_dir=run"], "model.network."),
        ([*SMALL, *PATCH, "run_dir=run", "metrics=[fd_cifar_matched,convergence]"], "metrics."),
        ([*SMALL, *PATCH, "run_dir=run", "metrics=[fid,kid,precision_recall]"], "metrics."),
        ([*SMALL, *PATCH, "run_dir=run", "logger=wandb", "logger.mode=disabled"], "logger."),
        ([*SMALL, *PATCH, "solver=ddim", "grid=trailing", "run_dir=run"], "solver."),
        (
            [
                *SMALL,
                "model=sd15",
                "model.path=pipe",
                "prompts=text",
                "prompts.file=prompts.txt",
                "run_dir=run",
            ],
            "model.",
        ),
        (
            [
                *SMALL,
                "model=sd15",
                "model.path=pipe",
                "prompts=text",
                "prompts.file=prompts.txt",
                "run_dir=run",
            ],
            "prompts.",
        ),
        ([*SMALL, "model=celebahq_ldm", "model.path=latent", "run_dir=run"], "model."),
        ([*LOOKED_UP, "run_dir=run"], "lml."),
    ],
    "calibrate": [
        ([*SHORT, *GAUSSIAN, "run_dir=run"], ""),
        (
            [*SHORT, *PATCH, "run_dir=run", "objective=features"],
            ("extractor", "objective", "model"),
        ),
        ([*SHORT, *PIPE, "run_dir=run"], ("attention", "prompts", "model", "dtype")),
    ],
    "evaluate": [
        (["run_dir=made", "threads=1", "device=cpu", "batch_size=1", "out=out"], ""),
        (["images=made/images", "threads=1", "device=cpu", "out=out"], ""),
        (
            ["run_dir=made", "metrics=convergence", "metrics.convergence.nfe=2", "out=out"],
            "metrics.",
        ),
    ],
    "tabulate": [
        (["runs=runs", "out=out"], ("name", "runs", "out", "show", "evaluations"))
    ],  # sample's beside
    "export": [
        (
            [
                "layout=coco_reference",
                "layout.images=val2014",
                "out=out",
                "prompts=coco14_30k",
                "prompts.file=captions.json",
                "prompts.count=1",
                "layout.size=8",
            ],
            "",
        ),
        (["layout=t2i_compbench", "run_dir=made", "out=out"], ""),
    ],
    "train": [
        ([*TRAIN, *TINY_UNET, "report_images=2"], ""),
        ([*TRAIN, "train=features"], ""),
    ],
    "benchmark": [
        (
            ["parts=[correction,memory]", "shape=[2,3,4,4]", "ranks=[1]", "repeats=1", "threads=1"],
            "",
        ),
        (
            [
                "parts=[run,outside,fd]",
                "settings=[float32]",
                "nfe=2",
                "batch_size=1",
                "batches=1",
                "fd_images=1",
                "model.path=model",
                "model.patch=1",
                "threads=1",
            ],
            "",
        ),
    ],
}
# What needs no key.
LINES: dict[str, list[list[str]]] = {
    "sample": [
        [*SMALL, *PATCH, "attention=efficient", "run_dir=run"],
        [*SMALL, *PATCH, "attention=flash", "run_dir=run"],
        [*SMALL, *PATCH, "attention=cudnn", "run_dir=run"],
        [*SMALL, *PATCH, "run_dir=" + 300 * "x"],
        [*SMALL, *PATCH, "run_dir=a/" + 300 * "x"],
        [*SMALL, *PATCH, "name=" + 300 * "x"],
        [*SMALL, *PATCH, "name=../../x"],
        [*SMALL, *PATCH, "batch_size=1000000000000", "num_images=2", "run_dir=run"],
        [*SMALL, *PATCH, "-m", "nfe=2,abc", "name=x"],
        [*SMALL, *PATCH, "-m", "seed=0,[a]", "name=x"],
        ["-m", "sweep=damping_rank", "metrics=[]"],
        [*LOOKED_UP, "run_dir=run", "nfe=3"],
    ],
    "calibrate": [
        [*SHORT, *GAUSSIAN, "run_dir=run", "ranks=[]"],
        [*SHORT, *GAUSSIAN, "run_dir=run", "ranks=[1,1]"],
        [*SHORT, *GAUSSIAN, "run_dir=run", "nfe=1"],
        [*SHORT, *GAUSSIAN, "run_dir=made/images"],
        [*SHORT, *GAUSSIAN, "run_dir=prompts.txt"],
        [*SHORT, *GAUSSIAN, "run_dir=run", "+solver.step.eta=1"],
        [*SHORT, *GAUSSIAN, "run_dir=run", "lml=calibrated"],
        [*SHORT, *GAUSSIAN, "run_dir=run", "fine.solver=../lml/off"],
        [*SHORT, *GAUSSIAN, "run_dir=run", "objective=features", "dtype=float64"],
        [*SHORT, *GAUSSIAN, "-m", "nfe=2,abc", "run_dir=run"],
        [*SHORT, *PIPE, "attention=cudnn", "run_dir=run"],
        [*SHORT, *PATCH, "attention=efficient", "run_dir=run"],
    ],
}


def flat(value: Any, prefix: str = "") -> Iterator[str]:
    """Every key of a config, groups among them."""
    for key, item in value.items() if isinstance(value, Mapping) else ():
        yield f"{prefix}{key}"
        yield from flat(item, f"{prefix}{key}.")


@cache
def keys(script: str, arguments: tuple[str, ...]) -> list[str]:
    """Of a script's config with these arguments."""
    from omegaconf import OmegaConf

    from lml.configs import compose

    cfg = compose(*arguments, config=script)
    return list(flat(OmegaConf.to_container(cfg)))


def lines(script: str) -> Iterator[Case]:
    """Bad command lines: of each key with each word."""
    seen = set()
    for arguments, prefix in COMMANDS[script]:
        for key in keys(script, tuple(arguments)):
            if not key.startswith(prefix):
                continue
            for name, word in WORDS.items():
                if (key, name, prefix) in seen and script == "sample":
                    continue
                seen.add((key, name, prefix))
                bad = word.format(key=key)
                kept = [a for a in arguments if bad[0] != "~" or a.lstrip("+").split("=")[0] != key]
                yield Case(script, script, [*kept, bad], f"{key}: {name}")
    for arguments in LINES.get(script, []):
        yield Case(script, script, arguments, arguments[-1][:60])


# --- folders -----------------------------------------------------------------------------------


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Where there is a value in a JSON value, containers among them."""
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = list(enumerate(value))[:2]
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def put(file: Path, path: tuple, value: Any) -> None:
    """Set the value at `path` of a JSON or YAML file."""
    is_json = file.suffix == ".json"
    content = json.loads(file.read_text()) if is_json else yaml.safe_load(file.read_text())
    node = content
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    file.write_text(json.dumps(content) if is_json else yaml.safe_dump(content))


def write(file: Path, content: bytes) -> None:
    """Set the whole file."""
    file.write_bytes(content)


def a_folder(file: Path) -> None:
    """Put a folder in a file's place."""
    file.unlink()
    file.mkdir()


def damages(folder: Path, names: list[str]) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """All that may have happened to these files of a folder, as functions of another such."""
    for name in names:
        text = (folder / name).read_text()
        content = json.loads(text) if name.endswith(".json") else yaml.safe_load(text)
        for label, raw in CONTENTS.items():
            yield f"{name}: {label}", lambda root, name=name, raw=raw: write(root / name, raw)
        yield f"{name}: a folder", lambda root, name=name: a_folder(root / name)
        yield f"{name}: gone", lambda root, name=name: (root / name).unlink()
        for path in places(content):
            for label, value in VALUES.items():

                def change(root: Path, name=name, path=path, value=value) -> None:
                    put(root / name, path, value)

                yield f"{name}: {'.'.join(map(str, path))} = {label}", change


def models(workshop: Path) -> Iterator[Case]:
    """Model folders that are broken."""
    pixel = ["unet/config.json", "scheduler/scheduler_config.json"]
    for name, damage in damages(workshop / "model", pixel):
        inside = lambda folder, damage=damage: damage(folder / "model")  # noqa: E731
        yield Case("models", "sample", [*SMALL, *PATCH, "run_dir=run"], f"model/{name}", inside)
    arguments = [*SMALL, "model=celebahq_ldm", "model.path=latent", "run_dir=run"]
    for name, damage in damages(workshop / "latent", ["vqvae/config.json"]):
        inside = lambda folder, damage=damage: damage(folder / "latent")  # noqa: E731
        yield Case("models", "sample", arguments, f"latent/{name}", inside)
    arguments = [*SMALL, *PIPE, "run_dir=run"]
    parts = ["model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json"]
    for name, damage in damages(workshop / "pipe", parts):
        inside = lambda folder, damage=damage: damage(folder / "pipe")  # noqa: E731
        yield Case("models", "sample", arguments, f"pipe/{name}", inside)


USES = {
    "tabulate": ["runs=runs", "out=out"],
    "evaluate": [
        "run_dir=runs/a",
        "metrics=[convergence,correction_cosine]",
        "threads=1",
        "device=cpu",
        "metrics.convergence.nfe=2",
        "batch_size=1",
    ],
    "sample": [*SMALL, *PATCH, "run_dir=runs/a", "metrics=lpips_diversity"],
    "export": ["layout=t2i_compbench", "run_dir=runs/a", "out=out"],
}


def runs(workshop: Path) -> Iterator[Case]:
    """Run folders that are damaged."""
    names = ["config.yaml", "manifest.json", "timing.json", "metrics.json"]
    for name, damage in damages(workshop / "runs/a", names):
        inside = lambda folder, damage=damage: damage(folder / "runs/a")  # noqa: E731
        for script, arguments in USES.items():
            case = Case("runs", script, arguments, f"{script}: {name}", inside)
            yield case
        sweep = [*SMALL, *PATCH, "-m", "seed=7", "name=runs", "progress=false"]

        def beside(folder: Path, damage=damage) -> None:
            damage(folder / "runs/a")
            (folder / "outputs").mkdir()
            (folder / "runs").rename(folder / "outputs/runs")

        yield Case("runs", "sample", sweep, f"a sweep beside: {name}", beside)
    for name, damage in damages(workshop / "runs", ["sweep.yaml"]):
        inside = lambda folder, damage=damage: damage(folder / "runs")  # noqa: E731
        yield Case("runs", "tabulate", USES["tabulate"], f"tabulate: {name}", inside)


def calibrations(workshop: Path) -> Iterator[Case]:
    """Calibrations, and searches that were interrupted, that are damaged; some sealed anew."""
    uses = {
        "calibration/calibration.json": (
            ("sample", [*LOOKED_UP, "run_dir=run"]),
            ("calibrate", [*SHORT, *GAUSSIAN, "run_dir=calibration"]),
        ),
        "begun/state.json": (("calibrate", [*SHORT, *GAUSSIAN, "run_dir=begun"]),),
    }
    for place, scripts in uses.items():
        for name, damage in damages(workshop, [place]):

            def forged(folder: Path, damage=damage, place=place) -> None:
                damage(folder)
                with contextlib.suppress(OSError, ValueError, AttributeError, RecursionError):
                    seal(folder / place)

            for script, arguments in scripts:
                yield Case("calibrations", script, arguments, f"{script}: {name}", damage)
                yield Case("calibrations", script, arguments, f"{script}: {name}, sealed", forged)


def seal(file: Path) -> None:
    """Give a calibration's file the seal of what it holds."""
    from lml.seals import sealed

    owner = "calibration" if file.name == "calibration.json" else file.name
    file.write_text(json.dumps(sealed(json.loads(file.read_text()), owner)))


# --- running -----------------------------------------------------------------------------------


def run(script: str, arguments: list[str], folder: Path, log: Path) -> Outcome:
    """scripts/`script`.py in `folder`, in a fork of this process."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.chdir(folder)
            for number, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(log / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
            resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            path = ROOT / "scripts" / f"{script}.py"
            sys.argv = [str(path), *arguments]
            os.environ["HYDRA_FULL_ERROR"] = "0"
            runpy.run_path(str(path), run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    end = time.monotonic() + SECONDS
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        if time.monotonic() > end:
            os.kill(pid, 9)
            _, status = os.waitpid(pid, 0)
            return Outcome(-9, "", f"more than {SECONDS} s")
        time.sleep(0.005)
    out, err = ((log / name).read_text(errors="replace") for name in ("out", "err"))
    return Outcome(os.waitstatus_to_exitcode(status), out, err)


def check(case: Case, workshop: Path) -> str | None:
    """What is wrong with how the case ends; None when nothing is."""
    with tempfile.TemporaryDirectory() as place:
        folder, log = Path(place, "here"), Path(place, "log")
        log.mkdir()
        shutil.copytree(workshop, folder)
        case.damage(folder)
        before = {file.name for file in folder.iterdir()}
        outcome = run(case.script, case.arguments, folder, log)
        odd = {file.name for file in folder.iterdir()} - before - case.made
        if (fault := outcome.fault()) is None and odd and outcome.code == 2:
            fault = f"left {sorted(odd)}"
        return fault


def furnish(workshop: Path) -> None:
    """What the cases work on: tiny models, a run, images with captions, CIFAR-10's form."""
    import numpy as np
    import torch
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
    from PIL import Image

    from lml.pipelines import tiny as tiny_pipelines

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
    )
    schedule = DDPMScheduler(prediction_type="v_prediction", clip_sample=False)
    DDPMPipeline(unet, schedule).save_pretrained(workshop / "model")
    tiny_pipelines.stable_diffusion(workshop / "tokenizer").save_pretrained(workshop / "pipe")
    shutil.rmtree(workshop / "tokenizer", ignore_errors=True)
    tiny_pipelines.latent(workshop / "latent")
    (workshop / "prompts.txt").write_text("a cat\na dog\n")
    (workshop / "val2014").mkdir()
    name = "COCO_val2014_000000000001.jpg"
    Image.new("RGB", (16, 12)).save(workshop / "val2014" / name)
    captions = {
        "images": [{"id": 1, "file_name": name}],
        "annotations": [{"id": 1, "image_id": 1, "caption": "a cat"}],
    }
    (workshop / "captions.json").write_text(json.dumps(captions))
    (workshop / "cifar10").mkdir()
    pixels = np.random.default_rng(0)
    for sheet in [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]:
        image = Image.fromarray(pixels.integers(0, 256, (8, 1024, 3), dtype=np.uint8))
        image.save(workshop / "cifar10" / f"{sheet}.png")
    for split, count in (("train", 40), ("test", 8)):
        np.save(workshop / f"cifar10/{split}_labels.npy", np.arange(count, dtype=np.uint8) % 10)
    log = workshop / "log"
    log.mkdir()
    tiny = [*SMALL, *PATCH, "metrics=convergence", "metrics.convergence.nfe=3"]
    for outcome in (
        run("sample", [*tiny, "run_dir=runs/b", "seed=1"], workshop, log),
        run("sample", [*tiny, "-m", "name=runs", "nfe=2"], workshop, log),
        run(
            "sample",
            [
                *SMALL,
                "model=sd15",
                "model.path=pipe",
                "prompts=t2i_compbench",
                "run_dir=made",
                "prompts.path=t2i",
                "prompts.categories=[color]",
                "prompts.samples_per_prompt=1",
            ],
            t2i(workshop),
            log,
        ),
    ):
        assert outcome.code == 0, outcome.err
    calibrate = [*SHORT, *GAUSSIAN, "run_dir=calibration"]
    outcome = run("calibrate", calibrate, workshop, log)
    assert outcome.code == 0, outcome.err
    found = json.loads((workshop / "calibration/calibration.json").read_text())
    (workshop / "begun").mkdir()
    state = {"rank": 1, "steps": 2, "values": [0.5], "error": 1.0, "mu": 0.01, "rounds": 0}
    state["is_done"] = False
    of = {key: found[key] for key in ("settings", "protocol")}
    (workshop / "begun/state.json").write_text(json.dumps({"of": of, "searches": [state]}))
    seal(workshop / "begun/state.json")
    (made,) = (workshop / "outputs/runs").glob("*/config.yaml")
    made.parent.rename(workshop / "runs/a")
    (workshop / "outputs/runs/sweep.yaml").rename(workshop / "runs/sweep.yaml")
    put(workshop / "runs/sweep.yaml", ("cells", 0, "run"), "a")
    shutil.rmtree(workshop / "outputs")
    shutil.rmtree(log)


def t2i(workshop: Path) -> Path:
    """`workshop`, with a prompt of T2I-CompBench in it."""
    (workshop / "t2i").mkdir()
    (workshop / "t2i/color_val.txt").write_text("a red cat\n")
    return workshop


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("groups", nargs="*", help="all, when none is named")
    parser.add_argument("--every", type=int, default=1, help="each so many cases")
    options = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", WANDB_MODE="disabled")
    os.environ["PYTHONPATH"] = str(ROOT)
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import torch

    torch.set_num_threads(1)
    # imported once, here, and not in every fork
    from lml import benchmark, export, report, training  # noqa: F401
    from lml.calibration import script  # noqa: F401
    from lml.runs import sample, score, sweep, tracking  # noqa: F401

    special = {"models": models, "runs": runs, "calibrations": calibrations}
    groups = options.groups or [*COMMANDS, *special]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCH_HOME"] = f"{folder}/torch"
        workshop = Path(folder, "workshop")
        workshop.mkdir()
        furnish(workshop)
        for group in groups:
            cases = special[group](workshop) if group in special else lines(group)
            cases = list(cases)[:: options.every]
            faults = {}
            start = time.monotonic()
            for case in cases:
                with contextlib.suppress(KeyError, TypeError, IndexError):
                    if fault := check(case, workshop):
                        faults[case.name] = fault
            good = len(cases) - len(faults)
            print(f"{group}: {good} of {len(cases)} end well ({time.monotonic() - start:.0f} s)")
            for name, fault in faults.items():
                print(f"    {name}: {re.sub(r'x{50,}', 'xxx', fault)}", flush=True)


if __name__ == "__main__":
    main()
