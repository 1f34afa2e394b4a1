"""Unconditional latent diffusion against diffusers' own, deprecated pipeline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, LDMPipeline, UNet2DModel, VQModel
from PIL import Image

TOY = ["model=celebahq_ldm", "num_images=2", "batch_size=2", "nfe=4", "metrics=none", "threads=1"]


def images(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(file)) for file in sorted(folder.glob("images/*.png"))])


def test_without_lml_the_images_are_those_of_diffusers(script, pipelines, tmp_path):
    folder = pipelines / "celebahq_ldm"
    more = [f"model.path={folder}", "model.scaling_factor=null", "solver=ddim", "lml=off"]
    more.append("run_dir=run")
    outcome = script("sample", *TOY, *more)
    assert (outcome.code, outcome.err) == (0, "")
    pipe = LDMPipeline(
        vqvae=VQModel.from_pretrained(folder / "vqvae"),
        unet=UNet2DModel.from_pretrained(folder / "unet"),
        scheduler=DDIMScheduler.from_pretrained(folder / "scheduler", timestep_spacing="leading"),
    )
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    expected = pipe(2, num_inference_steps=4, generator=generators, output_type="np").images
    assert abs(images(tmp_path / "run") - 255 * expected).max() <= 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_with_lml(script, pipelines, tmp_path, dtype):
    common = [*TOY, f"model.path={pipelines / 'celebahq_ldm'}", f"dtype={dtype}"]
    assert script("sample", *common, "run_dir=on", "lml.damping=1").code == 0
    assert script("sample", *common, "run_dir=off", "lml=off").code == 0
    assert (images(tmp_path / "on") != images(tmp_path / "off")).any()
    assert script("sample", *common, "lml=off", "model.slicing=true", "run_dir=sliced").code == 0
    difference = images(tmp_path / "sliced").astype(int) - images(tmp_path / "off")
    assert abs(difference).max() <= 2


def no_decoder(folder: Path) -> None:
    shutil.rmtree(folder / "vqvae")


def broken_decoder(folder: Path) -> None:
    weights = folder / "vqvae/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])


def other_decoder(folder: Path) -> None:
    shutil.rmtree(folder / "vqvae")
    shutil.copytree(folder / "unet", folder / "vqvae")


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (no_decoder, "no autoencoder in it (vqvae or vae)"),
        (broken_decoder, "the weights cannot be read"),
        (other_decoder, "a UNet2DModel; expected a VQModel or AutoencoderKL"),
    ],
)
def test_a_folder_that_is_no_latent_model(script, pipelines, tmp_path, harm, says):
    shutil.copytree(pipelines / "celebahq_ldm", tmp_path / "ldm")
    harm(tmp_path / "ldm")
    outcome = script("sample", *TOY, f"model.path={tmp_path / 'ldm'}", "run_dir=run")
    assert outcome.code == 2 and len(outcome.err.splitlines()) == 1
    assert outcome.err.startswith(f"model.path={tmp_path / 'ldm'}: ") and says in outcome.err


@pytest.mark.parametrize("model", ["celebahq_ldm", "sd15", "flux", "pixart"])
def test_convergence_in_latents_and_pixels(script, pipelines, prompts, tmp_path, model):
    """Against both solutions' latents, decoded here; kept only for the metric, and made up for."""
    text = [] if model == "celebahq_ldm" else prompts
    solver = "flow_euler" if model == "flux" else "ddim"
    common = [f"model={model}", *TOY[1:], *text, f"model.path={pipelines / model}", "lml=off"]
    common += [f"solver={solver}", "run_dir=run"]
    common += ["model.height=32", "model.width=32"] if model == "flux" else []
    fine = [f"metrics.convergence.solver={solver}", "metrics.convergence.nfe=8"]
    asked = ["metrics=convergence", *fine]
    assert script("sample", *common).code == 0
    assert not (tmp_path / "run/latents").exists()
    before = [file.read_bytes() for file in sorted(tmp_path.glob("run/images/*"))]
    outcome = script("sample", *[a for a in common if a != "metrics=none"], *asked)
    assert (outcome.code, outcome.err) == (0, "")
    assert [file.read_bytes() for file in sorted(tmp_path.glob("run/images/*"))] == before
    (reference,) = tmp_path.glob("outputs/reference/*")
    ours, theirs = (
        np.stack([np.load(file) for file in sorted(run.glob("latents/*.npy"))]).reshape(2, -1)
        for run in (tmp_path / "run", reference)
    )
    value = json.loads((tmp_path / "run/metrics.json").read_text())["convergence"]["value"]
    rmse = np.sqrt(np.mean((ours.astype(float) - theirs) ** 2))
    assert rmse > 0.01 and value["latent_rmse"] == pytest.approx(rmse, rel=1e-6)
    assert 0 < value["rmse"] < 2 and value["latent_cosine"] < 1
    if model == "celebahq_ldm":
        decoder = VQModel.from_pretrained(pipelines / model / "vqvae")
        with torch.no_grad():
            made = decoder.decode(torch.from_numpy(ours.reshape(2, 3, 8, 8))).sample
        made = (127.5 * made + 127.5).round().clamp(0, 255).permute(0, 2, 3, 1).numpy()
        assert abs(made - images(tmp_path / "run")).max() <= 1
    (tmp_path / "run/metrics.json").unlink()
    outcome = script("evaluate", "run_dir=run", *asked)
    assert (outcome.code, outcome.err) == (0, "")
    again = json.loads((tmp_path / "run/metrics.json").read_text())["convergence"]["value"]
    assert again == pytest.approx(value)
    (tmp_path / "run/latents/000001.npy").write_bytes(b"half")
    outcome = script("evaluate", "run_dir=run", *asked)
    assert outcome.code == 2 and "latents: no readable latents" in outcome.err
