"""Bad input is one line that names key, value and what is allowed; exit code 2; nothing touched."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ABSENT = "cuda:99" if torch.cuda.is_available() else "cuda"

VALUES = {
    "lml.damping=0": "lml.damping=0.*> 0",
    "lml.damping=-1.5": "lml.damping=-1.5.*> 0",
    "lml.damping=nan": "lml.damping=nan.*> 0",
    "lml.damping=much": "lml.damping=much.*> 0",
    "lml.damping=[8,null]": r"lml.damping=\[8.0, None\]: has 2 entries for \d+ steps",
    "lml.damping=[8,-1]": r"lml.damping\[1\]=-1: expected null or a number > 0",
    "lml.kappa=1.5": "lml.kappa=1.5.*0.*1",
    "lml.kappa=-0.1": "lml.kappa=-0.1.*0.*1",
    "lml.freeze=2": "lml.freeze=2.*0.*1",
    "lml.freeze=nan": "lml.freeze=nan.*0.*1",
    "lml.rank=-1": "lml.rank=-1.*0",
    "lml.rank=1.5": "lml.rank=1.5.*whole|integer",
    "lml.anchor=ema": "lml.(rank=2|anchor=ema).*1",
    "lml.anchor=past": "lml.anchor=past.*history.*ema",
    "lml.damping_scale=log": "lml.damping_scale=log.*relative.*absolute",
    "lml.target=noise": "lml.target=noise.*prediction",
    "lml.target=direction": "lml.target=direction.*prediction",
    "lml.norm_preserving=3": "lml.norm_preserving=3.*",
    "nfe=0": "nfe=0.*at least 1",
    "nfe=-3": "nfe=-3.*at least 1",
    "nfe=2.5": "nfe=2.5.*whole",
    "nfe=1001": "nfe=1001.*1000",
    "solver=heun nfe=10": "nfe=10: heun can make 9 or 11",
    "solver=pndm nfe=2": "nfe=2: pndm can make 1 or 3",
    "num_images=0": "num_images=0.*at least 1",
    "num_images=many": "num_images=many.*whole",
    "num_images=true": "num_images=True.*whole",
    "batch_size=0": "batch_size=0.*at least 1",
    "seed=-1": "seed=-1.*at least 0",
    "threads=0": "threads=0.*at least 1",
    "threads=100000000": "threads=100000000.* to 1024 .the system starts no more",
    "num_images=1000000000000": "num_images=1000000000000.* to 10000000 .a run's files",
    "model.sample_size=1000000": "model.sample_size=1000000.* to 16384 .a larger image",
    "~nfe": "nfe: missing; expected a whole number",
    "~threads": "threads: missing; expected null or a whole number",
    "solver.scheduler=null": "solver.scheduler=null: expected a group with a _target_",
    "solver=ddim solver.step.eta=null": "solver.step.eta=null: expected a number",
    "solver.scheduler._target_=0.5": "solver.scheduler._target_=0.5: expected the dotted name",
    "model.scheduler=[a]": "model.scheduler=.*: expected null or a group with a _target_",
    "+model.scheduler._target_=builtins.dict": "_target_=builtins.dict: expected a scheduler",
    "reference={a:1}": "reference={.*}: expected a path",
    "attention={a:1}": "attention={.*}: expected null or one of math",
    "name=a/../b": "name=a/../b: expected a folder's name",
    "name=5": "name=5: expected a folder's name",
    f"device={ABSENT}": f"device={ABSENT}.*auto.*cpu",
    "device=gpu": "device=gpu.*auto.*cpu",
    "device=meta": "device=meta.*auto.*cpu",
    "dtype=int8": "dtype=int8.*float32.*bfloat16",
    "compile=maybe": "compile=maybe.*true or false",
    "model.patch=0": "model.patch=0.*at least 1",
    "model.patch=2": "model.patch=2.*3 channels",
    "model.sample_size=0": "model.sample_size=0: expected null or a whole number of at least 1",
    "model.sample_size=8.5": "model.sample_size=8.5: expected null or a whole number",
    "model.path=nowhere": "model.path=nowhere: no such folder",
    "model.path=null": "model.path=null.*model.hub_id",
    "solver=ddim grid=lu": "grid=lu: ddim has no use_lu_lambdas.*trailing",
    "grid=ays": "grid=ays: not for cifar10; for sd15, sd15_canny, sd15_depth, "
    "sd15_depth_img2img, sd15_pose, sdxl",
    "solver=pndm grid=karras": "grid=karras: pndm.*leading",
    "solver=flow_euler": "solver=flow_euler: not for cifar10.*DDPMScheduler",
    "solver=ipndm_diffusers": "solver=ipndm_diffusers: not for cifar10",
    "solver=authors_ddim_lm lml=default": "lml.anchor=history: the released code has ema",
    "metrics=ideal_direction": "needs a model whose score is known.*model=gaussian",
    "metrics=hessian": "needs a model whose score is known",
    "metrics=correction_cosine metrics.correction_cosine.count=0": "count=0: expected a whole",
    "grid=trailing grid.timestep_spacing=even": "even",
    "solver.scheduler.algorithm_type=magic": "magic",
    "+solver.step.eta=1": "solver.step.eta=1: dpmsolverpp has no such",
    "solver.scheduler._target_=lml.schedulers.None": "solver.scheduler._target_=lml.sched",
    "+lml.damp=1": "lml.damp=1.*damping",
    "+solver.scheduler.order=2": "solver.scheduler.order=2.*solver_order",
    "solver=dimm": "solver=dimm: unknown; nearest: ddim",
    "grid=karas": "grid=karas: unknown; nearest: karras",
    "lml=of": "lml=of: unknown; nearest: off",
    "model=cifar": "model=cifar: unknown; nearest: cifar10",
    "metrics=fd_cfar": "metrics=fd_cfar: unknown; nearest: fd_cifar",
    "metrics=[fd_cfar]": "metrics=fd_cfar: unknown; nearest: fd_cifar",
    "logger=wandbb": "logger=wandbb: unknown; nearest: wandb",
    "experiment=cifar10": "experiment=cifar10: unknown; nearest: cifar10_",
    "lml.dampin=1": "lml.dampin=1: unknown key; nearest: damping",
    "num_image=1": "num_image=1: unknown key; nearest: num_images",
    "num_images.x=1": "num_images.x=1: num_images has no keys",
    "train=denoiser": "train=denoiser: unknown key",
    "lml=null": "lml=null.*string",
    "lml.rank": "lml.rank: expected KEY=VALUE",
    "lml.rank=[1": r"lml.rank=\[1: expected KEY=VALUE",
    "seed=1,2": "seed=1,2: .*--multirun",
    "name=???": r"name=\?\?\?: a value",
    "name=${nobody}": "'nobody' not found",
    "metrics=fd_cifar metrics.fd_cifar.features=nowhere": "metrics.fd_cifar.features=.*nowhere",
    "metrics=convergence metrics.convergence.solver=dimm metrics.convergence.nfe=5": (
        "metrics.convergence.solver=dimm: unknown; nearest: ddim"
    ),
}

VALUES["name=" + 300 * "x"] = "name=x+...: expected a folder's name"
VALUES["reference=" + 300 * "x"] = "reference=x+...: expected a path with names of at most 255"


def one_line(outcome, pattern: str) -> None:
    assert outcome.code == 2, outcome
    assert outcome.err.count("\n") == 1 and outcome.err.endswith("\n"), outcome.err
    assert re.search(pattern, outcome.err), outcome.err
    assert "Traceback" not in outcome.err and len(outcome.err) < 500


@pytest.mark.parametrize("arguments", VALUES, ids=lambda text: text.replace(" ", "_"))
def test_a_bad_value(script, toy, tmp_path, arguments):
    outcome = script("sample", *toy, *arguments.split(), "run_dir=run")
    one_line(outcome, VALUES[arguments])
    if not re.search("convergence|ideal_direction|hessian", arguments):  # known by then
        assert not (tmp_path / "run").exists()


def test_a_bad_value_in_a_process_of_its_own(spawn, toy, tmp_path):
    process = spawn("sample", *toy, "lml.damping=-1", "run_dir=run", new=True)
    out, err = process.communicate(timeout=90)
    assert (process.returncode, out) == (2, "")
    assert err.startswith("lml.damping=-1") and err.count("\n") == 1
    assert os.listdir(tmp_path) == []


@pytest.fixture
def model(tiny_model, tmp_path) -> Path:
    """A copy of the tiny model, to break."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def edit(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def truncate(model: Path) -> None:
    (model / WEIGHTS).write_bytes((model / WEIGHTS).read_bytes()[:-100])


