"""Text-to-image models by their configs: loaded, sampled as diffusers does, and refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import (
    ControlNetModel,
    DiffusionPipeline,
    StableDiffusionControlNetPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import load_image
from PIL import Image

from lml import schedulers
from lml.pipelines import tiny as tiny_pipelines

CONFIGS = Path(__file__).parents[2] / "configs/model"
TOY = ["num_images=3", "batch_size=2", "nfe=4", "metrics=none", "threads=1", "run_dir=run"]
FLOW = tiny_pipelines.FLOW
SIZE = {"flux": ["model.height=32", "model.width=32"]}
MODELS = sorted(tiny_pipelines.PIPELINES)


def arguments(pipelines: Path, model: str, *more: str) -> list[str]:
    solver = "flow_euler" if model in FLOW else "dpmsolverpp"
    path = f"model.path={pipelines / model}"
    return [f"model={model}", path, f"solver={solver}", *SIZE.get(model, []), *TOY, *more]


def images(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(file)) for file in sorted(folder.glob("images/*.png"))])


def test_every_text_model_of_the_configs_is_tried_here():
    texts = {f.stem for f in CONFIGS.glob("*.yaml") if "/base/text@_here_" in f.read_text()}
    assert texts == set(MODELS)


@pytest.mark.parametrize("model", MODELS)
def test_without_lml_the_images_are_those_of_diffusers(script, pipelines, prompts, tmp_path, model):
    """Batches of two prompts, each image from its own seed."""
    outcome = script("sample", *arguments(pipelines, model, *prompts, "lml=off"))
    assert (outcome.code, outcome.err) == (0, "")
    pipe = DiffusionPipeline.from_pretrained(pipelines / model)
    pipe.set_progress_bar_config(disable=True)
    name = "FlowMatchEulerDiscrete" if model in FLOW else "DPMSolverMultistep"
    parent = getattr(schedulers, f"LML{name}Scheduler").__bases__[-1]
    options = {} if model in FLOW else {"solver_order": 3}
    pipe.scheduler = parent.from_config(pipe.scheduler.config, **options)
    call = {"height": 32, "width": 32} if model == "flux" else {}
    if model == "pixart":
        call = {"use_resolution_binning": False, "clean_caption": False}
    scale = {"sdxl": 5.0, "pixart": 4.5, "sd3": 7.0, "flux": 3.5}.get(model, 7.5)
    expected = []
    for texts, seeds in ((["a cat", "a dog"], [0, 1]), (["a bird"], [2])):
        expected += pipe(
            texts,
            num_inference_steps=4,
            guidance_scale=scale,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            **call,
        ).images
    ours = images(tmp_path / "run").astype(int)
    assert abs(ours - np.stack([np.asarray(image) for image in expected])).max() <= 1
    timing = json.loads((tmp_path / "run/timing.json").read_text())
    assert timing["evaluations_per_image"] == 4
    assert timing["guidance_evaluations_per_image"] == (0 if model == "flux" else 4)
    assert {"network", "decoder", "text_encoder"} <= set(timing["seconds"])
    lines = (tmp_path / "run/prompts.jsonl").read_text().splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == ["a cat", "a dog", "a bird"]


def test_flux_as_the_authors_have_it(script, pipelines, prompts, tmp_path):
    """In bfloat16, on packed latents, at their damping."""
    for solver in ("authors_fm_euler", "authors_lml_euler", "flow_euler"):
        more = ["lml=off"] if solver == "flow_euler" else []
        common = [*arguments(pipelines, "flux", *prompts, "dtype=bfloat16"), f"solver={solver}"]
        outcome = script("sample", *common, *more, f"run_dir={solver}")
        assert (outcome.code, outcome.err) == (0, "")
    euler, lml, base = (
        images(tmp_path / s).astype(int)
        for s in ("authors_fm_euler", "authors_lml_euler", "flow_euler")
    )
    assert (euler == base).all() and abs(lml - base).mean() > 0.05
    lml = yaml.safe_load((tmp_path / "authors_lml_euler/config.yaml").read_text())["lml"]
    assert (lml["damping"], lml["target"], lml["kappa"]) == (1e-2, "prediction", 0)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_with_lml(script, pipelines, prompts, tmp_path, model, dtype):
    """It is on, after guidance: it sees one direction an image."""
    common = arguments(pipelines, model, *prompts, f"dtype={dtype}", "lml.damping=1")
    assert script("sample", *common).code == 0
    off = [*common, "lml.rank=0", "run_dir=off"]
    assert script("sample", *off).code == 0
    assert (images(tmp_path / "run") != images(tmp_path / "off")).any()


@pytest.mark.parametrize(
    "option", [["attention=math"], ["attention=flash"], ["channels_last=false"]], ids=str
)
def test_options_of_speed_change_next_to_nothing(script, pipelines, prompts, tmp_path, option):
    common = arguments(pipelines, "sd15", *prompts)
    assert script("sample", *common).code == 0
    assert script("sample", *common, *option, "run_dir=other").code == 0
    difference = images(tmp_path / "run").astype(int) - images(tmp_path / "other")
    assert abs(difference).max() <= 1


def test_unguided_and_with_a_negative_prompt(script, pipelines, prompts, tmp_path):
    common = arguments(pipelines, "sd15", *prompts)
    for name, more in {
        "guided": [],
        "unguided": ["model.guidance_scale=1"],
        "negative": ["model.negative_prompt=zzz"],
    }.items():
        assert script("sample", *common, *more, f"run_dir={name}").code == 0
    made = {name: images(tmp_path / name) for name in ("guided", "unguided", "negative")}
    assert (made["guided"] != made["unguided"]).any()
    assert (made["guided"] != made["negative"]).any()
    timing = json.loads((tmp_path / "unguided/timing.json").read_text())
    assert timing["guidance_evaluations_per_image"] == 0


def test_size_and_slicing(script, pipelines, prompts, tmp_path):
    more = ["model.height=24", "model.width=32"]
    common = arguments(pipelines, "sd15", *prompts, *more)
    assert script("sample", *common).code == 0
    assert images(tmp_path / "run").shape == (3, 24, 32, 3)
    assert script("sample", *common, "model.slicing=true", "run_dir=sliced").code == 0
    difference = images(tmp_path / "run").astype(int) - images(tmp_path / "sliced")
    assert abs(difference).max() <= 1


def test_a_prompt_that_is_too_long_is_cut_and_said(script, pipelines, prompts, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n" + "word " * 300 + "\na bird\n")
    outcome = script("sample", *arguments(pipelines, "sd15", *prompts))
    assert outcome.code == 0
    assert outcome.err == (
        "1 of 3 prompts are cut at the 16 tokens of tokenizer; the longest has 1202\n"
    )


@pytest.fixture
def control(pipelines, tmp_path) -> list[str]:
    """Arguments that give sd15_canny the tiny ControlNet and an image to follow."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "edges.png")
    return [
        "model=sd15_canny",
        f"model.path={pipelines / 'sd15'}",
        f"model.controlnet.path={pipelines / 'controlnet'}",
        f"model.control_image={tmp_path / 'edges.png'}",
        *TOY,
    ]


