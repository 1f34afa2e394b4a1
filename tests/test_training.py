"""Training at toy size: it resumes, and what it writes can be read and run."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline
from PIL import Image
from safetensors import safe_open

from lml.data.statistics import ReferenceStatistics
from lml.metrics.frechet import fd_cifar

TINY_UNET = [
    "unet.layers_per_block=1",
    "unet.block_out_channels=[16]",
    "unet.down_block_types=[DownBlock2D]",
    "unet.up_block_types=[UpBlock2D]",
    "+unet.norm_num_groups=4",
    "unet.attention_head_dim=8",
]


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
    def run(*arguments, minutes=0.005):
        return script(
            "train",
            f"data.path={data}",
            f"run_dir={tmp_path / 'run'}",
            f"budget.minutes={minutes}",
            "budget.batch_size=8",
            "budget.compile=false",
            "device=cpu",
            "threads=1",
            *arguments,
        )

    return run


def log_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_the_denoiser_goes_on_from_its_checkpoint(train, script, tmp_path):
    run = tmp_path / "run"
    assert train(*TINY_UNET).code == 0
    first = log_of(run)
    assert train(*TINY_UNET).code == 0
    assert len(log_of(run)) == len(first)  # the minutes are spent
    assert train(*TINY_UNET, minutes=0.03).code == 0
    assert log_of(run)[-1]["images"] > first[-1]["images"]
    assert log_of(run)[-1]["minutes"] > first[-1]["minutes"]

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
    ]:
        outcome = train(argument)
        assert outcome.code == 2
        assert message in outcome.err and len(outcome.err.strip().splitlines()) == 1
