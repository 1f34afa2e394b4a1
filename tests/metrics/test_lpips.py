"""LPIPS diversity, on a random AlexNet in torchvision's file."""

from __future__ import annotations

import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.functional.image import learned_perceptual_image_patch_similarity

from lml.errors import UserError
from lml.metrics.evaluate import Context, evaluate
from lml.metrics.lpips import WEIGHTS, LPIPSDiversity


def test_neighbours_against_torchmetrics(alexnet, tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5, 3, 40, 48), dtype=np.uint8)
    (tmp_path / "images").mkdir()
    for k, image in enumerate(images):
        Image.fromarray(image.transpose(1, 2, 0)).save(tmp_path / f"images/{k}.png")
    results = evaluate(tmp_path / "images", {"it": LPIPSDiversity()}, context=Context(batch_size=2))
    x = torch.from_numpy(images) / 127.5 - 1
    expected = learned_perceptual_image_patch_similarity(x[0:4:2], x[1:4:2], "alex")
    assert expected > 1e-3
    assert results["it"]["value"] == pytest.approx(expected.item(), rel=1e-5)
    assert results["it"]["warning"].startswith("5 images")


def test_the_same_images_are_not_diverse_and_one_image_is_an_error(alexnet):
    metric = LPIPSDiversity()
    image = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    metric.update(image)
    with pytest.raises(UserError, match="at least 2 images"):
        metric.compute()
    metric.update(torch.cat([image, image]))
    assert metric.compute() == 0


def test_weights_that_cannot_be_had(tmp_path, monkeypatch):
    def unreachable(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    monkeypatch.setattr(torch.hub, "urlopen", unreachable)
    with pytest.raises(UserError, match=r"alexnet-owt.*cannot be had .*no route.*torch/hub"):
        LPIPSDiversity()


def test_broken_weights(alexnet):
    (alexnet / WEIGHTS.rpartition("/")[2]).write_bytes(b"half")
    with pytest.raises(UserError, match="cannot be had"):
        LPIPSDiversity()
