"""What scripts/export.py lays out, read back by what others would read it with."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from PIL import Image

from lml import export
from lml.data import prompts
from lml.data.images import ImageFolder
from lml.store import RunFolder

LONG = "a very " * 60 + "long dog"
TEXTS = ["a red bench and a blue cake", "The clock reads 11:44.", "either/or a snake_case.", LONG]


@pytest.fixture
def run(tmp_path):
    """A complete run: two categories of four prompts, three images each."""
    (tmp_path / "dataset").mkdir()
    for category in ("color", "non_spatial"):
        (tmp_path / f"dataset/{category}_val.txt").write_text("\n".join(TEXTS))
    made = prompts.t2i_compbench(tmp_path / "dataset", ["color", "non_spatial"], 3)
    folder = RunFolder(tmp_path / "run", {"prompts": made.settings})
    config = {
        "model": {"name": "sd15"},
        "solver": {"name": "ddim"},
        "nfe": 15,
        "lml": {"rank": 2, "damping": 8.0},
    }
    folder.open(config)
    for index in range(len(made)):
        folder.write_image(index, np.full((4, 4, 3), index, np.uint8))
    folder.write_manifest(len(made))
    folder.close()
    made.save(folder.path / "prompts.jsonl")
    return folder.path


ARGUMENTS = ("layout=t2i_compbench", "run_dir=run", "out=out")
SAMPLER = "ddim-15-lml-rank2-damping8"


def read_as_the_benchmark(folder) -> list[tuple[str, int, int]]:
    """Prompt, index and pixel of each image, in the order that the evaluators go through them.

    BLIP_vqa.py and CLIP_similarity.py sort by what follows the last "_", UniDet's dataset by what
    follows the first; the prompt is what comes before the first.
    """
    names = os.listdir(folder)
    by_last = sorted(names, key=lambda name: int(name.split("_")[-1].split(".")[0]))
    by_first = sorted(names, key=lambda name: int(name.split("_")[1].split(".")[0]))
    assert by_last == by_first
    pixels = [int(np.asarray(Image.open(folder / name))[0, 0, 0]) for name in by_last]
    indices = [int(name.split("_")[-1].split(".")[0]) for name in by_last]
    return list(zip([name.split("_")[0] for name in by_last], indices, pixels, strict=True))


def test_the_benchmark_reads_prompts_and_order(script, run, tmp_path):
    outcome = script("export", *ARGUMENTS)
    assert (outcome.code, outcome.err) == (0, "")
    assert (
        outcome.out.startswith("24 images in out/sd15/*/") and "; 2 prompts changed" in outcome.out
    )
    for category, first in (("color", 0), ("non_spatial", 12)):
        found = read_as_the_benchmark(tmp_path / "out/sd15" / category / SAMPLER / "samples")
        assert [index for _, index, _ in found] == list(range(12))
        assert [pixel for _, _, pixel in found] == list(range(first, first + 12))
        for k, (text, _, _) in enumerate(found):
            original = TEXTS[k // 3]
            if k // 3 < 2:
                assert text == original
            elif k // 3 == 2:
                assert text == "either or a snake case."
            else:
                assert original.startswith(text + " ") and 235 < len(text) <= 244


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
    assert [file.name for file in folder.parent.iterdir()] == ["samples"]


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
    refused(script, *ARGUMENTS, "layout.model=a/b", pattern="layout.model=a/b: the name of a fol")


def refused(script, *arguments: str, pattern: str) -> None:
    outcome = script("export", *arguments)
    assert outcome.code == 2 and outcome.err.count("\n") == 1, outcome
    assert pattern in outcome.err


def test_runs_that_cannot_be_laid_out(script, run, tmp_path):
    refused(script, pattern="layout")
    refused(script, "layout=t2i", "out=x", pattern="layout=t2i: unknown")
    refused(script, *ARGUMENTS[:2], pattern="out=???: a value is needed")
    refused(script, *ARGUMENTS[::2], pattern="run_dir=None: either a run or prompts=NAME")
    refused(script, *ARGUMENTS, "run_dir=nowhere", pattern="run_dir=nowhere: no such folder")
    refused(script, *ARGUMENTS, "+layout.depth=1", pattern="layout: ")
    refused(script, *ARGUMENTS, "out=run/config.yaml", pattern="out=run/config.yaml: Not a direc")
    given = ("prompts=t2i_compbench", "prompts.path=dataset", "prompts.categories=[color]")
    refused(script, *ARGUMENTS, *given, pattern="either a run or prompts=NAME")
    refused(script, *ARGUMENTS[::2], *given, pattern="takes the images of a run")

    table = tmp_path / "p.txt"
    table.write_text("\n".join("abcdefghijklmnopqrstuvwx"))
    whole = (run / "prompts.jsonl").read_bytes()
    prompts.text(table).save(run / "prompts.jsonl")
    refused(script, *ARGUMENTS, pattern="not made from prompts=t2i_compbench")
    (run / "prompts.jsonl").write_bytes(whole.splitlines(keepends=True)[0])
    refused(script, *ARGUMENTS, pattern="1 prompts, 24 images")
    (run / "prompts.jsonl").unlink()
    refused(script, *ARGUMENTS, pattern="has no prompts.jsonl")
    (run / "prompts.jsonl").write_bytes(whole)
    (run / "manifest.json").unlink()
    refused(script, *ARGUMENTS, pattern="not complete")
    assert not (tmp_path / "out").exists()


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
    refused(script, *coco, "layout.size=0", pattern="layout.size=0: a whole number")
    refused(script, *coco, "layout.images=none", pattern="layout.images=none: no such folder")
    (tmp_path / "p.txt").write_text("a")
    text = ("prompts=text", "prompts.file=p.txt")
    arguments = [a for a in coco if not a.startswith("prompts")]
    refused(script, *arguments, *text, pattern="prompts=text: layout=coco_reference takes coco14")
    *_, name = sorted(f.name for f in (tmp_path / "reference").glob("*.png"))
    image = tmp_path / "val2014" / name.replace(".png", ".jpg")
    image.write_bytes(image.read_bytes()[:100])
    refused(script, *coco, "out=new", pattern=f"{image.name}: not a readable image")
    image.unlink()
    refused(script, *coco, "out=new", pattern=f"layout.images=val2014: has no {image.name}")
