"""Calibrations that compare images by other networks' features, and those networks."""

from __future__ import annotations

import json
from typing import get_args

import pytest
import torch
from diffusers import DiffusionPipeline
from torchmetrics.functional.image import learned_perceptual_image_patch_similarity

from lml import configs, schedulers
from lml.benchmark import random_inception
from lml.calibration import calibrate_pipeline
from lml.metrics.lpips import WEIGHTS, LPIPSFeatures
from lml.schema import CalibrationObjective

SMALL = ["model=gaussian", "model.network.sample_size=32", "solver=ddim", "grid=trailing", "nfe=2"]
SMALL += ["threads=1"]
SEARCH = ["searched=4", "unseen=4", "batch_size=4", "fine.nfe=6", "rounds=1", "progress=false"]


def test_the_names_are_those_of_the_configs():
    assert sorted(get_args(CalibrationObjective)) == configs.names("objective")


def test_the_mean_square_of_lpips_features_is_lpips(alexnet):
    x, y = torch.randint(0, 256, (2, 3, 3, 40, 48), dtype=torch.uint8)
    network = LPIPSFeatures()
    distances = (network(x) - network(y)).square().mean(dim=1)
    theirs = learned_perceptual_image_patch_similarity(
        x / 127.5 - 1, y / 127.5 - 1, "alex", reduction="none"
    )
    assert theirs.min() > 1e-3
    assert torch.allclose(distances, theirs, rtol=1e-4)


@pytest.fixture
def extractor(objective, alexnet, dinov2_folder, tmp_path) -> list[str]:
    """What the command line needs for `objective`."""
    if objective == "inception":
        images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
        random_inception(tmp_path / "inception.pth", images)
        return [f"extractor.weights={tmp_path}/inception.pth"]
    return [f"extractor.model={dinov2_folder}"] if objective == "dinov2" else []


@pytest.mark.parametrize("objective", ["dinov2", "inception", "lpips"])
def test_a_calibration_by_it_is_found_by_its_name(script, extractor, tmp_path, objective):
    few = ["searched=1", "unseen=1"] if objective == "inception" else []
    command = [*SMALL, *SEARCH, *few, f"objective={objective}", *extractor]
    outcome = script("calibrate", *command)
    assert outcome.code == 0, outcome.err
    (path,) = tmp_path.glob("outputs/calibrations/*/calibration.json")
    values = json.loads(path.read_text())
    assert values["protocol"]["extractor"]["_target_"].startswith("lml.metrics.")
    errors = values["errors"]
    assert 0 < errors["calibrated"]["searched"] < errors["off"]["searched"]
    sample = ["sample", *SMALL, "lml=calibrated", "num_images=2", "metrics=none"]
    assert script(*sample).code == 2
    assert script(*sample, f"lml.objective={objective}").code == 0


@pytest.mark.parametrize("objective", ["dinov2", "inception", "lpips"])
def test_a_network_that_is_not_there_is_one_line(script, alexnet, tmp_path, objective):
    (alexnet / WEIGHTS.rpartition("/")[2]).write_bytes(b"half")
    where = {"dinov2": "model", "inception": "weights"}.get(objective)
    missing = [f"extractor.{where}={tmp_path}/none"] if where else []
    outcome = script("calibrate", *SMALL, *SEARCH, f"objective={objective}", *missing)
    assert outcome.code == 2 and len(outcome.err.strip().splitlines()) == 1
    assert outcome.err.startswith(f"extractor.{where}=" if where else "objective=lpips")


def test_a_pipelines_images_are_compared_by_features(alexnet, pipelines):
    pipe = DiffusionPipeline.from_pretrained(pipelines / "sd15")
    pipe.scheduler = schedulers.LMLDDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    before, network = pipe.scheduler, LPIPSFeatures()
    how = {"num_inference_steps": 2, "height": 32, "width": 32}
    found = calibrate_pipeline(
        pipe, "a cat", samples=4, fine_steps=6, batch_size=2, rounds=1, extractor=network, **how
    )

    def images(scheduler, **options):
        pipe.scheduler = scheduler
        noise = [torch.Generator().manual_seed(1_000_002 + k) for k in range(2)]
        made = pipe(["a cat"] * 2, generator=noise, output_type="pt", **{**how, **options}).images
        return 2 * made - 1

    ours = images(found.choice.apply(before))
    fine = images(type(before).from_config(before.config, rank=0), num_inference_steps=6)
    theirs = learned_perceptual_image_patch_similarity(ours.clamp(-1, 1), fine.clamp(-1, 1), "alex")
    unseen = found.errors[found.chosen]["unseen"]
    assert unseen == pytest.approx(theirs.sqrt().item(), rel=0.02)  # 8 bits a pixel


def test_a_finished_calibration_says_how_it_was_made(script, tmp_path):
    command = [*SMALL, *SEARCH]
    assert script("calibrate", *command).code == 0
    assert not script("calibrate", *command).err
    again = script("calibrate", *command, "searched=5")
    assert again.code == 0
    assert "was made with searched=4, not 5; overwrite=true makes it anew" in again.err
