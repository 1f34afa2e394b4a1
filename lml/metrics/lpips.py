"""LPIPS diversity: how different the images of a set look from one another."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

from lml.data.statistics import describe
from lml.errors import UserError
from lml.metrics.base import RunMetric

WEIGHTS = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"


class LPIPSDiversity(RunMetric):
    """Mean LPIPS (Zhang et al., arXiv 1801.03924; AlexNet) of images 2k and 2k + 1 of a folder.

    Higher is more diverse. In a set with several images for each prompt, neighbours share their
    prompt. A pair lies within one batch of `evaluate`, so the batch size should be even.

    The network is torchmetrics', with torchvision's AlexNet. UserError if its weights are not there
    and cannot be fetched.
    """

    higher_is_better = True
    least_images = 2

    def __init__(self, num_images: int = 10_000, **kwargs):
        super().__init__(**kwargs)
        try:
            self.lpips = LearnedPerceptualImagePatchSimilarity("alex")
        except Exception as error:  # from the internet, the disk or the file
            folder = Path(torch.hub.get_dir(), "checkpoints")
            reason = " ".join(str(error).split())[:120]
            raise UserError(
                f"metrics=[lpips_diversity]: {WEIGHTS} cannot be had ({reason}); "
                f"put it into {folder}"
            ) from None
        self.num_images = num_images
        self.protocol = {
            "extractor": describe(self.lpips.net),
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
            self.total += self.lpips.net(images[0::2], images[1::2]).double().sum()
            self.pairs += len(images) // 2

    def compute(self) -> Tensor:
        """The mean distance, a float64 scalar ≥ 0."""
        if self.pairs == 0:
            raise UserError("metrics=[lpips_diversity]: needs at least 2 images")
        return self.total / self.pairs
