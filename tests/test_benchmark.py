from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from hydra import compose, initialize_config_dir
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from lml import benchmark
from lml.benchmark import Row, peak_memory
from lml.data.assets import ROOT
from lml.errors import UserError


def config(*overrides):
    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        return compose("benchmark", overrides)


def test_peak_memory_of_known_functions():
    x = torch.randn(1000, 50)
    kept = []

    def side_by_side():
        first = x.clone()
        second = x.clone()
        return first, second

    def one_after_the_other():
        for _ in range(3):
            x.clone()

    def inside_an_operation():
        return x.float().sort(dim=0)  # values, and indices of twice the size

    def keep_one():
        kept.append(x.clone())

    def free_the_other_one_first():
        kept.clear()
        return x.clone()

    tensors = {f: peak_memory(f) / x.nbytes for f in (side_by_side, one_after_the_other)}
    assert tensors == {side_by_side: 2, one_after_the_other: 1}
    assert peak_memory(inside_an_operation) >= 3 * x.nbytes
    assert peak_memory(keep_one) == peak_memory(free_the_other_one_first) == x.nbytes
    assert peak_memory(lambda: x.add_(1)) < 100


def test_memory_of_the_correction_counts_the_anchors_and_the_result():
    few, many = (benchmark.correction_memory((64, 3, 8, 8), [rank])[0] for rank in (1, 4))
    assert few.value >= 2 and many.value - few.value >= 3


@pytest.mark.parametrize(
    ("value", "goal", "met"),
    [(4, "<= 4", True), (4.1, "<= 4", False), (1.3, ">= 1.3", True), (1, ">= 1.3", False)],
)
def test_goals(value, goal, met):
    assert Row("it", value, goal).met is met
    assert Row("it", value).met is None


def test_toy_benchmark(tiny_model, tmp_path, capsys):
    cfg = config(
        f"model.path={tiny_model}",
        "model.patch=1",
        "shape=[2,3,4,4]",
        "ranks=[1,2]",
        "repeats=3",
        "nfe=3",
        "batch_size=2",
        "batches=2",
        "threads=1",
        "settings=[float32,bfloat16]",
        f"out={tmp_path / 'out.json'}",
    )
    before = torch.get_num_threads()
    rows = benchmark.benchmark(cfg)
    torch.set_num_threads(before)
    values = {row.measured: row.value for row in rows}
    assert len(values) == len(rows) == 2 * 2 + 2 + 2 * 2 + 2
    assert all(value > 0 for value in values.values())
    # the run and diffusers' pipeline make the same images from the same seeds
    assert values["largest difference of their pixels, in 1/255: float32"] <= 0.51
    assert values["largest difference of their pixels, in 1/255: bfloat16"] > 0.51

    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith("| ")]
    assert len(lines) == len(rows) + 1 and "1 threads" in printed
    saved = json.loads((tmp_path / "out.json").read_text())
    assert [row["value"] for row in saved["rows"]] == list(values.values())
    assert set(saved["speeds"]) == {"float32", "bfloat16"}


def test_other_noise_would_be_seen(tiny_model, monkeypatch):
    """The comparison of images has teeth: one seed off, and they differ."""
    make_pipeline = benchmark.ddim_pipeline

    def off_by_one(cfg):
        make = make_pipeline(cfg)
        return lambda indices: make(range(indices.start + 1, indices.stop + 1))

    monkeypatch.setattr(benchmark, "ddim_pipeline", off_by_one)
    cfg = config(f"model.path={tiny_model}")
    arguments = ["nfe=2", "batch_size=2", "threads=1"]
    rows, _ = benchmark.run_speed("float32", 1, cfg.model, arguments)
    assert rows[1].value > 20


def test_change_of_fd_cifar(tmp_path, tiny_unet):
    network = tiny_unet(sample_size=32)
    DDPMPipeline(network, DDPMScheduler(clip_sample=False)).save_pretrained(tmp_path)
    cfg = config(f"model.path={tmp_path}")
    arguments = ["nfe=1", "batch_size=4", "threads=1"]
    (row,) = benchmark.fd_change("bfloat16", 4, cfg.model, arguments)
    assert 0 < row.value < 100 and "4 images" in row.remark


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_the_evaluators_against_torch_fidelity(monkeypatch):
    """On small images for the network: at its own size, tests/metrics/test_inception.py has it."""
    monkeypatch.setattr(FeatureExtractorInceptionV3, "INPUT_IMAGE_SIZE", 107)
    monkeypatch.setattr(torch.hub, "_hub_dir", None)  # which it sets, and TORCH_HOME is not read
    known, eigvals = {}, np.linalg.eigvals  # of the same 2048x2048 matrices, 4 seconds each

    def eigvals_once(matrix: np.ndarray) -> np.ndarray:
        if (key := matrix.tobytes()) not in known:
            known[key] = eigvals(matrix)
        return known[key]

    monkeypatch.setattr(np.linalg, "eigvals", eigvals_once)
    fid, four, difference = benchmark.evaluator_speed(num_images=10, turns=1)
    assert fid.value > 0 and four.value > fid.value
    assert difference.value <= 1e-6 and difference.met


def test_a_difference_would_be_seen():
    theirs = {"fid": 10.0, "kid": {"mean": -2.0, "std": 1.0}}
    assert benchmark.largest_difference(theirs, theirs) == 0
    ours = {"fid": 10.1, "kid": {"mean": -2.0, "std": 3.0}}
    assert benchmark.largest_difference(ours, theirs) == pytest.approx(0.01)
    ours["kid"]["mean"] = 2.0
    assert benchmark.largest_difference(ours, theirs) == pytest.approx(2)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("parts=[correction,speed]", r"^parts\[1\]=speed: expected one of correction, memory, run"),
        (
            "settings=[float16]",
            r"^settings\[0\]=float16: expected one of float32, bfloat16, compiled",
        ),
    ],
)
def test_bad_input(override, message):
    with pytest.raises(UserError, match=message):
        benchmark.benchmark(config(override))


@pytest.mark.parametrize("content", ["# Notes", "[]", '{"name": "x"}', ""])
def test_what_is_no_file_of_ours_is_not_replaced(tmp_path, content):
    (tmp_path / "notes.md").write_text(content)
    with pytest.raises(UserError, match=r"notes\.md: not a file of this script"):
        benchmark.benchmark(config("parts=[]", f"out={tmp_path / 'notes.md'}"))
    assert (tmp_path / "notes.md").read_text() == content
    for _ in range(2):
        benchmark.benchmark(config("parts=[]", f"out={tmp_path / 'ratios.json'}"))
    assert json.loads((tmp_path / "ratios.json").read_text())["rows"] == []
