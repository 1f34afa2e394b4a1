"""Training at toy size: it resumes, and what it writes can be read and run."""

from __future__ import annotations

import json
import signal

import numpy as np
import pytest
import torch
from count_bad_input import TINY_UNET
from diffusers import DDPMPipeline
from PIL import Image
from safetensors import safe_open

from lml import training
from lml.cli.main import Interrupted
from lml.data import cifar10
from lml.data.statistics import ReferenceStatistics
from lml.metrics.frechet import fd_cifar


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder like CIFAR-10's PNG sheets, with 8 random images a sheet."""
    folder = tmp_path_factory.mktemp("cifar10")
    generator = np.random.default_rng(0)
    for name in [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]:
        sheet = generator.integers(0, 256, (8, 1024, 3), dtype=np.uint8)
        Image.fromarray(sheet).save(folder / f"{name}.png")
    for split, count in (("train", 40), ("test", 8)):
        np.save(folder / f"{split}_labels.npy", np.arange(count, dtype=np.uint8) % 10)
    return folder


@pytest.fixture
def train(script, data, tmp_path):
    def run(*arguments, images=24, out="run"):
        return script(
            "train",
            f"data.path={data}",
            f"run_dir={tmp_path / out}",
            f"budget.images={images}",
            "budget.dtype=float32",
            "budget.save_minutes=0",
            "budget.batch_size=8",
            "budget.compile=false",
            "device=cpu",
            "threads=1",
            *(["report_images=4"] if "train=features" not in arguments else []),
            *arguments,
        )

    return run


def log_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_the_denoiser_goes_on_from_its_checkpoint(train, script, tmp_path):
    run = tmp_path / "run"
    assert train(*TINY_UNET, images=24).code == 0
    first = log_of(run)
    assert [record["images"] for record in first] == [8, 16, 24]
    assert train(*TINY_UNET, images=24).code == 0
    assert log_of(run) == first  # the budget is spent
    assert train(*TINY_UNET, images=64).code == 0
    assert [record["images"] for record in log_of(run)] == list(range(8, 65, 8))

    (weights,) = (run / "model" / "unet").glob("*.safetensors")
    with safe_open(weights, "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float16}  # noqa: SIM118
    pipeline = DDPMPipeline.from_pretrained(run / "model")
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    average = torch.load(run / "state.pt", weights_only=True)["ema"]["shadow_params"]
    for stored, shadow in zip(pipeline.unet.parameters(), average, strict=True):
        torch.testing.assert_close(stored.float(), shadow, rtol=1e-3, atol=1e-6)

    sampled = script(
        "sample",
        f"model.path={run / 'model'}",
        "metrics=none",
        "num_images=2",
        "nfe=2",
        f"run_dir={tmp_path / 'samples'}",
    )
    assert sampled.code == 0


def test_a_run_that_was_stopped_is_the_one_that_was_not(train, tmp_path):
    """To the last bit, over an epoch's end: 5 batches of 8 are one."""
    same = ["budget.decay_from=1", "budget.warmup=1"]
    assert train(*TINY_UNET, *same, images=64, out="whole").code == 0
    for images in (16, 48, 64):
        assert train(*TINY_UNET, *same, images=images, out="parts").code == 0
    whole, parts = (
        torch.load(tmp_path / name / "state.pt", weights_only=True) for name in ("whole", "parts")
    )
    for kind in ("model", "ema"):
        torch.testing.assert_close(parts[kind], whole[kind], rtol=0, atol=0)


def test_an_interruption_loses_what_came_after_the_last_checkpoint(train, tmp_path, monkeypatch):
    stop = iter([False, False, True])
    check = training.math.isfinite

    def isfinite(value: float) -> bool:
        if next(stop):
            raise Interrupted(signal.SIGTERM)
        return check(value)

    monkeypatch.setattr(training.math, "isfinite", isfinite)
    outcome = train(*TINY_UNET, images=64)
    assert outcome.code == 128 + signal.SIGTERM
    assert outcome.err.splitlines()[-1] == (
        "interrupted after 16 of 64 images; the same command continues from the last checkpoint"
    )
    monkeypatch.undo()
    assert train(*TINY_UNET, images=64).code == 0
    assert [record["images"] for record in log_of(tmp_path / "run")] == list(range(8, 65, 8))


def test_what_is_reported(train, data, tmp_path):
    """At every `report_every`th checkpoint and at the last: the loss by hand, and a picture."""
    run = tmp_path / "run"
    assert train(*TINY_UNET, "budget.report_every=3", images=40).code == 0
    records = log_of(run)
    assert ["fd_cifar" in record for record in records] == [False, False, True, False, True]
    assert Image.open(run / "curve.png").size[0] > 500
    assert len(list((run / "grids").iterdir())) == 2

    pipeline = DDPMPipeline.from_pretrained(run / "model")
    images, _ = cifar10.load("test", data)
    total, generator = 0.0, torch.Generator().manual_seed(0)
    times = torch.arange(8)[torch.randperm(8, generator=generator)] * 125
    noise = torch.randn(8, 3, 32, 32, generator=generator)
    square = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)[times].view(-1, 1, 1, 1)
    clean = images / 127.5 - 1
    noisy = square.sqrt() * clean + (1 - square).sqrt() * noise
    target = square.sqrt() * noise - (1 - square).sqrt() * clean
    with torch.no_grad():
        total = (pipeline.unet(noisy, times).sample - target).square().mean().item()
    assert records[-1]["held_out_loss"] == pytest.approx(total, rel=1e-2)


@pytest.mark.parametrize("faster", [torch.float32, torch.bfloat16])
def test_the_type_is_the_faster_one(faster, monkeypatch):
    clock = iter(range(1000))
    now = [0.0]
    monkeypatch.setattr(training.time, "perf_counter", lambda: now[0])

    def step(dtype: torch.dtype) -> None:
        next(clock)
        now[0] += 1.0 if dtype == faster else 2.0

    assert training.choose_dtype(step, "auto") == faster
    assert training.choose_dtype(step, "bfloat16") == torch.bfloat16


def test_the_feature_network_and_its_statistics_fit(train, data, tmp_path):
    run = tmp_path / "run"
    assert train("train=features", "+network.width=8", "+network.num_features=16").code == 0
    assert 0 <= log_of(run)[-1]["test_accuracy"] <= 1
    assert ReferenceStatistics.load(run / "fd_cifar.npz").count == 40
    metric = fd_cifar(run / "model", run / "fd_cifar.npz")
    metric.update(torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8))
    assert metric.compute() > 0


def test_bad_input_is_one_line(train, tmp_path):
    for argument, message in [
        ("device=cuda:7", "device=cuda:7"),
        (f"data.path={tmp_path / 'nowhere'}", "data.path="),
        ("train=vae", "train=vae"),
        ("budget.dtype=int8", "budget.dtype=int8: expected one of auto, float32"),
    ]:
        outcome = train(argument)
        assert outcome.code == 2
        assert message in outcome.err and len(outcome.err.strip().splitlines()) == 1
