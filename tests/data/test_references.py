from __future__ import annotations

import struct
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from lml.data import cifar10, references
from lml.data.images import ImageFolder
from lml.data.references import Reference, find_reference, open_images
from lml.data.statistics import ReferenceStatistics, weights_sha256
from lml.errors import UserError


class Means(nn.Module):
    """Two features an image, and a count of the batches it has seen."""

    num_features = 2
    resize = "to one pixel"

    def __init__(self, scale=1.0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([scale, 2.0]), requires_grad=False)
        self.calls = 0

    def forward(self, images):
        self.calls += 1
        pixels = images.float().flatten(1)
        return torch.stack([pixels.mean(1), pixels[:, :3].mean(1)], 1) * self.scale


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The folder that statistics are kept in, made by whoever writes there first."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch/lml"


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (7, 6, 8, 3), dtype=np.uint8)


def write(folder, pixels):
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{index:03d}.png")
    return folder


@pytest.fixture
def folder(tmp_path, pixels):
    return write(tmp_path / "images", pixels)


def expected(pixels, extractor=None):
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    return (extractor or Means())(images).double()


def assert_statistics(statistics, features):
    torch.testing.assert_close(statistics.mu, features.mean(0))
    torch.testing.assert_close(statistics.sigma, features.T.cov())
    assert statistics.count == len(features)


def test_a_folder_and_a_zip_are_the_same(folder, tmp_path, pixels):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for file in folder.iterdir():
            archive.write(file, f"some/where/{file.name}")
        archive.writestr("some/where/._000.png", "what some systems leave beside an image")
        archive.writestr("__MACOSX/some/000.png", "likewise")
        archive.writestr("dataset.json", "{}")
    hashes = set()
    for spec in (folder, tmp_path / "images.zip"):
        reference = Reference(spec, Means())
        assert reference.size == (6, 8)
        assert_statistics(reference.statistics(), expected(pixels))
        protocol = reference.statistics().protocol
        assert protocol["images"]["count"] == 7 and protocol["images"]["size"] == [6, 8]
        assert protocol["source"] == str(spec) and protocol["resize"] == "to one pixel"
        assert protocol["extractor"] == {"name": "Means", "sha256": weights_sha256(Means())}
        described = reference.describe()
        assert described["source"] == str(spec) and described["count"] == 7
        hashes.add(described["sha256"])
    assert len(hashes) == 1


def test_cifar10():
    if cifar10.find_folder() is None:
        pytest.skip(f"CIFAR-10 is looked for in {' or '.join(map(str, cifar10.SEARCHED))}")
    images = open_images("torchvision:CIFAR10:test")
    assert len(images) == 10_000 and images.size == (32, 32)
    first = next(iter(images.batches(5)))
    assert torch.equal(first, cifar10.load("test")[0][:5])


def test_another_torchvision_dataset(tmp_path, monkeypatch, pixels):
    """FashionMNIST's own files, which are grey, for 5 images of 4x3 pixels."""
    raw = tmp_path / "data/fashionmnist/FashionMNIST/raw"
    raw.mkdir(parents=True)
    grey = pixels[:5, :3, :4, 0]
    for part in ("train", "t10k"):
        header = struct.pack(">4i", 0x803, 5, 3, 4)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + grey.tobytes())
        labels = struct.pack(">2i", 0x801, 5) + bytes(5)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(labels)
    monkeypatch.chdir(tmp_path)
    images = open_images("torchvision:FashionMNIST:train")
    assert len(images) == 5 and images.size == (3, 4)
    batches = list(images.batches(3))
    assert [len(batch) for batch in batches] == [3, 2]
    for channel in torch.cat(batches).unbind(1):
        assert np.array_equal(channel, grey)
    before = images.stamp()
    (raw / "train-labels-idx1-ubyte").write_bytes(labels + b" ")
    assert images.stamp() != before


def test_what_was_computed_is_read_the_next_time(folder, cache, pixels):
    first, second = Means(), Means()
    made = Reference(folder, first).statistics()
    assert first.calls == 1 and len(list(cache.glob("*.npz"))) == 1
    kept = Reference(folder, second).statistics()
    assert second.calls == 0
    assert torch.equal(made.mu, kept.mu) and torch.equal(made.sigma, kept.sigma)
    assert kept.protocol == made.protocol and kept.count == 7
    other = Means(3.0)
    assert_statistics(Reference(folder, other).statistics(), expected(pixels, Means(3.0)))
    assert other.calls == 1 and len(list(cache.glob("*.npz"))) == 2


@pytest.mark.parametrize("change", ["pixels", "more", "fewer"])
@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_a_changed_source_is_noticed(folder, tmp_path, pixels, change, kind):
    def pack():
        if kind == "folder":
            return folder
        with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
            for file in folder.iterdir():
                archive.write(file, file.name)
        return tmp_path / "images.zip"

    Reference(pack(), Means()).statistics()
    if change == "fewer":
        (folder / "006.png").unlink()
        pixels = pixels[:6]
    else:
        pixels = 255 - pixels if change == "pixels" else np.concatenate([pixels, pixels])
        write(folder, pixels)
    assert_statistics(Reference(pack(), Means()).statistics(), expected(pixels))


def test_features_are_kept_when_they_are_needed(folder, pixels):
    extractor = Means()
    assert Reference(folder, extractor).statistics().features is None
    for calls in (1, 1):  # computed once, with the statistics, then read
        reference = Reference(folder, again := Means())
        reference.need_features()
        torch.testing.assert_close(reference.statistics().features.double(), expected(pixels))
        assert again.calls <= calls
    assert again.calls == 0
    assert Reference(folder, extractor).statistics().features is None and extractor.calls == 1


