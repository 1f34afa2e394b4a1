"""FD-DINOv2: the Fréchet distance on DINOv2's features."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from lml.data.references import find_reference
from lml.metrics.frechet import FrechetDistance
from lml.metrics.networks import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Preprocessing,
    describe_source,
    load_network,
)


class DINOv2(nn.Module):
    """DINOv2's class token after the last layer norm.

    Call: uint8 images (B, 3, H, W) -> float32 features (B, `num_features`). Images are resized to
    224x224, as in dgm-eval, the code of Stein et al. (arXiv 2306.04675). `resize` describes how.
    `network` is a transformers Dinov2Model.
    """

    def __init__(self, network: nn.Module, size: int = 224):
        super().__init__()
        self.network = network
        self.num_features = network.config.hidden_size
        self.preprocessing = Preprocessing(size, "none", IMAGENET_MEAN, IMAGENET_STD)
        self.resize = str(self.preprocessing)
        embeddings = network.embeddings
        embeddings.interpolate_pos_encoding = partial(_positions, embeddings)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(pixel_values=self.preprocessing(images)).last_hidden_state[:, 0]


def _positions(embeddings: nn.Module, tokens: Tensor, height: int, width: int) -> Tensor:
    """Position embeddings for a smaller image than DINOv2 was trained on, as in its authors' code.

    That code stretches the grid by 0.1 of a patch ("to avoid floating point error"). Published
    distances include the stretch; transformers does not have it.
    """
    weights = embeddings.position_embeddings
    side = round((weights.shape[1] - 1) ** 0.5)
    grid = [length // embeddings.config.patch_size for length in (height, width)]
    if grid == [side, side]:
        return weights
    positions = nn.functional.interpolate(
        weights[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2),
        scale_factor=[(length + 0.1) / side for length in grid],
        mode="bicubic",
    )
    return torch.cat([weights[:, :1], positions.flatten(2).mT], dim=1)


def load_dinov2(model: str | Path, revision: str | None = None, key: str = "extractor") -> DINOv2:
    """DINOv2 from `model`, a hub id or a folder. UserError, naming `key`, if it is not there."""
    return DINOv2(load_network("Dinov2Model", model, revision, f"{key}.model"))


def fd_dinov2(
    reference: str | Path | None,
    model: str | Path = "facebook/dinov2-large",
    revision: str | None = None,
    num_images: int = 50_000,
) -> FrechetDistance:
    """FD-DINOv2 to `reference`, a folder of images or another source (see lml.data.references).

    `model` is the Dinov2Model that gives the features, a hub id or a folder. The default is
    ViT-L/14.
    """
    prefix = "metrics.fd_dinov2"
    extractor = load_dinov2(model, revision, prefix)
    source = find_reference(reference, extractor, f"{prefix}.reference")
    metric = FrechetDistance(extractor, source, num_images)
    metric.protocol["extractor"] |= describe_source(model, revision)
    return metric
