"""ImageReward: how much people would like an image, given its prompt."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lml.data.assets import locate
from lml.data.statistics import describe
from lml.errors import UserError
from lml.metrics.base import RunMetric
from lml.metrics.clip import check_pairs
from lml.metrics.networks import (
    CLIP_MEAN,
    CLIP_STD,
    Preprocessing,
    describe_source,
    find,
    import_transformers,
    load_tokenizer,
    one_line,
    tokenize,
)

MAX_TOKENS = 35
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the rewards that it was trained on
HEAD_LAYERS = (
    0,
    2,
    4,
    6,
    7,
)  # of the linear layers in the published list, which has dropout in between
FILE = "ImageReward.pt"

# (our name of a weight, its published name); the first that fits counts
PUBLISHED = (
    (r"vision\.embeddings\.class_embedding", r"blip.visual_encoder.cls_token"),
    (r"vision\.embeddings\.position_embedding", r"blip.visual_encoder.pos_embed"),
    (r"vision\.embeddings\.patch_embedding\.", r"blip.visual_encoder.patch_embed.proj."),
    (r"vision\.encoder\.layers\.(\d+)\.layer_norm(\d)\.", r"blip.visual_encoder.blocks.\1.norm\2."),
    (
        r"vision\.encoder\.layers\.(\d+)\.self_attn\.qkv\.",
        r"blip.visual_encoder.blocks.\1.attn.qkv.",
    ),
    (
        r"vision\.encoder\.layers\.(\d+)\.self_attn\.projection\.",
        r"blip.visual_encoder.blocks.\1.attn.proj.",
    ),
    (r"vision\.encoder\.layers\.(\d+)\.mlp\.", r"blip.visual_encoder.blocks.\1.mlp."),
    (r"vision\.post_layernorm\.", r"blip.visual_encoder.norm."),
    (r"text\.", r"blip.text_encoder."),
    *((rf"head\.{i}\.", f"mlp.layers.{layer}.") for i, layer in enumerate(HEAD_LAYERS)),
)
# in the published file, but not used by the reward: BLIP's pretraining heads and a buffer
UNUSED = {
    "blip.vision_proj.weight",
    "blip.vision_proj.bias",
    "blip.text_proj.weight",
    "blip.text_proj.bias",
    "blip.text_encoder.embeddings.position_ids",
}


class RewardNetwork(nn.Module):
    """BLIP's image encoder, its text encoder with cross-attention to the image, and a linear head.

    See Xu et al., arXiv 2304.05977, figure 3; for BLIP, Li et al., arXiv 2201.12086. The default
    sizes are those of the published weights. `head` holds the widths between `text_width` and 1.
    """

    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 16,
        vision_width: int = 1024,
        vision_layers: int = 24,
        vision_heads: int = 16,
        text_width: int = 768,
        text_layers: int = 12,
        text_heads: int = 12,
        max_positions: int = 512,
        vocabulary: int = 30524,
        head: Sequence[int] = (1024, 128, 64, 16),
    ):
        super().__init__()
        library = import_transformers("metrics.image_reward")
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        vision = library.BlipVisionConfig(
            image_size=image_size,
            patch_size=patch_size,
            hidden_size=vision_width,
            intermediate_size=4 * vision_width,
            num_hidden_layers=vision_layers,
            num_attention_heads=vision_heads,
            hidden_act="gelu",
            layer_norm_eps=1e-6,
            attention_dropout=0.0,
        )
        text = library.BlipTextConfig(
            vocab_size=vocabulary,
            hidden_size=text_width,
            encoder_hidden_size=vision_width,
            intermediate_size=4 * text_width,
            num_hidden_layers=text_layers,
            num_attention_heads=text_heads,
            max_position_embeddings=max_positions,
            hidden_act="gelu",
            layer_norm_eps=1e-12,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            is_decoder=True,  # adds cross-attention; causal masks are decided in the call
        )
        self.vision = library.BlipVisionModel(vision)
        self.text = BlipTextModel(text, add_pooling_layer=False)
        widths = (text_width, *head, 1)
        self.head = nn.Sequential(*map(nn.Linear, widths, widths[1:]))

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The rewards (B,) of normalised images (B, 3, H, W) and tokens (B, L)."""
        text = self.text(
            input_ids=input_ids,
            attention_mask=attention_mask,
            encoder_hidden_states=self.vision(pixel_values=pixels).last_hidden_state,
            is_decoder=False,
        )
        return (self.head(text.last_hidden_state[:, 0]).squeeze(1) - MEAN) / STD

    def load_published(self, state: Mapping[str, Tensor]) -> None:
        """Load weights that have the names of the published file.

        ValueError, which names the weight, if one is missing, unknown, or of another shape.
        """
        own = self.state_dict()
        published = {published_name(name): name for name in own}
        wrong = {
            "missing": published.keys() - state.keys(),
            "unknown": state.keys() - published.keys() - UNUSED,
        }
        for problem, names in wrong.items():
            if names:
                first, more = min(map(str, names)), len(names) - 1
                raise ValueError(f"{problem}: {first}" + (f" and {more} more" if more else ""))
        for name, ours in published.items():
            if state[name].shape != own[ours].shape:
                shapes = [[*shape] for shape in (state[name].shape, own[ours].shape)]
                raise ValueError(f"{name} is {shapes[0]}; expected {shapes[1]}")
        self.load_state_dict({ours: state[name] for name, ours in published.items()})


