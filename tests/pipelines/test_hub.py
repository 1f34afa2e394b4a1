"""Models from the hub: what is asked of it, what its answers become, and files as it has them."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DModel
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from PIL import Image
from safetensors.torch import load_file, save_file

from lml.errors import UserError
from lml.pipelines import control, find_model

TOY = ["num_images=2", "batch_size=2", "nfe=4", "metrics=none", "threads=1"]
COMMIT = {"main": "a" * 40, "old": "b" * 40}


class Hub:
    """A hub with one model, on this machine: what `huggingface_hub` asks of the real one."""

    def __init__(self, folder: Path, url: str = ""):
        self.folder, self.url = folder, url
        self.fetched: set[tuple[str, str]] = set()  # (revision, file)
        self.refuse: tuple[int, str] | None = None  # (status, X-Error-Code) for files
        self.unknown = False  # as for a name that is nobody's

    def files(self) -> list[str]:
        return sorted(f.relative_to(self.folder).as_posix() for f in self.folder.rglob("*.*"))

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body."""
        parts = path.split("?")[0].strip("/").split("/")
        if self.unknown:
            return 401, {"X-Error-Code": "RepoNotFound"}, b""
        if parts[:2] == ["api", "models"]:
            name = parts[5] if len(parts) > 5 else "main"
            commit = COMMIT.get(name, name)
            if commit not in COMMIT.values():
                return 404, {"X-Error-Code": "RevisionNotFound"}, b""
            if parts[4:5] == ["tree"]:
                return 200, {}, json.dumps([self._entry(file) for file in self.files()]).encode()
            files = [{"rfilename": file} for file in self.files()]
            about = {"id": "/".join(parts[2:4]), "sha": commit, "siblings": files, "tags": []}
            return 200, {}, json.dumps({**about, "private": False, "downloads": 0}).encode()
        if self.refuse:
            return self.refuse[0], {"X-Error-Code": self.refuse[1]}, b""
        revision, file = parts[3], "/".join(parts[4:])
        if not (self.folder / file).is_file():
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        self.fetched.add((revision, file))
        body = (self.folder / file).read_bytes()
        commit = COMMIT.get(revision, revision)
        tag = hashlib.sha256(body).hexdigest()
        return 200, {"ETag": f'"{tag}"', "X-Repo-Commit": commit}, body

    def _entry(self, file: str) -> dict[str, str | int]:
        size = (self.folder / file).stat().st_size
        return {"type": "file", "path": file, "size": size, "oid": "0" * 40}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub of the folder `tmp_path/hub`, and an empty cache."""
    model = Hub(tmp_path / "hub")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = model.answer(self.path)
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_HEAD(self) -> None:
            self.do_GET()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    # it looks each 10 ms whether it is to end, instead of each half second
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    model.url = f"http://127.0.0.1:{server.server_port}"
    constants = "huggingface_hub.constants"
    monkeypatch.setattr(f"{constants}.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(f"{constants}.ENDPOINT", model.url)
    template = model.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(f"{constants}.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", model.url)
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.HF_HUB_OFFLINE", False, raising=False)
    disable_progress_bars()
    yield model
    enable_progress_bars()
    server.shutdown()
    server.server_close()


def pixels(run: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(f)) for f in sorted(run.glob("images/*.png"))])


def test_what_is_fetched_of_a_text_model(script, pipelines, prompts, hub, tmp_path):
    """Its parts, at the revision; no checker, no pickled weights, no other variant."""
    shutil.copytree(pipelines / "sd15", hub.folder)
    weights = hub.folder / "unet/diffusion_pytorch_model.safetensors"
    for name in ("diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.bin"):
        shutil.copy(weights, weights.with_name(name))
    index = json.loads((hub.folder / "model_index.json").read_text())
    checker = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (hub.folder / "model_index.json").write_text(json.dumps({**index, "safety_checker": checker}))
    shutil.copytree(hub.folder / "unet", hub.folder / "safety_checker")
    (hub.folder / "v1-5-pruned.safetensors").write_bytes(b"all in one file")
    arguments = ["model=sd15", *TOY, *prompts]
    outcome = script("sample", *arguments, "model.revision=old", "run_dir=run")
    assert outcome.code == 0, outcome.err
    assert {revision for revision, _ in hub.fetched} == {COMMIT["old"]}
    files = {file for _, file in hub.fetched}
    parts = {"text_encoder": "model", "vae": "diffusion_pytorch_model"}
    parts["unet"] = "diffusion_pytorch_model"
    weights = {f"{part}/{name}.safetensors" for part, name in parts.items()}
    assert {file for file in files if file.endswith(("safetensors", "bin"))} == weights
    local = [*arguments, f"model.path={pipelines / 'sd15'}", "run_dir=local"]
    assert script("sample", *local).code == 0
    assert (pixels(tmp_path / "run") == pixels(tmp_path / "local")).all()


@pytest.mark.parametrize("model", ["cifar10_ddpm", "celebahq_ldm"])
def test_what_is_fetched_of_others(script, pipelines, tiny_model, hub, model):
    source = {"cifar10_ddpm": tiny_model, "celebahq_ldm": pipelines / "celebahq_ldm"}[model]
    shutil.copytree(source, hub.folder)
    for file in list(hub.folder.rglob("*.safetensors")):
        shutil.copy(file, file.with_suffix(".bin"))
    arguments = [f"model={model}", *TOY, "run_dir=run", "model.revision=old"]
    outcome = script("sample", *arguments)
    assert outcome.code == 0, outcome.err
    assert {revision for revision, _ in hub.fetched} == {COMMIT["old"]}
    assert not [file for _, file in hub.fetched if file.endswith(".bin")]


def only_pickled(folder: Path) -> None:
    """Weights in `folder` and below as they were saved before there were safetensors."""
    for file in list(folder.rglob("*.safetensors")):
        name = file.name if file.name.startswith("diffusion_") else "pytorch_model"
        torch.save(load_file(file), (file.parent / name).with_suffix(".bin"))
        file.unlink()


def test_the_published_latent_model_as_it_is_on_the_hub(script, pipelines, hub, tmp_path):
    """Its decoder's weights are pickled alone, and its network's in both formats."""
    shutil.copytree(pipelines / "celebahq_ldm", hub.folder)
    only_pickled(hub.folder / "vqvae")
    weights = hub.folder / "unet/diffusion_pytorch_model.safetensors"
    shutil.copy(weights, weights.with_suffix(".bin"))
    arguments = ["experiment=celebahq_lml", *TOY, "logger=none"]
    outcome = script("sample", *arguments, "run_dir=run")
    assert (outcome.code, outcome.err) == (0, "")
    fetched = {file for _, file in hub.fetched if not file.endswith(".json")}
    assert fetched == {
        "unet/diffusion_pytorch_model.safetensors",
        "vqvae/diffusion_pytorch_model.bin",
    }
    local = [*arguments, f"model.path={pipelines / 'celebahq_ldm'}", "run_dir=local"]
    assert script("sample", *local).code == 0
    assert (pixels(tmp_path / "run") == pixels(tmp_path / "local")).all()


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("depth", {"config.json", "preprocessor_config.json", "model.safetensors"}),
        ("pose", {"body_pose_model.pth"}),
    ],
)
def test_what_is_fetched_to_make_a_control_map(pipelines, hub, tmp_path, monkeypatch, kind, wanted):
    """From a hub id, at the revision; of a repository with many networks, the one that is used."""
    monkeypatch.delitem(control.PACKAGES, "pose")  # the network is not even read
    shutil.copytree(pipelines / "depth", hub.folder)
    for name in ("body_pose_model.pth", "hand_pose_model.pth", "pytorch_model.bin"):
        (hub.folder / name).write_bytes(b"weights")
    Image.new("RGB", (16, 16), "red").save(tmp_path / "photo.png")
    config = {
        "control_photo": str(tmp_path / "photo.png"),
        "control_map": {"kind": kind, "hub_id": "a/b", "revision": "old"},
    }
    found = control.find_control(config)
    assert hub.fetched == {(COMMIT["old"], file) for file in wanted}
    assert found.settings["control_map"]["kind"] == kind
    config["control_map"]["revision"] = "none"
    with pytest.raises(UserError, match=r"model.control_map.hub_id=a/b: it has no revision none"):
        control.find_control(config)
    config["control_map"] = {"kind": kind}
    with pytest.raises(UserError, match=r"model.control_map.path=null: expected a folder with"):
        control.find_control(config)


def only_fp16(folder: Path) -> None:
    for file in list(folder.rglob("*.safetensors")):
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))


@pytest.mark.parametrize(
    ("harm", "way_out"),
    [(only_pickled, "use_safetensors=false"), (only_fp16, "variant=fp16")],
)
@pytest.mark.parametrize("model", ["sd15", "sd15_canny", "celebahq_ldm", "cifar10_ddpm"])
def test_weights_that_are_not_asked_for(
    script, pipelines, tiny_model, prompts, hub, tmp_path, model, harm, way_out
):
    """Whatever was fetched, the error names the option that takes what the hub has."""
    source = {"cifar10_ddpm": tiny_model, "sd15_canny": pipelines / "controlnet"}
    shutil.copytree(source.get(model, pipelines / model), hub.folder)
    harm(hub.folder)
    group, text = "model", prompts if model.startswith("sd15") else []
    if model == "sd15_canny":
        group = "model.controlnet"
        Image.new("RGB", (16, 16), "red").save(tmp_path / "control.png")
        text = [*text, f"model.path={pipelines / 'sd15'}"]
        text += [f"model.control_image={tmp_path / 'control.png'}"]
    arguments = [f"model={model}", *TOY, *text, "run_dir=run"]
    outcome = script("sample", *arguments, f"{group}.use_safetensors=true")
    assert outcome.code == 2 and len(outcome.err.splitlines()) == 1, outcome.err
    assert outcome.err.startswith(f"{group}.hub_id=") and "hf download" not in outcome.err
    named = way_out if model != "sd15" else way_out.replace("fp16", "NAME")
    assert f"{group}.{named} takes" in outcome.err
    outcome = script("sample", *arguments, f"{group}.{way_out}")
    assert (outcome.code, outcome.err) == (0, "")


@pytest.mark.parametrize("model", ["sd15", "cifar10_ddpm"])
def test_what_the_hub_answers(script, pipelines, tiny_model, prompts, hub, model):
    """Nobody's name, a license to accept, no such revision."""
    shutil.copytree(pipelines / "sd15" if model == "sd15" else tiny_model, hub.folder)
    arguments = [f"model={model}", *TOY, *(prompts if model == "sd15" else []), "run_dir=run"]

    def line(*more: str) -> str:
        outcome = script("sample", *arguments, *more)
        assert outcome.code == 2 and len(outcome.err.splitlines()) == 1, outcome.err
        assert outcome.err.startswith("model.hub_id=") and "model.path=FOLDER" in outcome.err
        assert len(outcome.err) < 500
        # the hub's answer is no: to ask it again, by another command, is no way out
        assert "hf download" not in outcome.err
        return outcome.err

    hub.refuse = (403, "GatedRepo")
    assert "accept the license on https://huggingface.co/" in line()
    hub.refuse = None
    unknown = line("model.revision=none")
    assert "no revision none; use model.revision=null for its main branch" in unknown
    hub.unknown = True
    gone = line()
    assert "the hub has no such repository, or it is private" in gone
    assert "a mirror's name as model.hub_id" in gone and "`hf auth login`" in gone