def truncate_header(model: Path) -> None:
    (model / WEIGHTS).write_bytes((model / WEIGHTS).read_bytes()[:5])


def no_weights(model: Path) -> None:
    (model / WEIGHTS).unlink()


def nothing(model: Path) -> None:
    shutil.rmtree(model)
    model.mkdir()


def a_file(model: Path) -> None:
    shutil.rmtree(model)
    model.write_text("")


def conditional(model: Path) -> None:
    edit(model / "unet/config.json", _class_name="UNet2DConditionModel")


def other_shapes(model: Path) -> None:
    edit(model / "unet/config.json", block_out_channels=[16])


def other_layers(model: Path) -> None:
    edit(model / "unet/config.json", layers_per_block=2)


def by_class(model: Path) -> None:
    from diffusers import UNet2DModel

    config = UNet2DModel.load_config(model / "unet")
    UNet2DModel.from_config(config, num_class_embeds=10).save_pretrained(model / "unet")


def broken_config(model: Path) -> None:
    (model / "unet/config.json").write_text("{")


def no_schedule(model: Path) -> None:
    shutil.rmtree(model / "scheduler")


def unknown_schedule(model: Path) -> None:
    edit(model / "scheduler/scheduler_config.json", _class_name="MagicScheduler")


MODELS = {
    truncate: "weights cannot be read",
    truncate_header: "weights cannot be read",
    no_weights: r"no weights in unet \(.safetensors; model.use_safetensors=false takes pickled",
    nothing: "no UNet2DModel in it",
    a_file: "no such folder",
    conditional: "a UNet2DConditionModel; expected a UNet2DModel",
    other_shapes: "weights",
    other_layers: "weights are not those of config.json .*missing",
    by_class: "conditional on a class",
    broken_config: "config.json is not a diffusers config",
    no_schedule: "model.scheduler",
    unknown_schedule: "makes no scheduler .*MagicScheduler",
}