def test_controlnet(script, pipelines, prompts, control, tmp_path):
    assert script("sample", *control, *prompts, "lml=off").code == 0
    pipe = StableDiffusionControlNetPipeline.from_pretrained(
        pipelines / "sd15", controlnet=ControlNetModel.from_pretrained(pipelines / "controlnet")
    )
    pipe.set_progress_bar_config(disable=True)
    parent = schedulers.LMLDPMSolverMultistepScheduler.__bases__[-1]
    pipe.scheduler = parent.from_config(pipe.scheduler.config, solver_order=3)
    expected = pipe(
        ["a cat", "a dog"],
        Image.open(tmp_path / "edges.png"),
        num_inference_steps=4,
        generator=[torch.Generator().manual_seed(seed) for seed in (0, 1)],
    ).images
    ours = images(tmp_path / "run")[:2].astype(int)
    assert abs(ours - np.stack([np.asarray(image) for image in expected])).max() <= 1
    plain = arguments(pipelines, "sd15", *prompts, "lml=off", "run_dir=plain")
    assert script("sample", *plain).code == 0
    assert (images(tmp_path / "plain") != images(tmp_path / "run")).any()


@pytest.mark.parametrize("model", ["sd15_canny", "sd15_depth", "sd15_pose"])
def test_every_controlnet_config(script, prompts, control, model):
    assert script("sample", *control, f"model={model}", *prompts).code == 0


