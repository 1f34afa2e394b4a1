"""What a metric declares in its class is all that the rest of the house needs to know of it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Mapping

import pytest
import torch
from PIL import Image
from torchmetrics import MeanMetric

from lml import configs
from lml.data.assets import ROOT
from lml.errors import UserError
from lml.metrics.base import RunMetric, class_by_name, class_of, declared, is_higher_better
from lml.metrics.convergence import Convergence
from lml.metrics.evaluate import Context, evaluate
from lml.report.tables import Table
from lml.runs.sweep import Sweep
from lml.runs.sweep.objective import find_objective

METRICS = sorted(f.stem for f in (ROOT / "configs/metrics").glob("*.yaml") if f.stem != "none")


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_of_a_config_declares_what_others_need(name):
    cls = class_by_name(name)
    assert cls is not None and issubclass(cls, RunMetric)
    better = cls.higher_is_better
    assert better is not None, f"{cls.__name__} does not say whether higher is better"
    if isinstance(better, Mapping):
        assert set(cls.parts) <= set(better)


def test_the_direction_of_every_part():
    """A change here changes tables and searches."""
    higher = set()
    for name in METRICS:
        better = class_by_name(name).higher_is_better
        parts = better if isinstance(better, Mapping) else class_by_name(name).parts or ("",)
        higher |= {(name, p) for p in parts if is_higher_better(class_by_name(name), p)}
    assert higher == {
        ("clip_cosine", ""),
        ("clip_score", ""),
        *(("convergence", part) for part in ("cosine", "latent_cosine")),
        ("correction_cosine", "cosine"),
        *(("ideal_direction", part) for part in ("prediction", "corrected", "step")),
        *(("image_reward", part) for part in ("mean", "std")),
        *(("inception_score", part) for part in ("mean", "std")),
        ("lpips_diversity", ""),
        *(("precision_recall", part) for part in ("precision", "recall", "f_score")),
    }
    assert Table("convergence/latent_cosine", {}).higher
    assert not Table("timing/network", {}).higher and not Table("unknown/cosine", {}).higher


NEW = """
from lml.metrics.base import RunMetric
import torch

class Brightness(RunMetric):
    higher_is_better = {"mean": True, "darkest": False}
    parts = ("mean", "darkest")
    needs_prompts = True
    least_images = 2
    num_images = 100

    def __init__(self):
        super().__init__()
        self.protocol = {"scale": "0 to 255"}
        self.add_state("rows", [], dist_reduce_fx="cat")

    def update(self, images, prompts):
        assert len(prompts) == len(images)
        self.rows.append(images.double().mean((1, 2, 3)))

    def compute(self):
        rows = torch.cat(self.rows)
        return {"mean": rows.mean(), "darkest": rows.min()}
"""


@pytest.fixture
def new(tmp_path, monkeypatch):
    """A new metric, of which there are two files: its class and its config."""
    (tmp_path / "brightness.py").write_text(NEW)
    folder = tmp_path / "configs/metrics"
    folder.mkdir(parents=True)
    (folder / "bright.yaml").write_text("bright:\n  _target_: brightness.Brightness\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(configs, "CONFIGS", tmp_path / "configs")
    class_by_name.cache_clear()
    yield {"bright": {"_target_": "brightness.Brightness"}}
    class_by_name.cache_clear()
    sys.modules.pop("brightness", None)


def test_a_new_metric_needs_its_class_and_its_config_alone(new, tmp_path):
    assert Table("bright/mean", {}).higher and not Table("bright/darkest", {}).higher

    def objective(asked):
        return find_objective({"sweep": {"objective": asked}, "metrics": new})

    assert objective("bright") == "bright/mean" and objective("bright/darkest")
    with pytest.raises(UserError, match="bright/mean or bright/darkest"):
        objective("bright/lightest")
    for asked, higher in {"bright": True, "bright/darkest": False}.items():
        config = {"name": "study", "sweep": {"objective": asked}, "metrics": new}
        assert Sweep(None, config, local=True).higher_is_better is higher

    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (4, 4), (9, 9, 9)).save(images / "0.png")
    with pytest.raises(UserError, match=r"^metrics=\[bright\]: needs prompts"):
        evaluate(images, new)
    with pytest.raises(UserError, match=r"^metrics=\[bright\]: needs at least 2 images"):
        evaluate(images, new, context=Context(prompts=["a"]))
    Image.new("RGB", (4, 4), (3, 3, 3)).save(images / "1.png")
    result = evaluate(images, new, context=Context(prompts=["a", "b"]))["bright"]
    assert result["value"] == {"mean": 6.0, "darkest": 3.0}
    assert result["protocol"]["scale"] == "0 to 255" and "100" in result["warning"]


def test_a_metric_of_another_library_declares_the_defaults():
    metric = MeanMetric()
    for known in (metric, MeanMetric, None, class_of({"_target_": "torchmetrics.MeanMetric"})):
        declarations = declared(known)
        assert declarations.least_images == 1 and declarations.trajectories == 0
        assert not declarations.needs_prompts and not declarations.takes_latents
    assert declared(known_metric := Convergence()) is known_metric
    accuracy = class_of({"_target_": "torchmetrics.classification.BinaryAccuracy"})
    assert is_higher_better(accuracy) and not is_higher_better(class_of(metric))


@pytest.mark.parametrize(
    "config", [{}, {"_target_": "nowhere.Nothing"}, {"_target_": "torch.nn.ReLU"}, None, 3]
)
def test_a_config_without_a_metric_has_no_class(config):
    assert class_of(config) is None and not is_higher_better(None)


def test_classes_are_found_without_a_network():
    """No weights are read, and nothing is fetched, for a class or for a table."""
    code = (
        "import builtins, torch\n"
        "from lml.metrics.base import class_by_name\n"
        "def refuse(*a, **k): raise SystemExit('a network is made')\n"
        "torch.nn.Module.load_state_dict = refuse\n"
        "torch.load = torch.hub.load_state_dict_from_url = refuse\n"
        "torch.hub.download_url_to_file = torch.nn.Conv2d.__init__ = refuse\n"
        "torch.nn.Linear.__init__ = refuse\n"
        f"assert all(class_by_name(name) for name in {METRICS})\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_nothing_is_found_out_by_getattr():
    """Declarations are read as attributes of the class."""
    names = {"needs_prompts", "takes_latents", "least_images", "num_images", "trajectories"}
    names |= {"higher_is_better", "parts", "protocol", "reference_folder"}
    for file in (ROOT / "lml").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                texts = {a.value for a in node.args if isinstance(a, ast.Constant)}
                assert node.func.id not in ("getattr", "hasattr") or not texts & names, file


def test_a_value_has_the_parts_that_the_class_declares():
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    metric = Convergence()
    metric.update(images, images + 1)
    assert tuple(metric.compute()) == Convergence.parts
    metric.update(images, images + 1, (torch.ones(2, 4), torch.zeros(2, 4)))
    assert set(metric.compute()) == set(Convergence.higher_is_better)