def test_metrics_share_what_they_compute(folder, pixels):
    extractor = Means()
    one, two = (find_reference(folder, extractor, "key") for _ in range(2))
    two.need_features()
    assert_statistics(one.statistics(), expected(pixels))
    assert two.statistics().features is not None and extractor.calls == 1
    assert find_reference(folder, Means(), "key") is not one
    write(folder, 255 - pixels)
    changed = find_reference(folder, extractor, "key")
    assert_statistics(changed.statistics(), expected(255 - pixels))


def test_broken_statistics_are_computed_again(folder, cache, pixels):
    Reference(folder, Means()).statistics()
    (file,) = cache.glob("*.npz")
    file.write_bytes(file.read_bytes()[:-100])
    assert_statistics(Reference(folder, Means()).statistics(), expected(pixels))


def test_nowhere_to_keep_them(folder, tmp_path, monkeypatch, pixels):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "file"))
    assert_statistics(Reference(folder, Means()).statistics(), expected(pixels))


def test_other_peoples_statistics(tmp_path, pixels):
    features = expected(pixels).numpy()
    path = tmp_path / "theirs.npz"
    sigma = np.cov(features, rowvar=False)
    np.savez(path, mu=features.mean(0), sigma=sigma, arr_0=pixels, mu_s=0, sigma_s=0)
    reference = Reference(path, Means(), "metrics.fid.reference")
    torch.testing.assert_close(reference.statistics().mu, torch.from_numpy(features.mean(0)))
    torch.testing.assert_close(reference.statistics().sigma, torch.from_numpy(sigma))
    assert reference.size is None and reference.describe()["count"] is None
    assert reference.describe()["file"] == "theirs.npz"
    message = r"^metrics\.fid\.reference=.*theirs\.npz: .*Fréchet distance; expected the images"
    with pytest.raises(UserError, match=message):
        reference.need_features("metrics.fid.reference")
    np.savez(path, mu=np.zeros(3), sigma=np.zeros((3, 3)))
    with pytest.raises(UserError, match=r"^k=theirs\.npz: statistics of 3 features; Means has 2$"):
        Reference(path, Means(), "k")
    np.savez(path, mu=np.zeros(2), sigma=np.full((2, 2), np.nan))
    with pytest.raises(UserError, match="not finite"):
        Reference(path, Means(), "k")


def test_ones_own_statistics_in_a_file(folder, tmp_path):
    ReferenceStatistics.compute(ImageFolder(folder).batches(3), Means()).save(tmp_path / "my.npz")
    reference = Reference(tmp_path / "my.npz", Means())
    assert reference.size == (6, 8) and reference.statistics().count == 7
    with pytest.raises(UserError, match=r"^k=my\.npz: made with Means "):
        Reference(tmp_path / "my.npz", Means(3.0), "k")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere", r"^k=nowhere: not found; expected a folder of images, a \.zip"),
        ("file.txt", r"^k=file\.txt: expected a folder of images, a \.zip"),
        ("empty", r"^k=.*empty: no images in it"),
        ("empty.zip", r"^k=.*empty\.zip: no images in it"),
        ("no.zip", r"^k=.*no\.zip: not a zip file"),
        ("no.npz", r"^k=.*no\.npz: not a file of reference statistics"),
        ("torchvision:CIFAR11:train", "^k=torchvision:CIFAR11:train: no .*nearest: CIFAR10"),
        ("torchvision:CIFAR10", "^k=torchvision:CIFAR10: expected CIFAR10:train or CIFAR10:test"),
        ("torchvision:CIFAR100:val", "^k=.*: expected CIFAR100:train or CIFAR100:test"),
        ("torchvision:SVHN:test", r"^k=.*: not in .*data/svhn .*SVHN\('data/svhn', download=True"),
    ],
)
def test_what_is_no_reference(tmp_path, monkeypatch, spec, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name in ("file.txt", "no.zip", "no.npz"):
        (tmp_path / name).write_text("text")
    zipfile.ZipFile(tmp_path / "empty.zip", "w").close()
    with pytest.raises(UserError, match=message) as caught:
        Reference(spec, Means(), "k")
    assert "\n" not in str(caught.value)


def test_cifar10_that_is_not_there(monkeypatch):
    monkeypatch.setattr(cifar10, "SEARCHED", ())
    with pytest.raises(UserError, match=r"^k=torchvision:CIFAR10:train: not in .*download=True"):
        Reference("torchvision:CIFAR10:train", Means(), "k")


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_broken_and_unequal_images_are_named(folder, tmp_path, kind):
    Image.new("RGB", (4, 4)).save(folder / "004.png")
    for message in (r"004\.png: 4x4 pixels; all images must have the 8x6 of", "not a readable"):
        path = folder
        if kind == "zip":
            path = tmp_path / "images.zip"
            with zipfile.ZipFile(path, "w") as archive:
                for file in sorted(folder.iterdir()):
                    archive.write(file, file.name)
        with pytest.raises(UserError, match=rf"^{path}/.*{message}"):
            Reference(path, Means()).statistics()
        (folder / "003.png").write_bytes((folder / "003.png").read_bytes()[:-30])
    assert not list(references.cache_folder().glob("*.npz"))


def test_a_zip_whose_bytes_were_hurt(folder, tmp_path):
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, file.name)
        start = archive.getinfo("003.png").header_offset
    data = bytearray(path.read_bytes())
    data[start + 100] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"images\.zip/003\.png: not a readable image"):
        Reference(path, Means()).statistics()