@pytest.mark.parametrize("harm", MODELS, ids=lambda harm: harm.__name__)
def test_a_checkpoint_that_is_none(script, toy, tmp_path, model, harm):
    harm(model)
    outcome = script("sample", *toy, f"model.path={model}", "run_dir=run")
    one_line(outcome, f"^model.path={model}: .*{MODELS[harm]}")
    assert not list((tmp_path / "run").glob("images/*"))


def test_a_checkpoint_that_is_mended(script, toy, tiny_model, model):
    truncate(model)
    assert script("sample", *toy, f"model.path={model}", "run_dir=run").code == 2
    shutil.copy(tiny_model / WEIGHTS, model / WEIGHTS)
    outcome = script("sample", *toy, f"model.path={model}", "run_dir=run")
    assert (outcome.code, outcome.err) == (0, "")


def test_a_text_to_image_pipeline_is_another_architecture(script, toy, tmp_path):
    from diffusers import UNet2DConditionModel

    network = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        mid_block_type=None,
        norm_num_groups=4,
        cross_attention_dim=8,
    )
    network.save_pretrained(tmp_path / "pipe/unet")
    outcome = script("sample", *toy, f"model.path={tmp_path / 'pipe'}", "run_dir=run")
    one_line(outcome, "a UNet2DConditionModel; expected a UNet2DModel")


def test_a_schedule_of_ones_own_stands_in_for_a_missing_one(script, toy, tmp_path, model):
    no_schedule(model)
    schedule = "+model.scheduler={_target_:diffusers.DDPMScheduler,clip_sample:false}"
    outcome = script("sample", *toy, f"model.path={model}", "+" + schedule, "run_dir=run")
    assert outcome.code == 0, outcome.err


