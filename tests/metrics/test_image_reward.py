from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from lml.errors import UserError
from lml.metrics.evaluate import build
from lml.metrics.image_reward import RewardNetwork, image_reward

from .conftest import TINY_REWARD, WORDS

CLS, SEP = WORDS.index("[CLS]"), WORDS.index("[SEP]")


def reward(state, pixels, ids, mask):
    """The published arithmetic in plain float64: BLIP's ViT, BERT that looks at it, the head."""
    state = {name: weight.double() for name, weight in state.items()}

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x, name, eps):
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    def gelu(x):
        return x * (1 + torch.erf(x / math.sqrt(2))) / 2

    def attend(q, k, v, heads, bias=0.0):
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        weights = (q @ k.mT / math.sqrt(q.shape[-1]) + bias).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(2)

    name = "blip.visual_encoder"
    patch = state[f"{name}.patch_embed.proj.weight"]
    x = F.conv2d(pixels, patch, state[f"{name}.patch_embed.proj.bias"], stride=patch.shape[-1])
    x = x.flatten(2).mT
    x = torch.cat([state[f"{name}.cls_token"].expand(len(x), -1, -1), x], 1)
    x = x + state[f"{name}.pos_embed"]
    for i in range(TINY_REWARD["vision_layers"]):
        block = f"{name}.blocks.{i}"
        qkv = linear(norm(x, f"{block}.norm1", 1e-6), f"{block}.attn.qkv").chunk(3, -1)
        x = x + linear(attend(*qkv, TINY_REWARD["vision_heads"]), f"{block}.attn.proj")
        hidden = gelu(linear(norm(x, f"{block}.norm2", 1e-6), f"{block}.mlp.fc1"))
        x = x + linear(hidden, f"{block}.mlp.fc2")
    image = norm(x, f"{name}.norm", 1e-6)

    name = "blip.text_encoder"
    x = state[f"{name}.embeddings.word_embeddings.weight"][ids]
    x = x + state[f"{name}.embeddings.position_embeddings.weight"][: ids.shape[1]]
    x = norm(x, f"{name}.embeddings.LayerNorm", 1e-12)
    padding = (1 - mask.double())[:, None, None] * -10_000.0
    for i in range(TINY_REWARD["text_layers"]):
        for kind, seen, bias in (("attention", None, padding), ("crossattention", image, 0.0)):
            block = f"{name}.encoder.layer.{i}.{kind}"
            seen = x if seen is None else seen
            qkv = (
                linear(y, f"{block}.self.{part}")
                for part, y in (("query", x), ("key", seen), ("value", seen))
            )
            mixed = linear(attend(*qkv, TINY_REWARD["text_heads"], bias), f"{block}.output.dense")
            x = norm(x + mixed, f"{block}.output.LayerNorm", 1e-12)
        block = f"{name}.encoder.layer.{i}"
        hidden = gelu(linear(x, f"{block}.intermediate.dense"))
        x = norm(x + linear(hidden, f"{block}.output.dense"), f"{block}.output.LayerNorm", 1e-12)

    x = x[:, 0]
    for i in (0, 2, 4, 6, 7):
        x = linear(x, f"mlp.layers.{i}")
    return (x[:, 0] - 0.16717362830052426) / 1.0333394966054072


def tokens(*words, length=35):
    """[CLS] words [SEP], cut and padded to 35."""
    ids = [[*WORDS, "[DEC]", "[ENC]"].index(word) for word in words]
    ids = [CLS, *ids[: length - 2], SEP]
    ids = torch.tensor([ids + [0] * (length - len(ids))])
    return ids, (ids != 0).long()


