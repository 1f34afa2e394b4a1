from __future__ import annotations

import re

import numpy as np
import pytest
import scipy.linalg
import torch
from omegaconf import OmegaConf
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from lml.data import cifar10
from lml.data.assets import ROOT
from lml.data.statistics import ReferenceStatistics, make_reference
from lml.errors import UserError
from lml.metrics.evaluate import build
from lml.metrics.features import FeatureNetwork
from lml.metrics.frechet import (
    FrechetDistance,
    MatchedFrechetDistance,
    fd_cifar,
    load_features,
)

FEATURES = 16


class Pixels(nn.Module):
    """Features that are linear in the pixels, plus their batch norm in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.num_features = FEATURES
        self.linear = nn.Linear(3 * 4 * 4, FEATURES)
        self.norm = nn.BatchNorm1d(FEATURES)

    def forward(self, images):
        return self.norm(self.linear(images.flatten(1) / 255))


def random_images(count, seed, low=0, high=256):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, (count, 3, 4, 4), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def extractor():
    torch.manual_seed(0)
    return Pixels()


@pytest.fixture(scope="module")
def reference(extractor):
    return ReferenceStatistics.compute(random_images(400, 0).split(100), extractor)


def distance(extractor, reference, images, batch_size=64):
    metric = FrechetDistance(extractor, reference)
    for batch in images.split(batch_size):
        metric.update(batch)
    return metric.compute()


def by_matrix_square_root(x, y):
    """The formula as it is written, by SciPy in float64, for features (N, D)."""
    x, y = x.double().numpy(), y.double().numpy()
    cov_x, cov_y = np.cov(x.T), np.cov(y.T)
    root = scipy.linalg.sqrtm(cov_x @ cov_y)
    return np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(cov_x + cov_y - 2 * root).real


@pytest.mark.filterwarnings("ignore:Matrix is singular")
@pytest.mark.parametrize("count", [2, 3, FEATURES - 1, FEATURES, FEATURES + 1, 300])
@pytest.mark.parametrize("low", [0, 130])
def test_matrix_square_root(extractor, reference, count, low):
    images = random_images(count, 1, low)
    with torch.no_grad():
        expected = by_matrix_square_root(extractor(random_images(400, 0)), extractor(images))
    assert distance(extractor, reference, images).item() == pytest.approx(expected, rel=1e-5)


def test_torchmetrics_on_the_real_images(extractor, reference):
    images = random_images(50, 1, 40)
    metric = FrechetInceptionDistance(feature=extractor)
    metric.update(random_images(400, 0), real=True)
    metric.update(images, real=False)
    value = distance(extractor, reference, images)
    torch.testing.assert_close(value.float(), metric.compute(), rtol=1e-6, atol=0)


def test_closed_forms(extractor, reference):
    """A shift adds the squared distance of the means; a contraction by c scales Σ by c²."""
    images = random_images(400, 0)
    assert distance(extractor, reference, images).abs() < 1e-6 * reference.sigma.trace()
    dark = ReferenceStatistics.compute([images // 2], extractor)
    with torch.no_grad():
        step = extractor(torch.full((1, 3, 4, 4), 51)) - extractor(torch.zeros(1, 3, 4, 4))
    shifted = distance(extractor, dark, images // 2 + 51)
    torch.testing.assert_close(shifted.float(), step.square().sum(), rtol=1e-4, atol=0)
    even = ReferenceStatistics.compute([images // 2 * 2], extractor)
    expected = (even.mu - dark.mu).square().sum() + even.sigma.trace() / 4  # (1 - 1/2)² tr Σ
    contracted = distance(extractor, even, images // 2)
    torch.testing.assert_close(contracted, expected, rtol=1e-4, atol=0)


def test_batches_do_not_matter(extractor, reference):
    images = random_images(90, 1, 40)
    values = [distance(extractor, reference, images, size) for size in (1, 7, 90)]
    assert max(values) - min(values) <= 1e-5 * values[0]


def test_reset_and_merge_keep_the_reference(extractor, reference):
    images = random_images(90, 1, 40)
    expected = distance(extractor, reference, images)
    metric = FrechetDistance(extractor, reference)
    metric.update(random_images(10, 2))
    metric.reset()
    metric.update(images)
    torch.testing.assert_close(metric.compute(), expected, rtol=1e-9, atol=0)
    halves = [FrechetDistance(extractor, reference) for _ in range(2)]
    for half, part in zip(halves, images.split(45), strict=True):
        half.update(part)
    halves[0].merge_state(halves[1])
    torch.testing.assert_close(halves[0].compute(), expected, rtol=1e-6, atol=0)
    assert halves[0].count == 90


PIXELS = {"mean": [0.3, 0.5, 0.6], "std": [0.1, 0.2, 0.15]}


def matched_distance(extractor, reference, *batches):
    metric = MatchedFrechetDistance(extractor, reference, **PIXELS)
    for batch in batches:
        metric.update(batch)
    return metric.compute()


def test_matched_is_the_distance_of_images_that_were_matched_by_hand(extractor, reference):
    images = random_images(300, 1, 40, 200)
    pixels = images.permute(0, 2, 3, 1).numpy() / 255
    own = pixels.reshape(-1, 3)
    by_hand = (pixels - own.mean(0)) / own.std(0) * PIXELS["std"] + PIXELS["mean"]
    by_hand = np.rint(255 * by_hand).clip(0, 255).astype(np.uint8)
    expected = distance(extractor, reference, torch.from_numpy(by_hand).permute(0, 3, 1, 2))
    actual = matched_distance(extractor, reference, *images.split(64))
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)


def test_matched_knows_no_contrast(extractor, reference):
    """But for rounding; to the distance itself it is nearly all that there is."""
    images = random_images(300, 1, 60, 196)
    faint = (images.double() * 0.7 + 30).round().to(torch.uint8)
    ours, theirs = (matched_distance(extractor, reference, i) for i in (images, faint))
    assert abs(ours / theirs - 1) < 2e-3
    plain = [distance(extractor, reference, i) for i in (images, faint)]
    assert plain[1] / plain[0] > 1.2
    flat = torch.full((9, 3, 4, 4), 7, dtype=torch.uint8)
    mean = (255 * torch.tensor(PIXELS["mean"])).round().to(torch.uint8)
    expected = distance(extractor, reference, mean[:, None, None].expand(9, 3, 4, 4))
    assert matched_distance(extractor, reference, flat) == expected


def test_matched_computes_again_and_in_parts(extractor, reference):
    images = random_images(90, 1, 40)
    expected = matched_distance(extractor, reference, images)
    metric = MatchedFrechetDistance(extractor, reference, **PIXELS)
    metric.update(random_images(50, 2))
    metric.reset()
    metric.update(images[:20])
    metric.compute()
    metric.update(images[20:30])
    other = MatchedFrechetDistance(extractor, reference, **PIXELS)
    other.update(images[30:])
    metric.merge_state(other)
    torch.testing.assert_close(metric.compute(), expected, rtol=1e-9, atol=0)
    with pytest.raises(UserError, match="at least 2 images"):
        matched_distance(extractor, reference, images[:1])
    with pytest.raises(UserError, match="at least 2 images"):
        matched_distance(extractor, reference)


def test_training_mode_does_not_reach_the_extractor(extractor, reference):
    before = extractor.norm.running_mean.clone()
    metric = nn.Sequential(FrechetDistance(extractor, reference)).train()[0]
    metric.update(random_images(20, 1))
    assert torch.equal(extractor.norm.running_mean, before)


def test_bad_images(extractor, reference):
    metric = FrechetDistance(extractor, reference)
    with pytest.raises(UserError, match="images of 5x6 pixels: the reference's have 4x4"):
        metric.update(torch.zeros(2, 3, 6, 5, dtype=torch.uint8))
    metric.reset()
    metric.update(random_images(1, 0))
    with pytest.raises(UserError, match=r"num_images=1: .* at least 2 images"):
        metric.compute()


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    """A tiny feature network in half precision, and the statistics of 40 images."""
    folder = tmp_path_factory.mktemp("assets")
    torch.manual_seed(0)
    FeatureNetwork(width=4, num_features=6).half().save_pretrained(folder / "features")
    images = torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8)
    make_reference(load_features(folder / "features"), images, folder / "fd.npz")
    return folder


def test_fd_cifar(assets):
    metric = fd_cifar(assets / "features", assets / "fd.npz")
    assert metric.num_images == metric.protocol["images_asked"] == 10_000
    assert metric.extractor.head.weight.dtype == torch.float32
    statistics = ReferenceStatistics.load(assets / "fd.npz")
    assert metric.protocol["extractor"] == statistics.protocol["extractor"]
    assert metric.protocol["resize"] == "none"
    assert metric.protocol["reference"] == {
        "file": "fd.npz",
        "count": 40,
        "sha256": statistics.sha256,
    }
    metric.update(torch.randint(0, 256, (30, 3, 32, 32), dtype=torch.uint8))
    assert metric.compute() > 0


@pytest.mark.parametrize("numbers", [[0.1], [0.1, 0.2, 1.5], [0.1, 0.2, -0.1], []])
@pytest.mark.parametrize("name", ["mean", "std"])
def test_other_pixels_than_three_numbers_are_one_line(assets, name, numbers):
    pixels = {**PIXELS, name: numbers}
    config = {"_target_": "lml.metrics.frechet.fd_cifar", "pixels": pixels}
    config |= {"features": str(assets / "features"), "reference": str(assets / "fd.npz")}
    line = re.escape(f"metrics.matched: pixels.{name}={numbers}: expected three numbers in [0, 1]")
    with pytest.raises(UserError, match=f"^{line}"):
        build({"matched": config})


def configured(name, assets):
    """The metric of configs/metrics/`name`.yaml, with the tiny network."""
    config = OmegaConf.load(ROOT / f"configs/metrics/{name}.yaml")
    config[name].features = str(assets / "features")
    config[name].reference = str(assets / "fd.npz")
    return build(config)[name]


def test_the_config(assets):
    metric = configured("fd_cifar", assets)
    assert isinstance(metric, FrechetDistance) and metric.num_images == 10_000


def test_the_config_of_matched_has_the_pixels_of_the_training_images(assets):
    metric = configured("fd_cifar_matched", assets)
    assert isinstance(metric, MatchedFrechetDistance) and metric.num_images == 10_000
    assert metric.protocol["pixels_matched"] == {"mean": metric.mean, "std": metric.std}
    if cifar10.find_folder() is None:
        pytest.skip(f"CIFAR-10 is looked for in {' or '.join(map(str, cifar10.SEARCHED))}")
    images = (cifar10.load()[0] / 255).double()
    std, mean = torch.std_mean(images, (0, 2, 3), correction=0)
    torch.testing.assert_close(mean, mean.new_tensor(metric.mean), rtol=0, atol=1e-5)
    torch.testing.assert_close(std, std.new_tensor(metric.std), rtol=0, atol=1e-5)


def test_missing_weights_are_one_line_that_names_the_file_and_the_key(tmp_path, assets):
    lines = {
        "features": fd_cifar_error(tmp_path / "features", assets / "fd.npz"),
        "reference": fd_cifar_error(assets / "features", tmp_path / "fd.npz"),
    }
    for key, line in lines.items():
        assert line.startswith(f"metrics.fd_cifar.{key}={tmp_path}") and "\n" not in line
        assert "train.py train=features" in line
    assert "config.json" in lines["features"]
    (tmp_path / "features").mkdir()
    (tmp_path / "features/config.json").write_text("{}")
    line = fd_cifar_error(tmp_path / "features", assets / "fd.npz")
    assert "diffusion_pytorch_model.safetensors" in line


def fd_cifar_error(*paths):
    with pytest.raises(UserError) as caught:
        fd_cifar(*paths)
    return str(caught.value)


@pytest.mark.parametrize("broken", ["weights", "config"])
def test_broken_weights(tmp_path, assets, broken):
    for file in (assets / "features").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    name = {"weights": "diffusion_pytorch_model.safetensors", "config": "config.json"}[broken]
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-20])
    line = fd_cifar_error(tmp_path, assets / "fd.npz")
    assert re.match(rf"metrics\.fd_cifar\.features={tmp_path}: not a FeatureNetwork \(.+\)$", line)


def test_a_reference_of_other_weights(tmp_path, assets):
    FeatureNetwork(width=4, num_features=6).save_pretrained(tmp_path)
    line = fd_cifar_error(tmp_path, assets / "fd.npz")
    assert line.startswith("metrics.fd_cifar.reference=fd.npz: made with FeatureNetwork ")


def test_relative_paths_work_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"^features={ROOT / 'assets/nowhere'}: "):
        load_features("assets/nowhere")