def test_the_hub_is_gone(script, pipelines, prompts, hub, monkeypatch):
    """No network: what is in the cache is used, and what is not cannot be had."""
    shutil.copytree(pipelines / "sd15", hub.folder)
    arguments = ["model=sd15", *TOY, *prompts]
    assert script("sample", *arguments, "run_dir=first").code == 0
    nowhere = "http://127.0.0.1:9"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", nowhere)
    template = nowhere + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", nowhere)
    outcome = script("sample", *arguments, "run_dir=second")
    assert (outcome.code, outcome.err) == (0, "")
    outcome = script("sample", *arguments, "model.hub_id=nobody/nothing", "run_dir=third")
    assert outcome.code == 2 and len(outcome.err.splitlines()) == 1
    assert "Connection refused" in outcome.err or "ConnectError" in outcome.err


# --- files as they lie there -------------------------------------------------------------------


def settings(folder: Path, kind: str = "text", **options: object) -> dict:
    config = {"name": "x", "kind": kind, "path": str(folder), "guidance_scale": 1.0, **options}
    return find_model(config).settings


def copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def test_files_that_are_not_read_make_no_other_model(pipelines, tmp_path):
    """Weights before averaging, other variants and formats, as sd15 has them beside its own."""
    folder = copy(pipelines / "sd15", tmp_path / "sd15")
    own = folder / "unet/diffusion_pytorch_model.safetensors"
    for middle in ("non_ema", "fp16"):
        shutil.copy(own, own.with_name(f"diffusion_pytorch_model.{middle}.safetensors"))
    own.with_suffix(".bin").write_bytes(b"")
    assert settings(folder) == settings(pipelines / "sd15")
    other = settings(folder, variant="fp16")["networks"]
    assert other["unet"] != settings(folder)["networks"]["unet"]  # half precision is another one
    assert other["vae"] == settings(folder)["networks"]["vae"]  # which has no such variant


