from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics import Metric

from lml import files
from lml.data.images import ImageFolder
from lml.data.prompts import text
from lml.data.references import Reference
from lml.data.statistics import make_reference
from lml.errors import UserError
from lml.metrics.base import RunMetric
from lml.metrics.convergence import Convergence
from lml.metrics.evaluate import Context, build, evaluate
from lml.metrics.features import FeatureNetwork
from lml.metrics.frechet import load_features

ROOT = Path(__file__).parents[2]
FD_CIFAR = {"features": "features", "reference": "fd.npz"}


class MeanPixel(Metric):
    """A metric of another library: it declares nothing."""

    def __init__(self):
        super().__init__()
        self.batches = []
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, images):
        self.batches.append(images.shape)
        self.total += images.float().sum()
        self.count += images.numel()

    def compute(self):
        return self.total / self.count


class Letters(RunMetric):
    """Needs prompts: the letters of each, times the first pixel of its image."""

    needs_prompts = True

    def __init__(self):
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, images, prompts):
        assert isinstance(prompts, list) and len(prompts) == len(images)
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        self.total += (images[:, 0, 0, 0] * lengths).sum()

    def compute(self):
        return self.total


def write(folder, pixels):
    folder.mkdir(parents=True)
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{index:06d}.png")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """23 images, the same with noise, a tiny feature network and its statistics of 60 images."""
    root = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    pixels = random.integers(0, 240, (23, 32, 32, 3), dtype=np.uint8)
    write(root / "images", pixels)
    write(root / "fine", pixels + random.integers(0, 16, pixels.shape, dtype=np.uint8))
    torch.manual_seed(0)
    FeatureNetwork(width=4, num_features=6).half().save_pretrained(root / "features")
    images = torch.from_numpy(random.integers(0, 256, (60, 3, 32, 32), dtype=np.uint8))
    make_reference(load_features(root / "features"), images, root / "fd.npz")
    return root


def configs(root):
    return {
        "fd_cifar": {
            "_target_": "lml.metrics.frechet.fd_cifar",
            "features": str(root / "features"),
            "reference": str(root / "fd.npz"),
            "num_images": 24,
        },
        "convergence": {
            "_target_": "lml.metrics.convergence.Convergence",
            "reference": str(root / "fine"),
        },
    }


def test_all_metrics_in_one_pass(data):
    mean = MeanPixel()
    context = Context(batch_size=10)
    results = evaluate(data / "images", {**configs(data), "mean": mean}, context=context)
    assert mean.batches == [(10, 3, 32, 32), (10, 3, 32, 32), (3, 3, 32, 32)]

    assert list(results) == ["fd_cifar", "convergence", "mean"]
    folder, fine = ImageFolder(data / "images"), ImageFolder(data / "fine")
    made = build(configs(data))
    made["fd_cifar"].update(folder.load(folder.names))
    made["convergence"].update(folder.load(folder.names), fine.load(fine.names))
    expected = {name: value.item() for name, value in made["convergence"].compute().items()}
    assert results["convergence"]["value"] == pytest.approx(expected)
    assert results["fd_cifar"]["value"] == pytest.approx(made["fd_cifar"].compute().item(), 1e-5)
    assert results["mean"]["value"] == pytest.approx(folder.load(folder.names).float().mean())

    assert results["fd_cifar"]["warning"] == "23 images; the protocol asks for 24"
    assert "warning" not in results["convergence"]
    assert results["mean"]["protocol"] == {"metric": "MeanPixel", "images": 23}
    for result in results.values():
        assert result["protocol"]["images"] == 23 and result["seconds"] >= 0
    assert json.loads(json.dumps(results)) == results


def test_as_many_images_as_asked_need_no_warning(data):
    config = configs(data)["fd_cifar"] | {"num_images": 23}
    results = evaluate(ImageFolder(data / "images"), {"fd_cifar": config})
    assert "warning" not in results["fd_cifar"]


def test_the_same_metric_may_be_used_again(data):
    metric = build(configs(data))
    first = evaluate(data / "images", metric)
    again = evaluate(data / "images", metric)
    for name in first:
        assert first[name]["value"] == again[name]["value"]


def test_only_the_pairs_of_a_run_are_compared(data, tmp_path):
    calls = []

    def reference_run(**options):
        calls.append(options)
        return data / "fine"

    write(tmp_path / "few", np.zeros((3, 32, 32, 3), np.uint8))
    metrics = {"convergence": Convergence(solver="heun", nfe=7)}
    evaluate(tmp_path / "few", metrics, context=Context(reference_run))
    assert calls == [{"solver": "heun", "nfe": 7}]
    with pytest.raises(UserError, match=r"^metrics=\[convergence\]: needs a run"):
        evaluate(tmp_path / "few", metrics)
    with pytest.raises(UserError, match=r"^metrics=\[fine\]: the reference .*few has no 000003"):
        evaluate(data / "images", {"fine": Convergence(reference=tmp_path / "few")})
    write(tmp_path / "small", np.zeros((3, 4, 6, 3), np.uint8))
    with pytest.raises(UserError, match=r"small has 6x4 pixels; expected 32x32$"):
        evaluate(tmp_path / "few", {"fine": Convergence(reference=tmp_path / "small")})


def test_images_of_another_size(data, tmp_path):
    write(tmp_path / "small", np.zeros((3, 16, 16, 3), np.uint8))
    with pytest.raises(UserError, match="images of 16x16 pixels: the reference's have 32x32"):
        evaluate(tmp_path / "small", {"fd_cifar": configs(data)["fd_cifar"]})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_target_": "lml.metrics.nothing"}, r"^metrics\.name: .*nothing"),
        ({"_target_": "lml.metrics.convergence.Convergence", "nfee": 3}, r"^metrics\.name: .*nfee"),
        ({"_target_": "torch.nn.ReLU"}, r"^metrics\.name: expected a _target_ that makes"),
        ({"nfe": 3}, r"^metrics\.name: expected a _target_"),
        (
            {"_target_": "lml.metrics.frechet.fd_cifar", "features": "nowhere"},
            r"^metrics\.fd_cifar\.features=",
        ),
    ],
)
def test_metrics_that_cannot_be_made(config, message):
    with pytest.raises(UserError, match=message) as caught:
        build({"name": config})
    assert "\n" not in str(caught.value)


def test_no_metrics(data):
    assert evaluate(data / "images", {}) == {}


def test_prompts_are_those_of_the_images(data):
    folder = ImageFolder(data / "images")
    prompts = ["x" * k for k in range(23)]
    context = Context(batch_size=10, prompts=prompts)
    results = evaluate(
        data / "images", {"letters": Letters(), "mean": MeanPixel()}, context=context
    )
    pixels = folder.load(folder.names)[:, 0, 0, 0].tolist()
    assert results["letters"]["value"] == sum(k * pixel for k, pixel in enumerate(pixels))
    sha256 = hashlib.sha256("\n".join(prompts).encode()).hexdigest()
    assert results["letters"]["protocol"]["prompts_sha256"] == sha256
    assert "prompts_sha256" not in results["mean"]["protocol"]


def test_prompts_that_are_missing_or_too_few(data):
    with pytest.raises(UserError, match=r"^metrics=\[letters\]: needs prompts; give prompts=text"):
        evaluate(data / "images", {"letters": Letters()})
    context = Context(prompts=["x"] * 22)
    with pytest.raises(UserError, match=r"^metrics=\[letters\]: 22 prompts for the 23 images in "):
        evaluate(data / "images", {"letters": Letters()}, context=context)
    assert evaluate(data / "images", {"mean": MeanPixel()}, context=context)["mean"]["value"] > 0


def test_the_script_finds_prompts(script, data, monkeypatch, tmp_path):
    """In the run's folder, or in the prompts group; metrics from a module beside the script."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    metric = ["metrics=none", "+metrics.letters._target_=test_evaluate.Letters", "out=scores.json"]
    (tmp_path / "images").symlink_to(data / "images")
    arguments = ["evaluate", "images=images", *metric]
    outcome = script(*arguments)
    assert outcome.code == 2 and outcome.err.startswith("metrics=[letters]: needs prompts")
    (tmp_path / "p.txt").write_text("\n".join("x" * (k + 1) for k in range(23)))
    given = ["prompts=text", "prompts.file=p.txt"]
    outcome = script(*arguments, *given)
    assert (outcome.code, outcome.err) == (0, "")
    first = json.loads((tmp_path / "scores.json").read_text())["letters"]["value"]

    write(
        tmp_path / "run/images",
        np.asarray(
            ImageFolder(data / "images")
            .load(ImageFolder(data / "images").names)
            .permute(0, 2, 3, 1)
        ),
    )
    (tmp_path / "run/prompts.jsonl").write_text(text(tmp_path / "p.txt").to_jsonl())
    outcome = script("evaluate", "images=run/images", *metric)
    assert (outcome.code, outcome.err) == (0, "")
    assert json.loads((tmp_path / "scores.json").read_text())["letters"]["value"] == first
    (tmp_path / "p.txt").write_text("other\nprompts")
    outcome = script("evaluate", "images=run/images", *metric, *given)
    assert outcome.code == 2 and outcome.err.startswith("prompts: images=run/images were made from")


