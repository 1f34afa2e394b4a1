from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import transformers
from PIL import Image

from lml.data.statistics import ReferenceStatistics
from lml.errors import UserError
from lml.metrics.dinov2 import DINOv2, fd_dinov2
from lml.metrics.evaluate import build
from lml.metrics.networks import load_network


def cubic(x):
    """Keys' kernel with a = -0.75, PyTorch's."""
    x = abs(x)
    if x <= 1:
        return 1.25 * x**3 - 2.25 * x**2 + 1
    return -0.75 * x**3 + 3.75 * x**2 - 6 * x + 3 if x < 2 else 0.0


def resampling(inputs, outputs):
    """The matrix (outputs, inputs) that samples a line at steps of inputs / (outputs + 0.1)."""
    matrix = np.zeros((outputs, inputs))
    for row in range(outputs):
        centre = (row + 0.5) * inputs / (outputs + 0.1) - 0.5
        first = int(np.floor(centre))
        for k in range(first - 1, first + 3):
            matrix[row, min(max(k, 0), inputs - 1)] += cubic(centre - k)
    return torch.from_numpy(matrix).float()


@pytest.fixture(scope="module")
def extractor(dinov2_folder):
    return DINOv2(load_network("Dinov2Model", dinov2_folder, None, "model"))


@pytest.fixture(scope="module")
def expected(dinov2_folder):
    """Features by a DINOv2 that was made for 224x224, its positions resampled by hand."""
    trained = transformers.Dinov2Model.from_pretrained(dinov2_folder)
    config = transformers.Dinov2Config.from_pretrained(dinov2_folder, image_size=224)
    model = transformers.Dinov2Model(config).eval()
    state = trained.state_dict()
    name = "embeddings.position_embeddings"
    grid, matrix = state[name][0, 1:].unflatten(0, (37, 37)), resampling(37, 16)
    grid = torch.einsum("ai,bj,ijd->abd", matrix, matrix, grid)
    state[name] = torch.cat([state[name][:, :1], grid.flatten(0, 1)[None]], 1)
    model.load_state_dict(state)

    @torch.no_grad()
    def features(images):
        pixels = []
        for image in images.permute(0, 2, 3, 1).numpy():
            image = Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC)
            scaled = (np.asarray(image) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
            pixels.append(torch.from_numpy(scaled).permute(2, 0, 1).float())
        return model(torch.stack(pixels)).pooler_output

    return features


def test_features(extractor, expected, pictures):
    images = pictures.images[:3]
    with torch.no_grad():
        features = extractor(images)
    assert features.shape == (3, extractor.num_features) and features.dtype == torch.float32
    torch.testing.assert_close(features, expected(images), rtol=1e-4, atol=1e-5)


def test_positions_that_fit_are_left_alone(dinov2_folder):
    network = load_network("Dinov2Model", dinov2_folder, None, "model")
    embeddings = DINOv2(network).network.embeddings
    made = embeddings.interpolate_pos_encoding(None, 518, 518)
    assert made is embeddings.position_embeddings


@pytest.mark.filterwarnings("ignore:Matrix is singular")
def test_the_distance_to_a_folder_and_to_its_statistics(
    tiny_configs, extractor, expected, pictures, tmp_path
):
    folder = sorted(pictures.reference.iterdir())
    reference = torch.stack([torch.from_numpy(np.array(Image.open(f))) for f in folder])
    reference = reference.permute(0, 3, 1, 2)
    x, y = (expected(images).double().numpy() for images in (pictures.images, reference))
    root = scipy.linalg.sqrtm(np.cov(x.T) @ np.cov(y.T)).real
    distance = np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(np.cov(x.T) + np.cov(y.T) - 2 * root)

    ReferenceStatistics.compute([reference], extractor).save(tmp_path / "dinov2.npz")
    for source in (pictures.reference, tmp_path / "dinov2.npz"):
        config = tiny_configs["fd_dinov2"] | {"reference": str(source)}
        metric = build({"fd_dinov2": config})["fd_dinov2"]
        metric.update(pictures.images)
        assert metric.compute().item() == pytest.approx(distance, rel=1e-3)
        assert metric.num_images == metric.protocol["images_asked"] == 50_000
        reference_of = metric.protocol["reference"]
        assert reference_of.get("file", Path(reference_of.get("source", "")).name) == source.name
        assert reference_of["count"] == 9
        extractor_of = metric.protocol["extractor"]
        assert (extractor_of["name"], extractor_of["source"]) == ("DINOv2", "dinov2")
        resized = "resized to a square, to 224x224 (Pillow, bicubic, uint8)"
        assert metric.protocol["resize"] == resized


def test_references_that_are_none(dinov2_folder, tmp_path):
    with pytest.raises(UserError, match=r"^metrics\.fd_dinov2\.reference=null: expected a folder"):
        fd_dinov2(None, dinov2_folder)
    with pytest.raises(UserError, match=r"^metrics\.fd_dinov2\.reference=.*nowhere"):
        fd_dinov2(tmp_path / "nowhere", dinov2_folder)
    with pytest.raises(UserError, match=r"no images in it"):
        fd_dinov2(tmp_path, dinov2_folder)


def test_a_reference_of_other_weights(extractor, dinov2_folder, pictures, tmp_path):
    ReferenceStatistics.compute([pictures.images], extractor).save(tmp_path / "dinov2.npz")
    model = transformers.Dinov2Model.from_pretrained(dinov2_folder)
    model.layernorm.bias.data += 1e-3
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"^metrics\.fd_dinov2\.reference=dinov2\.npz: made with"):
        fd_dinov2(tmp_path / "dinov2.npz", tmp_path / "other")
