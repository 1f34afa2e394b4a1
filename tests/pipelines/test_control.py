"""Control maps that are made from a photograph, and img2img that begins with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from diffusers import ControlNetModel, StableDiffusionControlNetImg2ImgPipeline
from omegaconf import OmegaConf
from PIL import Image, ImageDraw, ImageOps
from safetensors.torch import load_file, save_file
from transformers import pipeline

from lml import schedulers
from lml.configs import compose
from lml.errors import UserError
from lml.pipelines import control, find_model
from lml.runs.plan import choose_prompts, plan
from lml.runs.solver import find_steps
from lml.runs.worker import Worker

TOY = ["num_images=3", "batch_size=2", "nfe=4", "metrics=none", "threads=1", "run_dir=run"]
IMG2IMG = StableDiffusionControlNetImg2ImgPipeline
# OpenPose's colours
NOSE, NECK, SHOULDER = (255, 0, 0), (255, 85, 0), (255, 170, 0)


@pytest.fixture
def photo(tmp_path) -> Path:
    """A photograph, wider than the images are, with a ball in its middle."""
    picture = Image.new("RGB", (48, 32), "white")
    ImageDraw.Draw(picture).ellipse((14, 6, 34, 26), fill="red")
    picture.save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def base(pipelines, prompts, photo) -> list[str]:
    """Arguments of sample.py for any ControlNet model with the photograph."""
    return [
        f"model.path={pipelines / 'sd15'}",
        f"model.controlnet.path={pipelines / 'controlnet'}",
        f"model.control_photo={photo}",
        *prompts,
        *TOY,
    ]


@pytest.fixture
def depth(pipelines, base) -> list[str]:
    """Those, with the tiny depth model."""
    return ["model=sd15_depth", f"model.control_map.path={pipelines / 'depth'}", *base]


def fitted(photo: Path, size: int = 16) -> Image.Image:
    return ImageOps.fit(Image.open(photo), (size, size), Image.Resampling.BICUBIC)


def images(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(file)) for file in sorted(folder.glob("images/*.png"))])


def contents(folder: Path) -> dict[str, bytes]:
    files = [folder / "control.png", *folder.glob("images/*.png")]
    return {file.name: file.read_bytes() for file in files}


# --- the maps ------------------------------------------------------------------------------------


def test_canny_edges(script, base, photo, tmp_path):
    """The run keeps them; given as control_image, they make the same images."""
    cv2 = pytest.importorskip("cv2")
    outcome = script("sample", "model=sd15_canny", *base)
    assert (outcome.code, outcome.err) == (0, "")
    edges = cv2.Canny(np.array(fitted(photo)), 100, 200)
    kept = np.asarray(Image.open(tmp_path / "run/control.png"))
    assert edges.any() and (kept == edges[..., None]).all()
    given = [f"model.control_image={tmp_path / 'run/control.png'}", "model.control_photo=null"]
    assert script("sample", "model=sd15_canny", *base, *given, "run_dir=given").code == 0
    assert (images(tmp_path / "given") == images(tmp_path / "run")).all()
    assert not (tmp_path / "given/control.png").exists()
    models = [
        yaml.safe_load((tmp_path / run / "config.yaml").read_text())["settings"]["model"]
        for run in ("run", "given")
    ]
    assert models[0].keys() - models[1].keys() == {"control_photo", "control_map"}
    assert models[1].keys() - models[0].keys() == {"control_image"}


def test_depth(script, depth, pipelines, photo, tmp_path):
    outcome = script("sample", *depth)
    assert (outcome.code, outcome.err) == (0, "")
    theirs = pipeline("depth-estimation", model=str(pipelines / "depth"), device="cpu")
    expected = np.asarray(theirs(fitted(photo))["depth"])
    kept = np.asarray(Image.open(tmp_path / "run/control.png"))
    assert expected.min() == 0 and expected.max() == 255
    assert (kept == expected[..., None]).all()


@pytest.fixture
def body(tmp_path) -> Path:
    """A folder with OpenPose's body network, whose weights are all 0."""
    pytest.importorskip("controlnet_aux")
    from controlnet_aux.open_pose.model import bodypose_model

    with torch.device("meta"):
        shapes = {name: value.shape for name, value in bodypose_model().state_dict().items()}
    weights = {name.partition(".")[2]: torch.zeros(1).expand(s) for name, s in shapes.items()}
    (tmp_path / "body").mkdir()
    torch.save(weights, tmp_path / "body/body_pose_model.pth")
    return tmp_path / "body"


