"""Mean and covariance of an image set's features, the reference of a Fréchet distance."""

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
from lml.files import load_json, open_arrays, replacing
from lml.schema import Statistics, check


def weights_sha256(module: nn.Module) -> str:
    """sha256 over the names and float32 values of a module's weights and buffers.

    It doesn't depend on the format of the file, nor on the type that the weights are stored in.
    """
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().to("cpu", torch.float32).contiguous().numpy())
    return digest.hexdigest()


def describe(extractor: nn.Module) -> dict[str, str]:
    """A feature extractor's name and the sha256 of its weights, for protocols.

    An extractor that never changes may have this as its `description`, since hashing takes time.
    """
    if hasattr(extractor, "description"):
        return dict(extractor.description)
    return {"name": type(extractor).__name__, "sha256": weights_sha256(extractor)}


def mean_and_covariance(count: int, total: Tensor, products: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and unbiased covariance (D, D) from sums, float64.

    `total` (D,) is the sum of `count` features f, `products` (D, D) that of their f fᵀ.
    """
    mu = total / count
    return mu, (products - count * torch.outer(mu, mu)) / (count - 1)


@dataclass
class ReferenceStatistics:
    """`mu` (D,) and unbiased `sigma` (D, D), float64, of the features of `count` images.

    `protocol` describes the extractor (name, sha256 of the weights) and the images (count, size as
    [H, W], sha256 of their pixels as uint8 NHWC). For other people's statistics it is empty, and
    `count` is None. `features` (`count`, D), float32, are None unless they were kept.
    """

    mu: Tensor
    sigma: Tensor
    count: int | None
    protocol: dict
    file: str | None = None
    sha256: str | None = None
    features: Tensor | None = None

    @property
    def size(self) -> tuple[int, int] | None:
        """(H, W) of the images; None if unknown."""
        size = self.protocol.get("images", {}).get("size")
        return size and tuple(size)

    def describe(self) -> dict:
        """The reference's entry in a metric's protocol."""
        return {"file": self.file, "count": self.count, "sha256": self.sha256}

    @classmethod
    @torch.no_grad()
    def compute(
        cls, batches: Iterable[Tensor], extractor: nn.Module, keep_features: bool = False
    ) -> ReferenceStatistics:
        """Statistics of uint8 batches (B, 3, H, W) under `extractor`: (B, 3, H, W) -> (B, D).

        One batch is in memory at a time, and all features if they are to be kept.
        """
        extractor = extractor.eval()
        device = next(extractor.parameters()).device
        pixels, count, total, products, size = hashlib.sha256(), 0, 0.0, 0.0, None
        kept = []
        for batch in batches:
            size = list(batch.shape[2:])
            pixels.update(batch.permute(0, 2, 3, 1).contiguous().cpu().numpy())
            features = extractor(batch.to(device)).cpu()
            if keep_features:
                kept.append(features)
            features = features.double()
            count += len(batch)
            total = total + features.sum(0)
            products = products + features.T @ features
        if count < 2:
            raise UserError(f"images: {count} given; statistics need at least 2")
        images = {"count": count, "size": size, "sha256": pixels.hexdigest()}
        return cls(
            *mean_and_covariance(count, total, products),
            count,
            {"extractor": describe(extractor), "images": images},
            features=torch.cat(kept) if kept else None,
        )

    def save(self, path: str | Path) -> None:
        """Write an .npz of mu, sigma, count, protocol (a JSON string) and the features, if any.

        It writes the whole file or nothing. The same statistics give the same bytes.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = {"mu": self.mu.numpy(), "sigma": self.sigma.numpy(), "count": self.count}
        if self.features is not None:
            arrays["features"] = self.features.numpy()
        with replacing(path) as file:
            np.savez(file, **arrays, protocol=json.dumps(self.protocol))

    @classmethod
    def load(
        cls,
        path: str | Path,
        key: str = "reference",
        features: bool = False,
        any_origin: bool = False,
    ) -> ReferenceStatistics:
        """Read a file that `save` wrote; its features, if any, only on request.

        With `any_origin`, also other people's .npz with only `mu` and `sigma`. UserError, naming
        `key`, for any other file.
        """
        path = locate(path)
        if not path.is_file():
            raise UserError(
                f"{key}={path}: no such file; `python scripts/train.py train=features` makes it"
            )
        try:
            with open_arrays(path) as file:
                mu, sigma = (torch.from_numpy(file[name]).double() for name in ("mu", "sigma"))
                if any_origin and "protocol" not in file:
                    count, protocol = None, {}
                else:
                    count, protocol = int(file["count"]), load_json(str(file["protocol"]))
                    check(protocol, Statistics, "protocol")
                keep = features and "features" in file
                kept = torch.from_numpy(file["features"]) if keep else None
        except Exception as error:  # zip, pickle, key and JSON errors all mean the same here
            raise UserError(f"{key}={path}: not a file of reference statistics ({error})") from None
        if mu.ndim != 1 or sigma.shape != (*mu.shape, *mu.shape):
            raise UserError(f"{key}={path}: mu {[*mu.shape]} and sigma {[*sigma.shape]} don't fit")
        if not (mu.isfinite().all() and sigma.isfinite().all()):
            raise UserError(f"{key}={path}: mu or sigma is not finite")
        sha256 = hashlib.sha256(np.memmap(path, np.uint8, "r")).hexdigest()
        return cls(mu, sigma, count, protocol, path.name, sha256, kept)

    def check(self, extractor: nn.Module, key: str = "reference") -> None:
        """UserError unless these are statistics of the features of exactly this extractor.

        For other people's statistics, only the number of features can be checked.
        """
        ours, theirs = describe(extractor), self.protocol.get("extractor", {})
        if len(self.mu) != extractor.num_features:
            raise UserError(
                f"{key}={self.file}: statistics of {len(self.mu)} features; "
                f"{ours['name']} has {extractor.num_features}"
            )
        if self.protocol and ours != theirs:
            raise UserError(
                f"{key}={self.file}: made with {theirs.get('name')} {theirs.get('sha256', '')[:12]}"
                f"; the features come from {ours['name']} {ours['sha256'][:12]}"
            )


def make_reference(
    extractor: nn.Module, images: Tensor, path: str | Path, batch_size: int = 500
) -> ReferenceStatistics:
    """Write the statistics of uint8 `images` (N, 3, H, W) under `extractor` to `path`.

    Use the extractor as it is read from its file: files in half precision round the weights, and a
    metric refuses statistics that other weights made.
    """
    statistics = ReferenceStatistics.compute(images.split(batch_size), extractor)
    statistics.save(path)
    return statistics
