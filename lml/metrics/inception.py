"""FID, KID, Inception Score, precision and recall on torch-fidelity's Inception-v3.

Features, arithmetic and default options are torch-fidelity's own. So on the same folder the numbers
are those of its `calculate_metrics`; for precision and recall with `feature_extractor=
"inception-v3-compat"`, since its default there is VGG-16. Metrics with the same weights share the
network, and each batch goes through it once.
"""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import (
    URL_INCEPTION_V3,
    FeatureExtractorInceptionV3,
)
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from torchmetrics.utilities import dim_zero_cat

from lml.data.assets import locate
from lml.data.references import check_size, find_reference
from lml.data.statistics import describe
from lml.errors import UserError
from lml.metrics.base import RunMetric
from lml.metrics.frechet import FrechetDistance
from lml.processes import rank_and_world

SEED = 2020  # torch-fidelity's default for KID's subsets and for the Inception Score's shuffling
BATCH_SIZE = 64  # also torch-fidelity's default: another batch size would round differently
PIECE = 8  # images in one pass through the first layers


class _InPieces(nn.Sequential):
    """A Sequential that, on a CPU, computes a few images at a time."""

    def forward(self, x: Tensor) -> Tensor:
        pieces = x.split(PIECE) if x.device.type == "cpu" else [x]
        return torch.cat([super(_InPieces, self).forward(piece) for piece in pieces])


