"""The empirical distribution of N images: the ideal denoiser of a data set."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from lml.data import cifar10
from lml.errors import UserError
from lml.exact.base import ExactModel
from lml.schema import check_whole


class Empirical(ExactModel):
    """x_0 is uniform over N images x_i. A perfectly trained network would compute

        E[x_0 | x_t] = Σ_i w_i x_i,  w = softmax_i(−‖x_t − α x_i‖² / 2σ²)

    (Karras et al., arXiv 2206.00364, equation 57). It makes one pass over the images in blocks,
    with a running maximum in the softmax. For any N this needs memory for the images as given
    (50,000 uint8 images of 3,072 dimensions: 154 MB), for one block in float64 (8·`block_size`·D
    bytes) and for a few copies of the batch.

    The logits are (α x·x_i − α² ‖x_i‖²/2) / σ² in float64. Their rounding error, about
    1e-15 ‖x_i‖²/σ², is the relative error of the weights: 1e-8 for CIFAR-10 at σ = 0.01. In
    float32 it would be about 1, enough to choose the wrong one of two neighbours.

    Args:
        images: (N, C, H, W), uint8 u (used as u/127.5 − 1) or floating point (used as given).
        block_size: the number of images in float64 at a time.
        kwargs: `scheduler` and `prediction_type` of `ExactModel`.
    """

    def __init__(self, images: Tensor, block_size: int = 1024, **kwargs):
        if images.ndim != 4 or len(images) < 1:
            raise UserError(
                f"images={tuple(images.shape)}: expected (N, C, H, W) with N at least 1"
            )
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise UserError(f"images={images.dtype}: expected uint8 or floating point")
        check_whole(block_size, "block_size")
        super().__init__(images.shape[1:], **kwargs)
        self.block_size = block_size
        self.register_buffer("images", images.flatten(1))

    @classmethod
    def cifar10(
        cls,
        count: int = 50_000,
        path: str | Path | None = None,
        download: bool = False,
        block_size: int = 1024,
        scheduler: SchedulerMixin | None = None,
        prediction_type: str | None = None,
    ) -> Empirical:
        """The first `count` training images of CIFAR-10, read by `lml.data.cifar10.load`."""
        if not 1 <= count <= 50_000:
            raise UserError(f"count={count}: expected from 1 to 50000")
        images, _ = cifar10.load("train", path, download, key="model.network")
        return cls(
            images[:count].clone(),
            block_size=block_size,
            scheduler=scheduler,
            prediction_type=prediction_type,
        )

    def _blocks(self) -> Iterator[Tensor]:
        """The images as float64 (n, D), n at most `block_size`."""
        for block in self.images.split(self.block_size):
            block = block.double()
            if self.images.dtype == torch.uint8:
                block.div_(127.5).sub_(1)
            yield block

    def _moments(
        self, x: Tensor, alpha: Tensor, sigma: Tensor, v: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """E[x_0], and with `v` E[x_0 (x_0·v)] and E[x_0·v], under the weights of `x` (B, D)."""
        top = x.new_full((len(x), 1), -torch.inf)
        total = x.new_zeros(len(x), 1)
        sums = [torch.zeros_like(x)] + ([torch.zeros_like(x), total] if v is not None else [])
        for block in self._blocks():
            square = torch.linalg.vector_norm(block, dim=1) ** 2
            logits = alpha / sigma**2 * (x @ block.T - 0.5 * alpha * square)
            new_top = torch.maximum(top, logits.detach().amax(1, keepdim=True))
            keep, weights = (top - new_top).exp(), (logits - new_top).exp()
            top = new_top
            terms = [weights @ block]
            if v is not None:
                along = weights * (v @ block.T)
                terms += [along @ block, along.sum(1, keepdim=True)]
            total = keep * total + weights.sum(1, keepdim=True)
            sums = [keep * s + term for s, term in zip(sums, terms, strict=True)]
        mean, *second = (s / total for s in sums)
        return (mean, *second) if second else (mean, None, None)

    def _posterior_mean(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return self._moments(x, alpha, sigma)[0]

    def _posterior_covariance_vector(
        self, x: Tensor, v: Tensor, alpha: Tensor, sigma: Tensor
    ) -> Tensor:
        mean, second, along = self._moments(x, alpha, sigma, v)
        return second - mean * along
