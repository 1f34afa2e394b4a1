"""CMMD: the maximum mean discrepancy of CLIP's image embeddings."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torchmetrics.utilities import dim_zero_cat

from lml.data.references import Reference, find_reference
from lml.data.statistics import describe
from lml.metrics.base import RunMetric
from lml.metrics.networks import (
    CLIP_MEAN,
    CLIP_STD,
    Preprocessing,
    describe_source,
    load_network,
)

SIGMA, SCALE = 10.0, 1000.0
ROWS = 512  # of the kernel matrix, computed at a time


class CLIPEmbedding(nn.Module):
    """CLIP's image embedding, of unit length.

    Call: uint8 images (B, 3, H, W) -> float32 (B, `num_features`). `resize` describes how images
    are resized. `network` is a transformers CLIPVisionModelWithProjection.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.num_features = network.config.projection_dim
        size = network.config.image_size
        self.preprocessing = Preprocessing(size, "first", CLIP_MEAN, CLIP_STD)
        self.resize = str(self.preprocessing)

    def forward(self, images: Tensor) -> Tensor:
        embeddings = self.network(pixel_values=self.preprocessing(images)).image_embeds
        return nn.functional.normalize(embeddings, dim=-1)


def mmd(x: Tensor, y: Tensor) -> Tensor:
    """Squared maximum mean discrepancy of samples x (N, D) and y (M, D), times 1000; float64.

        MMD² = mean k(x, x') + mean k(y, y') − 2 mean k(x, y),   k(a, b) = exp(−‖a − b‖² / 2σ²)

    with σ = 10. The means are over all pairs, including each sample with itself: this is the biased
    estimate of Gretton et al. (JMLR 13, equation 5), as in the code of Jayasumana et al. (arXiv
    2401.09603). Only 512 rows of a kernel matrix are in memory at a time.
    """
    x, y = x.double(), y.double()
    return SCALE * (_mean_kernel(x, x) + _mean_kernel(y, y) - 2 * _mean_kernel(x, y))


def _mean_kernel(x: Tensor, y: Tensor) -> Tensor:
    squares = y.square().sum(1)
    total = x.new_zeros(())
    for rows in x.split(ROWS):
        distances = rows.square().sum(1, keepdim=True) + squares - 2 * rows @ y.T
        total += torch.exp(-distances / (2 * SIGMA**2)).sum()
    return total / (len(x) * len(y))


class CMMD(RunMetric):
    """CMMD to a reference set, with the features of `embedding` (Jayasumana et al., 2401.09603).

    The embeddings of all images stay in memory: with ViT-L 3 kB an image, 92 MB for 30,000. Those
    of the reference take as much.
    """

    higher_is_better = False

    def __init__(
        self, embedding: CLIPEmbedding, reference: Reference, num_images: int = 0, **kwargs
    ):
        super().__init__(**kwargs)
        self.embedding = embedding.eval().requires_grad_(False)
        self.reference, self.num_images = reference, num_images
        self.protocol = {
            "extractor": describe(embedding),
            "resize": embedding.resize,
            "kernel": f"Gaussian, sigma {SIGMA:g}, times {SCALE:g}, biased",
            "images_asked": num_images,
            "reference": reference.describe(),
        }
        self.add_state("embeddings", [], dist_reduce_fx="cat")

    def update(self, images: Tensor) -> None:
        """Add generated images, uint8 (B, 3, H, W)."""
        self.reference.statistics()  # first, so that a broken reference costs no time
        # flat: torchmetrics sends a flat tensor for a process without images
        self.embeddings.append(self.embedding(images).flatten())

    @torch.no_grad()
    def compute(self) -> Tensor:
        """The distance, a float64 scalar ≥ 0 up to rounding; lower is better."""
        reference = self.reference.statistics().features
        self.protocol["reference"] = self.reference.describe()
        embeddings = dim_zero_cat(self.embeddings).unflatten(0, (-1, self.embedding.num_features))
        return mmd(embeddings, reference.to(embeddings.device))


def cmmd(
    reference: str | Path | None,
    model: str | Path = "openai/clip-vit-large-patch14-336",
    revision: str | None = None,
    num_images: int = 30_000,
) -> CMMD:
    """CMMD to the images of `reference` (see lml.data.references), with the CLIP in `model`."""
    prefix = "metrics.cmmd"
    kind, key = "CLIPVisionModelWithProjection", f"{prefix}.model"
    embedding = CLIPEmbedding(load_network(kind, model, revision, key, pickled=True))
    source = find_reference(reference, embedding, f"{prefix}.reference")
    source.need_features(f"{prefix}.reference")
    metric = CMMD(embedding, source, num_images)
    metric.protocol["extractor"] |= describe_source(model, revision)
    return metric