def test_a_hub_that_cannot_be_reached(script, toy, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    arguments = [a for a in toy if not a.startswith("model.")]
    outcome = script("sample", *arguments, "model=cifar10_ddpm", "run_dir=run")
    one_line(outcome, "^model.hub_id=google/ddpm-cifar10-32: .*hf download google/.*model.path=")
    assert not (tmp_path / "run").exists()


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_run_folder_with_other_settings(script, toy, tmp_path):
    assert script("sample", *toy, "run_dir=run").code == 0
    before = snapshot(tmp_path / "run")
    outcome = script("sample", *toy, "run_dir=run", "nfe=5")
    one_line(outcome, "^run_dir=run: .*nfe=4, not 5.*overwrite=true")
    assert snapshot(tmp_path / "run") == before
    assert script("sample", *toy, "run_dir=run", "nfe=5", "overwrite=true").code == 0
    after = snapshot(tmp_path / "run")
    assert not set(after.values()) & set(before.values()) - {b""}


@pytest.mark.parametrize("overwrite", ["false", "true"])
def test_a_folder_of_somebody_elses(script, toy, tmp_path, overwrite):
    (tmp_path / "run/images").mkdir(parents=True)
    (tmp_path / "run/images/000000.png").write_text("precious")
    outcome = script("sample", *toy, "run_dir=run", f"overwrite={overwrite}")
    one_line(outcome, "^run_dir=run: not a run's folder")
    assert snapshot(tmp_path / "run") == {tmp_path / "run/images/000000.png": b"precious"}


def test_a_folder_that_cannot_be_made(script, toy, tmp_path):
    (tmp_path / "file").write_text("mine")
    one_line(script("sample", *toy, "run_dir=file"), "^run_dir=file: a file; expected a folder")
    one_line(script("sample", *toy, "run_dir=file/run"), "^run_dir=file/run: .*Not a directory")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_is_not_writable(script, toy, tmp_path):
    (tmp_path / "locked").mkdir()
    os.chmod(tmp_path / "locked", 0o555)
    lock = ["chattr", "+i", str(tmp_path / "locked")]
    if os.access(tmp_path / "locked", os.W_OK) and subprocess.run(lock, check=False).returncode:
        pytest.skip("this user can write everywhere, and chattr is not allowed")
    try:
        outcome = script("sample", *toy, "run_dir=locked/run")
        one_line(outcome, "^run_dir=locked/run: .*expected a writable folder")
    finally:
        subprocess.run(["chattr", "-i", tmp_path / "locked"], capture_output=True)
        os.chmod(tmp_path / "locked", 0o755)


def test_a_full_disk(script, toy, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=48k", "none", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs is not allowed here")
    try:
        outcome = script("sample", *toy, "num_images=100", "run_dir=disk/run")
        one_line(outcome, "^run_dir=disk/run/images: No space left on device; free some space")
        stored = sorted((disk / "run/images").iterdir())
        assert 0 < len(stored) < 100 and not [f for f in stored if f.name.startswith(".")]
        subprocess.run(["mount", "-o", "remount,size=2m", str(disk)], check=True)
        outcome = script("sample", *toy, "num_images=100", "run_dir=disk/run")
        assert (outcome.code, outcome.err) == (0, "")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_stranger_among_the_images(script, toy, tmp_path):
    assert script("sample", *toy, "run_dir=run").code == 0
    (tmp_path / "run/images/cat.png").write_text("mine")
    outcome = script("sample", *toy, "run_dir=run")
    one_line(outcome, "cat.png: not one of this run's images; move it away")


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        ([], "run_dir=None: expected one of run_dir and images"),
        (["run_dir=a", "images=b"], "one of run_dir and images"),
        (["run_dir=nowhere"], "run_dir=nowhere: no such folder"),
        (["run_dir=."], "run_dir=.: not a run's folder"),
        (["images=nowhere", "metrics=convergence"], "images=nowhere: no such folder"),
        (["images=nowhere", "batch_size=0"], "batch_size=0: .*at least 1"),
        (["images=nowhere", "device=gpu"], "device=gpu: "),
        (["image=x"], "image=x: unknown key; nearest: images"),
    ],
)
def test_bad_input_to_evaluate(script, arguments, pattern):
    one_line(script("evaluate", *arguments), pattern)
