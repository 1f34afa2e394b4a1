"""The spaces in which a calibration compares samples with the fine solution."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lml.calibration.search import Objective
from lml.pipelines import pixel


def _flat(samples: Tensor) -> Tensor:
    return samples.flatten(1)


def of_samples() -> Objective:
    """The samples themselves, such as latents."""
    return Objective("rmse", _flat, _flat)


def of_pixels() -> Objective:
    """Pixels in [-1, 1]. The report rounds as metrics=[convergence] does; the search does not."""
    return Objective(
        "rmse",
        lambda images: _flat(images).clamp(-1, 1),
        lambda images: _flat(pixel.to_uint8(images)).float() / 127.5 - 1,
    )


def of_features(network: Callable[[Tensor], Tensor], name: str = "features") -> Objective:
    """Features of images (B, 3, H, W), or of the frames of videos (B, F, 3, H, W), in [-1, 1].

    `network` maps uint8 images (N, 3, H, W) to features (N, ...).
    """

    @torch.no_grad()
    def features(samples: Tensor) -> Tensor:
        images = pixel.to_uint8(samples.flatten(0, -4))
        return network(images).reshape(len(samples), -1)

    return Objective(name, features, features)
