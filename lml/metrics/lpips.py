"""LPIPS diversity: how different the images of a set look from one another."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

from lml.data.statistics import describe
from lml.errors import UserError
from lml.metrics.base import RunMetric

WEIGHTS = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"


def load_lpips(key: str) -> nn.Module:
    """LPIPS's network in torchmetrics, with torchvision's AlexNet.

    UserError, naming `key`, if AlexNet's weights are not there and cannot be fetched.
    """
    try:
        return LearnedPerceptualImagePatchSimilarity("alex").net
    except Exception as error:  # from the internet, the disk or the file
        folder = Path(torch.hub.get_dir(), "checkpoints")
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"{key}: {WEIGHTS} cannot be had ({reason}); put it into {folder}"
        ) from None


class LPIPSFeatures(nn.Module):
    """Features whose mean squared difference is LPIPS (Zhang et al., arXiv 1801.03924; AlexNet).

    Call: uint8 images (B, 3, H, W) of at least 32x32 pixels -> float32 (B, K).
    """

    def __init__(self, key: str = "objective=lpips"):
        super().__init__()
        self.network = load_lpips(key)

    def forward(self, images: Tensor) -> Tensor:
        layers = self.network.net(self.network.scaling_layer(images / 127.5 - 1))
        parts = []
        for layer, linear in zip(layers, self.network.lins, strict=True):
            weights = linear.model[-1].weight / layer[0, 0].numel()  # (1, C, 1, 1), not negative
            parts.append((F.normalize(layer, dim=1) * weights.sqrt()).flatten(1))
        features = torch.cat(parts, dim=1)
        return features * features.shape[1] ** 0.5  # a mean over features is then their sum


class LPIPSDiversity(RunMetric):
    """Mean LPIPS (Zhang et al., arXiv 1801.03924; AlexNet) of images 2k and 2k + 1 of a folder.

    Higher is more diverse. In a set with several images for each prompt, neighbours share their
    prompt. A pair lies within one batch of `evaluate`, so the batch size should be even.

    UserError if the weights of AlexNet are not there and cannot be fetched.
    """

    higher_is_better = True
    least_images = 2

    def __init__(self, num_images: int = 10_000, **kwargs):
        super().__init__(**kwargs)
        self.lpips = load_lpips("metrics=[lpips_diversity]")
        self.num_images = num_images
        self.protocol = {
            "extractor": describe(self.lpips),
            "resize": "none",
            "pairs": "images 2k and 2k + 1 by sorted name",
            "images_asked": num_images,
        }
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("pairs", torch.tensor(0), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, images: Tensor) -> None:
        """Add uint8 images (B, 3, H, W) of at least 32x32 pixels; an odd last one is left out."""
        images = images[: len(images) // 2 * 2] / 127.5 - 1
        if len(images):
            self.total += self.lpips(images[0::2], images[1::2]).double().sum()
            self.pairs += len(images) // 2

    def compute(self) -> Tensor:
        """The mean distance, a float64 scalar ≥ 0."""
        if self.pairs == 0:
            raise UserError("metrics=[lpips_diversity]: needs at least 2 images")
        return self.total / self.pairs