def one_fp16(folder: Path) -> None:
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    file.rename(file.with_name("diffusion_pytorch_model.fp16.safetensors"))


@pytest.mark.parametrize("harm", [only_fp16, one_fp16])
def test_a_variant_alone(script, pipelines, prompts, tmp_path, harm):
    folder = copy(pipelines / "sd15", tmp_path / "sd15")
    harm(folder)
    arguments = ["model=sd15", *TOY, *prompts, f"model.path={folder}"]
    outcome = script("sample", *arguments, "run_dir=run")
    assert outcome.code == 2 and len(outcome.err.splitlines()) == 1
    assert "model.variant=fp16 takes " in outcome.err
    outcome = script("sample", *arguments, "model.variant=fp16", "run_dir=run")
    assert (outcome.code, outcome.err) == (0, "")
    whole = ["model=sd15", *TOY, *prompts, f"model.path={pipelines / 'sd15'}", "run_dir=whole"]
    assert script("sample", *whole).code == 0
    assert (pixels(tmp_path / "run") == pixels(tmp_path / "whole")).all()


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_weights_in_several_files(script, pipelines, prompts, tmp_path, variant):
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(pipelines / "sd15")
    pipe.save_pretrained(tmp_path / "sd15", max_shard_size="40KB", variant=variant)
    assert len(list((tmp_path / "sd15/unet").glob("*-of-*.safetensors"))) > 1
    more = [f"model.variant={variant}"] if variant else []
    arguments = ["model=sd15", *TOY, *prompts]
    path = f"model.path={tmp_path / 'sd15'}"
    outcome = script("sample", *arguments, *more, path, "run_dir=run")
    assert (outcome.code, outcome.err) == (0, "")
    whole = [*arguments, f"model.path={pipelines / 'sd15'}", "run_dir=whole"]
    assert script("sample", *whole).code == 0
    assert (pixels(tmp_path / "run") == pixels(tmp_path / "whole")).all()
    next((tmp_path / "sd15/unet").glob("*00002-of-*.safetensors")).unlink()
    outcome = script("sample", *arguments, *more, path, "run_dir=half")
    assert outcome.code == 2 and len(outcome.err.splitlines()) == 1


