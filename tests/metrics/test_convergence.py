from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from lml.data.assets import ROOT
from lml.errors import UserError
from lml.metrics.convergence import Convergence
from lml.metrics.evaluate import build


def full(value, count=2):
    return torch.full((count, 3, 4, 5), value, dtype=torch.uint8)


def random_images(seed, count=7):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 4, 5), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(
    ("images", "reference", "rmse", "cosine"),
    [
        (full(255), full(0), 2.0, -1.0),
        (full(200), full(200), 0.0, 1.0),
        (full(255), full(204), 0.4, 1.0),
        # one of two images differs everywhere by 2: a mean of squares, not of roots
        (torch.cat([full(0, 1), full(255, 1)]), full(255), 2**0.5, 0.0),
    ],
)
def test_closed_forms(images, reference, rmse, cosine):
    metric = Convergence()
    metric.update(images, reference)
    values = {name: value.item() for name, value in metric.compute().items()}
    assert values == pytest.approx({"rmse": rmse, "cosine": cosine}, abs=1e-12)


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_numpy(batch_size):
    images, reference = random_images(0), random_images(1)
    metric = Convergence()
    for pair in zip(images.split(batch_size), reference.split(batch_size), strict=True):
        metric.update(*pair)
    x, y = (v.numpy().reshape(7, -1) / 127.5 - 1.0 for v in (images, reference))
    cosine = np.sum(x * y, 1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
    value = metric.compute()
    assert value["rmse"].item() == pytest.approx(np.sqrt(np.mean((x - y) ** 2)), rel=1e-12)
    assert value["cosine"].item() == pytest.approx(cosine.mean(), rel=1e-12)


def test_latents_are_compared_beside_the_pixels():
    images, reference = random_images(0), random_images(1)
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(2, 7, 6, 4, generator=generator)
    alone, metric = Convergence(), Convergence()
    alone.update(images, reference)
    for rows in (slice(0, 3), slice(3, 7)):
        metric.update(images[rows], reference[rows], (latents[0, rows], latents[1, rows]))
    value = metric.compute()
    for name, number in alone.compute().items():
        torch.testing.assert_close(value.pop(name), number)
    x, y = latents.double().numpy().reshape(2, 7, -1)
    cosine = np.sum(x * y, 1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
    expected = {"latent_rmse": np.sqrt(np.mean((x - y) ** 2)), "latent_cosine": cosine.mean()}
    assert {name: number.item() for name, number in value.items()} == pytest.approx(expected)
    assert "latents" in metric.protocol and "latents" not in alone.protocol


def test_the_floor_that_rounding_sets():
    """What the docstring says: the same image up to less than a grey level, rounded twice."""
    x = torch.rand(40, 3, 16, 16, dtype=torch.float64) * 200 + 20
    metric = Convergence()
    metric.update(x.round().byte(), (x + torch.rand_like(x) * 4 - 2).round().byte())
    shift = (4 / 127.5) ** 2 / 12  # variance of what was added
    floor = (metric.compute()["rmse"] ** 2 - shift).sqrt()
    assert floor == pytest.approx(0.0032, abs=2e-4)


def test_where_the_fine_solution_comes_from(tmp_path):
    calls = []

    def reference_run(**options) -> Path:
        calls.append(options)
        return tmp_path

    assert Convergence(nfe=50, solver="ddim").reference_folder(reference_run) == tmp_path
    assert calls == [{"nfe": 50, "solver": "ddim"}]
    assert Convergence(reference="fine").reference_folder(None) == Path("fine")
    message = r"^metrics=\[convergence\]: needs a run .* metrics\.convergence\.reference=FOLDER$"
    with pytest.raises(UserError, match=message):
        Convergence().reference_folder(None)


def test_the_config():
    metric = build(OmegaConf.load(ROOT / "configs/metrics/convergence.yaml"))["convergence"]
    assert metric.protocol["reference"] == {"solver": metric.solver, "nfe": 200}
    assert (ROOT / f"configs/solver/{metric.solver}.yaml").is_file()
    fine = Convergence(reference="fine").protocol["reference"]
    assert fine == {"folder": "fine"}
