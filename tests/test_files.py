"""Files that somebody else made: only regular ones, of the formats and sizes that are expected."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lml import files
from lml.data import cifar10, images, prompts
from lml.data.statistics import ReferenceStatistics
from lml.errors import UserError
from lml.files import read_json
from lml.pipelines import control, loading, text
from lml.report import figures, results
from lml.runs.records import read_config
from lml.runs.store import RunFolder
from lml.runs.sweep.ledger import Ledger


@pytest.fixture(autouse=True)
def deadline() -> Iterator[None]:
    """What waits for ever fails."""

    def stop(number: int, frame: object) -> None:
        raise TimeoutError("it waits for ever")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


# --- every place that reads a file --------------------------------------------------------------


def silent(line: str) -> None:
    """Takes what is said."""


def archive(path: Path) -> images.ImageZip:
    """A zip beside the image `path` that holds it."""
    with zipfile.ZipFile(path.with_suffix(".zip"), "w", zipfile.ZIP_DEFLATED) as file:
        file.write(path, path.name)
    return images.ImageZip(path.with_suffix(".zip"))


def stored(path: Path) -> bool | None:
    """What a run's folder says of its image 0, which is `path`."""
    (path.parent / "run/images").mkdir(parents=True)
    folder = RunFolder(path.parent / "run", {})
    path.rename(folder.image_path(0))
    return folder.holds(0)


def size_in_tables(path: Path) -> str:
    """What tables say of the size of a run's images, of which `path` is the first."""
    stored(path)
    return results._size(path.parent / "run", 1)


# Each reads the image `path`, and says that it can't by what stands beside it.
IMAGES = {
    "read": (images.read, UserError),
    "folder": (lambda path: images.ImageFolder(path.parent), UserError),
    "zip": (archive, UserError),
    "control image": (control.image_hash, UserError),
    "sheet": (cifar10._sheet, UserError),
    "run": (stored, False),
    "strip": (lambda path: figures._images(path.parent), None),
    "table": (size_in_tables, ""),
}
# Each reads the file of that name in a folder.
READERS = {
    "prompts.txt": (lambda path: prompts.text(path), UserError),
    "prompts.csv": (lambda path: prompts.table(path), UserError),
    "prompts.jsonl": (lambda path: prompts.read(path), UserError),
    "captions.json": (lambda path: prompts.captions(path), UserError),
    "captions_val2014.json": (lambda path: prompts.coco14_30k(path), UserError),
    "metrics.json": (read_json, {}),
    "timing.json": (lambda path: results._read(path, silent), {}),
    "config.yaml": (lambda path: read_config(path.parent), UserError),
    "sweep.yaml": (lambda path: results.read_sweep(path, silent), ([], [])),
    "results.csv": (lambda path: results.from_csv(path, [], silent), []),
    "config.json": (lambda path: loading.read_config(path.parent, "k", ("A",)), UserError),
    "scheduler_config.json": (lambda path: loading.read_scheduler(path.parent, "k", {}), UserError),
    "model_index.json": (lambda path: text._read_index(path.parent, "k"), UserError),
    "images.zip": (images.ImageZip, UserError),
}


