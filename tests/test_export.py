"""What scripts/export.py lays out, read back by what others would read it with."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image
from torchvision import transforms

from lml import export
from lml.data import prompts
from lml.data.assets import ROOT
from lml.data.images import ImageFolder
from lml.schema import shown

LONG = "a very " * 60 + "long dog"
TEXTS = ["a red bench and a blue cake", "The clock reads 11:44.", "either/or a snake_case.", LONG]


@pytest.fixture(scope="module")
def made(tmp_path_factory, pipelines):
    """A folder with T2I-CompBench's prompts and a run of the tiny Stable Diffusion."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "dataset").mkdir()
    for category in ("color", "non_spatial"):
        (folder / f"dataset/{category}_val.txt").write_text("\n".join(TEXTS))
    command = [sys.executable, str(ROOT / "scripts/sample.py"), *sd15(pipelines)]
    command += ["prompts.categories=[color,non_spatial]", "prompts.samples_per_prompt=3"]
    command += ["num_images=24"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def run(made, tmp_path):
    """A complete run: two categories of four prompts, three images each."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path / "run"


def sd15(pipelines) -> list[str]:
    """Arguments of scripts/sample.py for a run from T2I-CompBench's prompts that takes no time."""
    return [
        "model=sd15",
        f"model.path={pipelines / 'sd15'}",
        "model.height=16",
        "model.width=16",
        "prompts=t2i_compbench",
        "prompts.path=dataset",
        "solver=ddim",
        "nfe=2",
        "metrics=none",
        "threads=1",
        "progress=false",
        "run_dir=run",
    ]


ARGUMENTS = ("layout=t2i_compbench", "run_dir=run", "out=out")
SAMPLER = "ddim-2-lml-default"


def read_as_the_benchmark(folder) -> list[tuple[str, int, int]]:
    """Prompt, index and number of each image, in the order that the evaluators go through them.

    The number is that of the image in the folder `run`. BLIP_vqa.py and CLIP_similarity.py sort by
    what follows the last "_", UniDet's dataset by what follows the first; the prompt is what comes
    before the first.
    """
    names = os.listdir(folder)
    by_last = sorted(names, key=lambda name: int(name.split("_")[-1].split(".")[0]))
    by_first = sorted(names, key=lambda name: int(name.split("_")[1].split(".")[0]))
    assert by_last == by_first
    run = next(path for path in folder.parents if (path / "run").is_dir()) / "run/images"
    known = {image.read_bytes(): int(image.stem) for image in run.iterdir()}
    numbers = [known[(folder / name).read_bytes()] for name in by_last]
    indices = [int(name.split("_")[-1].split(".")[0]) for name in by_last]
    return list(zip([name.split("_")[0] for name in by_last], indices, numbers, strict=True))


def test_the_benchmark_reads_prompts_and_order(script, run, tmp_path):
    outcome = script("export", *ARGUMENTS)
    assert (outcome.code, outcome.err) == (0, "")
    assert (
        outcome.out.startswith("24 images in out/sd15/*/") and "; 2 prompts changed" in outcome.out
    )
    for category, first in (("color", 0), ("non_spatial", 12)):
        found = read_as_the_benchmark(tmp_path / "out/sd15" / category / SAMPLER / "samples")
        assert [index for _, index, _ in found] == list(range(12))
        assert [number for _, _, number in found] == list(range(first, first + 12))
        for k, (text, _, _) in enumerate(found):
            original = TEXTS[k // 3]
            if k // 3 < 2:
                assert text == original
            elif k // 3 == 2:
                assert text == "either or a snake case."
            else:
                assert original.startswith(text + " ") and 235 < len(text) <= 244


@pytest.mark.parametrize(
    ("options", "sampler"),
    [
        (["lml=off"], "ddim-2"),
        (["lml=off", "lml.damping=8"], "ddim-2"),
        ([], SAMPLER),
        (["lml.damping=8"], "ddim-2-lml-damping-8"),
        (["lml.rank=3", "lml.damping=0.5"], "ddim-2-lml-rank-3-damping-0.5"),
        (["lml=published"], "ddim-2-lml-published"),
        (["lml=published", "lml.damping=5e-3"], "ddim-2-lml-published-damping-0.005"),
        (["lml=ablation/ema"], "ddim-2-lml-rank-1-anchor-ema-kappa-0.5"),
        (["solver=dpmsolverpp"], "dpmsolverpp-2-lml-default"),
        ([], "ours"),
    ],
)
def test_a_run_from_prompts_to_the_benchmark(script, pipelines, tmp_path, options, sampler):
    """The benchmark's files, a tiny Stable Diffusion, and its images named by their prompts.

    Whatever the correction is, the samples' folder says it.
    """
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset/spatial_val.txt").write_text("a cat\na dog\n")
    arguments = ["prompts.categories=[spatial]", "prompts.samples_per_prompt=2", "num_images=4"]
    assert script("sample", *sd15(pipelines), *arguments, *options).code == 0
    given = ["layout.sampler=ours"] if sampler == "ours" else []
    outcome = script("export", *ARGUMENTS, *given)
    assert (outcome.code, outcome.err) == (0, "")
    folder = tmp_path / f"out/sd15/spatial/{sampler}/samples"
    names = ["a cat_000000.png", "a cat_000001.png", "a dog_000002.png", "a dog_000003.png"]
    assert sorted(file.name for file in folder.iterdir()) == names
    for index, name in enumerate(names):
        assert (folder / name).samefile(tmp_path / f"run/images/{index:06d}.png")


@pytest.mark.parametrize(
    ("dampings", "sampler"),
    [
        ([0.5, None, 8], "ddim-2-lml-damping-0.5-None-8"),
        ([k / 8 for k in range(1, 101)], r"ddim-2-lml-[0-9a-f]{10}"),
    ],
)
def test_a_damping_a_step_is_in_the_name_or_a_hash_of_it(script, run, tmp_path, dampings, sampler):
    config = OmegaConf.load(run / "config.yaml")
    config.lml.damping = dampings
    OmegaConf.save(config, run / "config.yaml")
    outcome = script("export", *ARGUMENTS)
    assert (outcome.code, outcome.err) == (0, "")
    (folder,) = (tmp_path / "out/sd15/color").iterdir()
    assert re.fullmatch(sampler, folder.name)


def test_what_was_exported_may_be_scored_and_exported_again(script, run, coco, tmp_path):
    """A score lies beside the images, as for every folder of images."""
    assert script("export", *ARGUMENTS).code == 0
    assert script("export", *coco).code == 0
    for folder in (f"out/sd15/color/{SAMPLER}/samples", "reference"):
        same = f"metrics.convergence.reference={folder}"
        arguments = (f"images={folder}", "metrics=convergence", same, "threads=1")
        outcome = script("evaluate", *arguments)
        assert (outcome.code, outcome.err) == (0, "")
        assert (tmp_path / f"{folder}.metrics.json").is_file()
    for arguments in (ARGUMENTS, coco):
        outcome = script("export", *arguments)
        assert (outcome.code, outcome.err) == (0, "")


def test_names_that_a_folder_can_hold():
    for prompt, expected in (
        ("a", "a"),
        ("日本" * 100, "日本" * 40 + "日"),
        ("ä" * 300, "ä" * 122),
        ("x" * 244, "x" * 244),
        ("x" * 240 + " yyy z", "x" * 240 + " yyy"),
        ("x" * 240 + " yyyy", "x" * 240),
        ("a\tb\nc", "a b c"),
        ("/a_", "a"),
    ):
        name, kept = export.name_of(prompt, 7)
        assert name == f"{expected}_000007.png" and len(name.encode()) <= 255
        assert kept == (prompt == expected)


def test_images_are_linked_and_a_second_run_makes_what_is_missing(script, run, tmp_path):
    assert script("export", *ARGUMENTS).code == 0
    folder = tmp_path / f"out/sd15/color/{SAMPLER}/samples"
    first, second, *_ = sorted(folder.iterdir())
    assert first.stat().st_nlink == 2
    first.unlink()
    kept = second.stat().st_ctime_ns
    outcome = script("export", *ARGUMENTS)
    assert (outcome.code, outcome.err) == (0, "")
    assert first.exists() and second.stat().st_ctime_ns == kept


def test_images_are_copied_where_links_cannot_be(script, run, tmp_path, monkeypatch):
    def link(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", link)
    assert script("export", *ARGUMENTS).code == 0
    assert script("export", *ARGUMENTS).code == 0
    folder = tmp_path / f"out/sd15/color/{SAMPLER}/samples"
    assert len(read_as_the_benchmark(folder)) == 12
    assert all(file.stat().st_nlink == 1 for file in folder.iterdir())
    assert sorted(file.name for file in folder.parent.iterdir()) == ["run.json", "samples"]


def test_names_can_be_given_and_two_runs_never_mix(script, run, tmp_path):
    names = ("layout.model=sd_1_5", "layout.sampler=dpm_lm_lambda_0.006")
    assert script("export", *ARGUMENTS, *names).code == 0
    folder = tmp_path / "out/sd_1_5/color/dpm_lm_lambda_0.006/samples"
    assert len(read_as_the_benchmark(folder)) == 12
    first = min(folder.iterdir())
    first.unlink()
    Image.new("RGB", (4, 4)).save(first)
    refused(script, *ARGUMENTS, *names, pattern=f"{first.name}: of another run")
    first.unlink()
    (folder / "old_000000.png").write_bytes(b"")
    refused(script, *ARGUMENTS, *names, pattern="old_000000.png: not of this run")
    refused(
        script, *ARGUMENTS, "layout.model=a/b", pattern="layout.model='a/b': expected a plain name"
    )


def refused(script, *arguments: str, pattern: str) -> None:
    outcome = script("export", *arguments)
    assert outcome.code == 2 and outcome.err.count("\n") == 1, outcome
    assert pattern in outcome.err


def test_runs_that_cannot_be_laid_out(script, run, tmp_path):
    refused(script, pattern="layout")
    refused(script, "layout=t2i", "out=x", pattern="layout=t2i: unknown")
    refused(script, *ARGUMENTS[:2], pattern="out=???: a value is needed")
    refused(script, *ARGUMENTS[::2], pattern="run_dir=None: expected either a run or prompts=NAME")
    refused(script, *ARGUMENTS, "run_dir=nowhere", pattern="run_dir=nowhere: no such folder")
    refused(script, *ARGUMENTS, "+layout.depth=1", pattern="layout: ")
    refused(script, *ARGUMENTS, "out=dataset/color_val.txt", pattern="color_val.txt: Not a direc")
    given = ("prompts=t2i_compbench", "prompts.path=dataset", "prompts.categories=[color]")
    refused(script, *ARGUMENTS, *given, pattern="either a run or prompts=NAME")
    refused(script, *ARGUMENTS[::2], *given, pattern="t2i_compbench needs a run")

    table = tmp_path / "p.txt"
    table.write_text("\n".join("abcdefghijklmnopqrstuvwx"))
    whole = (run / "prompts.jsonl").read_bytes()
    (run / "prompts.jsonl").write_text(prompts.text(table).to_jsonl())
    refused(script, *ARGUMENTS, pattern="not made from prompts=t2i_compbench")
    (run / "prompts.jsonl").write_bytes(whole.splitlines(keepends=True)[0])
    refused(script, *ARGUMENTS, pattern="1 prompts, 24 images")
    (run / "prompts.jsonl").unlink()
    refused(script, *ARGUMENTS, pattern="has no prompts.jsonl")
    (run / "prompts.jsonl").write_bytes(whole)
    (run / "manifest.json").unlink()
    refused(script, *ARGUMENTS, pattern="not complete")
    assert not (tmp_path / "out").exists()


# --- runs that somebody else made ---------------------------------------------------------------

ELSEWHERE = [
    "../../x",
    "..",
    ".",
    "",
    "/tmp/x",
    "a/b",
    "a\\b",
    "C:x",
    "a\nb",
    "\0",
    "x" * 256,
    3,
    None,
]


def edit_prompts(run, **entries: object) -> None:
    lines = (run / "prompts.jsonl").read_text().splitlines()
    lines[5] = json.dumps({**json.loads(lines[5]), **entries})
    (run / "prompts.jsonl").write_text("\n".join(lines))


def edit_manifest(run, name: object, sha256: str | None = None) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    known = manifest["images"].pop("000005.png")
    manifest["images"][str(name)] = sha256 or known
    (run / "manifest.json").write_text(json.dumps(manifest))


def edit_config(run, key: str, value: object) -> None:
    config = OmegaConf.load(run / "config.yaml")
    OmegaConf.update(config, key, value)
    OmegaConf.save(config, run / "config.yaml")


PLACES = {
    "category": lambda run, name: edit_prompts(run, category=name),
    "image": edit_manifest,
    "model": lambda run, name: edit_config(run, "model.name", name or ".."),
    "sampler": lambda run, name: edit_config(run, "solver.name", f"../{name}"),
}


@pytest.mark.parametrize("name", ELSEWHERE, ids=lambda name: json.dumps(name)[:10])
@pytest.mark.parametrize("place", PLACES)
def test_a_runs_names_lead_nowhere_else(script, run, tmp_path, place, name):
    if place == "image" and not isinstance(name, str):
        name = "../secret"
    (tmp_path / "secret").write_text("secret")
    PLACES[place](run, name)
    refused(script, *ARGUMENTS, pattern="expected a plain name of one file or folder")
    assert not (tmp_path / "out").exists() and not (tmp_path / "x").exists()


@pytest.mark.parametrize("key", ["sample", "prompt_index"])
@pytest.mark.parametrize("value", ["../x", -1, 1.5, None, [1]])
def test_a_runs_numbers_are_numbers(script, run, tmp_path, key, value):
    edit_prompts(run, **{key: value})
    refused(
        script, *ARGUMENTS, pattern=f"{key}={shown(value)}: expected a whole number of at least 0"
    )
    assert not (tmp_path / "out").exists()


def no_links(*_: object) -> None:
    raise OSError(18, "Invalid cross-device link")


HARMS = {
    "another": lambda file: Image.new("RGB", (16, 16)).save(file),
    "gone": lambda file: file.unlink(),
    "secret": lambda file: (file.unlink(), file.symlink_to(file.parents[2] / "secret")),
    "pipe": lambda file: (file.unlink(), os.mkfifo(file)),
    "folder": lambda file: (file.unlink(), file.mkdir()),
}


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("link", [True, False])
def test_only_the_runs_own_images_are_laid_out(script, run, tmp_path, monkeypatch, harm, link):
    if not link:
        monkeypatch.setattr(export.os, "link", no_links)
    (tmp_path / "secret").write_text("secret")
    HARMS[harm](run / "images/000005.png")
    refused(script, *ARGUMENTS, pattern="000005.png: not the image of manifest.json")
    laid = [file.read_bytes() for file in (tmp_path / "out").rglob("*_0*.png")]
    assert b"secret" not in laid and len(laid) < 24


@pytest.mark.parametrize("images", [None, [], "x", {"000000.png": 3}])
def test_a_manifest_without_images(script, run, tmp_path, images):
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps({**manifest, "images": images}))
    refused(script, *ARGUMENTS, pattern="24 prompts, ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["../secret.jpg", "/tmp/x.jpg", "a\\b.jpg", "", None, 3])
def test_the_images_of_captions_are_those_in_the_folder(script, run, coco, tmp_path, name):
    """Where a run that somebody else made says which images its captions are of."""
    shutil.copy(next((tmp_path / "val2014").iterdir()), tmp_path / "secret.jpg")
    lines = [{"index": 0, "prompt": "a cat", "file_name": "COCO_val2014_000000000000.jpg"}]
    lines += [{"index": 1, "prompt": "a dog", "file_name": name}]
    (run / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    arguments = [a for a in coco if not a.startswith("prompts")]
    refused(script, *arguments, "run_dir=run", pattern="file_name=")
    assert not (tmp_path / "reference").exists()


# --- MS-COCO -----------------------------------------------------------------------------------


@pytest.fixture
def coco(tmp_path):
    """A captions file of six images of several shapes, one of them grey, and the images."""
    random = np.random.default_rng(0)
    (tmp_path / "val2014").mkdir()
    images, captions = [], []
    for k, (height, width) in enumerate([(48, 64), (64, 48), (50, 50), (33, 80), (20, 31), (7, 9)]):
        name = f"COCO_val2014_{k:012d}.jpg"
        pixels = random.integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels if k != 3 else pixels[..., 0]).save(tmp_path / "val2014" / name)
        images.append({"id": k, "file_name": name})
        captions.append({"id": k, "image_id": k, "caption": "a cat"})
    content = {"images": images, "annotations": captions}
    (tmp_path / "captions.json").write_text(json.dumps(content))
    return (
        "layout=coco_reference",
        "layout.images=val2014",
        "layout.size=16",
        "prompts=coco14_30k",
        "prompts.file=captions.json",
        "prompts.count=5",
        "out=reference",
    )


def test_the_reference_is_the_images_of_the_captions(script, coco, tmp_path):
    outcome = script("export", *coco)
    assert (outcome.code, outcome.err) == (0, "")
    chosen = prompts.coco14_30k(tmp_path / "captions.json", count=5)
    names = sorted(record["file_name"].replace(".jpg", ".png") for record in chosen.records)
    folder = ImageFolder(tmp_path / "reference")
    assert folder.names == names and folder.size == (16, 16) and len(names) == 5
    for name in names:
        with Image.open(tmp_path / "val2014" / name.replace(".png", ".jpg")) as image:
            pixels = np.asarray(image.convert("RGB"))
        height, width, _ = pixels.shape
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        middle = Image.fromarray(pixels[top : top + side, left : left + side])
        expected = np.asarray(middle.resize((16, 16), Image.Resampling.LANCZOS))
        assert np.array_equal(np.asarray(Image.open(tmp_path / "reference" / name)), expected)
    about = json.loads((tmp_path / "reference/reference.json").read_text())
    assert about["count"] == 5 and about["sha256"] == chosen.settings["sha256"]


def test_a_reference_set_by_torchvisions_rule(script, coco, tmp_path):
    assert script("export", *coco, "layout.rule=torchvision", "layout.size=10").code == 0
    rule = transforms.Compose([transforms.Resize(10), transforms.CenterCrop(10)])
    for file in (tmp_path / "reference").glob("*.png"):
        (original,) = tmp_path.rglob(f"{file.stem}.jpg")
        expected = np.asarray(rule(Image.open(original).convert("RGB")))
        assert np.array_equal(np.asarray(Image.open(file)), expected)
    refused(script, *coco, "layout.rule=other", pattern="layout.rule=other: expected edm or torchv")


def test_a_reference_set_is_completed_by_the_same_command(script, coco, tmp_path):
    assert script("export", *coco).code == 0
    first, second, *_ = sorted((tmp_path / "reference").glob("*.png"))
    before, kept = first.read_bytes(), second.stat().st_mtime_ns
    first.unlink()
    (tmp_path / "reference/.x.png.tmp").write_bytes(b"what a killed one left")
    assert script("export", *coco).code == 0
    assert first.read_bytes() == before and second.stat().st_mtime_ns == kept


def test_reference_sets_that_are_refused(script, coco, tmp_path):
    assert script("export", *coco).code == 0
    refused(script, *coco, "layout.size=8", pattern="out=reference: holds another reference set")
    refused(script, *coco, "prompts.seed=3", pattern="reference")
    refused(script, *coco, "layout.size=0", pattern="layout.size=0: expected a whole number")
    refused(script, *coco, "layout.images=none", pattern="layout.images=none: no such folder")
    (tmp_path / "p.txt").write_text("a")
    text = ("prompts=text", "prompts.file=p.txt")
    arguments = [a for a in coco if not a.startswith("prompts")]
    refused(script, *arguments, *text, pattern="prompts=text: layout=coco_reference needs prompts")
    *_, name = sorted(f.name for f in (tmp_path / "reference").glob("*.png"))
    image = tmp_path / "val2014" / name.replace(".png", ".jpg")
    image.write_bytes(image.read_bytes()[:100])
    refused(script, *coco, "out=new", pattern=f"{image.name}: not a readable image")
    image.unlink()
    refused(script, *coco, "out=new", pattern=f"layout.images=val2014: has no {image.name}")
