"""Fréchet distance to stored reference statistics, and FD-CIFAR, that distance on our features."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from lml.data.assets import locate
from lml.data.statistics import ReferenceStatistics, describe
from lml.errors import UserError
from lml.metrics.features import FeatureNetwork


class FrechetDistance(FrechetInceptionDistance):
    """torchmetrics' Fréchet distance, with reference statistics in place of the real images.

        d² = ‖μ − μ_ref‖² + tr(Σ + Σ_ref − 2 (Σ Σ_ref)^½)

    (Heusel et al., arXiv 1706.08500, equation 6.) Its eigenvalue formula agrees with a float64
    matrix square root to 1e-7 relative, and to 1e-5 for fewer images than features.

    `feature` maps uint8 (B, 3, H, W) to (B, `feature.num_features`); `num_images` is what the
    protocol asks for. Raises UserError when `reference` was made with another extractor, for
    images of another size than the reference's, and for fewer than 2 images.
    """

    def __init__(
        self, feature: nn.Module, reference: ReferenceStatistics, num_images: int = 0, **kwargs
    ):
        reference.check(feature)
        super().__init__(feature=feature.eval().requires_grad_(False), **kwargs)
        self.num_images = num_images
        self.size = tuple(reference.protocol["images"]["size"])
        self.protocol = {
            "extractor": describe(feature),
            "resize": "none",
            "images_asked": num_images,
            "reference": {
                "file": reference.file,
                "count": reference.count,
                "sha256": reference.sha256,
            },
        }
        # As defaults, so that reset() brings them back; by "max", since each process holds the
        # same reference and a sum would count its images more than once.
        n, mu = reference.count, reference.mu
        products = (n - 1) * reference.sigma + n * torch.outer(mu, mu)
        self.add_state("real_features_sum", n * mu, dist_reduce_fx="max")
        self.add_state("real_features_cov_sum", products, dist_reduce_fx="max")
        self.add_state("real_features_num_samples", torch.tensor(n), dist_reduce_fx="max")
        # torchmetrics sets it in update, which a process without images never calls.
        self.orig_dtype = torch.float32

    def train(self, mode: bool = True) -> FrechetDistance:
        """Stays in evaluation mode: the extractor's batch norms must not move."""
        return super().train(False)

    def update(self, images: Tensor) -> None:
        """Add generated images, uint8 (B, 3, H, W)."""
        if images.shape[2:] != self.size:
            (height, width), (h, w) = self.size, images.shape[2:]
            raise UserError(f"images of {w}x{h} pixels: the reference's have {width}x{height}")
        super().update(images, real=False)

    def compute(self) -> Tensor:
        """The distance, a float32 scalar ≥ 0 up to rounding."""
        if self.fake_features_num_samples < 2:
            count = int(self.fake_features_num_samples)
            raise UserError(f"num_images={count}: a Fréchet distance needs at least 2 images")
        return super().compute()


def load_features(path: str | Path, key: str = "features") -> FeatureNetwork:
    """The FeatureNetwork stored in the folder `path`. UserError, naming `key`, when it isn't."""
    folder = locate(path)
    names = ("config.json", "diffusion_pytorch_model.safetensors")
    for name in names:
        if not (folder / name).is_file():
            raise UserError(
                f"{key}={folder}: {name} of the feature network is missing; put it there or run "
                "`python scripts/train.py train=features`"
            )
    try:
        return FeatureNetwork.from_pretrained(
            folder, local_files_only=True, torch_dtype=torch.float32
        )
    except Exception as error:  # safetensors, JSON and shape errors share no base class
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{key}={folder}: not a FeatureNetwork ({reason})") from None


def fd_cifar(
    features: str | Path = "assets/features",
    reference: str | Path = "assets/fd_cifar.npz",
    num_images: int = 10_000,
) -> FrechetDistance:
    """FD-CIFAR: the Fréchet distance to CIFAR-10's training images on FeatureNetwork's features.

    Not FID, and not comparable with it. Relative paths are looked for from the current folder, then
    from the repository's root.
    """
    prefix = "metrics.fd_cifar"
    network = load_features(features, f"{prefix}.features")
    statistics = ReferenceStatistics.load(reference, f"{prefix}.reference")
    statistics.check(network, f"{prefix}.reference")
    return FrechetDistance(network, statistics, num_images)