def published_name(name: str) -> str:
    """The name in the published file of the weight `name` of a RewardNetwork."""
    for ours, theirs in PUBLISHED:
        renamed, found = re.subn("^" + ours, theirs, name)
        if found:
            return renamed
    raise KeyError(name)


class ImageReward(RunMetric):
    """Mean and standard deviation of ImageReward's rewards (Xu et al., arXiv 2304.05977).

    On the data that the reward was trained on, rewards have a mean of about 0 and a standard
    deviation of about 1. Prompts are cut to 35 tokens, [CLS] and [SEP] included. After `compute`,
    `protocol` says how many prompts were longer.
    """

    higher_is_better = True
    parts = ("mean", "std")
    needs_prompts = True

    def __init__(self, network: RewardNetwork, tokenizer: Any, num_images: int = 0, **kwargs):
        super().__init__(**kwargs)
        self.network, self.tokenizer, self.num_images = network, tokenizer, num_images
        size = network.vision.config.image_size
        self.preprocessing = Preprocessing(size, "last", CLIP_MEAN, CLIP_STD)
        self.protocol = {
            "extractor": describe(network),
            "resize": str(self.preprocessing),
            "max_tokens": MAX_TOKENS,
            "images_asked": num_images,
        }
        for name in ("total", "squares"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("count", "truncated"):
            self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")

    def rewards(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """The rewards (B,) of images, uint8 (B, 3, H, W), for their B prompts."""
        tokens, truncated = tokenize(self.tokenizer, prompts, MAX_TOKENS)
        self.truncated += truncated
        tokens = {name: value.to(images.device) for name, value in tokens.items()}
        return self.network(self.preprocessing(images), **tokens)

    def update(self, images: Tensor, prompts: Sequence[str]) -> None:
        """Add images, uint8 (B, 3, H, W), and their B prompts."""
        check_pairs(images, prompts, "image_reward")
        rewards = self.rewards(images, prompts).double()
        self.total += rewards.sum()
        self.squares += rewards.square().sum()
        self.count += len(images)

    def compute(self) -> dict[str, Tensor]:
        """`mean` and `std` of the images' rewards (std divides by N, not by N − 1)."""
        self.protocol["prompts_truncated"] = int(self.truncated)
        mean = self.total / self.count
        variance = self.squares / self.count - mean.square()
        return {"mean": mean, "std": variance.clamp(min=0).sqrt()}


def load_reward(weights: str | Path, revision: str | None, key: str, **sizes: Any) -> RewardNetwork:
    """RewardNetwork(**sizes) with the published weights, in evaluation mode, without gradients.

    `weights` is the file ImageReward.pt, a folder with it, or a hub id. UserError, which begins
    with `key`, if the file is not there or not complete.
    """
    path = locate(weights)
    if not path.is_file():
        path = find(weights, revision, key, [FILE]) / FILE
    if not path.is_file():
        raise UserError(f"{key}={weights}: no {FILE} in it (hub id zai-org/ImageReward)")
    network = RewardNetwork(**sizes)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        network.load_published(state)
    except Exception as error:  # zip, pickle, key and shape errors share no base class
        raise UserError(
            f"{key}={weights}: not the weights of ImageReward ({one_line(error)})"
        ) from None
    return network.float().eval().requires_grad_(False)


def image_reward(
    weights: str | Path = "zai-org/ImageReward",
    tokenizer: str | Path = "google-bert/bert-base-uncased",
    revision: str | None = None,
    num_images: int = 30_000,
    **sizes: Any,
) -> ImageReward:
    """ImageReward with the published weights and BERT's tokenizer, both hub ids or paths.

    `sizes` are arguments of RewardNetwork, for weights of another size than the published ones.
    """
    prefix = "metrics.image_reward"
    words = load_tokenizer(tokenizer, None, f"{prefix}.tokenizer")
    # BLIP adds these tokens, so a prompt that contains them becomes the same tokens here.
    words.add_special_tokens({"bos_token": "[DEC]"})
    words.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    network = load_reward(weights, revision, f"{prefix}.weights", **sizes)
    if len(words) != network.text.config.vocab_size:
        raise UserError(
            f"{prefix}.tokenizer={tokenizer}: {len(words)} tokens with [DEC] and [ENC]; "
            f"the weights have {network.text.config.vocab_size}"
        )
    metric = ImageReward(network, words, num_images)
    metric.protocol["extractor"] |= describe_source(weights, revision)
    return metric
