"""One run: the same bytes however it is made, resumed, counted, timed."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

from lml.configs import names
from lml.data.assets import ROOT
from lml.data.images import read
from lml.errors import UserError
from lml.pipelines import pixel
from lml.runs import plan, sampling
from lml.runs.records import read_config
from lml.runs.score import is_finished
from lml.runs.solver import find_steps, make_scheduler
from lml.runs.store import RunFolder
from lml.runs.writer import Writer

FILES = {"config.yaml", "grid.png", "images", "manifest.json", "timing.json"}


def wait_for(condition: Callable[[], bool], process: subprocess.Popen, seconds: float = 90) -> None:
    """Return once `condition()` holds; fail when the process ends before, or takes too long."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.005)


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of all files in a folder, by name."""
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    """Runs that were made once, to be copied or read."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def finished(script, toy, tmp_path, kept):
    """The folder of an uninterrupted run."""
    if not (kept / "finished").exists():
        outcome = script("sample", *toy, "run_dir=finished")
        assert (outcome.code, outcome.err) == (0, "")
        (tmp_path / "finished").rename(kept / "finished")
    return shutil.copytree(kept / "finished", tmp_path / "finished")


LONG = ["num_images=200", "batch_size=2", "progress=false"]  # so that it can be cut at any image


@pytest.fixture
def whole(script, toy, kept) -> dict[str, bytes]:
    """The images of an uninterrupted long run."""
    if not (kept / "long").exists():
        assert script("sample", *toy, *LONG, f"run_dir={kept / 'long'}").code == 0
    return contents(kept / "long/images")


def evaluations(monkeypatch) -> list[int]:
    """Batch sizes of the calls of networks from now on."""
    calls = []
    sample = pixel.sample

    def counting(network, *args, **kwargs):
        count = network.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
        try:
            return sample(network, *args, **kwargs)
        finally:
            count.remove()

    monkeypatch.setattr(pixel, "sample", counting)
    return calls


def test_a_run_leaves_what_the_design_says(finished):
    assert {f.name for f in finished.iterdir() if not f.name.startswith(".")} == FILES
    names = [f"{i:06d}.png" for i in range(10)]
    assert sorted(contents(finished / "images")) == names
    manifest = json.loads((finished / "manifest.json").read_text())
    assert manifest["complete"] and list(manifest["images"]) == names
    timing = json.loads((finished / "timing.json").read_text())
    assert timing["evaluations_per_image"] == 4 and timing["images"] == 10
    seconds = timing["seconds"]
    assert all(value >= 0 for value in seconds.values()) and seconds["correction"] > 0
    total = seconds.pop("total")
    assert sum(seconds.values()) == pytest.approx(total, abs=1e-3)
    with (
        Image.open(finished / "grid.png") as grid,
        Image.open(finished / "images/000005.png") as one,
    ):
        assert grid.size == (4 * 10 + 2, 3 * 10 + 2)
        assert np.array_equal(np.asarray(grid)[12:20, 12:20], np.asarray(one))
    config = (finished / "config.yaml").read_text()
    assert "run_dir=finished" in config and torch.__version__.split("+")[0] in config


def test_an_image_is_the_loop_written_out(finished, tiny_model):
    """The first block by hand: seeds, noise, a diffusers solver of its own, rounding."""
    from lml.schedulers import LMLDPMSolverMultistepScheduler

    model = pixel.find_pixel_model({"name": "tiny", "path": str(tiny_model), "patch": 1})
    network = model.load(torch.device("cpu"), torch.float32)
    scheduler = LMLDPMSolverMultistepScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        prediction_type="v_prediction",
        algorithm_type="dpmsolver++",
        solver_order=3,
        rank=2,
    )
    scheduler.set_timesteps(4)
    x = torch.stack(
        [torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    )
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t).sample, t, x).prev_sample
    images = np.stack(
        [np.asarray(Image.open(finished / f"images/{i:06d}.png")) for i in range(4)]
    ).astype(int)
    expected = np.rint(np.clip(127.5 * x.numpy() + 127.5, 0, 255)).transpose(0, 2, 3, 1)
    assert np.abs(images - expected).max() <= 1  # another memory format rounds otherwise


def test_a_complete_run_calls_no_network_and_changes_nothing(script, toy, finished, monkeypatch):
    calls = evaluations(monkeypatch)
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    monkeypatch.setattr(RunFolder, "holds", None)  # the manifest is enough
    outcome = script("sample", *toy, "run_dir=finished")
    assert (outcome.code, outcome.err, calls) == (0, "", [])
    assert {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()} == before


