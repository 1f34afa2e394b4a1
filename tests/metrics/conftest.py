"""Tiny random models as they lie on disk, a set of images, and their prompts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
import transformers
from PIL import Image

from lml.metrics.lpips import WEIGHTS

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "dog", "##s", "red", "on", "mat"]
TINY_REWARD = {
    "image_size": 32,
    "patch_size": 8,
    "vision_width": 24,
    "vision_layers": 2,
    "vision_heads": 3,
    "text_width": 16,
    "text_layers": 2,
    "text_heads": 4,
    "max_positions": 40,
    "vocabulary": len(WORDS) + 2,
    "head": (12, 8, 6, 4),
}


def spread(model: torch.nn.Module, seed: int, scale: float = 0.3) -> None:
    """Random weights large enough for every part of the network to show in its output."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        weight.data.normal_(0, scale, generator=generator)
        if "norm" in name.lower() and name.endswith("weight"):
            weight.data += 1


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of 32x32 images and 12 tokens, of the layout and config of openai's."""
    folder = tmp_path_factory.mktemp("models") / "clip"
    tower = {"hidden_size": 16, "intermediate_size": 32, "projection_dim": 8}
    tower |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    vocabulary = [*LETTERS, *(c + "</w>" for c in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    text = {"vocab_size": len(vocabulary), "max_position_embeddings": 12}
    text |= {
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
    }  # as published, wrong as it is
    config = transformers.CLIPConfig(
        text_config=tower | text,
        vision_config=tower | {"image_size": 32, "patch_size": 8},
        projection_dim=8,
    )
    model = transformers.CLIPModel(config)
    spread(model, 0)
    model.save_pretrained(folder)
    ids = {word: index for index, word in enumerate(vocabulary)}
    (folder / "vocab.json").write_text(json.dumps(ids))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


@pytest.fixture(scope="session")
def dinov2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DINOv2 of one layer, with position embeddings for 518x518 as published."""
    folder = tmp_path_factory.mktemp("models") / "dinov2"
    sizes = {"hidden_size": 6, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.Dinov2Model(transformers.Dinov2Config(image_size=518, **sizes))
    spread(model, 1, 1.0)  # attention that chooses, or 256 patches average out
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BERT's tokenizer with a vocabulary of a few words."""
    folder = tmp_path_factory.mktemp("models") / "bert"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    config = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def published_shapes() -> Callable[..., dict[str, tuple[int, ...]]]:
    """`published_shapes(**sizes)`: names and shapes in ImageReward.pt, from timm's ViT and BERT."""

    def shapes(
        image_size: int = 224,
        patch_size: int = 16,
        vision_width: int = 1024,
        vision_layers: int = 24,
        text_width: int = 768,
        text_layers: int = 12,
        max_positions: int = 512,
        vocabulary: int = 30524,
        head: tuple[int, ...] = (1024, 128, 64, 16),
        **heads: int,
    ) -> dict[str, tuple[int, ...]]:
        made: dict[str, tuple[int, ...]] = {}

        def linear(name: str, inputs: int, outputs: int) -> None:
            made[f"{name}.weight"], made[f"{name}.bias"] = (outputs, inputs), (outputs,)

        def norm(name: str, width: int) -> None:
            made[f"{name}.weight"] = made[f"{name}.bias"] = (width,)

        v, t, width = "blip.visual_encoder", "blip.text_encoder", vision_width
        made[f"{v}.cls_token"] = (1, 1, width)
        made[f"{v}.pos_embed"] = (1, (image_size // patch_size) ** 2 + 1, width)
        made[f"{v}.patch_embed.proj.weight"] = (width, 3, patch_size, patch_size)
        made[f"{v}.patch_embed.proj.bias"] = (width,)
        for i in range(vision_layers):
            norm(f"{v}.blocks.{i}.norm1", width)
            linear(f"{v}.blocks.{i}.attn.qkv", width, 3 * width)
            linear(f"{v}.blocks.{i}.attn.proj", width, width)
            norm(f"{v}.blocks.{i}.norm2", width)
            linear(f"{v}.blocks.{i}.mlp.fc1", width, 4 * width)
            linear(f"{v}.blocks.{i}.mlp.fc2", 4 * width, width)
        norm(f"{v}.norm", width)

        width = text_width
        made[f"{t}.embeddings.position_ids"] = (1, max_positions)
        made[f"{t}.embeddings.word_embeddings.weight"] = (vocabulary, width)
        made[f"{t}.embeddings.position_embeddings.weight"] = (max_positions, width)
        norm(f"{t}.embeddings.LayerNorm", width)
        for i in range(text_layers):
            layer = f"{t}.encoder.layer.{i}"
            for attention, inputs in (("attention", width), ("crossattention", vision_width)):
                linear(f"{layer}.{attention}.self.query", width, width)
                linear(f"{layer}.{attention}.self.key", inputs, width)
                linear(f"{layer}.{attention}.self.value", inputs, width)
                linear(f"{layer}.{attention}.output.dense", width, width)
                norm(f"{layer}.{attention}.output.LayerNorm", width)
            linear(f"{layer}.intermediate.dense", width, 4 * width)
            linear(f"{layer}.output.dense", 4 * width, width)
            norm(f"{layer}.output.LayerNorm", width)

        linear("blip.vision_proj", vision_width, 256)
        linear("blip.text_proj", text_width, 256)
        widths = (text_width, *head, 1)
        for layer, inputs, outputs in zip((0, 2, 4, 6, 7), widths, widths[1:], strict=False):
            linear(f"mlp.layers.{layer}", inputs, outputs)
        return made

    return shapes


@pytest.fixture(scope="session")
def reward_state(published_shapes) -> dict[str, torch.Tensor]:
    """Random weights of the tiny reward under their published names."""
    generator = torch.Generator().manual_seed(2)
    state = {}
    for name, shape in published_shapes(**TINY_REWARD).items():
        state[name] = torch.randn(shape, generator=generator) * 0.4
        if "norm" in name.lower() and name.endswith("weight"):
            state[name] += 1
    length = TINY_REWARD["max_positions"]
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(length)[None]
    return state


@pytest.fixture(scope="session")
def reward_file(tmp_path_factory: pytest.TempPathFactory, reward_state) -> Path:
    """The tiny reward's ImageReward.pt."""
    path = tmp_path_factory.mktemp("models") / "ImageReward.pt"
    torch.save(reward_state, path)
    return path


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """`images` (11, 3, 37, 50), uint8, `prompts`, and the folders `path` and `reference`."""
    root = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)

    def draw(name: str, count: int) -> np.ndarray:
        coarse = random.integers(0, 256, (count, 6, 7, 3), dtype=np.uint8)
        images = np.stack(
            [Image.fromarray(c).resize((50, 37), Image.Resampling.BICUBIC) for c in coarse]
        )
        (root / name).mkdir()
        for i, image in enumerate(images):
            Image.fromarray(image).save(root / name / f"{i:06d}.png")
        return images

    images = torch.from_numpy(draw("images", 11)).permute(0, 3, 1, 2).contiguous()
    draw("reference", 9)
    prompts = ["a cat", "a red dog", "dogs", "a", "cats on a red mat", "mat"]
    prompts += ["a red cat on a red mat on a red dog " * 5, "A  Red\nCAT", "", "[ENC] dog", "zebra"]
    return SimpleNamespace(
        images=images, prompts=prompts, path=root / "images", reference=root / "reference"
    )


@pytest.fixture(scope="session")
def tiny_configs(clip_folder, dinov2_folder, bert_folder, reward_file, pictures) -> dict[str, dict]:
    """configs/metrics/NAME.yaml of the metrics on transformers' networks, with tiny models."""
    from omegaconf import OmegaConf

    from lml.data.assets import ROOT

    changed = {
        "clip_score": {"model": str(clip_folder)},
        "clip_cosine": {"model": str(clip_folder)},
        "image_reward": {
            "weights": str(reward_file),
            "tokenizer": str(bert_folder),
            **TINY_REWARD,
        },
        "fd_dinov2": {"model": str(dinov2_folder), "reference": str(pictures.reference)},
        "cmmd": {"model": str(clip_folder), "reference": str(pictures.reference)},
    }
    return {
        name: OmegaConf.to_container(OmegaConf.load(ROOT / f"configs/metrics/{name}.yaml"))[name]
        | keys
        for name, keys in changed.items()
    }


@pytest.fixture
def alexnet(tmp_path, monkeypatch) -> Path:
    """torch's hub folder, with random weights where torchvision looks."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    folder = tmp_path / "torch/hub/checkpoints"
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    state = torchvision.models.alexnet().state_dict()
    torch.save(state, folder / WEIGHTS.rpartition("/")[2])
    return folder