def test_another_control_image_is_another_run(script, prompts, control, tmp_path):
    assert script("sample", *control, *prompts).code == 0
    Image.new("RGB", (16, 16)).save(tmp_path / "edges.png")
    outcome = script("sample", *control, *prompts)
    assert outcome.code == 2 and "control_image" in outcome.err


def test_a_control_image_is_turned_as_diffusers_turns_it(script, prompts, control, tmp_path):
    """Stored lying, with the EXIF orientation of a camera that was held upright."""
    pixels = np.asarray(Image.open(tmp_path / "edges.png"))
    assert script("sample", *control, *prompts).code == 0
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(pixels)).save(tmp_path / "edges.png", exif=exif)
    assert (np.asarray(load_image(str(tmp_path / "edges.png"))) == pixels).all()
    outcome = script("sample", *control, *prompts)
    assert outcome.code == 0 and "all were stored before" in outcome.out  # the very same run


def not_an_image(path: Path) -> None:
    path.write_text("edges")


def of_another_size(path: Path) -> None:
    Image.new("RGB", (20, 16)).save(path)


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (Path.unlink, "no such file"),
        (not_an_image, "not a readable image"),
        (of_another_size, "20x16 pixels; expected 16x16"),
    ],
)
def test_a_control_image_that_is_none(script, prompts, control, tmp_path, harm, says):
    harm(tmp_path / "edges.png")
    outcome = script("sample", *control, *prompts)
    assert outcome.code == 2 and len(outcome.err.splitlines()) == 1
    assert outcome.err.startswith(f"model.control_image={tmp_path / 'edges.png'}: ")
    assert says in outcome.err


BAD = {
    "model.guidance_scale=-1": "model.guidance_scale=-1: expected a number of at least 0",
    "model.guidance_scale=nan": "model.guidance_scale=nan",
    "model.height=30": "model.height=30: expected a multiple of 8",
    "model.negative_prompt=[a,b]": "model.negative_prompt=['a', 'b']: expected null or text",
    "model.slicing=3": "model.slicing=3: expected true or false",
    "model.cpu_offload=true": "model.cpu_offload=true: expected an accelerator",
    "attention=fast": "attention=fast: expected null or one of math",
    "+model.call.magic=1": "model.magic: StableDiffusionPipeline takes no such option",
    "+model.call.clip_skip=1": "model.call: StableDiffusionPipeline fails with clip_skip=1",
    "num_images=4": "num_images=4: prompts=text has 3",
    "model.path=nowhere": "model.path=nowhere: no such folder",
    "solver=flow_euler": "solver=flow_euler: not for sd15",
}


@pytest.mark.parametrize("override", BAD)
def test_bad_input(script, pipelines, prompts, override):
    outcome = script("sample", *arguments(pipelines, "sd15", *prompts, override))
    assert outcome.code == 2 and len(outcome.err.splitlines()) == 1
    assert outcome.err.startswith(BAD[override])


def test_prompts_where_none_are_taken_and_none_where_they_are(script, pipelines, prompts, toy):
    outcome = script("sample", *toy, *prompts)
    assert (outcome.code, outcome.err) == (
        2,
        "prompts: model=cifar10 takes none; use prompts=none\n",
    )
    outcome = script("sample", *arguments(pipelines, "sd15"))
    assert outcome.code == 2 and outcome.err.startswith("prompts=none: model=sd15 needs prompts")


def truncated(folder: Path) -> None:
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def half_downloaded(folder: Path) -> None:
    (folder / "text_encoder/model.safetensors").unlink()


def no_tokenizer(folder: Path) -> None:
    shutil.rmtree(folder / "tokenizer")


def pickled(folder: Path) -> None:
    for file in folder.glob("vae/*.safetensors"):
        file.rename(file.with_suffix(".bin"))