def test_a_run_without_prompts_is_told_before_any_image_is_made(script, toy, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    metric = "+metrics.letters._target_=test_evaluate.Letters"
    outcome = script("sample", *toy, metric, "run_dir=run")
    assert outcome.code == 2 and outcome.err.startswith("metrics=[letters]: needs prompts")
    assert outcome.err.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize("metric", ["clip_score", "clip_cosine", "image_reward"])
def test_missing_prompts_are_told_before_missing_weights(script, toy, data, tmp_path, metric):
    toy = [a for a in toy if a != "metrics=none"]
    runs = ["sample", *toy, "run_dir=run"], ["evaluate", f"images={data / 'images'}"]
    for arguments in runs:
        outcome = script(*arguments, f"metrics=[{metric}]")
        assert outcome.code == 2 and outcome.err.count("\n") == 1
        assert outcome.err.startswith(f"metrics=[{metric}]: needs prompts; give prompts=text")
    assert not (tmp_path / "run").exists()


WORKER = textwrap.dedent(
    """
    import json, sys
    from pathlib import Path
    import torch
    import torch.distributed as dist
    from lml.errors import UserError
    from lml.metrics.evaluate import Context, evaluate

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = []
    for folder, batch_size in json.loads(sys.argv[2]):
        try:
            prompts = [str(k) * k for k in range(len(list(Path(folder).iterdir())))]
            context = Context(batch_size=batch_size, prompts=prompts)
            results.append(evaluate(folder, json.loads(sys.argv[1]), context=context))
        except UserError as error:
            results.append(str(error))
    open(f"{sys.argv[3]}.{dist.get_rank()}", "w").write(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()  # left to the interpreter's end, it aborts now and then
    """
)


def test_two_processes_give_the_numbers_of_one(data, tmp_path, ranks):
    """Also when one has no images at all, and when one of them comes upon a broken file."""
    broken = write(tmp_path / "broken", np.zeros((8, 32, 32, 3), np.uint8))
    (broken / "000005.png").write_bytes(b"")
    jobs = [(str(data / "images"), 5), (str(data / "images"), 50), (str(broken), 4)]
    script, out = tmp_path / "worker.py", tmp_path / "out"
    script.write_text(WORKER)
    pixels = {"mean": [0.3, 0.5, 0.6], "std": [0.1, 0.2, 0.15]}
    known = {**configs(data), "matched": {**configs(data)["fd_cifar"], "pixels": pixels}}
    metrics = {**known, "letters": {"_target_": "test_evaluate.Letters"}}
    arguments = [json.dumps(metrics), json.dumps(jobs), str(out)]
    outcome = ranks(script, *arguments, PYTHONPATH=f"{ROOT}:{Path(__file__).parent}")
    assert outcome.code == 0, outcome.err
    for rank in range(2):
        *results, error = json.loads(Path(f"{out}.{rank}").read_text())
        for result, (folder, batch_size) in zip(results, jobs, strict=False):
            prompts = [str(k) * k for k in range(23)]
            context = Context(batch_size=batch_size, prompts=prompts)
            mine = {**known, "letters": Letters()}
            expected = evaluate(folder, mine, context=context)
            for name in expected:
                assert result[name]["value"] == pytest.approx(expected[name]["value"], rel=1e-6)
                assert result[name]["protocol"] == expected[name]["protocol"]
        assert "000005.png: not a readable image" in error


class Hungry(MeanPixel):
    """Runs out of memory as CUDA's allocator says it."""

    def update(self, images):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


class Huge(MeanPixel):
    def to(self, *_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_memory_that_runs_out(data):
    with pytest.raises(UserError, match=r"^metrics=\[a\]: a batch of 10 images needs .*batch_size"):
        evaluate(data / "images", {"a": Hungry()}, context=Context(batch_size=10))
    with pytest.raises(UserError, match=r"^metrics=\[a\]: its network needs more memory than cpu"):
        evaluate(data / "images", {"a": Huge()})


def test_too_few_images_are_told_before_any_work(script, toy, data, tmp_path):
    write(tmp_path / "one", np.zeros((1, 32, 32, 3), np.uint8))
    mean = MeanPixel()
    with pytest.raises(UserError, match=r"^metrics=\[fd\]: needs at least 2 images; there are 1$"):
        evaluate(tmp_path / "one", {"mean": mean, "fd": configs(data)["fd_cifar"]})
    assert not mean.batches
    metric = [f"metrics.fd_cifar.features={data / 'features'}", "metrics=fd_cifar"]
    metric.append(f"metrics.fd_cifar.reference={data / 'fd.npz'}")
    toy = [a for a in toy if a != "metrics=none"]
    outcome = script("sample", *toy, *metric, "num_images=1", "run_dir=run")
    assert outcome.code == 2 and outcome.err.startswith("metrics=[fd_cifar]: needs at least 2")
    assert not (tmp_path / "run").exists()


def test_scores_that_cannot_be_written(script, data, tmp_path, monkeypatch):
    (tmp_path / "images").symlink_to(data / "images")
    metric = ["metrics=none", "+metrics.mean._target_=torchmetrics.MeanMetric"]
    outcome = script("evaluate", "images=images", *metric, "out=nowhere/scores.json")
    assert outcome.code == 2 and outcome.err.startswith("out=nowhere/scores.json: nowhere cannot")
    (tmp_path / "scores.json").mkdir()
    metric = ["metrics=fd_cifar", f"metrics.fd_cifar.features={data / 'features'}"]
    metric.append(f"metrics.fd_cifar.reference={data / 'fd.npz'}")
    outcome = script("evaluate", "images=images", *metric, "out=scores.json")
    assert outcome.code == 2 and len(outcome.err.splitlines()) == 1 and outcome.out == ""

    def full(path: Path, durable: bool = True) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "replacing", full)
    outcome = script("evaluate", "images=images", *metric, "out=others.json")
    assert outcome.code == 2 and len(outcome.err.splitlines()) == 1 and "No space" in outcome.err
    assert "fd_cifar" in outcome.out  # what took the time is not lost


class Compared(MeanPixel, RunMetric):
    """With a reference set of images."""

    def __init__(self, reference):
        super().__init__()
        self.reference = Reference(reference, torch.nn.Identity(), "metrics.compared.reference")
        self.protocol = {"reference": self.reference.describe()}


@pytest.mark.parametrize("as_zip", [False, True], ids=["folder", "zip"])
def test_files_that_are_left_out_are_said_and_in_the_protocol(tmp_path, as_zip):
    pixels = np.zeros((2, 8, 8, 3), dtype=np.uint8)
    images, reference = write(tmp_path / "images", pixels), write(tmp_path / "theirs", pixels)
    (images / "a.gif").touch()
    (reference / "b.tiff").touch()
    (reference / "c.jfif").touch()
    if as_zip:
        reference = Path(shutil.make_archive(str(reference), "zip", reference))
    lines = []
    metrics = {"compared": Compared(reference), "again": Compared(reference), "mean": MeanPixel()}
    results = evaluate(images, metrics, context=Context(say=lines.append))
    assert [line.split(": ")[0] for line in lines] == [
        f"images={images}",
        f"metrics.compared.reference={reference}",
    ]
    assert lines[0].endswith("; 1 file is left out: 1 .gif")
    assert lines[1].endswith("; 2 files are left out: 1 .jfif, 1 .tiff")
    assert {result["protocol"]["left_out"] for result in results.values()} == {1}
    assert results["compared"]["protocol"]["reference"]["left_out"] == 2


def test_nothing_is_said_where_nothing_is_left_out(data, capfd):
    result = evaluate(data / "images", {"mean": MeanPixel()})["mean"]
    assert capfd.readouterr().err == "" and "left_out" not in result["protocol"]


def test_what_is_left_out_is_a_line_on_stderr(script, data, tmp_path):
    images = Path(shutil.copytree(data / "images", tmp_path / "images"))
    arguments = [f"images={images}", "metrics=fd_cifar", "threads=1"]
    arguments += [f"metrics.fd_cifar.{key}={data / name}" for key, name in FD_CIFAR.items()]
    assert script("evaluate", *arguments).err == ""
    (images / "in").mkdir()
    (images / "in/a.png").touch()
    (images / "b.gif").touch()
    outcome = script("evaluate", *arguments)
    assert outcome.code == 0 and outcome.err.count("\n") == 1
    assert outcome.err.endswith(
        "23 images (.png, .bmp, .webp, .jpg, .jpeg); 2 files are left out: "
        "1 .gif, 1 in sub-folders\n"
    )
    written = json.loads((tmp_path / "images.metrics.json").read_text())
    assert written["fd_cifar"]["protocol"]["left_out"] == 2