def test_pose(script, base, body, tmp_path):
    """A network that sees nobody: a black map."""
    outcome = script("sample", "model=sd15_pose", f"model.control_map.path={body}", *base)
    assert (outcome.code, outcome.err) == (0, "")
    kept = np.asarray(Image.open(tmp_path / "run/control.png"))
    assert kept.shape == (16, 16, 3) and not kept.any()
    (body / "body_pose_model.pth").write_bytes(b"weights")
    outcome = script("sample", "model=sd15_pose", f"model.control_map.path={body}", *base)
    assert outcome.code == 2 and "control_map.network" in outcome.err  # another run
    outcome = script("sample", "model=sd15_pose", f"model.control_map.path={body}", *base, "name=b",
                     "run_dir=broken")  # fmt: skip
    assert outcome.code == 2 and len(outcome.err.splitlines()) == 1
    assert "body_pose_model.pth cannot be read" in outcome.err


def test_the_skeleton_that_is_drawn(body, monkeypatch):
    """OpenPose's colours, on the keypoints that the network found."""
    from controlnet_aux.open_pose import Body

    points = np.array([[256, 100, 1, 0], [256, 200, 1, 1], [150, 200, 1, 2]], dtype=float)
    person = np.full((1, 20), -1.0)
    person[0, :3], person[0, 18:] = (0, 1, 2), (3, 3)
    monkeypatch.setattr(Body, "__call__", lambda self, image: (points, person))
    draw, _ = control._find_pose({"control_map": {"path": str(body)}})
    drawn = draw(Image.new("RGB", (512, 512)))
    found = {at: drawn.getpixel(at) for at in ((256, 100), (256, 200), (150, 200), (200, 200))}
    limb = tuple(int(0.6 * value) for value in NOSE)  # neck to shoulder: the first limb's colour
    assert list(found.values()) == [NOSE, NECK, SHOULDER, limb]
    assert draw(Image.new("RGB", (64, 64))).size == (64, 64)


