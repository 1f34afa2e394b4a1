"""How networks are laid out for a device and a type, and libraries that are missing."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from test_configs import composed
from torch import nn

from lml.errors import UserError
from lml.pipelines import find_model, loading
from lml.pipelines import tiny as tiny_pipelines

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
HALF = [torch.float16, torch.bfloat16]
TOY = ["num_images=3", "batch_size=2", "nfe=4", "metrics=none", "threads=1", "run_dir=run"]


def images(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(file)) for file in sorted(folder.glob("images/*.png"))])


def group_norms(*networks: nn.Module) -> list[nn.GroupNorm]:
    found = [m for network in networks for m in network.modules() if isinstance(m, nn.GroupNorm)]
    assert found
    return found


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """What is moved to a device stays where it is; the devices that were asked for."""
    asked = []

    def stay(original):
        def to(self, *args, **kwargs):
            if args and isinstance(args[0], torch.device):
                asked.append(args[0])
                return self
            return original(self, *args, **kwargs)

        return to

    def offload(self, device):
        asked.append(device)

    for cls in (nn.Module, diffusers.ModelMixin, diffusers.DiffusionPipeline):
        monkeypatch.setattr(cls, "to", stay(cls.to))
    monkeypatch.setattr(diffusers.DiffusionPipeline, "enable_model_cpu_offload", offload)
    return asked


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("device", [CUDA, torch.device("mps"), CPU], ids=str)
@pytest.mark.parametrize(
    "model", ["sd15", "sdxl", "sd3", "pixart", "flux", "celebahq_ldm", "cifar10"]
)
def test_group_norms_are_torchs_own_but_on_a_cpu(
    pipelines, tiny_model, nowhere, model, device, dtype
):
    folder = tiny_model if model == "cifar10" else pipelines / model
    more = ["model.patch=1"] if model == "cifar10" else []
    found = find_model(composed(f"model={model}", f"model.path={folder}", *more)["model"])
    check_group_norms(found.sampler(device, dtype, True, False), device, dtype)
    assert set(nowhere) == {device}


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_group_norms_are_torchs_own_where_parts_wait_on_a_cpu(pipelines, nowhere, dtype):
    options = [f"model.path={pipelines / 'sdxl'}", "model.cpu_offload=true"]
    found = find_model(composed("model=sdxl", *options)["model"])
    check_group_norms(found.sampler(CUDA, dtype, True, False), CUDA, dtype)
    assert set(nowhere) == {CUDA}


def check_group_norms(sampler, device: torch.device, dtype: torch.dtype) -> None:
    networks = [sampler.network]
    if hasattr(sampler, "pipe"):
        networks.append(sampler.pipe.vae)
    elif hasattr(sampler, "decoder"):
        networks.append(sampler.decoder)
    for module in group_norms(*networks):
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert (type(module) is nn.GroupNorm) == (device != CPU)
        assert module.weight.dtype == dtype
        assert not module.training and not module.weight.requires_grad


@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
@pytest.mark.parametrize("affine", [True, False])
def test_a_group_norm_in_float32_whatever_its_type(dtype, affine):
    """Also after its network was cast to another type, as SDXL's decoder is in every call."""
    plain = nn.GroupNorm(2, 4, affine=affine)
    if affine:
        nn.init.normal_(plain.weight)
    plain.to(dtype)
    network = nn.Sequential(plain)
    network.dtype = dtype
    norm = loading.lay_out(network, CPU, False)[0]
    assert isinstance(norm, loading.GroupNormInFloat32) == (dtype != torch.float32)
    exact = nn.GroupNorm(2, 4, affine=affine)
    exact.load_state_dict(norm.state_dict())
    for to in (dtype, torch.float32, dtype):
        x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)).to(to)
        assert torch.equal(norm.to(to)(x), exact(x.float()).to(to))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_decoder_that_works_in_float32_alone(script, pipelines, prompts, tmp_path, dtype):
    """SDXL's, with force_upcast=true: cast back and forth, in more than one batch."""
    arguments = ["model=sdxl", f"model.path={pipelines / 'sdxl'}", *TOY, *prompts, "lml=off"]
    outcome = script("sample", *arguments, f"dtype={dtype}")
    assert (outcome.code, outcome.err) == (0, "")
    outcome = script("sample", *arguments, "run_dir=exact")
    assert (outcome.code, outcome.err) == (0, "")
    difference = images(tmp_path / "run").astype(int) - images(tmp_path / "exact")
    assert abs(difference).mean() < 6


# --- libraries ---------------------------------------------------------------------------------