def test_only_blocks_that_miss_an_image_are_made_again(script, toy, finished, monkeypatch):
    before = contents(finished / "images")
    (finished / "images/000009.png").unlink()
    (finished / "images/000001.png").write_bytes(before["000001.png"][:100])
    (finished / "images/000002.png").write_bytes(before["000003.png"])
    whole = finished / "images/000000.png"
    written = whole.stat().st_mtime_ns
    calls = evaluations(monkeypatch)
    outcome = script("sample", *toy, "run_dir=finished")
    assert outcome.code == 0 and outcome.err.count("\n") == 1
    assert whole.stat().st_mtime_ns == written
    assert "made again: 000001.png, 000002.png" in outcome.err
    assert calls == [4] * 4 + [2] * 4
    assert contents(finished / "images") == before


def test_bytes_do_not_depend_on_what_does_not_determine_them(script, toy, finished, tmp_path):
    moved = tmp_path / "moved"
    os.rename(toy[0].split("=")[1], moved)
    try:
        arguments = [f"model.path={moved}", *toy[1:], "name=other", "progress=false", "device=cpu"]
        assert script("sample", *arguments, "run_dir=again").code == 0
        # ... and so it is the same run: the folder is accepted.
        assert script("sample", *arguments, "run_dir=finished").code == 0
    finally:
        os.rename(moved, toy[0].split("=")[1])
    again = tmp_path / "again"
    assert contents(again / "images") == contents(finished / "images")


def test_images_depend_on_their_own_seed(script, toy, finished, tmp_path):
    assert script("sample", *toy, "seed=4", "num_images=4", "run_dir=later").code == 0
    ours, theirs = (
        [np.asarray(Image.open(folder / f"images/{i:06d}.png")) for i in indices]
        for folder, indices in ((tmp_path / "later", range(4)), (finished, range(4, 8)))
    )
    assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_is_completed_by_the_same_command(
    script, toy, finished, tmp_path, monkeypatch, number
):
    submit, left = Writer.submit, [2]

    def interrupting(self, images):
        submit(self, images)
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Writer, "submit", interrupting)
    outcome = script("sample", *toy, "run_dir=cut")
    stored = len(contents(tmp_path / "cut/images"))
    assert outcome.code == 128 + number
    assert outcome.err == (
        f"interrupted: {stored} of 10 images stored; the same command completes the run\n"
    )
    manifest = json.loads((tmp_path / "cut/manifest.json").read_text())
    assert (manifest["complete"], manifest["count"], stored) == (False, 8, 8)
    assert not (tmp_path / "cut/timing.json").exists()
    assert script("sample", *toy, "run_dir=cut").code == 0
    assert contents(tmp_path / "cut/images") == contents(finished / "images")


def test_kill_at_a_random_moment_then_resume(script, spawn, toy, whole, tmp_path):
    arguments = [*toy, *LONG, "run_dir=killed"]
    victim = spawn("sample", *arguments)
    images = tmp_path / "killed/images"
    goal = random.randint(1, 50)
    wait_for(lambda: images.is_dir() and len(list(images.glob("[0-9]*.png"))) >= goal, victim)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    stored = contents(images)
    assert goal <= len(stored) < 200
    assert not (tmp_path / "killed/manifest.json").exists()
    outcome = script("sample", *arguments)
    assert (outcome.code, outcome.err) == (0, "")
    assert contents(images) == whole


