"""The Fréchet distance to a reference set, and FD-CIFAR: that distance on our own features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric
from torchmetrics.utilities import dim_zero_cat

from lml.data.assets import locate
from lml.data.references import Reference, check_size
from lml.data.statistics import ReferenceStatistics, describe, mean_and_covariance
from lml.errors import UserError, first_line
from lml.metrics.base import RunMetric
from lml.metrics.features import FeatureNetwork


class FrechetDistance(RunMetric):
    """The Fréchet distance of the images' features to those of a reference set.

        d² = ‖μ − μ_ref‖² + tr(Σ + Σ_ref − 2 (Σ Σ_ref)^½)

    (Heusel et al., arXiv 1706.08500, equation 6), computed by torch-fidelity in float64. It agrees
    with a matrix square root to 1e-7 relative; with fewer images than features, to 1e-5. Only sums
    are kept: 8 D² bytes for D features, for any number of images.

    Args:
        feature: maps uint8 (B, 3, H, W) to (B, `feature.num_features`). If it resizes the images,
            its attribute `resize` describes how.
        reference: the reference set, or its statistics.
        num_images: how many images the protocol expects.

    Raises:
        UserError: `reference` was made with another extractor; the images have another size than
            the reference's; there are fewer than 2 images.
    """

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
        """Stay in evaluation mode: the extractor's batch norms must not change."""
        return super().train(False)

    def update(self, images: Tensor) -> None:
        """Add generated images, uint8 (B, 3, H, W)."""
        check_size(images, self.reference)
        self._reference_statistics()  # first, so that a broken reference costs no time
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


class MatchedFrechetDistance(FrechetDistance):
    """The Fréchet distance at matched brightness, colour cast and contrast.

    Before the features are computed, one affine map for each channel, the same for all images,
    gives the pixels the mean and the standard deviation of the reference images. Rounding and
    clipping leave small differences. So a sampler gains nothing by contrast alone. All images stay
    in memory: 3 H W bytes each.

    Args:
        feature, reference, num_images: as for FrechetDistance. `reference` must know the size of
            its images.
        mean, std: of the reference images, three numbers in [0, 1] each.

    Raises:
        ValueError: `mean` or `std` is something else.
    """

    def __init__(
        self,
        feature: nn.Module,
        reference: ReferenceStatistics,
        mean: Sequence[float],
        std: Sequence[float],
        num_images: int = 0,
        **kwargs,
    ):
        super().__init__(feature, reference, num_images, **kwargs)
        self.mean, self.std = list(mean), list(std)
        for name, numbers in (("mean", self.mean), ("std", self.std)):
            if len(numbers) != 3 or not all(0 <= number <= 1 for number in numbers):
                raise ValueError(f"pixels.{name}={numbers}: expected three numbers in [0, 1]")
        self.protocol["pixels_matched"] = {"mean": self.mean, "std": self.std}
        self.add_state("pixels", [], dist_reduce_fx="cat")
        self.reset()

    def reset(self) -> None:
        """Forget all images."""
        super().reset()
        # a process without images must send the same type as the others
        self.pixels.append(torch.empty(0, dtype=torch.uint8, device=self.device))

    def update(self, images: Tensor) -> None:
        """Add generated images, uint8 (B, 3, H, W)."""
        check_size(images, self.reference)
        self.pixels.append(images.flatten())

    def compute(self) -> Tensor:
        """The distance, a float64 scalar ≥ 0 up to rounding."""
        for name in ("total", "products", "count"):  # forget those of an earlier call
            setattr(self, name, torch.zeros_like(getattr(self, name)))
        images = dim_zero_cat(self.pixels).view(-1, 3, *self.reference.size)
        if len(images):
            ours_std, ours_mean = torch.std_mean(images.double(), (0, 2, 3), correction=0)
            mean, std = (255 * ours_mean.new_tensor(numbers) for numbers in (self.mean, self.std))
            scale = torch.where(ours_std > 0, std / ours_std, 1.0)
            shift = mean - scale * ours_mean
            for batch in images.split(250):
                matched = batch * scale[:, None, None] + shift[:, None, None]
                super().update(matched.round().clamp(0, 255).to(torch.uint8))
        return super().compute()


def load_features(path: str | Path, key: str = "features") -> FeatureNetwork:
    """The FeatureNetwork in the folder `path`. UserError, which names `key`, if there is none."""
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
            folder,
            local_files_only=True,
            torch_dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
        )
    except Exception as error:  # safetensors, JSON and shape errors share no base class
        reason = first_line(error)
        raise UserError(f"{key}={folder}: not a FeatureNetwork ({reason})") from None


def fd_cifar(
    features: str | Path = "assets/features",
    reference: str | Path = "assets/fd_cifar.npz",
    num_images: int = 10_000,
    pixels: Mapping[str, Sequence[float]] | None = None,
) -> FrechetDistance:
    """FD-CIFAR: the Fréchet distance to CIFAR-10's training images on FeatureNetwork's features.

    It is not FID, and not comparable with it. With `pixels`, the `mean` and `std` of the training
    images, it is a MatchedFrechetDistance. Relative paths are tried from the current folder first,
    then from the repository's root.
    """
    prefix = "metrics.fd_cifar"
    network = load_features(features, f"{prefix}.features")
    statistics = ReferenceStatistics.load(reference, f"{prefix}.reference")
    statistics.check(network, f"{prefix}.reference")
    if pixels is not None:
        return MatchedFrechetDistance(network, statistics, num_images=num_images, **pixels)
    return FrechetDistance(network, statistics, num_images)
