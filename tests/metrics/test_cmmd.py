from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from lml.data.assets import ROOT
from lml.errors import UserError
from lml.metrics import cmmd as module
from lml.metrics.cmmd import cmmd, mmd
from lml.metrics.evaluate import build


def by_double_loop(x, y):
    """1000 times the biased estimate of MMD², written out, for lists of float64 vectors."""

    def mean(a, b):
        kernel = [math.exp(-(math.dist(p, q) ** 2) / 200) for p in a for q in b]
        return math.fsum(kernel) / len(kernel)

    x, y = x.double().tolist(), y.double().tolist()
    return 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))


@pytest.mark.parametrize(("n", "m"), [(1, 1), (5, 3), (30, 41)])
def test_double_loop(n, m):
    x, y = torch.randn(n, 6), torch.randn(m, 6) + 0.5
    assert mmd(x, y).item() == pytest.approx(by_double_loop(x, y), rel=1e-9, abs=1e-9)


def test_closed_forms():
    """A set has no distance to itself; two single points are 2000 (1 - k) apart."""
    x = torch.randn(20, 4)
    assert abs(mmd(x, x).item()) < 1e-9
    a, b = torch.zeros(1, 4), torch.full((1, 4), 5.0)  # |a - b| = 10
    assert mmd(a, b).item() == pytest.approx(2000 * (1 - math.exp(-0.5)), rel=1e-12)


def test_blocks_do_not_matter(monkeypatch):
    x, y = torch.randn(30, 4), torch.randn(23, 4)
    whole = mmd(x, y).item()
    for rows in (1, 7, 30):
        monkeypatch.setattr(module, "ROWS", rows)
        assert mmd(x, y).item() == pytest.approx(whole, rel=1e-9)


def test_memory_does_not_grow_with_the_square(monkeypatch):
    """No tensor of the kernel has more rows than a block."""
    shapes = []
    exp = torch.exp
    monkeypatch.setattr(torch, "exp", lambda x: shapes.append(x.shape) or exp(x))
    mmd(torch.randn(1100, 2), torch.randn(3, 2))
    assert {shape[0] for shape in shapes} == {512, 76, 3}


@torch.no_grad()
def embeddings(folder, images):
    """Unit embeddings of uint8 images by the whole CLIPModel, squares cut out and resized."""
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    pixels = []
    for image in images.permute(0, 2, 3, 1).numpy():
        h, w = image.shape[:2]
        side = min(h, w)
        top, left = (h - side) // 2, (w - side) // 2
        image = Image.fromarray(image[top : top + side, left : left + side])
        scaled = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC)) / 255
        scaled = (scaled - [0.48145466, 0.4578275, 0.40821073]) / [
            0.26862954,
            0.26130258,
            0.27577711,
        ]
        pixels.append(torch.from_numpy(scaled).permute(2, 0, 1).float())
    output = model.get_image_features(torch.stack(pixels))
    output = getattr(output, "pooler_output", output)
    return output / output.norm(dim=-1, keepdim=True)


def test_from_images_to_the_distance(tiny_configs, clip_folder, pictures):
    files = sorted(pictures.reference.iterdir())
    reference = torch.stack([torch.from_numpy(np.array(Image.open(f))) for f in files])
    x, y = (embeddings(clip_folder, i) for i in (pictures.images, reference.permute(0, 3, 1, 2)))
    metric = build({"cmmd": tiny_configs["cmmd"]})["cmmd"]
    values = []
    for _ in range(2):
        metric.reset()
        metric.update(pictures.images[:4])
        metric.update(pictures.images[4:])
        values.append(metric.compute().item())
    expected = by_double_loop(x, y)
    assert expected > 0.1
    assert values == pytest.approx([expected] * 2, abs=1e-5)

    protocol = dict(metric.protocol)
    extractor, reference_of = protocol.pop("extractor"), protocol.pop("reference")
    assert (extractor["name"], extractor["source"]) == ("CLIPEmbedding", "clip")
    assert protocol == {
        "resize": "central square, then resized, to 32x32 (Pillow, bicubic, uint8)",
        "kernel": "Gaussian, sigma 10, times 1000, biased",
        "images_asked": 30_000,
    }
    assert reference_of["source"] == str(pictures.reference) and reference_of["count"] == 9
    assert metric.num_images == 30_000


def test_references_that_are_none(clip_folder):
    for reference, message in (
        (None, "null: expected a folder of images"),
        ("nowhere", "nowhere: not found; expected a folder of images"),
        (ROOT / "assets/fd_cifar.npz", "fd_cifar.npz: statistics of 256 features"),
    ):
        with pytest.raises(UserError, match=rf"^metrics\.cmmd\.reference=.*{message}"):
            cmmd(reference, clip_folder)