def test_sigterm_from_outside(spawn, toy, tmp_path):
    process = spawn("sample", *toy, "num_images=5000", "batch_size=2", "run_dir=cut", new=True)
    images = tmp_path / "cut/images"
    wait_for(lambda: images.is_dir() and len(list(images.glob("[0-9]*.png"))) >= 5, process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    stored = len(contents(images))
    assert f"interrupted: {stored} of 5000 images stored" in err and "Traceback" not in err


def test_two_processes_make_the_bytes_of_one(spawn, toy, finished, tmp_path):
    two = spawn("sample", *toy, "run_dir=two", processes=2)
    _, err = two.communicate(timeout=180)
    assert two.returncode == 0, err
    assert contents(tmp_path / "two/images") == contents(finished / "images")
    assert (tmp_path / "two/grid.png").read_bytes() == (finished / "grid.png").read_bytes()
    timing = json.loads((tmp_path / "two/timing.json").read_text())
    assert (timing["processes"], timing["images"], timing["evaluations_per_image"]) == (2, 10, 4)
    assert json.loads((tmp_path / "two/manifest.json").read_text())["complete"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_dies_is_named_and_the_same_command_completes_the_run(
    script, spawn, toy, whole, tmp_path, rank
):
    """kill -9 of one of two: torchrun names it, the other ends at once, and nothing is lost."""
    arguments = [*toy, *LONG, "run_dir=two"]
    two = spawn("sample", *arguments, processes=2)
    images = tmp_path / "two/images"
    wait_for(lambda: images.is_dir() and len(list(images.glob("[0-9]*.png"))) >= 4, two)
    os.kill(process_of_rank(two, rank), signal.SIGKILL)
    start = time.monotonic()
    _, err = two.communicate(timeout=60)
    assert two.returncode != 0 and time.monotonic() - start < 20
    assert re.search(rf"rank +: {rank} .*\n *exitcode +: -9 ", err), err
    assert re.search(rf"^\[rank {1 - rank}\] (interrupted|another process)", err, re.M), err
    stored = contents(images)
    assert 4 <= len(stored) < 200
    outcome = script("sample", *arguments)
    assert outcome.code == 0 and outcome.err == ""
    assert contents(images) == whole


def process_of_rank(launcher: subprocess.Popen, rank: int) -> int:
    """The id of the process that torchrun started as number `rank`."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            variables = (path / "environ").read_bytes().split(b"\0")
            parent = int((path / "stat").read_text().rpartition(") ")[2].split()[1])
        except OSError:
            continue
        if parent == launcher.pid and f"RANK={rank}".encode() in variables:
            return int(path.name)
    raise AssertionError(f"torchrun has no process of rank {rank}")


def test_a_process_that_fails_names_its_rank(ranks, toy, tmp_path, tiny_model):
    path = poisoned(tiny_model, tmp_path / "nan")
    outcome = ranks(ROOT / "scripts/sample.py", *toy, f"model.path={path}", "run_dir=two")
    assert outcome.code != 0
    lines = [line for line in outcome.err.splitlines() if line.startswith("[rank ")]
    assert any("NaN or inf at step 1 of 4" in line for line in lines), outcome.err
    assert not contents(tmp_path / "two/images")


def poisoned(model: Path, path: Path) -> Path:
    """The model, with a NaN among its weights."""
    from diffusers import DDPMPipeline

    pipeline = DDPMPipeline.from_pretrained(model)
    pipeline.unet.conv_out.bias.data[0] = float("nan")
    pipeline.save_pretrained(path)
    return path


def test_nan_stops_the_run_and_stores_nothing_of_the_batch(script, toy, tmp_path, monkeypatch):
    """The network goes wrong in the second batch, at its third step."""
    sample, batches = pixel.sample, []

    def failing(network, *args, **kwargs):
        calls = []
        batches.append(calls)

        def spoil(_, inputs, output):
            calls.append(1)
            if len(batches) == 2 and len(calls) == 3:
                output[0][1, 0, 0, 0] = float("inf")

        handle = network.register_forward_hook(spoil)
        try:
            return sample(network, *args, **kwargs)
        finally:
            handle.remove()

    monkeypatch.setattr(pixel, "sample", failing)
    outcome = script("sample", *toy, "run_dir=run")
    assert outcome.code == 2 and outcome.err.count("\n") == 1
    assert "step 3 of 4, timestep 500" in outcome.err.replace("499", "500")
    assert len(batches[1]) == 3
    assert sorted(contents(tmp_path / "run/images")) == [f"{i:06d}.png" for i in range(4)]
    monkeypatch.undo()


def scheduler(solver: str, grid: str = "default"):
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose("sample", [f"solver={solver}", "lml=off", "model=gaussian", f"grid={grid}"])
    cfg = OmegaConf.to_container(cfg, resolve=True)
    cfg["model"]["scheduler"] = {"_target_": "diffusers.DDPMScheduler"}
    return make_scheduler(cfg, pixel.find_pixel_model(cfg["model"]))


REACHABLE = {
    "heun": range(1, 40, 2),
    "pndm": [1, *range(3, 40)],
    "authors_pndm": range(13, 40),  # four steps or more
}


@pytest.mark.parametrize(
    "solver",
    sorted(
        set(names("solver"))
        - {"ipndm_diffusers", "authors_fm_euler", "authors_lml_euler"}
        - {"flow_euler", "flow_euler_calibrated"}
    ),
)
def test_nfe_is_met_exactly_or_refused_with_the_nearest(solver):
    made = scheduler(solver)
    for nfe in range(1, 25):
        reachable = REACHABLE.get(solver, range(1, 40))
        if nfe in reachable:
            steps = find_steps(made, nfe, solver)
            made.set_timesteps(steps)
            assert len(made.timesteps) == nfe
        else:
            below = max((n for n in reachable if n < nfe), default=None)
            above = min(n for n in reachable if n > nfe)
            nearest = f"{below} or {above}" if below else str(above)
            with pytest.raises(UserError, match=f"^nfe={nfe}: {solver} can make {nearest}$"):
                find_steps(made, nfe, solver)


def test_the_models_schedule_is_taken_and_its_grid_is_not():
    """Heun's own betas and DDPM's leading grid are what diffusers' from_config would hand on."""
    made = scheduler("heun")
    assert made.config.beta_start == pytest.approx(1e-4) and made.config.beta_end == 0.02
    assert made.config.timestep_spacing == "linspace"
    assert scheduler("heun", grid="trailing").config.timestep_spacing == "trailing"
    assert scheduler("ddim").config.timestep_spacing == "leading"


def test_stochastic_solvers_draw_from_the_images_own_generators(script, toy, tmp_path):
    arguments = [*toy, "solver=ddim", "solver.step.eta=1.0"]
    assert script("sample", *arguments, "run_dir=a").code == 0
    assert script("sample", *arguments, "solver.step.eta=0.0", "run_dir=b").code == 0
    whole = contents(tmp_path / "a/images")
    assert not set(whole.values()) & set(contents(tmp_path / "b/images").values())
    for name in ("000001.png", "000006.png"):
        (tmp_path / "a/images" / name).unlink()
    assert script("sample", *arguments, "run_dir=a").code == 0
    assert contents(tmp_path / "a/images") == whole


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_other_types_make_nearly_the_same_images(script, toy, finished, tmp_path, dtype):
    assert script("sample", *toy, f"dtype={dtype}", "run_dir=run").code == 0
    ours, theirs = (
        np.stack([np.asarray(Image.open(f)) for f in sorted((folder / "images").iterdir())])
        for folder in (tmp_path / "run", finished)
    )
    error = np.abs(ours.astype(int) - theirs).mean()
    assert error < {"bfloat16": 8, "float16": 1, "float64": 0.01}[dtype]


def test_space_to_depth_is_the_network_on_blocks(tiny_unet):
    torch.manual_seed(0)
    network = tiny_unet(sample_size=4, in_channels=12, out_channels=12).eval()
    wrapped = pixel.SpaceToDepth(network, 2)
    assert wrapped.config.in_channels == 3 and pixel.size(wrapped) == (8, 8)
    images = torch.randn(2, 3, 8, 8)
    blocks = torch.stack(
        [images[:, c, i::2, j::2] for c in range(3) for i in (0, 1) for j in (0, 1)], 1
    )
    expected = network(blocks, 7).sample
    out = wrapped(images, 7).sample
    again = torch.stack(
        [out[:, c, i::2, j::2] for c in range(3) for i in (0, 1) for j in (0, 1)], 1
    )
    torch.testing.assert_close(again, expected)
    fast = wrapped(images.to(memory_format=torch.channels_last), 7, return_dict=False)[0]
    torch.testing.assert_close(fast, out)


def test_to_uint8_rounds_half_to_even_and_clamps():
    x = torch.tensor([-2.0, -1.0, 0.0, 1 / 127.5, 1.0, 3.0])
    assert pixel.to_uint8(x).tolist() == [0, 0, 128, 128, 255, 255]
    assert pixel.to_uint8(torch.linspace(-1, 1, 256)).tolist() == list(range(256))
    assert pixel.to_uint8(torch.tensor([0.5], dtype=torch.float64)).dtype == torch.uint8


def test_a_reference_run_is_made_once_and_without_lml(script, toy, tmp_path, monkeypatch):
    metric = "metrics=[convergence]"
    outcome = script("sample", *toy, metric, "metrics.convergence.nfe=20", "run_dir=a")
    assert outcome.code == 0, outcome.err
    (reference,) = (tmp_path / "outputs/reference").iterdir()
    config = (reference / "config.yaml").read_text()
    assert "nfe: 20" in config and "rank: 0" in config
    metrics = json.loads((tmp_path / "a/metrics.json").read_text())
    assert 0 < metrics["convergence"]["value"]["rmse"] < 1
    assert "convergence/rmse" in outcome.out
    calls = evaluations(monkeypatch)
    more = ("lml.rank=0", metric, "metrics.convergence.nfe=20", "run_dir=b")
    assert script("sample", *toy, *more).code == 0
    assert sum(calls) == 10 * 4  # the run at hand, and no reference
    assert len(list((tmp_path / "outputs/reference").iterdir())) == 1


@pytest.mark.parametrize("solver", ["authors_dpm_lm", "authors_ddim_lm", "unipc"])
@pytest.mark.parametrize("tool", ["sample", "evaluate"])
def test_the_solver_of_a_reference_is_what_the_command_line_makes_of_its_name(
    script, toy, tmp_path, tool, solver
):
    """A sweep that is scored, and a run that is scored later."""
    options = ["metrics.convergence.nfe=8", f"metrics.convergence.solver={solver}"]
    assert script("sample", *toy, "run_dir=run").code == 0
    run = [*toy, "run_dir=run"] if tool == "sample" else ["run_dir=run", "threads=1"]
    outcome = script(tool, *run, "metrics=convergence", *options)
    assert (outcome.code, outcome.err) == (0, "")
    (reference,) = (tmp_path / "outputs/reference").iterdir()
    made = read_config(reference)
    fine = [*toy, f"solver={solver}", "nfe=8", "lml=off", "run_dir=fine"]
    assert script("sample", *fine).code == 0
    asked = read_config(tmp_path / "fine")
    assert made["solver"] == asked["solver"] and made["settings"] == asked["settings"]


def test_a_reference_that_another_process_is_making_is_waited_for(script, toy, tmp_path):
    """As in a sweep whose jobs run side by side; a run itself is still refused."""
    metric = ["metrics=[convergence]", "metrics.convergence.nfe=20"]
    assert script("sample", *toy, *metric, "run_dir=a").code == 0
    (reference,) = (tmp_path / "outputs/reference").iterdir()
    held, released = threading.Event(), threading.Event()

    def hold() -> None:
        with FileLock(reference / ".lock"):
            held.set()
            time.sleep(1)
            released.set()

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    outcome = script("sample", *toy, *metric, "lml.rank=1", "run_dir=b")
    assert (outcome.code, outcome.err) == (0, "") and released.is_set()
    holder.join()
    with FileLock(tmp_path / "b/.lock"):
        outcome = script("sample", *toy, "lml.rank=1", "run_dir=b")
    assert outcome.code == 2 and "another process is writing to it" in outcome.err


def test_evaluate_wants_a_complete_run(script, finished):
    (finished / "manifest.json").unlink()
    outcome = script("evaluate", "run_dir=finished", "metrics=convergence")
    assert outcome.code == 2
    assert outcome.err == (
        "run_dir=finished: not complete; finish the run, or give images=finished/images\n"
    )


def test_evaluate_scores_a_run_and_a_plain_folder(script, toy, finished, tmp_path):
    convergence = ["metrics=convergence", "metrics.convergence.nfe=20", "threads=1"]
    outcome = script("evaluate", "run_dir=finished", *convergence)
    assert outcome.code == 0, outcome.err
    in_run = json.loads((finished / "metrics.json").read_text())["convergence"]["value"]
    (reference,) = (tmp_path / "outputs/reference").glob("*/images")
    arguments = [f"metrics.convergence.reference={reference}", "out=scores.json"]
    outcome = script("evaluate", f"images={finished / 'images'}", *convergence, *arguments)
    assert outcome.code == 0, outcome.err
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["convergence"]["value"] == in_run


def repaint(run: Path) -> None:
    Image.new("RGB", (8, 8), "red").save(run / "images/000004.png")


def edit_seed(run: Path) -> None:
    file = run / "config.yaml"
    file.write_text(file.read_text().replace("\nseed: 0\n", "\nseed: 1\n"))


@pytest.mark.parametrize(
    ("harm", "line"),
    [
        (lambda run: (run / "images/000004.png").unlink(), "images/000004.png is missing; "),
        (repaint, "images/000004.png was changed after the run; "),
        (
            lambda run: shutil.copy(run / "grid.png", run / "images/000010.png"),
            "images/000010.png is not one of its images (move it away); ",
        ),
        (edit_seed, "config.yaml was edited after the run (manifest.json has another config_sha"),
    ],
)
def test_scores_are_sealed_only_of_the_runs_own_images(script, toy, finished, tmp_path, harm, line):
    shutil.copytree(finished / "images", tmp_path / "others")
    asked = ["metrics=convergence", "metrics.convergence.reference=others", "threads=1"]
    assert script("evaluate", "run_dir=finished", *asked).code == 0
    before = (finished / "metrics.json").read_bytes()
    harm(finished)
    for out in ([], ["out=scores.json"]):
        outcome = script("evaluate", "run_dir=finished", *asked, *out)
        assert outcome.code == 2 and outcome.err.startswith(f"run_dir=finished: {line}"), outcome
        assert outcome.err.count("\n") == 1 and outcome.out == ""
    assert (finished / "metrics.json").read_bytes() == before
    assert not (tmp_path / "scores.json").exists()


@pytest.mark.parametrize("tool", ["sample", "evaluate", "evaluate apart"])
def test_what_is_no_file_of_metrics_is_told_before_anything_is_made(
    script, toy, finished, tmp_path, tool, monkeypatch
):
    calls = evaluations(monkeypatch)
    file, asked = finished / "metrics.json", ["metrics=convergence", "metrics.convergence.nfe=6"]
    if tool == "evaluate apart":
        file, asked = tmp_path / "notes.md", [*asked, "out=notes.md"]
    file.write_text('{"fd_cifar": {"value": 1},}')
    run = [*toy] if tool == "sample" else ["threads=1"]
    outcome = script(tool.split()[0], *run, "run_dir=finished", *asked)
    assert outcome.code == 2 and outcome.err.count("\n") == 1 and not calls, outcome
    assert f"{file.name}: not a file of metrics (" in outcome.err
    assert file.read_text() == '{"fd_cifar": {"value": 1},}'
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize("images", ["finished/images", "finished/images/", "link"])
def test_a_run_goes_on_after_its_images_were_scored(script, toy, finished, tmp_path, images):
    """What is scored as a plain folder stays what it is: images alone."""
    (tmp_path / "link").symlink_to(finished / "images")
    convergence = ["metrics=convergence", "metrics.convergence.reference=finished/images"]
    outcome = script("evaluate", f"images={images}", *convergence, "threads=1")
    assert (outcome.code, outcome.err) == (0, "")
    scores = tmp_path / ("link" if images == "link" else "finished/images")
    scores = json.loads(scores.with_name(f"{scores.name}.metrics.json").read_text())
    assert scores["convergence"]["value"]["rmse"] == 0
    assert set(contents(finished / "images")) == {f"{i:06d}.png" for i in range(10)}
    outcome = script("sample", *toy, "run_dir=finished")
    assert (outcome.code, outcome.err) == (0, "")
    # ... and goes when the images do
    assert script("sample", *toy, "run_dir=finished", "overwrite=true").code == 0
    assert not (finished / "images.metrics.json").exists()


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        ("evaluate", ["images=finished/images", "out=finished/images/scores.json"]),
        ("evaluate", ["run_dir=finished", "out=finished/images/scores.json"]),
        ("evaluate", ["run_dir=finished", "out=finished/images/000001.png"]),
        ("evaluate", ["run_dir=finished", "out=finished/config.yaml"]),
        # a score of a plain folder has no seal
        ("evaluate", ["images=finished/images", "out=finished/metrics.json"]),
        ("export", ["layout=t2i_compbench", "run_dir=finished", "out=finished/images"]),
        ("export", ["layout=t2i_compbench", "run_dir=finished", "out=finished/images/new"]),
        ("tabulate", ["experiment=table1_cifar10", "out=finished/images"]),
        ("benchmark", ["parts=[]", "out=finished/images/ratios.json"]),
        ("train", ["run_dir=finished/images/model", "budget.images=1"]),
        ("sample", ["model=gaussian", "metrics=none", "run_dir=finished/images/new"]),
    ],
)
def test_no_tool_writes_among_a_runs_files(script, finished, tool, arguments):
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    outcome = script(tool, *arguments)
    assert outcome.code == 2 and outcome.err.count("\n") == 1, outcome
    key = "run_dir" if tool in ("train", "sample") else "out"
    assert re.match(rf"{key}=finished/.*: among the files of the run in .*/finished; ", outcome.err)
    assert {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()} == before


