"""A tiny model in diffusers' format, and the scripts, run in this process or in another."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from preloaded import ENVIRONMENT, Server

from lml.pipelines import tiny as tiny_pipelines

ROOT = Path(__file__).parents[1]
torch.set_num_threads(1)  # pytest-xdist runs a process a core
gc.disable()  # until all is imported


def pytest_collection_finish() -> None:
    """What was imported is left out of garbage collections, which else take a tenth of the time."""
    gc.freeze()
    gc.enable()


def _with_room(function: Callable[..., object], **arguments: object) -> object:
    return function(**arguments)


# CPython keeps the frames of Python in chunks of 16 KiB. A call that needs a new one maps it, and
# unmaps it on return. Where the deep calls of Hydra stand at the end of a chunk, this takes three
# quarters of the time of a test. A large frame has a large chunk, which its callees share.
_with_room.__code__ = _with_room.__code__.replace(co_stacksize=1 << 14)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    """A test is called by `_with_room`."""
    pyfuncitem.obj = functools.partial(_with_room, pyfuncitem.obj)
    return (yield)


@pytest.fixture(scope="session", autouse=True)
def torch_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """TORCH_HOME, where statistics of reference sets are kept, is empty and gone afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("torch")
        patch.setenv("TORCH_HOME", str(path))
        yield path


@pytest.fixture(scope="session")
def tiny_unet() -> Callable[..., UNet2DModel]:
    """`tiny_unet(**options)` makes a random UNet2DModel of a few thousand parameters."""

    def make(**options) -> UNet2DModel:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return UNet2DModel(
                **{
                    "sample_size": 8,
                    "layers_per_block": 1,
                    "block_out_channels": (8,),
                    "down_block_types": ("DownBlock2D",),
                    "up_block_types": ("UpBlock2D",),
                    "norm_num_groups": 4,
                    **options,
                }
            )

    return make


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, tiny_unet) -> Path:
    """A DDPM of 8x8 images in diffusers' format; not to be written to."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    schedule = DDPMScheduler(prediction_type="v_prediction", clip_sample=False)
    DDPMPipeline(tiny_unet(), schedule).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def toy(tiny_model: Path) -> list[str]:
    """Arguments of scripts/sample.py for a run of three batches that takes no time."""
    return [
        f"model.path={tiny_model}",
        "model.patch=1",
        "metrics=none",
        "num_images=10",
        "batch_size=4",
        "nfe=4",
        "threads=1",
    ]


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds every pipeline of `tiny_pipelines` by the name of its config.

    Beside them "celebahq_ldm", "controlnet" and "depth". Not to be written to.
    """
    root = tmp_path_factory.mktemp("pipelines")
    for name, build in tiny_pipelines.PIPELINES.items():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            build(root / "tokenizers" / name).save_pretrained(root / name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tiny_pipelines.latent(root / "celebahq_ldm")
        tiny_pipelines.controlnet().save_pretrained(root / "controlnet")
        tiny_pipelines.depth(root / "depth")
    return root


@pytest.fixture
def prompts(tmp_path: Path) -> list[str]:
    """Arguments that give a run three prompts."""
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\na dog\na bird\n")
    return ["prompts=text", f"prompts.file={file}"]


@dataclass
class Outcome:
    """What a script left: its exit code and what it printed."""

    code: int
    out: str
    err: str


@pytest.fixture
def script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Outcome]]:
    """`script("sample", *arguments)` runs scripts/sample.py in this process, in `tmp_path`."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    threads = torch.get_num_threads()

    def run(name: str, *arguments: str) -> Outcome:
        path = ROOT / "scripts" / f"{name}.py"
        monkeypatch.setattr(sys, "argv", [str(path), *arguments])
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        monkeypatch.chdir(tmp_path)
        capfd.readouterr()
        try:
            runpy.run_path(str(path), run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code
        printed = capfd.readouterr()
        return Outcome(code, printed.out, printed.err)

    yield run
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def _server() -> Iterator[Callable[[], Server]]:
    server = functools.cache(Server)  # for the first that needs it
    yield server
    if server.cache_info().currsize:
        server().stop()


@pytest.fixture
def fork(
    _server: Callable[[], Server], tmp_path: Path
) -> Iterator[Callable[..., subprocess.Popen]]:
    """`fork(path, *arguments, **environment)` starts a script in `tmp_path`, without its imports.

    See tests/preloaded.py.
    """
    started = []

    def start(path: Path, *arguments: str, **environment: str) -> subprocess.Popen:
        if sys.platform == "linux":
            process = _server().start(path, *arguments, cwd=tmp_path, env=environment)
        else:
            process = begin([sys.executable, str(path), *arguments], tmp_path, environment)
        started.append(process)
        return process

    yield start
    end(started)


@pytest.fixture
def ranks(fork: Callable[..., subprocess.Popen]) -> Callable[..., Outcome]:
    """`ranks(path, *arguments, **environment)` runs a script in two processes that join.

    They have the variables that torchrun sets, but nothing ends one when the other fails. The
    outcome is that of both.
    """

    def run(path: Path, *arguments: str, **environment: str) -> Outcome:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        environment = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "WORLD_SIZE": "2",
            **environment,
        }
        both = [
            fork(path, *arguments, **environment, RANK=str(rank), LOCAL_RANK=str(rank))
            for rank in range(2)
        ]
        printed = [process.communicate(timeout=180) for process in both]
        code = next((process.returncode for process in both if process.returncode), 0)
        return Outcome(code, *("".join(texts) for texts in zip(*printed, strict=True)))

    return run


@pytest.fixture
def spawn(
    fork: Callable[..., subprocess.Popen], tmp_path: Path
) -> Iterator[Callable[..., subprocess.Popen]]:
    """`spawn("sample", *arguments, new=False, processes=1)` starts scripts/sample.py in `tmp_path`.

    With `new`, and by torchrun with several `processes`, as a user starts it; else by `fork`.
    """
    started = []

    def start(
        name: str, *arguments: str, new: bool = False, processes: int = 1
    ) -> subprocess.Popen:
        path = ROOT / "scripts" / f"{name}.py"
        if processes == 1 and not new:
            return fork(path, *arguments)
        python = [sys.executable]
        if processes > 1:
            python += ["-m", "torch.distributed.run", "--standalone"]
            python += [f"--nproc-per-node={processes}"]
        process = begin([*python, str(path), *arguments], tmp_path, {})
        started.append(process)
        return process

    yield start
    end(started)


def begin(command: list[str], folder: Path, environment: dict[str, str]) -> subprocess.Popen:
    return subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, **ENVIRONMENT, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.communicate()
