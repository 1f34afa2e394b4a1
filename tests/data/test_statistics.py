from __future__ import annotations

import copy
import hashlib

import numpy as np
import pytest
import torch

from lml.data.statistics import ReferenceStatistics, make_reference, weights_sha256
from lml.errors import UserError
from lml.metrics.features import FeatureNetwork


@pytest.fixture(scope="module")
def extractor():
    torch.manual_seed(0)
    return FeatureNetwork(width=4, num_features=6)


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (23, 3, 32, 32), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("batch_size", [1, 7, 23])
def test_mean_and_covariance(extractor, images, batch_size, tmp_path):
    extractor.train()  # statistics must be taken in evaluation mode all the same
    made = make_reference(extractor, images, tmp_path / "new/reference.npz", batch_size)
    with torch.no_grad():
        features = extractor.eval()(images).double()
    torch.testing.assert_close(made.mu, features.mean(0), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(made.sigma, features.T.cov(), rtol=1e-5, atol=1e-9)
    assert made.mu.dtype == made.sigma.dtype == torch.float64


def test_the_file_holds_everything(extractor, images, tmp_path):
    path = tmp_path / "reference.npz"
    made = make_reference(extractor, images, path)
    read = ReferenceStatistics.load(path)
    assert torch.equal(made.mu, read.mu) and torch.equal(made.sigma, read.sigma)
    assert (read.count, read.protocol, read.file) == (23, made.protocol, "reference.npz")
    pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
    assert read.protocol == {
        "extractor": {"name": "FeatureNetwork", "sha256": weights_sha256(extractor)},
        "images": {"count": 23, "size": [32, 32], "sha256": hashlib.sha256(pixels).hexdigest()},
    }
    assert read.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    make_reference(extractor, images, tmp_path / "again.npz", 5)
    with np.load(tmp_path / "again.npz") as file:
        assert str(file["protocol"]) == str(np.load(path)["protocol"])
    read.check(extractor)


def test_statistics_of_other_weights_are_refused(extractor, images, tmp_path):
    make_reference(extractor, images, tmp_path / "reference.npz")
    read = ReferenceStatistics.load(tmp_path / "reference.npz")
    other = copy.deepcopy(extractor)
    with torch.no_grad():
        other.head.bias[3] += 1e-3
    with pytest.raises(UserError, match=r"^key=reference\.npz: made with FeatureNetwork "):
        read.check(other, "key")
    wider = FeatureNetwork(width=4, num_features=8)
    with pytest.raises(
        UserError, match=r"^key=reference\.npz: statistics of 6 features; .* has 8$"
    ):
        read.check(wider, "key")


def test_the_hash_of_weights_is_that_of_their_values(extractor):
    half = copy.deepcopy(extractor).half()
    assert weights_sha256(half) == weights_sha256(copy.deepcopy(half).float())
    assert weights_sha256(half) != weights_sha256(extractor)
    renamed = torch.nn.Sequential(extractor.head)
    assert weights_sha256(renamed) != weights_sha256(extractor.head)


def test_files_that_are_not_statistics(tmp_path):
    path = tmp_path / "reference.npz"
    with pytest.raises(UserError, match=rf"^a\.b={path}: no such file; `python scripts/train\.py"):
        ReferenceStatistics.load(path, "a.b")
    for content in (b"", b"PK\x03\x04", b"nothing of the kind"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"^a\.b={path}: not a file of reference statistics"):
            ReferenceStatistics.load(path, "a.b")
    np.savez(path, mu=np.zeros(3), sigma=np.zeros((3, 3)), count=5)
    with pytest.raises(UserError, match=r"not a file of reference statistics .*protocol"):
        ReferenceStatistics.load(path)
    np.savez(path, mu=np.zeros(3), sigma=np.zeros((3, 2)), count=5, protocol="{}")
    with pytest.raises(UserError, match=r"mu \[3\] and sigma \[3, 2\] don't fit"):
        ReferenceStatistics.load(path)


def test_one_image_has_no_covariance(extractor, images, tmp_path):
    with pytest.raises(UserError, match="1 given"):
        make_reference(extractor, images[:1], tmp_path / "reference.npz")
    with pytest.raises(UserError, match="0 given"):
        ReferenceStatistics.compute(iter([]), extractor)
    assert not (tmp_path / "reference.npz").exists()