def sentencepiece_alone(folder: Path) -> None:
    """T5's tokenizer as PixArt's repository has it: a SentencePiece model and a config."""
    from transformers.utils import sentencepiece_model_pb2_new as format

    proto = format.ModelProto()
    proto.trainer_spec.model_type, proto.trainer_spec.unk_id = 1, 2
    for piece, kind in [("<pad>", 3), ("</s>", 3), ("<unk>", 2), ("\u2581", 1)]:
        proto.pieces.add(piece=piece, score=0.0 if kind > 1 else -3.0, type=kind)
    for letter in tiny_pipelines.LETTERS:
        proto.pieces.add(piece=letter, score=-3.0, type=1)
    (folder / "tokenizer.json").unlink()
    (folder / "spiece.model").write_bytes(proto.SerializeToString())


@pytest.fixture
def pixart(pipelines: Path, tmp_path: Path) -> list[str]:
    """Arguments for a tiny PixArt in `tmp_path/pixart`, its tokenizer a SentencePiece model."""
    folder = Path(shutil.copytree(pipelines / "pixart", tmp_path / "pixart"))
    sentencepiece_alone(folder / "tokenizer")
    return ["model=pixart", f"model.path={folder}", *TOY]


@pytest.mark.parametrize(
    ("hidden", "named"),
    [
        (["sentencepiece"], "sentencepiece"),
        (["google.protobuf"], "protobuf"),
        (["sentencepiece", "google.protobuf"], "sentencepiece and protobuf"),
    ],
)
def test_the_library_that_a_tokenizer_lacks(
    script, pixart, prompts, tmp_path, monkeypatch, hidden, named
):
    for module in ("sentencepiece", "google.protobuf"):
        # an empty one stands for what may not be here
        there = sys.modules.get(module) or type(sys)(module)
        monkeypatch.setitem(sys.modules, module, None if module in hidden else there)
    for check in ("is_sentencepiece_available", "is_protobuf_available"):
        monkeypatch.setattr(f"transformers.convert_slow_tokenizer.{check}", lambda: False)
    outcome = script("sample", *pixart, *prompts)
    assert (outcome.code, outcome.err) == (
        2,
        f"model.path={tmp_path / 'pixart'}: its tokenizer needs {named}: "
        "`pip install -e '.[text]'`\n",
    )


@pytest.fixture
def sentencepiece(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is there: transformers asks for it, and reads its format with protobuf."""
    there = sys.modules.get("sentencepiece") or type(sys)("sentencepiece")
    monkeypatch.setitem(sys.modules, "sentencepiece", there)
    module = "transformers.convert_slow_tokenizer"
    monkeypatch.setattr(f"{module}.requires_backends", lambda *_: None)
    monkeypatch.setattr(f"{module}.is_sentencepiece_available", lambda: False)


def test_a_tokenizer_that_is_a_sentencepiece_model(
    script, pixart, pipelines, prompts, tmp_path, sentencepiece
):
    """Makes the images of the same tokenizer in today's format."""
    outcome = script("sample", *pixart, *prompts)
    assert (outcome.code, outcome.err) == (0, "")
    other = [*pixart, f"model.path={pipelines / 'pixart'}", "run_dir=other"]
    assert script("sample", *other, *prompts).code == 0
    assert (images(tmp_path / "run") == images(tmp_path / "other")).all()


def test_a_sentencepiece_model_that_is_broken(script, pixart, prompts, tmp_path, sentencepiece):
    """Is no reason to name a library."""
    (tmp_path / "pixart/tokenizer/spiece.model").write_bytes(b"half")
    outcome = script("sample", *pixart, *prompts)
    assert (outcome.code, outcome.err) == (
        2,
        f"model.path={tmp_path / 'pixart'}: tokenizer/spiece.model cannot be read\n",
    )


def test_another_fault_than_the_tokenizers(script, pixart, prompts, tmp_path, sentencepiece):
    """Is named, where there is a SentencePiece model that can be read."""
    index = tmp_path / "pixart/model_index.json"
    index.write_text(index.read_text().replace("T5Tokenizer", "MagicTokenizer"))
    outcome = script("sample", *pixart, *prompts)
    assert outcome.code == 2 and len(outcome.err.splitlines()) == 1
    assert "makes no PixArtAlphaPipeline" in outcome.err and "MagicTokenizer" in outcome.err


def test_offloading_needs_accelerate(pipelines, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    options = [f"model.path={pipelines / 'sd15'}", "model.cpu_offload=true"]
    found = find_model(composed("model=sd15", *options)["model"])
    message = r"^model\.cpu_offload=true: needs accelerate: `pip install -e '\.\[text\]'`$"
    with pytest.raises(UserError, match=message):
        found.sampler(CUDA, torch.float32, False, False)
