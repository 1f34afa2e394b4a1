"""CLIP score: how well an image fits its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lml.data.statistics import describe
from lml.errors import UserError
from lml.metrics.base import RunMetric
from lml.metrics.networks import (
    CLIP_MEAN,
    CLIP_STD,
    Preprocessing,
    describe_source,
    load_network,
    load_tokenizer,
    tokenize,
)


class CLIPScore(RunMetric):
    """max(100 · mean cos(E_image, E_prompt), 0), in [0, 100] (Hessel et al., arXiv 2104.08718).

    The scale is that of torchmetrics' CLIPScore. So is the maximum, which is taken of the mean and
    not of each image. The value differs from torchmetrics' in two things. Images are resized by
    Pillow, as in OpenAI's own preprocessing. And a prompt that is too long keeps its closing token,
    where CLIP reads the embedding of the text; torchmetrics cuts that token off.

    `model` is a transformers CLIPModel and `tokenizer` its tokenizer. After `compute`, `protocol`
    says how many prompts were truncated.
    """

    higher_is_better = True
    needs_prompts = True
    config: ClassVar[str] = "clip_score"  # configs/metrics/`config`.yaml
    factor: ClassVar[int] = 100  # of each cosine
    scale: ClassVar[str] = "max(100 * mean cosine, 0)"

    def __init__(self, model: nn.Module, tokenizer: Any, num_images: int = 0, **kwargs):
        super().__init__(**kwargs)
        self.model, self.tokenizer, self.num_images = model, tokenizer, num_images
        self.max_tokens = model.config.text_config.max_position_embeddings
        size = model.config.vision_config.image_size
        self.preprocessing = Preprocessing(size, "last", CLIP_MEAN, CLIP_STD)
        self.protocol = {
            "extractor": describe(model),
            "scale": self.scale,
            "resize": str(self.preprocessing),
            "max_tokens": self.max_tokens,
            "images_asked": num_images,
        }
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("count", "truncated"):
            self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")

    def update(self, images: Tensor, prompts: Sequence[str]) -> None:
        """Add images, uint8 (B, 3, H, W), and their B prompts."""
        check_pairs(images, prompts, self.config)
        tokens, truncated = tokenize(self.tokenizer, prompts, self.max_tokens)
        tokens = {name: value.to(images.device) for name, value in tokens.items()}
        # get_image_features returns other things in other versions of transformers
        image = self.model.vision_model(pixel_values=self.preprocessing(images)).pooler_output
        text = self.model.text_model(**tokens).pooler_output
        image, text = self.model.visual_projection(image), self.model.text_projection(text)
        self.total += self.factor * torch.cosine_similarity(image, text).double().sum()
        self.count += len(images)
        self.truncated += truncated

    def compute(self) -> Tensor:
        """The score, a scalar in [0, 100]; higher is better."""
        return self._mean().clamp(min=0)

    def _mean(self) -> Tensor:
        self.protocol["prompts_truncated"] = int(self.truncated)
        return self.total / self.count


class CLIPCosine(CLIPScore):
    """mean cos(E_image, E_prompt), in [-1, 1]: not scaled, and never cut off at zero.

    This is the number that T2I-CompBench (arXiv 2307.06350) calls CLIPScore. Its own evaluator has
    another tokenizer of the same tokens, and fails at a prompt that is too long.
    """

    config = "clip_cosine"
    factor = 1
    scale = "mean cosine"

    def compute(self) -> Tensor:
        """The mean, a scalar in [-1, 1]; higher is better."""
        return self._mean()


def check_pairs(images: Tensor, prompts: Sequence[str], name: str) -> None:
    """UserError, which names the metric, unless there is one prompt for each image."""
    if prompts is None or len(prompts) != len(images):
        count = 0 if prompts is None else len(prompts)
        raise UserError(f"metrics=[{name}]: {count} prompts for {len(images)} images; one each")


def clip_score(
    model: str | Path = "openai/clip-vit-large-patch14",
    revision: str | None = None,
    num_images: int = 30_000,
) -> CLIPScore:
    """CLIPScore with the CLIPModel and the tokenizer in `model`, a hub id or a folder."""
    return _load(CLIPScore, model, revision, num_images)


def clip_cosine(
    model: str | Path = "openai/clip-vit-base-patch32",
    revision: str | None = None,
    num_images: int = 30_000,
) -> CLIPCosine:
    """CLIPCosine with the CLIPModel and the tokenizer in `model`, a hub id or a folder."""
    # published as pytorch_model.bin
    return _load(CLIPCosine, model, revision, num_images, pickled=True)


def _load(
    kind: type[CLIPScore],
    model: str | Path,
    revision: str | None,
    num_images: int,
    pickled: bool = False,
) -> CLIPScore:
    key = f"metrics.{kind.config}.model"
    network = load_network("CLIPModel", model, revision, key, pickled)
    metric = kind(network, load_tokenizer(model, revision, key), num_images)
    metric.protocol["extractor"] |= describe_source(model, revision)
    return metric
