"""Fréchet distance to stored reference statistics, and FD-CIFAR, that distance on our features."""

from __future__ import annotations

from pathlib import Path

import torch
import torchmetrics
from torch import Tensor, nn
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

from lml.data.assets import locate
from lml.data.references import Reference, check_size
from lml.data.statistics import ReferenceStatistics, describe, mean_and_covariance
from lml.errors import UserError
from lml.metrics.features import FeatureNetwork


class FrechetDistance(torchmetrics.Metric):
    """The Fréchet distance of the images' features to those of a reference set.

        d² = ‖μ − μ_ref‖² + tr(Σ + Σ_ref − 2 (Σ Σ_ref)^½)

    (Heusel et al., arXiv 1706.08500, equation 6), by torch-fidelity's formula in float64. It agrees
    with a matrix square root to 1e-7 relative, and to 1e-5 for fewer images than features. Sums are
    all that is kept: 8 D² bytes for D features, whatever the number of images.

    `feature` maps uint8 (B, 3, H, W) to (B, `feature.num_features`), and may say in
    `feature.resize` what it does to the size; `num_images` is what the protocol asks for. Raises
    UserError when `reference` was made with another extractor, for images of another size than the
    reference's, and for fewer than 2 images.
    """

    is_differentiable = False
    full_state_update = False
    higher_is_better = False
    least_images = 2

    def __init__(
        self,
        feature: nn.Module,
        reference: ReferenceStatistics | Reference,
        num_images: int = 0,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if isinstance(reference, ReferenceStatistics):
            reference.check(feature)
        self.extractor = feature.eval().requires_grad_(False)
        self.reference = reference
        self.num_images = num_images
        self.protocol = {
            "extractor": describe(feature),
            "resize": getattr(feature, "resize", "none"),
            "images_asked": num_images,
            "reference": reference.describe(),
        }
        d = feature.num_features
        for name, shape in (("total", (d,)), ("products", (d, d))):
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def train(self, mode: bool = True) -> FrechetDistance:
        """Stays in evaluation mode: the extractor's batch norms must not move."""
        return super().train(False)

    def update(self, images: Tensor) -> None:
        """Add generated images, uint8 (B, 3, H, W)."""
        check_size(images, self.reference)
        self._reference_statistics()  # before the images, so that a broken reference costs no time
        features = self.extractor(images).double()
        self.total += features.sum(0)
        self.products += features.T @ features
        self.count += len(images)

    def compute(self) -> Tensor:
        """The distance, a float64 scalar ≥ 0 up to rounding."""
        if self.count < 2:
            raise UserError(f"num_images={self.count}: a Fréchet distance needs at least 2 images")
        reference = self._reference_statistics()
        self.protocol["reference"] = self.reference.describe()
        ours = mean_and_covariance(int(self.count), self.total.cpu(), self.products.cpu())
        ours, theirs = (
            {"mu": mu.numpy(), "sigma": sigma.numpy()}
            for mu, sigma in (ours, (reference.mu, reference.sigma))
        )
        distance = fid_statistics_to_metric(ours, theirs, verbose=False)[KEY_METRIC_FID]
        return torch.tensor(distance, dtype=torch.float64)

    def _reference_statistics(self) -> ReferenceStatistics:
        known = isinstance(self.reference, ReferenceStatistics)
        return self.reference if known else self.reference.statistics()


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
