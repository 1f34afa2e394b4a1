"""ImageReward: a human's preference for an image, given its prompt."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lml.data.assets import locate
from lml.data.statistics import describe
from lml.errors import UserError
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
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the rewards that it was trained to
HEAD_LAYERS = (0, 2, 4, 6, 7)  # as published: dropout in between
FILE = "ImageReward.pt"

# (a name of ours, its published one), tried in turn
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
# BLIP's heads for pretraining and a buffer: in the file, without a part in the reward
UNUSED = {
    "blip.vision_proj.weight",
    "blip.vision_proj.bias",
    "blip.text_proj.weight",
    "blip.text_proj.bias",
    "blip.text_encoder.embeddings.position_ids",
}


class RewardNetwork(nn.Module):
    """BLIP's image encoder, its text encoder that looks at the image, and a linear head.

    (Xu et al., arXiv 2304.05977, figure 3; BLIP: Li et al., arXiv 2201.12086.) The sizes are those
    of the published weights by default; `head` are the widths between the text's and 1.
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
            is_decoder=True,  # gives it cross-attention; the call decides about causal masks
        )
        self.vision = library.BlipVisionModel(vision)
        self.text = BlipTextModel(text, add_pooling_layer=False)
        widths = (text_width, *head, 1)
        self.head = nn.Sequential(*map(nn.Linear, widths, widths[1:]))

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Rewards (B,) of normalised images (B, 3, H, W) and tokens (B, L)."""
        text = self.text(
            input_ids=input_ids,
            attention_mask=attention_mask,
            encoder_hidden_states=self.vision(pixel_values=pixels).last_hidden_state,
            is_decoder=False,
        )
        return (self.head(text.last_hidden_state[:, 0]).squeeze(1) - MEAN) / STD

    def load_published(self, state: Mapping[str, Tensor]) -> None:
        """Take over weights under the names of the published file.

        ValueError, naming it, when one is missing, of another shape, or has no place here.
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
                raise ValueError(f"{name} is {shapes[0]}; {shapes[1]} is asked")
        self.load_state_dict({ours: state[name] for name, ours in published.items()})


def published_name(name: str) -> str:
    """What the published file calls the weight `name` of a RewardNetwork."""
    for ours, theirs in PUBLISHED:
        renamed, found = re.subn("^" + ours, theirs, name)
        if found:
            return renamed
    raise KeyError(name)


class ImageReward(Metric):
    """Mean and standard deviation of ImageReward's rewards (Xu et al., arXiv 2304.05977).

    Rewards have about zero mean and unit deviation on the data that the reward was trained on;
    higher is better. Prompts are read up to 35 tokens, [CLS] and [SEP] included; `protocol` says
    after `compute` how many were longer.
    """

    is_differentiable = False
    full_state_update = False
    higher_is_better = True
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
        """The reward of each, (B,), of images, uint8 (B, 3, H, W), and their B prompts."""
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
        """`mean` and `std` of the images' rewards (std over their number, not one less)."""
        self.protocol["prompts_truncated"] = int(self.truncated)
        mean = self.total / self.count
        variance = self.squares / self.count - mean.square()
        return {"mean": mean, "std": variance.clamp(min=0).sqrt()}


def load_reward(weights: str | Path, revision: str | None, key: str, **sizes: Any) -> RewardNetwork:
    """RewardNetwork(**sizes) with the published weights, to be evaluated, not trained.

    `weights` is the file ImageReward.pt, a folder with it, or a hub id. UserError, beginning with
    `key`, when it isn't there or not whole.
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
    """ImageReward by the published weights and BERT's tokenizer; hub ids or paths.

    `sizes` are RewardNetwork's, for weights of another size than the published ones.
    """
    prefix = "metrics.image_reward"
    words = load_tokenizer(tokenizer, None, f"{prefix}.tokenizer")
    # As BLIP adds them, so that a prompt with these words in it becomes the same tokens.
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


image_reward.needs_prompts = True  # to be known before its network is loaded