@pytest.mark.parametrize("model", ["cifar10_ddpm", "celebahq_ldm", "sd15_canny"])
def test_pickled_weights_where_the_user_says_so(
    script, pipelines, tiny_model, prompts, tmp_path, model
):
    """The authors' ddpm_ema_cifar10 was saved when that was the default."""
    source = {"cifar10_ddpm": tiny_model, "celebahq_ldm": pipelines / "celebahq_ldm"}
    source = source.get(model, pipelines / "controlnet")
    folder = copy(source, tmp_path / "pickled")
    only_pickled(folder)
    key = "model.controlnet" if model == "sd15_canny" else "model"
    arguments = [f"model={model}", *TOY, f"{key}.use_safetensors=true"]
    if model == "sd15_canny":
        Image.new("RGB", (16, 16), "red").save(tmp_path / "control.png")
        arguments += [*prompts, f"model.path={pipelines / 'sd15'}"]
        arguments += [f"model.control_image={tmp_path / 'control.png'}"]
    outcome = script("sample", *arguments, f"{key}.path={folder}", "run_dir=run")
    assert outcome.code == 2 and len(outcome.err.splitlines()) == 1
    assert outcome.err.startswith(f"{key}.path={folder}: no weights in ")
    assert f"{key}.use_safetensors=false takes " in outcome.err
    more = [f"{key}.path={folder}", f"{key}.use_safetensors=false", "run_dir=run"]
    outcome = script("sample", *arguments, *more)
    assert (outcome.code, outcome.err) == (0, "")
    assert script("sample", *arguments, f"{key}.path={source}", "run_dir=safe").code == 0
    assert (pixels(tmp_path / "run") == pixels(tmp_path / "safe")).all()


@pytest.mark.parametrize("kind", ["pixel", "latent"])
def test_options_that_are_none(pipelines, tiny_model, kind):
    folder = {"pixel": tiny_model, "latent": pipelines / "celebahq_ldm"}[kind]
    with pytest.raises(UserError, match=r"^model\.use_safetensors=maybe: expected true or false$"):
        settings(folder, kind=kind, use_safetensors="maybe")
    assert settings(folder, kind=kind, variant=16) == settings(folder, kind=kind)


class Code:
    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


def test_pickled_code_is_not_run(script, tiny_model, tmp_path):
    folder = copy(tiny_model, tmp_path / "pickled")
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    torch.save({"weight": Code()}, folder / "unet/diffusion_pytorch_model.bin")
    arguments = ["model=cifar10_ddpm", *TOY, "model.use_safetensors=false"]
    outcome = script("sample", *arguments, f"model.path={folder}", "run_dir=run")
    assert outcome.code == 2 and "the weights cannot be read" in outcome.err
    assert not (tmp_path / "ran").exists()


OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def old_names(file: Path) -> None:
    """Attention as diffusers called it when the hub's first models were saved."""
    state = {}
    for name, weight in load_file(file).items():
        for new, old in OLD.items():
            name = name.replace(f".{new}.", f".{old}.")
        state[name] = weight
    save_file(state, file, {"format": "pt"})


def test_attention_by_its_old_names(script, pipelines, tmp_path):
    """As in google/ddpm-cifar10-32, ldm-celebahq-256 and sd15's autoencoder."""
    folder = copy(pipelines / "celebahq_ldm", tmp_path / "ldm")
    for part in ("unet", "vqvae"):
        old_names(folder / part / "diffusion_pytorch_model.safetensors")
    names = load_file(folder / "unet/diffusion_pytorch_model.safetensors")
    assert any(".proj_attn." in name for name in names)
    arguments = ["model=celebahq_ldm", *TOY]
    outcome = script("sample", *arguments, f"model.path={folder}", "run_dir=run")
    assert (outcome.code, outcome.err) == (0, "")
    new = f"model.path={pipelines / 'celebahq_ldm'}"
    assert script("sample", *arguments, new, "run_dir=new").code == 0
    assert (pixels(tmp_path / "run") == pixels(tmp_path / "new")).all()


@pytest.mark.parametrize("model", ["sd15", "sdxl", "pixart"])
def test_what_old_files_hold_beside_the_weights(script, pipelines, prompts, tmp_path, model):
    """Positions that transformers used to save, and the embedding that T5 shares, twice."""
    folder = copy(pipelines / model, tmp_path / model)
    for file in folder.glob("text_encoder*/model.safetensors"):
        state = load_file(file)
        if "shared.weight" in state:
            state["encoder.embed_tokens.weight"] = state["shared.weight"].clone()
        else:
            prefix = "text_model." if any(k.startswith("text_model.") for k in state) else ""
            state[f"{prefix}embeddings.position_ids"] = torch.arange(16)[None]
        save_file(state, file, {"format": "pt"})
    for file in folder.glob("vae/*.safetensors"):
        old_names(file)
    arguments = [f"model={model}", *TOY, *prompts, f"model.path={folder}", "run_dir=run"]
    outcome = script("sample", *arguments)
    assert (outcome.code, outcome.err) == (0, "")


def test_the_networks_have_attention_to_rename(pipelines):
    kinds = {"celebahq_ldm/unet": UNet2DModel, "sd15/vae": AutoencoderKL}
    for folder, cls in kinds.items():
        names = cls.from_pretrained(pipelines / folder).state_dict()
        assert any(".to_q." in name for name in names)


def test_a_configuration_of_old(script, pipelines, tmp_path):
    """What configs held that nobody reads any more is no warning and no error."""
    folder = copy(pipelines / "celebahq_ldm", tmp_path / "ldm")
    for file, more in {
        "scheduler/scheduler_config.json": {"timestep_values": None, "tensor_format": "pt"},
        "unet/config.json": {"_diffusers_version": "0.1.2", "resnet_input_channels": 3},
        "vqvae/config.json": {"_diffusers_version": "0.1.2", "resolution": 256},
    }.items():
        config = json.loads((folder / file).read_text())
        config.pop("scaling_factor", None)
        (folder / file).write_text(json.dumps({**config, **more}))
    arguments = ["model=celebahq_ldm", *TOY, f"model.path={folder}", "run_dir=run"]
    outcome = script("sample", *arguments)
    assert (outcome.code, outcome.err) == (0, "")


@pytest.mark.parametrize("scale", ["0", "-1", "nan", "true", "some"])
def test_a_scale_of_latents_that_is_none(pipelines, scale):
    value = {"true": True, "some": "some"}.get(scale)
    value = float(scale) if value is None else value
    with pytest.raises(UserError, match=f"^model.scaling_factor={value}: expected a number > 0"):
        settings(pipelines / "celebahq_ldm", kind="latent", scaling_factor=value)


def test_latents_are_the_decoders_by_default(script, pipelines, tmp_path):
    """The published model's are; what diffusers writes into a config is Stable Diffusion's."""
    arguments = ["model=celebahq_ldm", *TOY, f"model.path={pipelines / 'celebahq_ldm'}"]
    runs = {"run": [], "one": ["model.scaling_factor=1"], "config": ["model.scaling_factor=null"]}
    for run, more in runs.items():
        assert script("sample", *arguments, *more, f"run_dir={run}").code == 0
    made = {run: pixels(tmp_path / run) for run in runs}
    assert (made["run"] == made["one"]).all() and (made["run"] != made["config"]).any()