def preprocess(image, size=32):
    """uint8 (3, H, W): Pillow's bicubic on the shorter side, the centre, CLIP's mean and std."""
    image = Image.fromarray(image.permute(1, 2, 0).numpy())
    short = min(image.size)
    width, height = (int(size * side / short) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    pixels = np.asarray(image.crop((left, top, left + size, top + size))) / 255.0
    pixels = (pixels - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


@pytest.fixture
def metric(tiny_configs):
    return build({"image_reward": tiny_configs["image_reward"]})["image_reward"]


def test_plain_float64(metric, reward_state, pictures):
    """From pixels and prompts to rewards, by a second implementation of every part."""
    prompts = ["a cat", "A  Red\nDOGS", "", "zebra on [ENC] mat", "a red cat " * 15]
    words = [["a", "cat"], ["a", "red", "dog", "##s"], [], ["[UNK]", "on", "[ENC]", "mat"]]
    words.append(["a", "red", "cat"] * 15)
    images = pictures.images[:5]
    expected = torch.cat(
        [
            reward(reward_state, preprocess(image), *tokens(*chosen))
            for image, chosen in zip(images, words, strict=True)
        ]
    )
    assert expected.std() > 0.1
    with torch.no_grad():
        rewards = metric.rewards(images, prompts)
    torch.testing.assert_close(rewards.double(), expected, rtol=1e-4, atol=1e-5)
    metric.reset()
    metric.update(images[:2], prompts[:2])
    metric.update(images[2:], prompts[2:])
    value = metric.compute()
    assert tuple(value) == metric.parts
    assert value["mean"].item() == pytest.approx(expected.mean().item(), abs=1e-5)
    assert value["std"].item() == pytest.approx(expected.std(correction=0).item(), rel=1e-4)
    assert metric.protocol["prompts_truncated"] == 1


def test_the_epsilons_of_the_layer_norms(reward_state, pictures):
    """With inputs so small that they decide: of the images' variance 1e-6, of the words' 1e-12."""
    state = dict(reward_state)
    for name in state:
        small = ("cls_token", "pos_embed", "patch_embed", "attn.proj", "mlp.fc2")
        if "visual" in name and any(part in name for part in small):
            state[name] = state[name] * 1e-3
        if "embeddings.word" in name or "embeddings.position_e" in name:
            state[name] = state[name] * 1e-6
    network = RewardNetwork(**TINY_REWARD).eval()
    network.load_published(state)
    pixels, text = preprocess(pictures.images[0]), tokens("a", "red", "cat")
    expected = reward(state, pixels, *text)
    with torch.no_grad():
        made = network(pixels.float(), *text).double()
    assert (expected - reward(reward_state, pixels, *text)).abs() > 0.01
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)


def test_the_published_file_fits_at_full_size(published_shapes):
    """Every name and shape in ImageReward.pt has its place at the default sizes."""
    shapes = published_shapes()
    with torch.device("meta"):
        network = RewardNetwork()
        network.load_published({name: torch.empty(shape) for name, shape in shapes.items()})
    # what BLIP has beyond the reward: two projections of (weight, bias) and the position ids
    assert len(network.state_dict()) == len(shapes) - 5
    weights = sum(math.prod(weight.shape) for weight in network.state_dict().values())
    assert weights == sum(map(math.prod, shapes.values())) - 512 - 256 * (1024 + 768 + 2)
    assert network.vision.config.num_attention_heads == 16
    assert network.text.config.num_attention_heads == 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("mlp.layers.7.bias"), "missing: mlp.layers.7.bias"),
        (lambda s: s.update({"mlp.layers.1.bias": torch.zeros(3)}), "unknown: mlp.layers.1.bias"),
        (lambda s: s.update({"head.0.bias": torch.zeros(3)}), "unknown: head.0.bias"),
        (
            lambda s: [s.pop(name) for name in list(s) if ".blocks.1." in name],
            "missing: blip.visual_encoder.blocks.1.attn.proj.bias and 11 more",
        ),
        (
            lambda s: s.update({"mlp.layers.0.bias": torch.zeros(3)}),
            r"mlp.layers.0.bias is \[3\]; expected \[12\]",
        ),
        (lambda s: s.clear(), "missing: .* more"),
    ],
)
def test_every_weight_is_accounted_for(reward_state, bert_folder, tmp_path, change, message):
    state = dict(reward_state)
    change(state)
    torch.save(state, tmp_path / "ImageReward.pt")
    line = rf"^metrics\.image_reward\.weights={tmp_path}: not the weights .*\({message}\)$"
    with pytest.raises(UserError, match=line):
        image_reward(tmp_path, bert_folder, **TINY_REWARD)


def test_what_the_reward_does_not_use_may_be_absent(reward_state, bert_folder, tmp_path):
    unused = ("_proj.", "position_ids")
    state = {k: v for k, v in reward_state.items() if not any(part in k for part in unused)}
    assert len(state) == len(reward_state) - 5
    torch.save(state, tmp_path / "ImageReward.pt")
    image_reward(tmp_path / "ImageReward.pt", bert_folder, **TINY_REWARD)


class Code:
    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


@pytest.mark.parametrize("broken", ["half", "empty", "code", "list"])
def test_broken_files(reward_file, bert_folder, tmp_path, monkeypatch, broken):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "broken.pt"
    whole = reward_file.read_bytes()
    if broken in ("half", "empty"):
        path.write_bytes(whole[: len(whole) // 2 if broken == "half" else 0])
    else:
        torch.save(Code() if broken == "code" else [1, 2], path)
    with pytest.raises(UserError, match=rf"weights={path}: not the weights of ImageReward") as e:
        image_reward(path, bert_folder, **TINY_REWARD)
    assert "\n" not in str(e.value) and len(str(e.value)) < 500
    assert not Path("ran").exists()


def test_missing_files(reward_file, bert_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"weights=.*: no ImageReward\.pt in it"):
        image_reward(tmp_path, bert_folder, **TINY_REWARD)
    with pytest.raises(UserError, match=r"^metrics\.image_reward\.tokenizer=.*: no tokenizer"):
        image_reward(reward_file, tmp_path, **TINY_REWARD)


def test_a_tokenizer_of_another_vocabulary(reward_file, tmp_path, bert_folder):
    (tmp_path / "tokenizer_config.json").write_text(
        (bert_folder / "tokenizer_config.json").read_text()
    )
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS[:-1]) + "\n")
    with pytest.raises(UserError, match=r"13 tokens with \[DEC\] and \[ENC\]; the weights have 14"):
        image_reward(reward_file, tmp_path, **TINY_REWARD)


def test_the_protocol(metric, pictures):
    assert metric.needs_prompts and metric.num_images == metric.protocol["images_asked"] == 30_000
    extractor = metric.protocol["extractor"]
    assert extractor["name"] == "RewardNetwork" and extractor["source"] == "ImageReward.pt"
    assert metric.protocol["max_tokens"] == 35 and "central square" in metric.protocol["resize"]
    with pytest.raises(UserError, match=r"^metrics=\[image_reward\]: 1 prompts for 2 images"):
        metric.update(pictures.images[:2], ["a"])