def refuses(reader, path: Path, answer: object) -> str:
    """Check that `reader` does not take `path`; its message, if it has one."""
    if answer is not UserError:
        assert reader(path) == answer
        return ""
    with pytest.raises(UserError) as caught:
        reader(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    return str(caught.value)


# --- only regular files -------------------------------------------------------------------------

KINDS = {
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "folder": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", READERS)
def test_what_is_no_regular_file_is_not_read(tmp_path, name, kind):
    KINDS[kind](tmp_path / name)
    refuses(READERS[name][0], tmp_path / name, READERS[name][1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", sorted(set(IMAGES) - {"zip"}))
def test_an_image_that_is_no_regular_file_is_not_read(tmp_path, place, kind):
    KINDS[kind](tmp_path / "000000.png")
    refuses(IMAGES[place][0], tmp_path / "000000.png", IMAGES[place][1])


@pytest.mark.parametrize("name", ["config.yaml", "manifest.json", "metrics.json", "images/0.png"])
def test_a_script_does_not_wait_for_a_pipe(spawn, tmp_path, name):
    (tmp_path / "run/images").mkdir(parents=True)
    (tmp_path / "run/config.yaml").write_text("settings: {}")
    (tmp_path / "run/manifest.json").write_text('{"complete": true}')
    (tmp_path / "run" / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / "run" / name)
    signal.alarm(90)
    process = spawn("evaluate", "run_dir=run", "metrics=none", new=name == "config.yaml")
    out, err = process.communicate(timeout=80)
    assert (out, err.count("\n")) == ("", 1) and "run" in err


# --- JSON and YAML ------------------------------------------------------------------------------

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize("name", [name for name in READERS if name.endswith(".yaml")])
@pytest.mark.parametrize("content", [LAUGHS, "settings: &a {}\nb: *a", "settings: &a {b: *a}"])
def test_aliases_are_not_read(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    refuses(READERS[name][0], tmp_path / name, READERS[name][1])
    with pytest.raises(ValueError, match="aliases"):
        files.load_yaml(tmp_path / name)


def test_what_is_written_has_no_aliases(tmp_path):
    """Though what is written has the same list at several places."""
    shared = [1, 2]
    RunFolder(tmp_path / "run", {"a": shared}).open({"b": shared, "c": {"d": shared}})
    assert read_config(tmp_path / "run")["c"] == {"d": [1, 2]}
    (tmp_path / "sweep.yaml").write_text(files.dump_yaml({"a": shared, "b": {"é": shared}}))
    assert files.load_yaml(tmp_path / "sweep.yaml") == {"a": [1, 2], "b": {"é": [1, 2]}}
    ledger = Ledger(tmp_path)
    cell = {"run": None, "overrides": ["a=1"], "status": "refused", "lml": {"rank": shared}}
    ledger.write([cell, {**cell, "overrides": ["a=2"]}])
    assert len(files.load_yaml(tmp_path / "sweep.yaml")["cells"]) == 2
    ledger.close()


@pytest.mark.parametrize("name", [name for name in READERS if name.endswith((".json", ".jsonl"))])
def test_json_that_is_nested_too_deep(tmp_path, name):
    (tmp_path / name).write_text("[" * 100_000 + "]" * 100_000)
    refuses(READERS[name][0], tmp_path / name, READERS[name][1])


# --- images -------------------------------------------------------------------------------------


def png(width: int, height: int) -> bytes:
    """A PNG of grey pixels, all black, whose file takes a thousandth of its pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    packer, rows = zlib.compressobj(9), bytes(width + 1)
    data = b"".join([*(packer.compress(rows) for _ in range(height)), packer.flush()])
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("place", IMAGES)
def test_postscript_called_png_starts_nothing(tmp_path, place, monkeypatch):
    import PIL.EpsImagePlugin

    def started(*args: object, **options: object) -> None:
        raise AssertionError("Ghostscript is started")

    monkeypatch.setattr(PIL.EpsImagePlugin, "Ghostscript", started)
    file = tmp_path / "000000.png"
    Image.new("RGB", (8, 8)).save(file, "EPS")
    said = refuses(IMAGES[place][0], file, IMAGES[place][1])
    assert "Ghostscript" not in said


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PPM", "TGA", "ICO"])
@pytest.mark.parametrize("place", IMAGES)
def test_only_the_formats_that_are_promised_are_read(tmp_path, place, kind):
    file = tmp_path / "000000.png"
    Image.new("RGB", (16, 16)).save(file, kind)
    refuses(IMAGES[place][0], file, IMAGES[place][1])


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP", "JPEG"])
def test_what_is_promised_is_read(tmp_path, kind):
    Image.new("RGB", (16, 8)).save(tmp_path / "a.png", kind)
    assert images.read(tmp_path / "a.png").shape == (3, 8, 16)
    assert archive(tmp_path / "a.png").size == (8, 16)


@pytest.mark.parametrize("size", [(10_000, 10_000), (20_000, 20_000)], ids=str)
@pytest.mark.parametrize("place", IMAGES)
def test_an_image_of_too_many_pixels_is_not_decoded(tmp_path, place, size, monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it is decoded"))
    (tmp_path / "000000.png").write_bytes(png(*size))
    refuses(IMAGES[place][0], tmp_path / "000000.png", IMAGES[place][1])


@pytest.mark.parametrize("size", [(9_000, 9_000), (8, 9), (9, 8)], ids=str)
@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_an_image_of_another_size_than_the_first_is_not_decoded(tmp_path, kind, size, monkeypatch):
    for name, shape in (("a.png", (8, 8)), ("b.png", size)):
        (tmp_path / name).write_bytes(png(*shape))
    if kind == "zip":
        with zipfile.ZipFile(tmp_path / "set.zip", "w") as file:
            for name in ("a.png", "b.png"):
                file.write(tmp_path / name, name)
    known = images.ImageZip(tmp_path / "set.zip") if kind == "zip" else images.ImageFolder(tmp_path)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it is decoded"))
    width, height = size
    for read in (known.load, lambda names: list(known.load_blocks([names]))):
        with pytest.raises(UserError, match=rf"b\.png: {width}x{height} pixels; all .* 8x8 of a"):
            read(["b.png"])


@pytest.mark.parametrize("first", [True, False])
def test_what_a_zip_says_is_larger_than_its_pixels_is_not_unpacked(tmp_path, first, monkeypatch):
    bomb = png(8, 8) + bytes(2 * images.METADATA)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as file:
        if not first:
            file.writestr("a.png", png(8, 8))
        file.writestr("b.png", bomb)
    assert (tmp_path / "a.zip").stat().st_size < 100_000
    read = zipfile.ZipFile.read

    def watched(self: zipfile.ZipFile, name: str, *args: object) -> bytes:
        assert name != "b.png", "it is unpacked"
        return read(self, name, *args)

    monkeypatch.setattr(zipfile.ZipFile, "read", watched)
    with pytest.raises(UserError, match=r"b\.png: not a readable image \(\d+ bytes; \d+ at most"):
        images.ImageZip(tmp_path / "a.zip").load(["b.png"])


def test_a_large_image_takes_no_memory(tmp_path):
    """The script, in a process that may have little."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").write_bytes(png(10_000, 10_000))
    code = (
        "import resource, sys; from lml.data.images import ImageFolder\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: ImageFolder('images')\n"
        "except ValueError as error: print(error, file=sys.stderr)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    signal.alarm(90)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(files.__file__).parents[1])},
    )
    assert done.stderr.count("\n") == 1 and "100000000 pixels" in done.stderr
    assert int(done.stdout) < 50_000  # kB


def test_an_ordinary_set_is_what_it_was(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3), dtype=np.uint8)
    for k, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{k}.png")
    loaded = torch.cat(list(images.ImageFolder(tmp_path).batches(2)))
    assert np.array_equal(loaded.permute(0, 2, 3, 1).numpy(), pixels)


# --- names --------------------------------------------------------------------------------------

NAMES = ["", ".", "..", "a/b", "/a", "../a", "a\\b", "C:a", "a\nb", "a\0b", "\x7f", "\ud800"]
NAMES += ["a" * 256, "é" * 128, None, 3, ["a"]]


@pytest.mark.parametrize("name", NAMES, ids=lambda name: json.dumps(name)[:12])
def test_a_name_that_leads_elsewhere(name):
    with pytest.raises(UserError, match=r"^key=.*: expected a plain name") as caught:
        files.plain_name(name, "key")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 300


@pytest.mark.parametrize("name", ["a", "..a", "a b.png", "é" * 127, "a" * 255, "3d_spatial"])
def test_a_plain_name(name):
    assert files.plain_name(name, "key") == name


def test_arrays_that_unpack_to_too_much_are_not_read(tmp_path, monkeypatch):
    path = tmp_path / "statistics.npz"
    np.savez_compressed(path, mu=np.zeros(1000), sigma=np.zeros((1000, 1000)))
    assert path.stat().st_size < 20_000
    with files.open_arrays(path) as arrays:
        assert arrays["sigma"].shape == (1000, 1000)
    monkeypatch.setattr(files, "UNPACKED_MAX", 1_000_000)
    with pytest.raises(UserError, match="it unpacks to 8,0"):
        ReferenceStatistics.load(path, any_origin=True)