class InceptionV3(nn.Module):
    """torch-fidelity's port of TensorFlow's Inception-v3 of 2015-12-05, weights from `path`.

    Call: uint8 images (B, 3, H, W) of any size -> float32 features (B, 2048). `logits(images)`
    gives float32 (B, 1008), one logit for each class, without the bias, as torch-fidelity's
    Inception Score uses them. Both come from one pass. The results for the last tensor are kept.
    """

    num_features = 2048
    num_classes = 1008
    resize = "bilinear to 299x299 as in TensorFlow 1.x: no antialiasing, corners aligned at 0"

    def __init__(self, path: str | Path):
        super().__init__()
        outputs = ["2048", "logits_unbiased"]
        network = FeatureExtractorInceptionV3("inception-v3-compat", outputs, str(path))
        self.network = network.requires_grad_(False)
        # A layer takes 180 MB, so the layers up to the second pooling wait for memory. Pieces that
        # fit the processor's cache give the same bits faster.
        stem = ["Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1"]
        stem += ["Conv2d_3b_1x1", "Conv2d_4a_3x3", "MaxPool_2"]
        layers = [getattr(network, name) for name in stem]
        for name in stem[1:]:
            setattr(network, name, nn.Identity())
        network.Conv2d_1a_3x3 = _InPieces(*layers)
        self.description = describe(self)
        self._last = None

    def train(self, mode: bool = True) -> InceptionV3:
        """Stay in evaluation mode: the batch norms must not change."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        return self._outputs(images)[0]

    def logits(self, images: Tensor) -> Tensor:
        return self._outputs(images)[1]

    @torch.no_grad()
    def _outputs(self, images: Tensor) -> tuple[Tensor, Tensor]:
        # The version counts in-place changes. A weak reference does not keep the batch in memory.
        version = None if images.is_inference() else images._version
        if self._last is not None:
            seen, its_version, outputs = self._last
            if seen() is images and version is not None and its_version == version:
                return outputs
        parts = [self.network(part) for part in images.split(BATCH_SIZE)]
        outputs = tuple(torch.cat(part) for part in zip(*parts, strict=True))
        self._last = (weakref.ref(images), version, outputs)
        return outputs


_networks: weakref.WeakValueDictionary = weakref.WeakValueDictionary()


def load_inception(weights: str | Path | None, key: str = "extractor") -> InceptionV3:
    """The network with the weights in the file `weights`; None for torch-fidelity's own file.

    All metrics with the same file share one network. UserError, which names `key`, if the file does
    not hold these weights.
    """
    path = find_weights(weights, key)
    status = path.stat()
    token = (path.resolve(), status.st_size, status.st_mtime_ns)
    network = _networks.get(token)
    if network is None:
        try:
            # torch-fidelity would run code inside the file; this refuses such a file first
            torch.load(path, map_location="cpu", weights_only=True)
            network = InceptionV3(path)
        except Exception as error:  # torch's, pickle's and zip's errors share no base class
            reason = " ".join(str(error).split())[:120]
            raise UserError(
                f"{key}.weights={path}: not the weights of torch-fidelity's Inception-v3 "
                f"({reason}); expected {URL_INCEPTION_V3}"
            ) from None
        _networks[token] = network
    return network


def find_weights(weights: str | Path | None, key: str) -> Path:
    """The file `weights`; for None the file in torch's hub folder, fetched if it is not there.

    UserError if there is no such file, or it cannot be fetched.
    """
    name = URL_INCEPTION_V3.rpartition("/")[2]
    if weights is not None:
        path = locate(weights)
        if not path.is_file():
            raise UserError(f"{key}.weights={weights}: no such file; expected {URL_INCEPTION_V3}")
        return path
    path = Path(torch.hub.get_dir(), "checkpoints", name)
    try:
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            digest = path.stem.rpartition("-")[2]
            with FileLock(f"{path}.lock"):
                if not path.is_file():
                    torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), digest)
    except Exception as error:  # no internet, a wrong hash, a folder that cannot be written to
        raise UserError(
            f"{key}.weights=null: {name} is not in {path.parent} and cannot be fetched ({error}); "
            f"put {URL_INCEPTION_V3} there, or name the file with {key}.weights="
        ) from None
    return path


class FID(FrechetDistance):
    """Fréchet Inception Distance (Heusel et al., arXiv 1706.08500).

    `reference` is a folder of images, a .zip, torchvision:NAME:SPLIT or an .npz of statistics (see
    lml.data.references). Memory does not grow with the number of images. UserError as for
    FrechetDistance, and if the weights or the reference cannot be found.
    """

    def __init__(
        self,
        reference: str | Path | None = None,
        weights: str | Path | None = None,
        num_images: int = 50_000,
        **kwargs,
    ):
        network = load_inception(weights, "metrics.fid")
        source = find_reference(reference, network, "metrics.fid.reference")
        super().__init__(network, source, num_images, **kwargs)


class _EveryImage(RunMetric):
    """A metric of one row of numbers for every image, in the order of the images.

    Under torch.distributed, process r of W must be updated with the blocks r, r + W, … of images.
    """

    def __init__(self, network: InceptionV3, width: int, num_images: int, **kwargs):
        super().__init__(compute_on_cpu=True, **kwargs)
        self.extractor = network
        self.width = width
        self.num_images = num_images
        self.protocol = {
            "extractor": describe(network),
            "resize": network.resize,
            "images_asked": num_images,
        }
        self.add_state("rows", [], dist_reduce_fx="cat")
        self.add_state("blocks", [], dist_reduce_fx="cat")

    def add(self, rows: Tensor) -> None:
        """Keep `rows` (B, width) of one block of images."""
        rank, world = rank_and_world()
        self.rows.append(rows.cpu())
        block = (self.update_count - 1) * world + rank
        self.blocks.append(torch.full((len(rows),), block))

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather the rows of all processes."""
        if not self.rows:  # a process without images must send rows of the same width
            self.rows.append(torch.empty(0, self.width))
            self.blocks.append(torch.empty(0, dtype=torch.long))
        super().sync(*args, **kwargs)

    def all_rows(self, least: int, why: str) -> Tensor:
        """The rows of all images, (N, width). UserError, with the reason `why`, below `least`."""
        rows, blocks = dim_zero_cat(self.rows), dim_zero_cat(self.blocks)
        if len(rows) < least:
            raise UserError(f"num_images={len(rows)}: {why} at least {least} images")
        in_order = bool((blocks.diff() >= 0).all())
        return rows if in_order else rows[blocks.argsort(stable=True)]


class _Compared(_EveryImage):
    """A metric of the features of every image and every reference image: 8 KB an image."""

    def __init__(
        self,
        key: str,
        reference: str | Path | None,
        weights: str | Path | None,
        num_images: int,
        **kwargs,
    ):
        network = load_inception(weights, key)
        super().__init__(network, network.num_features, num_images, **kwargs)
        self.key = key
        self.reference = find_reference(reference, network, f"{key}.reference")
        self.reference.need_features(f"{key}.reference")
        self.protocol["reference"] = self.reference.describe()

    def update(self, images: Tensor) -> None:
        """Add generated images, uint8 (B, 3, H, W)."""
        check_size(images, self.reference)
        self.reference.statistics()  # first, so that a broken reference costs no time
        self.add(self.extractor(images))

    def both(self, least: int, why: str) -> tuple[Tensor, Tensor]:
        """The features of the images (N, 2048) and of the reference images (M, 2048)."""
        ours, theirs = self.all_rows(least, why), self.reference.statistics().features
        self.protocol["reference"] = self.reference.describe()
        if len(theirs) < least:
            source = f"{self.key}.reference={self.reference.spec}"
            raise UserError(f"{source}: {len(theirs)} images; {why} at least {least}")
        return ours, theirs


