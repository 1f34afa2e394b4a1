from __future__ import annotations

import hashlib
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10

from lml.data import cifar10
from lml.errors import UserError

needs_data = pytest.mark.skipif(
    cifar10.find_folder() is None,
    reason=f"CIFAR-10 is not in {' or '.join(map(str, cifar10.SEARCHED))}",
)


@needs_data
@pytest.mark.parametrize(
    ("split", "count", "sha256"),
    [
        ("train", 50_000, "47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a"),
        ("test", 10_000, "f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04"),
    ],
)
def test_the_official_images_in_the_official_order(split, count, sha256):
    images, labels = cifar10.load(split)
    assert images.shape == (count, 3, 32, 32) and images.dtype == torch.uint8
    assert images.is_contiguous() and labels.dtype == torch.int64
    assert labels.bincount().tolist() == [count // 10] * 10
    pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
    assert hashlib.sha256(pixels).hexdigest() == sha256


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)


def test_sheets(tmp_path, pixels):
    for k in range(5):
        sheet = pixels[2 * k : 2 * k + 2].reshape(2, 1024, 3)
        Image.fromarray(sheet).save(tmp_path / f"data_batch_{k + 1}.png")
    np.save(tmp_path / "train_labels.npy", np.arange(10, dtype=np.uint8))
    limit = Image.MAX_IMAGE_PIXELS
    images, labels = cifar10.load("train", tmp_path)
    assert np.array_equal(images.permute(0, 2, 3, 1), pixels[:10])
    assert labels.tolist() == list(range(10))
    assert limit == Image.MAX_IMAGE_PIXELS
    (tmp_path / "data_batch_2.png").write_bytes(b"\x89PNG")
    with pytest.raises(UserError, match=r"data_batch_2\.png: not a sheet of CIFAR-10"):
        cifar10.load("train", tmp_path)


def test_torchvisions_copy(tmp_path, pixels, monkeypatch):
    """Its own files, but for the checksums, which only the real ones have."""
    batches = [[f"data_batch_{k}", None] for k in range(1, 6)]
    monkeypatch.setattr(CIFAR10, "train_list", batches)
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", None]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": None})
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    planes = pixels.transpose(0, 3, 1, 2).reshape(6, 2, 3072)
    for (name, _), data in zip([*batches, ["test_batch", None]], planes, strict=True):
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": [7, 3]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))

    assert cifar10.find_folder(tmp_path) == tmp_path
    images, labels = cifar10.load("train", tmp_path)
    assert np.array_equal(images.permute(0, 2, 3, 1), pixels[:10])
    assert labels.tolist() == [7, 3] * 5
    assert np.array_equal(cifar10.load("test", tmp_path)[0].permute(0, 2, 3, 1), pixels[10:])

    (folder / "data_batch_5").unlink()
    with pytest.raises(UserError, match=rf"^data\.path={tmp_path}: Dataset not found or corrupted"):
        cifar10.load("train", tmp_path)


def test_no_data(tmp_path):
    assert cifar10.find_folder(tmp_path) is None
    message = rf"^data\.path={tmp_path}: CIFAR-10 is not in {tmp_path}; .* data\.download=true$"
    with pytest.raises(UserError, match=message):
        cifar10.load(path=tmp_path)
    with pytest.raises(UserError, match=r"^model\.path=.* with model\.download=true$"):
        cifar10.load(path=tmp_path, key="model")