# --- what names a run --------------------------------------------------------------------------


def raise_version(monkeypatch):
    monkeypatch.setattr(plan, "METHOD_VERSION", plan.METHOD_VERSION + 1)


def forget_version(monkeypatch):
    """A run as it was named before there were versions."""
    determine = plan.determine

    def older(*args):
        return {k: v for k, v in determine(*args).items() if k != "method_version"}

    monkeypatch.setattr(plan, "determine", older)


@pytest.mark.parametrize("change", [raise_version, forget_version])
def test_a_run_of_another_version_of_the_method_is_another_run(
    script, toy, tmp_path, monkeypatch, change
):
    with monkeypatch.context() as patch:
        change(patch)
        for options in ([], ["lml=off"]):
            assert script("sample", *toy, *options, "name=study").code == 0
        assert script("sample", *toy, "run_dir=run").code == 0
    calls = evaluations(monkeypatch)
    outcome = script("sample", *toy, "run_dir=run")
    assert outcome.code == 2 and outcome.err.count("\n") == 1 and not calls
    assert "method_version=" in outcome.err and "overwrite=true" in outcome.err
    outcome = script("sample", *toy, "lml=off", "name=study")
    assert (outcome.code, outcome.err, calls) == (0, "", [])
    outcome = script("sample", *toy, "name=study")
    assert (outcome.code, outcome.err, sum(calls)) == (0, "", 10 * 4)
    assert len(list((tmp_path / "outputs/study").glob("*/manifest.json"))) == 3
    # Its images are still images. What needs their way again is refused.
    scored = ["metrics=convergence", "metrics.convergence.reference=run/images", "threads=1"]
    outcome = script("evaluate", "run_dir=run", *scored)
    assert (outcome.code, outcome.err) == (0, "")
    outcome = script("evaluate", "run_dir=run", "metrics=correction_cosine", "threads=1")
    assert outcome.code == 2 and outcome.err.count("\n") == 1
    assert outcome.err.startswith("run_dir=run: its images can't be made again now (method_ver")
    assert script("sample", *toy, "run_dir=run", "overwrite=true").code == 0
    assert script("evaluate", "run_dir=run", "metrics=correction_cosine", "threads=1").code == 0