def test_a_map_is_made_by_one_thread(photo):
    """So that it does not depend on how many processes share the cores."""
    used, before = [], torch.get_num_threads()

    def make(picture: Image.Image) -> Image.Image:
        used.append(torch.get_num_threads())
        raise RuntimeError("no map")

    torch.set_num_threads(2)
    try:
        with pytest.raises(UserError, match=r"^key=.*photo.png: no map could be made \(no map\)$"):
            control.Control("key", str(photo), {}, make).at((16, 16))
        assert used == [1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# --- runs ----------------------------------------------------------------------------------------


def test_the_photograph_names_the_run(script, depth, photo, tmp_path):
    """Its pixels do, and the depth model; its place does not."""
    assert script("sample", *depth).code == 0
    shutil.move(photo, tmp_path / "moved.png")
    moved = f"model.control_photo={tmp_path / 'moved.png'}"
    outcome = script("sample", *depth, moved)
    assert outcome.code == 0 and "all were stored before" in outcome.out
    Image.new("RGB", (48, 32)).save(tmp_path / "moved.png")
    outcome = script("sample", *depth, moved)
    assert outcome.code == 2 and "model.control_photo=" in outcome.err
    assert "holds a run with other settings" in outcome.err


@pytest.mark.parametrize("file", ["preprocessor_config.json", "model.safetensors"])
def test_the_depth_model_names_the_run(script, depth, pipelines, tmp_path, file):
    shutil.copytree(pipelines / "depth", tmp_path / "depth")
    here = f"model.control_map.path={tmp_path / 'depth'}"
    assert script("sample", *depth).code == 0
    assert "all were stored before" in script("sample", *depth, here).out
    path = tmp_path / "depth" / file
    if path.suffix == ".json":
        about = json.loads(path.read_text())
        path.write_text(json.dumps({**about, "image_mean": [0, 0, 0]}))
    else:
        save_file({k: 2 * v for k, v in load_file(path).items()}, path, {"format": "pt"})
    outcome = script("sample", *depth, here)
    assert outcome.code == 2 and "model.control_map." in outcome.err


def test_two_processes_and_a_run_that_was_cut_off(script, spawn, depth, tmp_path):
    assert script("sample", *depth).code == 0
    whole = contents(tmp_path / "run")
    two = spawn("sample", *depth, "run_dir=two", processes=2)
    _, err = two.communicate(timeout=240)
    assert two.returncode == 0, err
    assert contents(tmp_path / "two") == whole
    for name in ("control.png", "images/000001.png"):
        (tmp_path / "run" / name).unlink()
    assert script("sample", *depth).code == 0
    assert contents(tmp_path / "run") == whole


def test_what_is_done_with_a_finished_run(script, depth, tmp_path):
    assert script("sample", *depth).code == 0
    assert script("sample", *depth, "model.strength=0.5", "run_dir=other").code == 0
    scored = script("evaluate", "run_dir=run", "metrics=[correction_cosine]", "threads=1")
    assert (scored.code, scored.err) == (0, "")
    compared = script("compare", "run_dirs=[run,other]", "out=page")
    assert (compared.code, compared.err) == (0, "")
    shutil.copy(tmp_path / "run/control.png", tmp_path / "kept.png")
    given = [f"model.control_image={tmp_path / 'kept.png'}", "model.control_photo=null"]
    assert script("sample", *depth, *given, "overwrite=true").code == 0
    assert not (tmp_path / "run/control.png").exists()  # it was another run's


# --- img2img -------------------------------------------------------------------------------------


@pytest.fixture
def img2img(depth) -> list[str]:
    return [*depth, "model=sd15_depth_img2img"]


SOLVERS = {
    "ddim": (schedulers.LMLDDIMScheduler, {"clip_sample": False}),
    "dpmsolverpp": (schedulers.LMLDPMSolverMultistepScheduler, {"solver_order": 3}),
    "euler": (schedulers.LMLEulerDiscreteScheduler, {}),
}


@pytest.mark.parametrize("solver", SOLVERS)
def test_without_lml_img2img_is_that_of_diffusers(
    script, img2img, pipelines, photo, tmp_path, solver
):
    """From the noised photograph, the last 4 of 5 steps."""
    outcome = script("sample", *img2img, f"solver={solver}", "lml=off")
    assert (outcome.code, outcome.err) == (0, "")
    timing = json.loads((tmp_path / "run/timing.json").read_text())
    assert (timing["evaluations_per_image"], timing["guidance_evaluations_per_image"]) == (4, 4)
    assert "encoder" in timing["seconds"]
    pipe = IMG2IMG.from_pretrained(
        pipelines / "sd15", controlnet=ControlNetModel.from_pretrained(pipelines / "controlnet")
    )
    pipe.set_progress_bar_config(disable=True)
    scheduler, options = SOLVERS[solver]
    pipe.scheduler = scheduler.__bases__[-1].from_config(pipe.scheduler.config, **options)
    expected = pipe(
        ["a cat", "a dog"],
        image=fitted(photo),
        control_image=Image.open(tmp_path / "run/control.png"),
        num_inference_steps=5,
        generator=[torch.Generator().manual_seed(seed) for seed in (0, 1)],
    ).images
    ours = images(tmp_path / "run")[:2].astype(int)
    assert abs(ours - np.stack([np.asarray(image) for image in expected])).max() <= 1


@pytest.mark.parametrize("solver", ["ddim", "dpmsolverpp", "dpmsolver_singlestep", "unipc", "pndm"])
def test_img2img_with_lml(script, img2img, tmp_path, solver):
    common = [*img2img, f"solver={solver}", "nfe=6", "lml.damping=0.5"]
    outcome = script("sample", *common, "metrics=[correction_cosine]")
    assert (outcome.code, outcome.err) == (0, "")
    assert script("sample", *common, "lml.rank=0", "run_dir=off").code == 0
    assert (images(tmp_path / "run") != images(tmp_path / "off")).any()
    score = json.loads((tmp_path / "run/metrics.json").read_text())["correction_cosine"]
    assert score["value"]["non_finite"] == 0 and len(score["steps"]["timestep"]) == 6
    assert max(score["steps"]["timestep"]) < 850  # it begins in the middle
    assert min(score["steps"]["cosine"]) < 0.9999


def test_a_network_that_fails_is_named_by_the_step_that_is_made(
    script, img2img, pipelines, tmp_path
):
    shutil.copytree(pipelines / "sd15", tmp_path / "sd15")
    file = tmp_path / "sd15/unet/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["conv_out.bias"] += torch.nan
    save_file(weights, file, {"format": "pt"})
    outcome = script("sample", *img2img, "solver=ddim", f"model.path={tmp_path / 'sd15'}")
    assert outcome.code == 2 and len(outcome.err.splitlines()) == 1
    # of the model's 5 leading timesteps 801, 601, ...
    assert "NaN or inf at step 1 of 4, timestep 601" in outcome.err


@pytest.mark.parametrize("strength", [0.05, 0.29, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("solver", ["DDIM", "DPMSolverMultistep", "HeunDiscrete", "PNDM"])
def test_the_evaluations_of_img2img_are_counted_as_diffusers_makes_them(solver, strength):
    options = {"skip_prk_steps": True} if solver == "PNDM" else {}
    scheduler = getattr(schedulers, f"LML{solver}Scheduler")(**options)
    holder, counts = SimpleNamespace(scheduler=scheduler), {}
    for steps in range(1, min(round(60 / strength), 1000)):
        scheduler.set_timesteps(steps)
        counts[steps] = len(IMG2IMG.get_timesteps(holder, steps, strength, "cpu")[0])
    for nfe in (1, 2, 5, 8, 13, 40):
        if nfe in counts.values():
            assert counts[find_steps(scheduler, nfe, solver, strength)] == nfe
            continue
        below = max((count for count in counts.values() if count < nfe), default=0)
        above = min(count for count in counts.values() if count > nfe)
        with pytest.raises(UserError) as refused:
            find_steps(scheduler, nfe, solver, strength)
        reachable = f"{below} or {above}" if below else f"{above}"
        assert str(refused.value) == f"nfe={nfe}: {solver} can make {reachable}"


def test_more_evaluations_than_there_are_timesteps(script, img2img, tmp_path):
    outcome = script("sample", *img2img, "nfe=300", "model.strength=0.25")
    assert outcome.code == 2 and len(outcome.err.splitlines()) == 1
    assert outcome.err.startswith("nfe=300: at most 250, of the model's 1000 timesteps with model.")
    outcome = script("sample", *img2img, "solver=heun", "nfe=8")
    assert outcome.code == 2 and outcome.err.startswith("nfe=8: heun can make 7 or 9")


def test_a_sweep_of_strengths(script, img2img, tmp_path):
    common = [*img2img, "run_dir=null", "name=sweep", "lml=off"]
    outcome = script("sample", "-m", *common, "model.strength=0.2,0.9")
    assert (outcome.code, outcome.err) == (0, "")
    assert len(list((tmp_path / "outputs/sweep").glob("*/control.png"))) == 2


@pytest.mark.parametrize("strength", [0.15, 0.8])
def test_a_rate_is_measured_on_steps_that_are_made(img2img, strength):
    cfg = OmegaConf.to_container(
        compose(*img2img, f"model.strength={strength}", config="sample"), resolve=True
    )
    model = find_model(cfg["model"])
    worker = Worker(plan(cfg, model, choose_prompts(cfg, model)), torch.device("cpu"))
    counted = []
    worker.sampler().network.register_forward_hook(lambda *_: counted.append(1))
    assert worker.measure() > 0
    assert 1 <= len(counted) - 4 <= 2  # beside the 4 of the run


def test_what_compares_with_other_numbers_of_steps_is_refused(script, img2img, tmp_path):
    outcome = script("sample", *img2img, "metrics=[convergence]")
    assert outcome.code == 2 and len(outcome.err.splitlines()) == 1
    assert outcome.err.startswith("model.strength=0.8: not with metrics=[convergence], since each")
    taken = ("model", "prompts", "threads", "nfe")
    outcome = script("calibrate", *(a for a in img2img if a.startswith(taken)))
    assert outcome.code == 2 and len(outcome.err.splitlines()) == 1
    assert outcome.err.startswith("model.strength=0.8: not with a calibration, since each")


# --- bad input -----------------------------------------------------------------------------------

BAD = {
    "model.control_photo=nowhere.png": "model.control_photo=nowhere.png: no such file",
    "model.control_photo=prompts.txt": "model.control_photo=prompts.txt: not a readable image",
    "model.control_photo=null": "model.control_image=null: expected the image that the ControlNet",
    "model.control_photo=null model.strength=0.5": "model.control_photo=null: expected the photogr",
    "model.control_image=photo.png": "model.control_photo=PHOTO: model.control_image is also given",
    "model.controlnet=null": "model.control_photo=PHOTO: sd15_depth has no ControlNet; use model=",
    "model.control_map=null": "model.control_map.kind=null: expected the map of model.control_ph",
    "model.control_map.kind=edges": "model.control_map: expected null or a group|"
    "model.control_map.kind=edges: expected one of canny, depth, pose",
    "model.control_map.path=nowhere": "model.control_map.path=nowhere: no such folder; expected a",
    "model.control_map.path=empty": "model.control_map.path=empty: no empty/config.json in it",
    "model.control_map.kind=pose": "model.control_photo=PHOTO: needs controlnet_aux: `pip|"
    "model.control_map.path=DEPTH: no body_pose_model.pth in it",
    "model.strength=0": "model.strength=0: expected null or a number > 0",
    "model.strength=1.5": "model.strength=1.5: expected null or a number from 0 to 1",
}


@pytest.mark.parametrize("override", BAD)
def test_bad_input(script, depth, photo, pipelines, tmp_path, override):
    (tmp_path / "empty").mkdir()
    outcome = script("sample", *depth, *override.split())
    assert outcome.code == 2 and len(outcome.err.splitlines()) == 1
    says = BAD[override].replace("PHOTO", str(photo)).replace("DEPTH", str(pipelines / "depth"))
    assert outcome.err.startswith(tuple(says.split("|"))), outcome.err
    assert not (tmp_path / "run").exists()


def test_a_photograph_for_a_model_without_a_controlnet(script, base, photo):
    arguments = ["model=sd15", *(a for a in base if ".controlnet" not in a)]
    outcome = script("sample", *arguments)
    assert outcome.code == 2 and len(outcome.err.splitlines()) == 1
    assert outcome.err.startswith(
        f"model.control_photo={photo}: sd15 has no ControlNet; use model="
    )


@pytest.mark.parametrize("kind", sorted(control.PACKAGES))
def test_a_missing_extra(script, base, photo, monkeypatch, kind):
    monkeypatch.setitem(control.PACKAGES, kind, ("the-package", "no_such_module"))
    outcome = script("sample", f"model=sd15_{kind}", *base)
    assert outcome.code == 2 and outcome.err == (
        f"model.control_photo={photo}: needs the-package: `pip install -e '.[control]'`\n"
    )


@pytest.mark.parametrize(
    ("lost", "says"),
    [
        ("neck.fusion_stage.layers.0.residual_layer1.convolution1.weight", None),
        ("neck.fusion_stage.layers.1.residual_layer1.convolution1.weight", "missing: neck.fusion"),
        ("head.head.0.weight", "missing: head.head.0.weight"),
    ],
)
def test_a_depth_model_lacks_what_is_never_used(script, depth, pipelines, tmp_path, lost, says):
    """As Intel/dpt-large does: its first fusion layer has no residual."""
    shutil.copytree(pipelines / "depth", tmp_path / "depth")
    file = tmp_path / "depth/model.safetensors"
    weights = load_file(file)
    del weights[lost]
    save_file(weights, file, {"format": "pt"})
    outcome = script("sample", *depth, f"model.control_map.path={tmp_path / 'depth'}")
    if says is None:
        assert (outcome.code, outcome.err) == (0, "")
        assert script("sample", *depth, "run_dir=whole").code == 0
        maps = [(tmp_path / run / "control.png").read_bytes() for run in ("run", "whole")]
        assert maps[0] == maps[1]
        return
    assert outcome.code == 2 and len(outcome.err.splitlines()) == 1
    assert outcome.err.startswith("model.control_map.path=") and says in outcome.err


def test_a_depth_model_without_its_preprocessing(script, depth, pipelines, tmp_path):
    shutil.copytree(pipelines / "depth", tmp_path / "depth")
    file = tmp_path / "depth/preprocessor_config.json"
    for harm, says in ((lambda: file.write_text("{"), "no map could be made"), (file.unlink, "no")):
        harm()
        outcome = script("sample", *depth, f"model.control_map.path={tmp_path / 'depth'}")
        assert outcome.code == 2 and len(outcome.err.splitlines()) == 1
        assert f": {says}" in outcome.err
