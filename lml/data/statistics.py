"""Mean and covariance of an image set's features: what a Fréchet distance is measured against."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lml.data.assets import locate
from lml.errors import UserError


def weights_sha256(module: nn.Module) -> str:
    """sha256 over the names and float32 values of a module's weights and buffers.

    So it doesn't depend on the file format or on the type that the weights are stored in.
    """
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().to("cpu", torch.float32).contiguous().numpy())
    return digest.hexdigest()


def describe(extractor: nn.Module) -> dict[str, str]:
    """A feature extractor's name and the sha256 of its weights, as protocols state them."""
    return {"name": type(extractor).__name__, "sha256": weights_sha256(extractor)}


@dataclass
class ReferenceStatistics:
    """`mu` (D,) and unbiased `sigma` (D, D), float64, of the features of `count` images.

    `protocol` says which extractor (name, sha256 of the weights) saw which images (count, size as
    [H, W], sha256 of their pixels as uint8 NHWC).
    """

    mu: Tensor
    sigma: Tensor
    count: int
    protocol: dict
    file: str | None = None
    sha256: str | None = None

    @classmethod
    @torch.no_grad()
    def compute(cls, batches: Iterable[Tensor], extractor: nn.Module) -> ReferenceStatistics:
        """Of uint8 batches (B, 3, H, W) under `extractor`: uint8 (B, 3, H, W) -> (B, D)."""
        extractor = extractor.eval()
        device = next(extractor.parameters()).device
        pixels, count, total, products, size = hashlib.sha256(), 0, 0.0, 0.0, None
        for batch in batches:
            size = list(batch.shape[2:])
            pixels.update(batch.permute(0, 2, 3, 1).contiguous().cpu().numpy())
            features = extractor(batch.to(device)).double().cpu()
            count += len(batch)
            total = total + features.sum(0)
            products = products + features.T @ features
        if count < 2:
            raise UserError(f"images: {count} given; statistics need at least 2")
        mu = total / count
        sigma = (products - count * torch.outer(mu, mu)) / (count - 1)
        images = {"count": count, "size": size, "sha256": pixels.hexdigest()}
        return cls(mu, sigma, count, {"extractor": describe(extractor), "images": images})

    def save(self, path: str | Path) -> None:
        """Write an .npz of mu, sigma, count and protocol (a JSON string); equal bytes each time."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = {"mu": self.mu.numpy(), "sigma": self.sigma.numpy(), "count": self.count}
        with path.open("wb") as file:
            np.savez(file, **arrays, protocol=json.dumps(self.protocol))

    @classmethod
    def load(cls, path: str | Path, key: str = "reference") -> ReferenceStatistics:
        """Read what `save` wrote. `key` is the configuration key that errors point to."""
        path = locate(path)
        if not path.is_file():
            raise UserError(
                f"{key}={path}: no such file; `python scripts/train.py train=features` makes it"
            )
        try:
            with np.load(path) as file:
                mu, sigma, count, protocol = (
                    file[name] for name in ("mu", "sigma", "count", "protocol")
                )
            mu, sigma = torch.from_numpy(mu).double(), torch.from_numpy(sigma).double()
            protocol = json.loads(str(protocol))
        except Exception as error:  # zip, pickle, key and JSON errors all mean the same here
            raise UserError(f"{key}={path}: not a file of reference statistics ({error})") from None
        if sigma.shape != (*mu.shape, *mu.shape):
            raise UserError(f"{key}={path}: mu {[*mu.shape]} and sigma {[*sigma.shape]} don't fit")
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        return cls(mu, sigma, int(count), protocol, path.name, sha256)

    def check(self, extractor: nn.Module, key: str = "reference") -> None:
        """UserError unless these are statistics of the features of exactly this extractor."""
        ours, theirs = describe(extractor), self.protocol.get("extractor", {})
        if len(self.mu) != extractor.num_features:
            raise UserError(
                f"{key}={self.file}: statistics of {len(self.mu)} features; "
                f"{ours['name']} has {extractor.num_features}"
            )
        if ours != theirs:
            raise UserError(
                f"{key}={self.file}: made with {theirs.get('name')} {theirs.get('sha256', '')[:12]}"
                f"; the features come from {ours['name']} {ours['sha256'][:12]}"
            )


def make_reference(
    extractor: nn.Module, images: Tensor, path: str | Path, batch_size: int = 500
) -> ReferenceStatistics:
    """Write the statistics of uint8 `images` (N, 3, H, W) under `extractor` to `path`.

    Give the extractor as it is read back from disk: half-precision files round its weights, and a
    metric refuses statistics that other weights made.
    """
    statistics = ReferenceStatistics.compute(images.split(batch_size), extractor)
    statistics.save(path)
    return statistics
