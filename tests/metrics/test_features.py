from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lml.metrics.features import FeatureNetwork


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return FeatureNetwork(width=4, num_features=6).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=generator)


def test_features_and_logits(network, images):
    features = network(images)
    assert features.shape == (4, network.num_features) and features.dtype == torch.float32
    assert network.head(features).shape == (4, 10)


def test_images_do_not_influence_one_another(network, images):
    alone = torch.cat([network(image) for image in images.split(1)])
    torch.testing.assert_close(network(images), alone, rtol=1e-5, atol=1e-6)


def test_zero_weights_but_one_show_the_scale_of_the_input(images):
    """With a first layer that passes one colour on, features are means of (x / 127.5 - 1)+."""
    network = FeatureNetwork(width=4, num_features=6).eval().requires_grad_(False)
    first, norm = network.stem[0][0], network.stem[0][1]
    first.weight.zero_()
    first.weight[0, 0, 1, 1] = 1  # red, the pixel itself
    expected = F.relu(images[:, 0] / 127.5 - 1) / (1 + norm.eps) ** 0.5
    seen = []
    handle = network.stem[0].register_forward_hook(lambda *call: seen.append(call[2]))
    network(images)
    handle.remove()
    torch.testing.assert_close(seen[0][:, 0], expected)


def test_save_and_load(network, images, tmp_path):
    network.save_pretrained(tmp_path)
    loaded = FeatureNetwork.from_pretrained(tmp_path)
    assert not loaded.training and loaded.num_features == 6
    assert torch.equal(loaded(images), network(images))
