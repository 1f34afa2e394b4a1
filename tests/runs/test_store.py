"""The run folder: sealed images, atomic files, refusals."""

from __future__ import annotations

import errno
import io
import os
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from lml import files
from lml.errors import RunError, UserError
from lml.files import file_hash, read_json, write_json
from lml.runs import records, store
from lml.runs.names import image_index, image_name
from lml.runs.records import WRITTEN, check_output, merge_metrics, read_config
from lml.runs.store import APART, RunFolder
from lml.runs.writer import Writer
from lml.seals import settings_hash

SETTINGS = {"nfe": 10, "solver": {"name": "ddim", "order": 3}, "seed": 0}


def pixels(index: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(index).integers(0, 256, (8, 6, channels), dtype=np.uint8)


def make(path: Path, count: int = 4, settings: dict = SETTINGS) -> RunFolder:
    folder = RunFolder(path, settings)
    folder.open({"nfe": settings["nfe"]})
    for index in range(count):
        folder.write_image(index, pixels(index))
    return folder


def test_the_hash_sees_values_and_nothing_else():
    same = {"seed": 0.0, "solver": {"order": 3, "name": "ddim"}, "nfe": 10}
    assert settings_hash(SETTINGS) == settings_hash(same)
    others = [
        {**SETTINGS, "nfe": 11},
        {**SETTINGS, "nfe": "10"},
        {**SETTINGS, "seed": False},
        {**SETTINGS, "seed": None},
        {**SETTINGS, "solver": {"name": "ddim", "order": 3.5}},
        {**SETTINGS, "more": None},
    ]
    assert len({settings_hash(s) for s in [SETTINGS, *others]}) == 1 + len(others)


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_comes_back_and_its_seal_holds(tmp_path, channels):
    folder = make(tmp_path, 0)
    folder.write_image(3, pixels(3, channels))
    with Image.open(folder.image_path(3)) as image:
        assert np.array_equal(np.asarray(image).reshape(8, 6, channels), pixels(3, channels))
    assert folder.holds(3) is True
    assert folder.holds(2) is None


def truncate(folder: RunFolder, path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def empty(folder: RunFolder, path: Path) -> None:
    path.write_bytes(b"")


def swap(folder: RunFolder, path: Path) -> None:
    shutil.copy(folder.image_path(0), path)


def reencode(folder: RunFolder, path: Path) -> None:
    Image.fromarray(pixels(2)).save(path)


def repaint(folder: RunFolder, path: Path) -> None:
    with Image.open(path) as image:
        text = image.text
        array = np.asarray(image).copy()
    array[0, 0, 0] ^= 1
    info = PngImagePlugin.PngInfo()
    for key, value in text.items():
        info.add_text(key, value)
    Image.fromarray(array).save(path, pnginfo=info)


def of_another_run(folder: RunFolder, path: Path) -> None:
    other = make(path.parents[2] / "other", 3, {**SETTINGS, "nfe": 11})
    shutil.copy(other.image_path(2), path)


@pytest.mark.parametrize("harm", [truncate, empty, swap, reencode, repaint, of_another_run])
@pytest.mark.parametrize("manifest", [False, True])
def test_a_broken_or_foreign_image_is_found(tmp_path, harm, manifest):
    folder = make(tmp_path / "run")
    if manifest:
        folder.write_manifest(4)
    harm(folder, folder.image_path(2))
    assert folder.survey(4) == ({0, 1, 3}, ["000002.png"])


def test_a_missing_image_is_missing_and_not_broken(tmp_path):
    folder = make(tmp_path)
    folder.image_path(1).unlink()
    assert folder.survey(5) == ({0, 2, 3}, [])


@pytest.mark.parametrize("name", ["000004.png", "cat.png", "notes.txt"])
def test_images_that_cannot_be_the_runs_are_refused(tmp_path, name):
    folder = make(tmp_path)
    (folder.images / name).write_bytes(b"x")
    with pytest.raises(UserError, match=name):
        folder.survey(4)
    assert (folder.images / name).read_bytes() == b"x"


def test_the_manifest_says_what_is_there(tmp_path):
    folder = make(tmp_path)
    assert folder.read_manifest() == {}
    assert folder.write_manifest(6) == 4
    manifest = folder.read_manifest()
    assert (manifest["complete"], manifest["count"], manifest["num_images"]) == (False, 4, 6)
    assert manifest["images"]["000001.png"] == file_hash(folder.image_path(1))
    assert manifest["config_sha256"] == file_hash(tmp_path / "config.yaml")
    folder.write_manifest(4)
    assert folder.read_manifest()["complete"] is True
    other = RunFolder(tmp_path, {**SETTINGS, "nfe": 11})
    assert other.read_manifest() == {}


def test_the_same_settings_go_on_and_leave_the_folder_as_it_was(tmp_path):
    folder = make(tmp_path)
    folder.close()
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    again = RunFolder(tmp_path, SETTINGS)
    again.open({"nfe": 10, "device": "another"})
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_overwriting_removes_what_a_run_of_the_same_settings_wrote(tmp_path):
    folder = make(tmp_path)
    folder.write_manifest(4)
    folder.close()
    for name in (*WRITTEN, APART, "notes.txt"):
        (tmp_path / name).write_text("{}")
    again = RunFolder(tmp_path, SETTINGS)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    again.open({"nfe": 10, "device": "another"}, overwrite=True)
    assert again.survey(4) == (set(), []) and again.is_replacing
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    again.begin()
    left = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert left == [".lock", "config.yaml", "notes.txt"]
    assert read_config(tmp_path)["device"] == "another"


@pytest.mark.parametrize("name", ["images", "images/new", "latents/new", "config.yaml", "grid.png"])
def test_nothing_is_written_among_a_runs_own_files(tmp_path, name):
    make(tmp_path / "run").close()
    path = tmp_path / "run" / name
    with pytest.raises(UserError, match=f"^out={path}: among the files of the run in .*/run; "):
        check_output(path, "out")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with pytest.raises(UserError):
        check_output(tmp_path / "link" / name, "out")
    for other in ("run", "run/scores.json", "other/images/scores.json", f"other/{name}"):
        check_output(tmp_path / other, "out")


def test_other_settings_are_refused_by_name_and_overwritten_on_demand(tmp_path):
    folder = make(tmp_path)
    folder.write_manifest(4)
    folder.close()
    (tmp_path / "prompts.jsonl").write_text("the other run's")
    (tmp_path / "notes.txt").write_text("mine")
    (folder.images / "mine.png").write_text("mine")
    other = RunFolder(tmp_path, {**SETTINGS, "nfe": 20, "solver": {"name": "ddim", "order": 2}})
    with pytest.raises(UserError, match=r"nfe=10, not 20; solver.order=3, not 2") as error:
        other.open({})
    assert "overwrite=true" in str(error.value) and "\n" not in str(error.value)
    assert folder.holds(0) and (tmp_path / "manifest.json").exists()
    other.open({"nfe": 20}, overwrite=True)
    with pytest.raises(UserError, match=r"mine.png: not one of this run's images; move it away"):
        other.survey(4)
    assert folder.holds(0) and (tmp_path / "manifest.json").exists()
    other.begin()
    left = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert left == [".lock", "config.yaml", "images/mine.png", "notes.txt"]
    assert read_config(tmp_path)["settings"]["nfe"] == 20


@pytest.mark.parametrize("config", [None, "a: 1\n", "settings: 3\n", ": ["])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_no_runs_is_never_touched(tmp_path, config, overwrite):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/000000.png").write_text("precious")
    if config is not None:
        (tmp_path / "config.yaml").write_text(config)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="not a run's folder"):
        RunFolder(tmp_path, SETTINGS).open({}, overwrite)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_a_kill_left_half_written_is_removed(tmp_path):
    folder = make(tmp_path)
    folder.close()
    for stale in (tmp_path / ".manifest.json.1.tmp", folder.images / ".000007.png.1.tmp"):
        stale.write_bytes(b"half")
    folder.open({})
    assert not list(tmp_path.rglob("*.tmp")) and folder.survey(4) == ({0, 1, 2, 3}, [])


def test_two_at_a_time_are_refused(tmp_path):
    folder = make(tmp_path)
    with pytest.raises(UserError, match="another process"):
        RunFolder(tmp_path, SETTINGS).open({})
    folder.close()
    RunFolder(tmp_path, SETTINGS).open({})


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(UserError, match=f"run_dir={path}"):
            RunFolder(path, SETTINGS).open({}, overwrite=True)
    assert (tmp_path / "file").read_text() == "mine"


class HalfWritten(io.FileIO):
    """A file for which the disk has no room: its first half is there."""

    def write(self, data: bytes) -> int:
        super().write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_one_line_and_leaves_what_was_there(tmp_path, monkeypatch):
    folder = make(tmp_path, 2)
    write_json(tmp_path / "metrics.json", {"a": {"value": 1}})
    before = {p.name: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    monkeypatch.setattr(files, "open", HalfWritten, raising=False)
    with pytest.raises(RunError, match="No space left on device") as error:
        merge_metrics(tmp_path / "metrics.json", {"b": {"value": 2}}, f"run_dir={tmp_path}")
    assert str(error.value).startswith(f"run_dir={tmp_path}") and "\n" not in str(error.value)
    with pytest.raises(RunError, match="No space left"), Writer(folder) as writer:
        writer.submit((i, pixels(i)) for i in (1, 2))
        writer.wait()
    assert {p.name: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_disk_that_really_is_full(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(tmp_path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs is not allowed here")
    try:
        folder = make(tmp_path / "run", 0)
        stored = 0
        with pytest.raises(RunError, match="No space left"):
            for stored in range(100):
                folder.write_image(stored, np.tile(pixels(stored), (8, 8, 1)))
        assert stored > 0
        assert folder.survey(100) == (set(range(stored)), [])
        folder.close()
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_metrics_are_merged(tmp_path):
    path = tmp_path / "metrics.json"
    one, two = {"value": 1}, {"value": {"mean": 2.0}}
    merge_metrics(path, {"a": one, "b": one}, "out=x")
    merge_metrics(path, {"b": two}, "out=x")
    assert read_json(path) == {"a": one, "b": two}
    path.write_text("{}")
    merge_metrics(path, {"c": two}, "out=x")
    assert read_json(path) == {"c": two}


NO_METRICS = [
    "",
    "# Notes",
    "[]",
    "3",
    '{"a": {"value": 1},}',
    '{"a": 3}',
    '{"name": "x"}',
    '{"a": {}}',
]


@pytest.mark.parametrize("content", [*NO_METRICS, "[" * 100_000, "\xff\xfe"])
def test_what_is_no_file_of_metrics_is_not_replaced(tmp_path, content):
    path = tmp_path / "metrics.json"
    path.write_bytes(content.encode("latin1"))
    with pytest.raises(UserError, match=r"^out=x: not a file of metrics \(.*\); mend it") as error:
        merge_metrics(path, {"a": {"value": 1}}, "out=x")
    assert "\n" not in str(error.value) and path.read_bytes() == content.encode("latin1")


def test_processes_that_add_scores_at_a_time_lose_none(tmp_path, monkeypatch):
    folder = make(tmp_path, 4, {**SETTINGS, "num_images": 4})
    folder.write_manifest(4)
    folder.close()
    manifest, read = folder.read_manifest(), records.read_metrics

    def slow(*args: object) -> dict:
        found = read(*args)
        time.sleep(0.01)
        return found

    monkeypatch.setattr(records, "read_metrics", slow)

    def add(number: int) -> None:
        other = RunFolder(tmp_path, folder.settings)
        other.add_metrics({f"metric{number}": {"value": number}}, manifest)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(16)))
    assert {entry["value"] for entry in read(tmp_path / "metrics.json", "x").values()} == {
        *range(16)
    }


def test_scores_of_a_run_that_was_made_anew_meanwhile_are_not_added(tmp_path, monkeypatch):
    folder = make(tmp_path, 4, {**SETTINGS, "num_images": 4})
    folder.write_manifest(4)
    manifest = folder.read_manifest()
    monkeypatch.setattr(records, "WAIT", 0)
    with pytest.raises(UserError, match="another process is writing to it"):
        RunFolder(tmp_path, folder.settings).add_metrics({}, manifest)
    folder.write_image(1, pixels(7))
    folder.write_manifest(4)
    folder.close()
    with pytest.raises(UserError, match=r"^run_dir=.*: the run changed while it was scored$"):
        folder.add_metrics({"a": {"value": 1}}, manifest)
    assert not (tmp_path / "metrics.json").exists()


def test_the_writer_reports_the_batch_before_when_the_next_one_comes(tmp_path):
    folder = make(tmp_path, 0)
    with Writer(folder) as writer:
        writer.submit((i, pixels(i)) for i in range(3))
        writer.submit([(3, np.zeros((2, 2, 5), np.uint8))])  # five channels: no PNG
        assert {path.name for path in folder.images.iterdir()} >= {"000000.png", "000002.png"}
        with pytest.raises(TypeError):
            writer.submit([])


# --- images of a run to be replaced, and a million of them -------------------------------------


def test_the_images_of_the_replaced_run_are_known_by_their_number(tmp_path):
    """There may be more of them than of the new; and what is beyond them is somebody else's."""
    older = {**SETTINGS, "num_images": 6, "seed": 1}
    folder = make(tmp_path, 0, older)
    for index in range(6):
        folder.write_image(index, pixels(index), np.zeros(2, np.float32))
    folder.close()
    for name in ("000017.npy", "mine.npy", "000003.txt"):
        (tmp_path / "latents" / name).write_text("mine")
    again = RunFolder(tmp_path, {**SETTINGS, "num_images": 2})
    again.open({}, overwrite=True)
    assert again.survey(2) == (set(), [])
    (folder.images / "000006.png").write_text("mine")
    with pytest.raises(UserError, match=r"000006\.png: not one of this run's"):
        again.survey(2)
    again.begin()
    assert [path.name for path in folder.images.iterdir()] == ["000006.png"]
    left = {path.name for path in (tmp_path / "latents").iterdir()}
    assert left == {"000017.npy", "mine.npy", "000003.txt"}


@pytest.mark.parametrize("count", [1, 64, 1_000_000, 1_000_001, 20_000_000])
def test_names_sort_by_number_however_many_there_are(count):
    picked = sorted({0, 7, 63, 999_999, 1_000_000, count - 1} & set(range(count)))
    names = [image_name(index, count) for index in picked]
    assert names == sorted(names) and [image_index(n, count) for n in names] == picked
    assert len({len(name) for name in names}) == 1 and names[0].startswith("000000")
    for name in ("0.png", f"0{names[-1]}", names[0].replace(".png", ".npy"), "00000x.png"):
        assert image_index(name, count) is None
    assert image_index(image_name(count, count + 1), count) is None


def test_a_run_of_more_than_a_million_images(tmp_path):
    settings = {**SETTINGS, "num_images": 1_000_001}
    folder = RunFolder(tmp_path, settings)
    folder.open({})
    for index in (1_000_000, 2, 999_999):
        folder.write_image(index, pixels(index))
    assert folder.survey(1_000_001) == ({2, 999_999, 1_000_000}, [])
    assert folder.write_manifest(1_000_001) == 3
    assert list(folder.read_manifest()["images"]) == ["0000002.png", "0999999.png", "1000000.png"]


# --- what a complete run is held against -------------------------------------------------------


def remove(folder: RunFolder, path: Path) -> None:
    path.unlink()


def add(folder: RunFolder, path: Path) -> None:
    shutil.copy(path, folder.images / "cat.png")


def edit_config(folder: RunFolder, path: Path) -> None:
    file = folder.path / "config.yaml"
    file.write_text(file.read_text().replace("nfe: 10", "nfe: 9", 1))


def edit_manifest(folder: RunFolder, path: Path) -> None:
    """An image gone, and the manifest made to fit."""
    path.unlink()
    manifest = folder.read_manifest()
    del manifest["images"][path.name]
    write_json(folder.path / "manifest.json", {**manifest, "num_images": 3, "count": 3})


CHANGES = {
    remove: "images/000002.png is missing",
    add: "images/cat.png is not one of its images (move it away)",
    edit_config: "config.yaml was edited after the run",
    edit_manifest: "manifest.json does not have 4 images",
    **dict.fromkeys(
        [truncate, empty, swap, repaint], "images/000002.png was changed after the run"
    ),
}


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("harm", CHANGES)
def test_a_changed_run_is_noticed(tmp_path, harm, quick):
    folder = make(tmp_path / "run", 4, {**SETTINGS, "num_images": 4})
    folder.write_manifest(4)
    assert list(folder.changes(quick)) == []
    harm(folder, folder.image_path(2))
    assert list(folder.changes(quick)) == [CHANGES[harm]]


def test_images_that_were_not_touched_are_not_read(tmp_path, monkeypatch):
    folder = make(tmp_path, 4, {**SETTINGS, "num_images": 4})
    folder.write_manifest(4)
    for index in range(4):
        os.utime(folder.image_path(index), (0, 0))
    read = []
    sha256 = files.file_hash
    monkeypatch.setattr(store, "file_hash", lambda path: read.append(path.name) or sha256(path))
    assert list(folder.changes(quick=True)) == [] and read == ["config.yaml"]
    os.utime(folder.image_path(3))
    assert list(folder.changes(quick=True)) == [] and read[2:] == ["000003.png"]
    assert list(folder.changes()) == [] and len(read) == 3 + 5
    folder.image_path(1).write_bytes(b"")  # as a power cut leaves it
    os.utime(folder.image_path(1), (0, 0))
    assert len(list(folder.changes(quick=True))) == 1