def no_index(folder: Path) -> None:
    (folder / "model_index.json").unlink()


def other_pipeline(folder: Path) -> None:
    edit_index(folder, _class_name="DDPMPipeline")


def unknown_pipeline(folder: Path) -> None:
    edit_index(folder, _class_name="MagicPipeline")


def edit_index(folder: Path, **entries: str) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, **entries}))


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (truncated, "unet: the weights cannot be read"),
        (half_downloaded, "no weights in text_encoder"),
        (no_tokenizer, "no tokenizer in it"),
        (pickled, "no weights in vae .*model.use_safetensors=false"),
        (no_index, "no pipeline in it"),
        (other_pipeline, "a DDPMPipeline; expected a pipeline from text to images"),
        (unknown_pipeline, "a MagicPipeline, which diffusers does not have"),
    ],
)
def test_a_pipeline_that_is_none(script, pipelines, prompts, tmp_path, harm, says):
    shutil.copytree(pipelines / "sd15", tmp_path / "sd15")
    harm(tmp_path / "sd15")
    outcome = script("sample", *arguments(tmp_path, "sd15", *prompts))
    assert outcome.code == 2 and len(outcome.err.splitlines()) == 1
    assert outcome.err.startswith(f"model.path={tmp_path / 'sd15'}: ")
    assert re.search(says, outcome.err)


def test_pickled_weights_where_the_user_says_so(script, pipelines, prompts, tmp_path):
    shutil.copytree(pipelines / "sd15", tmp_path / "sd15")
    vae = DiffusionPipeline.from_pretrained(pipelines / "sd15").vae
    (tmp_path / "sd15/vae/diffusion_pytorch_model.safetensors").unlink()
    vae.save_pretrained(tmp_path / "sd15/vae", safe_serialization=False)
    common = arguments(tmp_path, "sd15", *prompts)
    assert script("sample", *common).code == 2
    assert script("sample", *common, "model.use_safetensors=false").code == 0
    safe = arguments(pipelines, "sd15", *prompts, "run_dir=safe")
    assert script("sample", *safe).code == 0
    assert (images(tmp_path / "safe") == images(tmp_path / "run")).all()


def test_a_network_that_returns_nan(script, pipelines, prompts, tmp_path):
    shutil.copytree(pipelines / "sd15", tmp_path / "sd15")
    unet = DiffusionPipeline.from_pretrained(pipelines / "sd15").unet
    unet.conv_out.bias.data[0] = float("nan")
    unet.save_pretrained(tmp_path / "sd15/unet")
    outcome = script("sample", *arguments(tmp_path, "sd15", *prompts))
    assert outcome.code == 2 and "NaN or inf at step 1 of 4, timestep 801" in outcome.err
    assert not list((tmp_path / "run/images").glob("*.png"))


@pytest.mark.parametrize("model", [*MODELS, "sd15_canny", "celebahq_ldm", "cifar10_ddpm"])
def test_a_hub_that_cannot_be_reached(script, prompts, tmp_path, monkeypatch, model):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    more = prompts if model in MODELS or model == "sd15_canny" else []
    outcome = script("sample", f"model={model}", *TOY, *more)
    assert outcome.code == 2 and len(outcome.err.splitlines()) == 1
    assert outcome.err.startswith("model.hub_id=") and "model.path=FOLDER" in outcome.err


def test_memory_that_runs_out(script, pipelines, prompts, tmp_path, monkeypatch):
    """As CUDA's allocator says it, in the second batch; the first one stays."""
    calls = []

    def forward(self, *args, **kwargs):
        calls.append(1)
        if len(calls) > 4:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return original(self, *args, **kwargs)

    original = UNet2DConditionModel.forward
    monkeypatch.setattr(UNet2DConditionModel, "forward", forward)
    outcome = script("sample", *arguments(pipelines, "sd15", *prompts))
    assert outcome.code == 2 and len(outcome.err.splitlines()) == 1
    assert outcome.err.startswith("batch_size=2: too large for sd15 and the memory of cpu; ")
    assert "model.slicing=true" in outcome.err and "model.cpu_offload=true" in outcome.err
    assert len(list((tmp_path / "run/images").glob("*.png"))) == 2