def test_overwriting_makes_a_finished_run_again(script, toy, finished, monkeypatch):
    before = contents(finished / "images")
    calls = evaluations(monkeypatch)
    for _ in range(2):
        outcome = script("sample", *toy, "run_dir=finished", "overwrite=true")
        assert (outcome.code, outcome.err, sum(calls)) == (0, "", 10 * 4)
        assert "images/s" in outcome.out and contents(finished / "images") == before
        calls.clear()


def broken_weights(tiny_model: Path, folder: Path) -> list[str]:
    shutil.copytree(tiny_model, folder / "cut")
    file = folder / "cut/unet/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    return [f"model.path={folder / 'cut'}"]


def nan_weights(tiny_model: Path, folder: Path) -> list[str]:
    return [f"model.path={poisoned(tiny_model, folder / 'nan')}"]


def foreign_file(tiny_model: Path, folder: Path) -> list[str]:
    (folder / "finished/images/mine.png").write_text("mine")
    return []


def no_attention(tiny_model: Path, folder: Path) -> list[str]:
    return ["attention=cudnn"]


@pytest.mark.parametrize("harm", [broken_weights, nan_weights, foreign_file, no_attention])
@pytest.mark.parametrize("same", [True, False])
def test_what_cannot_be_made_replaces_nothing(script, toy, finished, tiny_model, harm, same):
    arguments = harm(tiny_model, finished.parent)
    arguments += [] if same else ["seed=3"]
    (finished / "latents").mkdir()
    (finished / "latents/mine.npy").write_text("mine")
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    outcome = script("sample", *toy, "run_dir=finished", "overwrite=true", *arguments)
    assert outcome.code == 2 and outcome.err.count("\n") == 1, outcome
    assert {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()} == before
    (finished / "images/mine.png").unlink(missing_ok=True)
    outcome = script("sample", *toy, "run_dir=finished", "overwrite=true", "seed=3")
    assert (outcome.code, outcome.err) == (0, "")
    assert (finished / "latents/mine.npy").read_text() == "mine"