class KID(_Compared):
    """Kernel Inception Distance (Bińkowski et al., arXiv 1801.01401), mean and std over subsets.

    This is the unbiased squared MMD with the kernel (xᵀy/2048 + 1)³, without a scale factor. It is
    computed between random subsets of the two sets, `subsets` times, with `subset_size` images each
    or as many as there are. The features of all images stay in memory: 8 KB an image, 400 MB for
    50,000, and as much for the reference.
    """

    higher_is_better = False
    parts = ("mean", "std")
    least_images = 2

    def __init__(
        self,
        reference: str | Path | None = None,
        weights: str | Path | None = None,
        subsets: int = 100,
        subset_size: int = 1000,
        num_images: int = 50_000,
        **kwargs,
    ):
        key = "metrics.kid"
        _at_least(subsets, 1, f"{key}.subsets")
        _at_least(subset_size, 2, f"{key}.subset_size")
        super().__init__(key, reference, weights, num_images, **kwargs)
        self.subset_size = subset_size
        self.protocol |= {"subsets": subsets, "subset_size": subset_size, "seed": SEED}

    def compute(self) -> dict[str, float]:
        """`mean` and `std` over the subsets."""
        features = self.both(2, "KID needs")
        size = min(self.subset_size, *map(len, features))
        self.protocol["subset_size"] = size
        value = kid_features_to_metric(
            *features,
            kid_subsets=self.protocol["subsets"],
            kid_subset_size=size,
            rng_seed=SEED,
            verbose=False,
        )
        return _short(value, "kernel_inception_distance_")


class PrecisionRecall(_Compared):
    """Improved precision and recall (Kynkäänniemi et al., arXiv 1904.06991), and their F-score.

    A ball around a reference image reaches to its `neighborhood`-th nearest reference image.
    Precision is the share of images that lie in such a ball. Recall is the same with the two sets
    exchanged. The features of all images stay in memory, as for KID, and so do distances in
    float32: for up to 10,000 images four matrices (1.6 GB), for larger sets 10,000 rows of one
    matrix at a time (twice 2 GB for 50,000).
    """

    higher_is_better = True
    parts = ("precision", "recall", "f_score")

    def __init__(
        self,
        reference: str | Path | None = None,
        weights: str | Path | None = None,
        neighborhood: int = 3,
        num_images: int = 50_000,
        **kwargs,
    ):
        key = "metrics.precision_recall"
        _at_least(neighborhood, 1, f"{key}.neighborhood")
        super().__init__(key, reference, weights, num_images, **kwargs)
        self.protocol |= {"neighborhood": neighborhood}
        self.least_images = neighborhood + 1

    def compute(self) -> dict[str, float]:
        """`precision`, `recall` and `f_score`, in [0, 1]."""
        neighborhood = self.protocol["neighborhood"]
        features = self.both(neighborhood + 1, f"{neighborhood} neighbours need")
        value = prc_features_to_metric(
            *features,
            prc_neighborhood=neighborhood,
            save_cpu_ram=max(map(len, features)) > 10_000,
            verbose=False,
        )
        return _short(value, "")


class InceptionScore(_EveryImage):
    """Inception Score (Salimans et al., arXiv 1606.03498), mean and std over `splits` parts.

    The images are shuffled first. The logits of all images stay in memory: 4 KB an image, 200 MB
    for 50,000.
    """

    higher_is_better = True
    parts = ("mean", "std")

    def __init__(
        self,
        weights: str | Path | None = None,
        splits: int = 10,
        num_images: int = 50_000,
        **kwargs,
    ):
        key = "metrics.inception_score"
        _at_least(splits, 1, f"{key}.splits")
        network = load_inception(weights, key)
        super().__init__(network, network.num_classes, num_images, **kwargs)
        self.protocol |= {"splits": splits, "seed": SEED}
        self.least_images = splits

    def update(self, images: Tensor) -> None:
        """Add generated images, uint8 (B, 3, H, W)."""
        self.add(self.extractor.logits(images))

    def compute(self) -> dict[str, float]:
        """`mean`, in [1, 1008], and `std` over the splits."""
        splits = self.protocol["splits"]
        rows = self.all_rows(splits, f"metrics.inception_score.splits={splits} needs")
        return _short(isc_features_to_metric(rows, splits, True, SEED), "inception_score_")


def _at_least(value: Any, least: int, key: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{key}={value}: expected a whole number of at least {least}")


def _short(value: dict[str, float], prefix: str) -> dict[str, float]:
    return {name.removeprefix(prefix): number for name, number in value.items()}