def test_an_interruption_before_the_first_batch_replaces_nothing(
    script, toy, finished, monkeypatch
):
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    monkeypatch.setattr(pixel, "sample", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
    outcome = script("sample", *toy, "run_dir=finished", "overwrite=true", "seed=3")
    assert (outcome.code, outcome.err) == (130, "interrupted\n")
    assert {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()} == before


def test_two_processes_overwrite_together(ranks, toy, finished, tmp_path):
    """Also when the second has nothing to make."""
    arguments = [*toy, "num_images=4", "run_dir=finished", "overwrite=true"]
    outcome = ranks(ROOT / "scripts/sample.py", *arguments)
    assert outcome.code == 0, outcome.err
    assert sorted(contents(finished / "images")) == [f"{i:06d}.png" for i in range(4)]
    assert json.loads((finished / "manifest.json").read_text())["complete"]


def test_an_edited_config_is_neither_recorded_nor_gone_on_with(script, toy, finished):
    config = finished / "config.yaml"
    whole = config.read_text()
    config.write_text(whole.replace("\nnfe: 4\n", "\nnfe: 5\n"))
    assert config.read_text() != whole
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    outcome = script("sample", *toy, "run_dir=finished")
    assert outcome.code == 2 and outcome.err == (
        "run_dir=finished: config.yaml was edited after the run; restore it, or use "
        "overwrite=true to make the run anew\n"
    )
    assert {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()} == before
    (finished / "images/000002.png").unlink()  # nor when there is something to make
    assert script("sample", *toy, "run_dir=finished").code == 2
    assert script("sample", *toy, "run_dir=finished", "overwrite=true").code == 0
    assert "\nnfe: 4\n" in config.read_text()


def test_a_score_of_other_options_is_not_the_one_that_is_asked_for(script, toy, tmp_path):
    """Whichever tool made it."""
    asked = ["metrics=convergence", "metrics.convergence.nfe=6"]
    assert script("sample", *toy, *asked, "run_dir=run").code == 0
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    folder = RunFolder(tmp_path / "run", read_config("run")["settings"])
    config = read_config("run")["metrics"]
    assert is_finished(folder, config)
    assert script("evaluate", "run_dir=run", *asked, "threads=1").code == 0
    again = json.loads((tmp_path / "run/metrics.json").read_text())
    again["convergence"]["seconds"] = metrics["convergence"]["seconds"]
    again["convergence"]["seal"] = metrics["convergence"]["seal"]
    assert again == metrics and is_finished(folder, config)
    other = ["metrics=convergence", "metrics.convergence.nfe=8"]
    assert script("evaluate", "run_dir=run", *other, "threads=1").code == 0
    assert not is_finished(folder, config)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a C++ compiler on the path")
def test_compile_makes_nearly_the_same_images(script, toy, finished, tmp_path):
    outcome = script("sample", *toy, "compile=true", "num_images=4", "run_dir=run")
    assert outcome.code == 0, outcome.err
    for i in range(4):
        ours, theirs = (
            np.asarray(Image.open(folder / f"images/{i:06d}.png")).astype(int)
            for folder in (tmp_path / "run", finished)
        )
        assert np.abs(ours - theirs).max() <= 1


def test_a_reference_whose_solver_does_not_fit_the_model_is_named_by_its_key(script):
    flow = ["model=gaussian_flow", "solver=flow_euler", "num_images=1", "threads=1", "nfe=2"]
    flow += ["metrics=[convergence]", "metrics.convergence.nfe=4"]
    outcome = script("sample", *flow)
    assert outcome.code == 2 and outcome.err.count("\n") == 1
    assert outcome.err.startswith("metrics.convergence.solver=dpmsolverpp: not for gaussian_flow")
    assert script("sample", *flow, "metrics.convergence.solver=flow_euler").code == 0


def test_runs_of_a_sweep_share_the_network(script, toy, tmp_path, monkeypatch):
    """Loaded once, and counted and timed afresh in every run."""
    loads = []
    load = pixel.PixelModel.load
    monkeypatch.setattr(
        pixel.PixelModel, "load", lambda *args, **kwargs: loads.append(1) or load(*args, **kwargs)
    )
    sampling._loaded.clear()
    assert script("sample", "-m", *toy, "seed=0,1", "name=sweep").code == 0
    assert len(loads) == 1
    timings = [json.loads(f.read_text()) for f in tmp_path.glob("outputs/sweep/*/timing.json")]
    assert [timing["evaluations_per_image"] for timing in timings] == [4, 4]
    assert not sampling._loaded[next(iter(sampling._loaded))].network._forward_hooks
    assert script("sample", *toy, "dtype=bfloat16", "name=other").code == 0
    assert len(loads) == 2


def test_images_of_another_size(script, toy, tmp_path):
    """A network of convolutions takes any; its own is the same run as when nothing is said."""
    for size in ("8", "null", "16"):
        assert script("sample", *toy, "num_images=2", f"model.sample_size={size}").code == 0
    runs = list((tmp_path / "outputs/cifar10-dpmsolverpp").iterdir())
    sizes = [Image.open(run / "images/000000.png").size for run in runs]
    assert sorted(sizes) == [(8, 8), (16, 16)]
    embedded = pixel.find_pixel_model(
        {"name": "cifar10", "path": "assets/cifar10", "patch": 1, "sample_size": 64}
    )
    assert pixel.size(embedded.load(torch.device("cpu"), torch.float32)) == (64, 64)
    with pytest.raises(UserError, match=r"model\.sample_size=68: expected null or a multiple of 8"):
        pixel.find_pixel_model({**embedded.config, "sample_size": 68})


def test_seeds_that_begin_again(script, tmp_path):
    """seeds=2: image i is made from seed + i % 2, as if it stood alone."""
    arguments = ["model=gaussian", "model.network.sample_size=4", "metrics=none", "nfe=3"]
    arguments += ["num_images=5", "batch_size=3", "threads=1", "seed=7"]
    for name, more in (("each", []), ("two", ["seeds=2"]), ("one", ["seeds=1"])):
        assert script("sample", *arguments, *more, f"run_dir={name}").code == 0
    images = {
        name: [read(tmp_path / name / f"images/{i:06d}.png").tolist() for i in range(5)]
        for name in ("each", "two", "one")
    }
    first, second = images["each"][:2]
    assert images["two"] == [first, second, first, second, first]
    assert images["one"] == [first] * 5 and len(set(map(str, images["each"]))) == 5
    outcome = script("sample", *arguments, "seeds=3", "run_dir=two")
    assert outcome.code == 2 and "seeds" in outcome.err
