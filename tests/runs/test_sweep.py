"""What goes on around the cells of a sweep: before it, after it, when it is cut, and a search."""

from __future__ import annotations

import csv
import itertools
import json
import os
import re
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from omegaconf import OmegaConf

from lml import configs
from lml.cli import hydra_sweeps
from lml.cli.messages import explain
from lml.cli.values import complete
from lml.correction import METHOD_VERSION
from lml.data.assets import ROOT
from lml.errors import UserError
from lml.pipelines import find_model
from lml.runs import plan as planning
from lml.runs import sample
from lml.runs.progress import Progress
from lml.runs.sweep import Sweep
from lml.runs.sweep.objective import find_objective, read_objective
from lml.runs.worker import Worker

TOY = [
    "-m",
    "name=study",
    "model=gaussian",
    "model.network.sample_size=4",
    "metrics=none",
    "num_images=6",
    "batch_size=4",
    "nfe=4",
    "threads=1",
]
SCORED = ["metrics=[convergence]", "metrics.convergence.nfe=6"]


def kept(tmp_path: Path) -> dict:
    return yaml.safe_load((tmp_path / "outputs/study/sweep.yaml").read_text())


def statuses(tmp_path: Path) -> list[str]:
    return [cell["status"] for cell in kept(tmp_path)["cells"]]


def runs(tmp_path: Path) -> set[str]:
    return {path.parent.name for path in tmp_path.glob("outputs/study/*/manifest.json")}


@pytest.fixture
def made(monkeypatch) -> list[dict]:
    """The configs of the cells that are run from now on."""
    configs = []
    run = sample.run

    def counting(cfg, observer=None):
        configs.append(OmegaConf.to_container(cfg, resolve=True))
        return run(cfg, observer)

    monkeypatch.setattr("lml.runs.sample.run", counting)
    return configs


# --- before it ---------------------------------------------------------------------------------


def test_refused_cells_are_skipped_and_the_same_run_is_made_once(script, tmp_path, made):
    axes = ["solver=ddim,pndm", "nfe=2", "lml=off", "lml.damping=8,16"]
    outcome = script("sample", *TOY, *axes)
    assert outcome.code == 0
    assert re.fullmatch(
        r".*solver=pndm .*lml.damping=8 \(and 1 more\): nfe=2: pndm can make 1 or 3; skipped\n",
        outcome.err,
    )
    assert len(made) == 1  # without LML its damping is nothing
    assert outcome.out.startswith("study: 3 cells, 2 refused; to make: 6 images, 12 evaluations, ")
    cells = kept(tmp_path)["cells"]
    (name,) = runs(tmp_path)
    assert [cell["run"] for cell in cells] == [name, None, None]
    options = yaml.safe_load((ROOT / "configs/lml/default.yaml").read_text())
    same = {argument for argument in TOY[1:] if argument != "nfe=4"}
    overrides = set(cells[1].pop("overrides"))
    assert overrides == {*same, "solver=pndm", "nfe=2", "lml=off", "lml.damping=8"}
    assert cells[1] == {
        "run": None,
        "solver": "pndm",
        "grid": "default",
        "lml": {**options, "rank": 0, "damping": 8, "method_version": METHOD_VERSION},
        "nfe": 2,
        "seed": 0,
        "num_images": 6,
        "model": "gaussian",
        "dtype": "float32",
        "status": "refused",
        "reason": "nfe=2: pndm can make 1 or 3",
    }


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            "device=cuda:99 seed=0,1",
            r".*\(and 1 more\): device=cuda:99: not available; use auto .*; skipped",
        ),
        ("lml.dampin=1,2", "lml.dampin=1: unknown key; nearest: damping, damping_scale"),
        ("solver=ddim,dimm", "solver=dimm: unknown; nearest: ddim, pndm, deis"),
        ("nfe=3,x", ".*"),
        ("protocol=ful", "protocol=ful: unknown; nearest: full"),
        ("sweep=damping_rank", "sweep.objective=null: expected metrics=NAME"),
        ("sweep=damping_rank sweep.objective=fid", "sweep.objective=fid: not one of the run's.*"),
    ],
)
def test_nothing_is_made_when_there_is_nothing_to_make(script, tmp_path, arguments, line):
    outcome = script("sample", *TOY, *arguments.split())
    if line == ".*":  # a value that one cell refuses is another matter
        assert outcome.code == 0 and statuses(tmp_path) == ["done"]
        assert "nfe=x: expected a whole number of at least 1; skipped" in outcome.err
        return
    assert outcome.code == 2 and re.fullmatch(f"{line}\n", outcome.err), outcome.err
    assert not (tmp_path / "outputs/study").exists()


def test_finished_cells_are_skipped_and_a_missing_metric_is_all_that_is_made(
    script, tmp_path, made
):
    axes = ["seed=0,100"]
    assert script("sample", *TOY, *axes).code == 0
    assert len(made) == 2
    outcome = script("sample", *TOY, *axes)
    assert (outcome.code, outcome.err, len(made)) == (0, "", 2)
    assert outcome.out == "study: 2 cells, 2 finished; nothing to make\n"
    timings = {path: path.stat().st_mtime_ns for path in tmp_path.glob("outputs/study/*/timing.*")}
    outcome = script("sample", *TOY, *axes, *SCORED)
    assert outcome.out.startswith("study: 2 cells; to score: 2\n") and outcome.code == 0
    assert len(made) == 4 and timings == {path: path.stat().st_mtime_ns for path in timings}
    for again, count in ((SCORED, 4), ([*SCORED[:1], "metrics.convergence.nfe=7"], 6)):
        assert script("sample", *TOY, *axes, *again).code == 0
        assert len(made) == count  # a metric that is asked for in another way is another one
    manifest = next(tmp_path.glob("outputs/study/*/manifest.json"))
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "complete": False}))
    assert script("sample", *TOY, *axes).code == 0 and len(made) == 7


def edit_value(run: Path) -> None:
    file = run / "metrics.json"
    scores = json.loads(file.read_text())
    scores["convergence"]["value"]["rmse"] = 0.001
    file.write_text(json.dumps(scores))


def remove_seal(run: Path) -> None:
    edit_value(run)
    file = run / "metrics.json"
    scores = json.loads(file.read_text())
    del scores["convergence"]["seal"]
    file.write_text(json.dumps(scores))


def remove_images(run: Path) -> None:
    for index in range(5):
        (run / f"images/{index:06d}.png").unlink()


def repaint(run: Path) -> None:
    (run / "images/000001.png").write_bytes((run / "images/000002.png").read_bytes())


FOUND = [*TOY, *SCORED, "lml.damping=4,8", "sweep=damping_rank", "sweep.num_images=2"]
FOUND += ["sweep.objective=convergence/rmse", "lml.rank=1", "seed=0", "nfe=3"]


@pytest.fixture(scope="module")
def searched(tmp_path_factory) -> Path:
    """A search that was made once, to be copied."""
    return tmp_path_factory.mktemp("searched")


@pytest.mark.parametrize("harm", [edit_value, remove_seal, remove_images, repaint])
def test_a_cell_that_was_changed_is_not_finished_and_is_made_again(
    script, tmp_path, made, searched, harm
):
    if not (searched / "outputs").exists():
        outcome = script("sample", *FOUND)
        assert outcome.code == 0, outcome.err
        (tmp_path / "outputs").rename(searched / "outputs")
        (searched / "best").write_text(outcome.out.splitlines()[-1])
    best = (searched / "best").read_text()
    shutil.copytree(searched / "outputs", tmp_path / "outputs")
    tried = values(tmp_path, "rmse", num_images=6)
    worst = max(tried, key=tried.get)
    (run,) = {
        cell["run"]
        for cell in kept(tmp_path)["cells"]
        if (cell["lml"]["rank"], cell["lml"]["damping"], cell["num_images"]) == (*worst, 6)
    }
    folder = tmp_path / "outputs/study" / run
    before = values(tmp_path, "rmse")
    harm(folder)
    made.clear()
    outcome = script("sample", *FOUND)
    assert outcome.code == 0 and "2 cells, 1 finished" in outcome.out and len(made) == 1
    assert outcome.out.splitlines()[-1] == best and values(tmp_path, "rmse") == before
    plan = script("sample", *FOUND).out.splitlines()[0]
    assert plan.endswith("2 images each with the best and with lml=off")


@pytest.mark.parametrize("harm", [edit_value, remove_seal])
def test_nothing_is_chosen_by_a_score_without_its_seal(script, tmp_path, harm):
    assert script("sample", *TOY, *SCORED, "nfe=3").code == 0
    (run,) = (path.parent for path in tmp_path.glob("outputs/study/*/metrics.json"))
    cfg = {"sweep": {"objective": "convergence/rmse"}, "metrics": {"convergence": {}}}
    assert read_objective(cfg, run) > 0.001
    harm(run)
    with pytest.raises(UserError, match=r"metrics\.json: convergence (has no|was edited)"):
        read_objective(cfg, run)


def test_what_it_takes_is_told_at_the_rate_of_the_newest_runs(script, tmp_path, monkeypatch):
    measured = []
    measure = Worker.measure
    monkeypatch.setattr(Worker, "measure", lambda self: measured.append(1) or measure(self))
    outcome = script("sample", *TOY, "nfe=4,6")
    pattern = r"study: 2 cells; to make: 12 images, 60 evaluations, about \d+ s at [\d,]+ eval"
    assert re.match(pattern, outcome.out) and len(measured) == 1
    for path in tmp_path.glob("outputs/study/*/timing.json"):
        timing = json.loads(path.read_text())
        timing["images_per_second"] = 0.5 / timing["evaluations_per_image"]
        path.write_text(json.dumps(timing))
    outcome = script("sample", *TOY, "nfe=4,6", "seed=0,100", "lml=default,off")
    assert outcome.out.startswith(
        "study: 8 cells, 2 finished; to make: 36 images, 180 evaluations, "
        "about 6 min at 0.5 evaluations/s\n"
    )
    assert len(measured) == 1
    assert script("sample", *TOY, "nfe=3", "dtype=float64").code == 0
    assert len(measured) == 2  # another type takes another time


@pytest.mark.parametrize("option", ["lml.damping=[8,8,8,8]", "lml.length=[1,1,1,0.9]"])
def test_the_rate_is_measured_where_each_step_has_an_option_of_its_own(script, option):
    """It is measured on fewer steps."""
    outcome = script("sample", *TOY, option, "seed=0,100")
    assert outcome.code == 0, outcome.err
    assert re.search(r"2 cells; to make: .* at [\d,]+ eval", outcome.out)


def test_cells_are_planned_with_a_bar_and_composed_once_a_choice_of_groups(
    script, tmp_path, monkeypatch
):
    """Hydra takes a fifth of a second each time."""
    composed, shown = [], []
    compose_cell = ConfigLoaderImpl.load_sweep_config

    def counting(self, config, overrides):
        composed.append(overrides)
        return compose_cell(self, config, overrides)

    class Bar(Progress):
        def __init__(self, total, show, unit):
            super().__init__(total, show, unit)
            shown.append((self, show))

    monkeypatch.setattr(ConfigLoaderImpl, "load_sweep_config", counting)
    monkeypatch.setattr("lml.runs.sweep.Progress", Bar)
    axes = ["solver=ddim,unipc", "nfe=range(2,12)", "lml.damping=1,2,3,4,5", "seed=0,100"]
    outcome = script("sample", *TOY, *axes, "device=tpu")
    assert "200 cells, 200 refused; nothing to make" in outcome.out
    assert len(composed) == 2
    ((bar, show),) = shown
    assert show and (bar.count, bar.total, bar.unit) == (200, 200, "cells")
    script("sample", *TOY, *axes, "device=tpu", "progress=false")
    assert shown[1][1] is False


OVERRIDES = [
    ["solver=unipc", "nfe=7"],
    ["lml=off", "lml.damping=3", "solver=ddim"],
    ["lml.rank=1", "lml=published", "lml.damping=[1,2,null]"],
    ["metrics=[fid,kid]", "metrics.kid.subset_size=10"],
    ["+grid.timestep_spacing=linspace", "++nfe=9", "+model.call={a: 1, b: [x, y]}"],
    ["experiment=table1_cifar10", "protocol=full", "seed=5", "solver=deis"],
    ["model={name: mine, path: here}", "name=${model.name}-${nfe}"],
    ["lml={rank: 1}", "~lml.kappa", "run_dir='~/a b'"],
    ["experiment=table1_cifar10", "lml.damping=2", "metrics=none"],
]


def test_a_cell_is_what_hydra_makes_of_its_overrides(script, monkeypatch):
    """Of all at once, and one after the other from what was composed before."""
    seen = []

    def compare(self, config, loader, failed):
        composer = hydra_sweeps._Composer(config, loader)
        for overrides in [*OVERRIDES, *OVERRIDES]:
            cfg = loader.load_sweep_config(config, overrides)
            cfg = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
            complete(cfg, "sample")
            assert composer(overrides) == OmegaConf.to_container(cfg, resolve=True), overrides
            seen.append(overrides)
        for wrong in (["lml.dampin=3"], ["solver=dimm"], ["nfe.x=3"], ["~nf"], ["+nfe=3"]):
            with pytest.raises(Exception) as theirs:
                loader.load_sweep_config(config, wrong)
            with pytest.raises(type(theirs.value)) as ours:
                composer(wrong)
            assert explain(ours.value) == explain(theirs.value)
        raise UserError("enough")

    monkeypatch.setattr(hydra_sweeps._Sweeper, "__init__", compare)
    outcome = script("sample", "-m", "seed=1,2", "num_images=3")
    assert (outcome.code, outcome.err, len(seen)) == (2, "enough\n", 2 * len(OVERRIDES))


def test_every_name_has_its_own_file(script, tmp_path):
    outcome = script("sample", *TOY, "name=${solver.name}", "solver=ddim,unipc")
    assert outcome.code == 0 and outcome.out.startswith("ddim, unipc: 2 cells; ")
    for name in ("ddim", "unipc"):
        (cell,) = yaml.safe_load((tmp_path / f"outputs/{name}/sweep.yaml").read_text())["cells"]
        assert cell["solver"] == name


# --- after it, and when it is cut --------------------------------------------------------------


def test_failed_cells_are_listed_and_made_by_the_same_command(script, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        run = sample.run

        def failing(cfg, observer=None):
            if cfg.nfe == 4:
                raise UserError("disk=full: of what it is full")
            return run(cfg, observer)

        patch.setattr("lml.runs.sample.run", failing)
        outcome = script("sample", *TOY, "nfe=4,5", "lml=off")
        assert outcome.code == 2
        first, head, line = outcome.err.splitlines()
        assert head == "1 cell failed; the same command makes them:"
        assert line == f"  {first}" and first.endswith("lml=off: disk=full: of what it is full")
        cells = kept(tmp_path)["cells"]
        assert [cell["status"] for cell in cells] == ["failed", "done"]
        assert cells[0]["reason"] == "disk=full: of what it is full" and cells[1]["reason"] is None
    outcome = script("sample", *TOY, "nfe=4,5", "lml=off")
    assert (outcome.code, outcome.err) == (0, "")
    assert statuses(tmp_path) == ["done", "done"] and len(kept(tmp_path)["commands"]) == 1


def test_overwriting_makes_every_cell_again(script, tmp_path, made):
    arguments = [*TOY, *SCORED, "nfe=2,4", "lml=off"]
    for overwrite, count in ((False, 2), (False, 0), (True, 2), (True, 2)):
        made.clear()
        outcome = script("sample", *arguments, f"overwrite={str(overwrite).lower()}")
        assert (outcome.code, outcome.err, len(made)) == (0, "", count)
        work = "to make: 12 images, 36 evaluations" if count else "2 finished; nothing to make"
        assert work in outcome.out and statuses(tmp_path) == ["done", "done"]


def test_sweeps_of_one_name_add_up(script, tmp_path, capfd):
    assert script("sample", *TOY, "solver=pndm", "nfe=2,4").code == 0
    assert statuses(tmp_path) == ["refused", "done"]
    path = tmp_path / "outputs/study/sweep.yaml"
    older = kept(tmp_path)
    older["cells"][0]["run"], older["cells"][0]["status"] = "0123456789", "missing"
    path.write_text(yaml.safe_dump(older))
    assert script("sample", *TOY, "nfe=3,5").code == 0
    both = kept(tmp_path)
    assert [cell["nfe"] for cell in both["cells"]] == [2, 4, 3, 5] and len(both["commands"]) == 2
    # What was asked for by the same overrides is another run now, and known to be refused.
    assert script("sample", *TOY, "solver=pndm", "nfe=2,4").code == 0
    assert sorted(cell["status"] for cell in kept(tmp_path)["cells"]) == ["done"] * 3 + ["refused"]
    assert kept(tmp_path)["commands"] == both["commands"]
    path.write_text("cells: [")
    outcome = script("sample", *TOY, "nfe=3,5")
    assert outcome.code == 0 and outcome.err.startswith(
        "outputs/study/sweep.yaml: not a sweep's file; kept as sweep.yaml.broken, and written anew"
    )
    assert path.with_name("sweep.yaml.broken").read_text() == "cells: ["
    assert [cell["nfe"] for cell in kept(tmp_path)["cells"]] == [3, 5]


def test_a_second_sweep_is_refused_and_a_killed_one_is_completed(script, spawn, tmp_path):
    arguments = [*TOY, "seed=range(0,600,100)"]
    first = spawn("sample", *arguments)
    deadline = time.monotonic() + 300
    while not runs(tmp_path):
        assert first.poll() is None and time.monotonic() < deadline, first.communicate()
        time.sleep(0.005)
    first.send_signal(signal.SIGSTOP)
    before = {path: path.read_bytes() for path in tmp_path.glob("outputs/study/*.yaml")}
    outcome = script("sample", *TOY, "seed=5000,6000")
    assert outcome.code == 2 and outcome.out == ""
    assert outcome.err.startswith(
        f"name=study: process {first.pid} on {socket.gethostname()} (`python "
    )
    assert outcome.err.count("\n") == 1 and "is sweeping in outputs/study; wait" in outcome.err
    assert before == {path: path.read_bytes() for path in tmp_path.glob("outputs/study/*.yaml")}
    first.kill()
    first.communicate()
    assert statuses(tmp_path) == ["missing"] * 6 and len(runs(tmp_path)) < 6
    outcome = script("sample", *arguments)
    assert (outcome.code, outcome.err) == (0, "") and " finished; to make: " in outcome.out
    assert statuses(tmp_path) == ["done"] * 6 and len(runs(tmp_path)) == 6


def test_interrupted_it_keeps_what_is_done(script, tmp_path, monkeypatch):
    run = sample.run

    def interrupted(cfg, observer=None):
        if cfg.seed == 100:
            os.kill(os.getpid(), signal.SIGINT)
        return run(cfg, observer)

    monkeypatch.setattr("lml.runs.sample.run", interrupted)
    outcome = script("sample", *TOY, "seed=0,100,200")
    assert (outcome.code, outcome.err) == (130, "interrupted\n")
    assert statuses(tmp_path) == ["done", "missing", "missing"]


def test_several_processes_sweep_together(ranks, tmp_path):
    outcome = ranks(ROOT / "scripts/sample.py", *TOY, "solver=ddim,pndm", "nfe=2,3,4")
    assert outcome.code == 0, outcome.err
    assert outcome.out.count("study: 6 cells, 1 refused; ") == 1
    assert outcome.err.count("skipped") == 1
    assert sorted(statuses(tmp_path)) == ["done"] * 5 + ["refused"]
    timings = [
        json.loads(path.read_text()) for path in tmp_path.glob("outputs/study/*/timing.json")
    ]
    assert {timing["processes"] for timing in timings} == {2}


# --- protocols ---------------------------------------------------------------------------------


def composed(*overrides: str) -> dict:
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose("sample", list(overrides), return_hydra_config=True)
    params = dict(cfg.hydra.sweeper.params or {})
    cfg = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
    return {**OmegaConf.to_container(cfg, resolve=True), "params": params}


def test_a_study_has_a_protocol_and_another_can_be_chosen():
    cpu, full = (composed("experiment=table1_cifar10", *more) for more in ([], ["protocol=full"]))
    assert (cpu["num_images"], full["num_images"]) == (5000, 50000)
    assert cpu["params"]["nfe"] == "5,6,8,10,20"
    assert full["params"]["nfe"] == "5,6,8,10,12,15,20,50"
    axes = {key: cpu["params"][key] for key in ("lml", "solver")}
    assert axes == {
        "lml": "off,default",
        "solver": "ddim,pndm,dpmsolver,dpmsolverpp,unipc,deis,ipndm",
    }
    assert axes == {key: full["params"][key] for key in axes}
    # Image i is made from seed + i, so seeds nearer than that share images.
    seeds = [int(seed) for seed in full["params"]["seed"].split(",")]
    apart = [b - a for a, b in itertools.pairwise(seeds)]
    assert len(apart) == 2 and min(apart) >= full["num_images"]
    assert not composed()["params"] and composed()["num_images"] == 64


def test_an_axis_on_the_command_line_wins_over_the_protocols(script, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        Sweep, "launch", lambda self, overrides, make: asked.extend(overrides) or []
    )
    arguments = ["experiment=table1_cifar10", "protocol=full", "solver=deis", "nfe=8", "lml=off"]
    assert script("sample", "-m", *arguments).code == 0
    same = {"experiment=table1_cifar10", "protocol=full", "solver=deis", "nfe=8", "lml=off"}
    assert [set(cell) - same for cell in asked] == [
        {"seed=0"},
        {"seed=100000"},
        {"seed=200000"},
    ]


def test_the_runs_of_a_table_are_found():
    """What the committed table was made of has the hash that its cell has today."""
    cell = ["experiment=calibrated_cifar10", "lml=off", "solver=ddim", "nfe=5", "seed=0"]
    cfg = composed(*cell, "grid=default", "batch_size=250", "dtype=float16")
    planned = planning.plan(cfg, find_model(cfg["model"]), None)
    (run,) = {  # of all metrics
        row["run"]
        for row in csv.DictReader((ROOT / "experiments/calibrated_cifar10/results.csv").open())
        if tuple(row[key] for key in ("solver", "grid", "nfe", "seed"))
        == ("ddim", "default", "5", "0")
        and json.loads(row["lml"])["rank"] == 0
    }
    assert planned.folder.path == Path("outputs/calibrated_cifar10", run)


# --- searches ----------------------------------------------------------------------------------

SEARCH = [*(a for a in TOY if a != "metrics=none"), *SCORED, "dtype=float32", "compile=false"]


def values(tmp_path: Path, part: str, **of) -> dict[tuple, float]:
    """The objective of every cell of these values, by rank and damping."""
    found = {}
    for cell in kept(tmp_path)["cells"]:
        if all(cell[key] == value for key, value in of.items()) and cell["status"] == "done":
            file = tmp_path / "outputs/study" / cell["run"] / "metrics.json"
            value = json.loads(file.read_text())["convergence"]["value"][part]
            found[cell["lml"]["rank"], cell["lml"]["damping"]] = value
    return found


@pytest.mark.parametrize(("part", "best"), [("rmse", min), ("cosine", max)])
def test_a_grid_finds_the_best_and_tries_it_on_other_seeds(script, tmp_path, made, part, best):
    arguments = [
        *("sweep=damping_rank", f"sweep.objective=convergence/{part}", "sweep.num_images=8"),
        *("lml.rank=1,2", "lml.damping=4,-1", "solver=ddim,unipc"),
    ]
    outcome = script("sample", *SEARCH, *arguments)
    assert outcome.code == 0 and outcome.err.count("\n") == 1  # of all that are refused
    plan, *_ = outcome.out.splitlines()
    assert plan.startswith("study: 8 cells, 4 refused; to make: 24 images, 96 evaluations, ")
    assert plan.endswith("; then 8 images each with the best and with lml=off")
    for solver in ("ddim", "unipc"):
        tried = values(tmp_path, part, solver=solver, seed=1000000, num_images=6)
        assert len(tried) == 2
        rank, damping = setting = best(tried, key=tried.get)
        final = values(tmp_path, part, solver=solver, seed=2000000, num_images=8)
        assert set(final) == {setting, (0, None)}
        line = (
            f"solver={solver}: convergence/{part} was best of 2 with lml.rank={rank} "
            f"lml.damping={damping} ({tried[setting]:.5g}); on 8 images of seed 2000000: "
            f"{final[setting]:.5g}, with lml=off {final[0, None]:.5g}"
        )
        assert line in outcome.out.splitlines()
    count = len(made)
    again = script("sample", *SEARCH, *arguments)
    assert again.out.splitlines()[1:] == outcome.out.splitlines()[-2:] and len(made) == count


def test_the_best_is_that_of_the_mean_over_the_seeds(script, monkeypatch):
    """Not that of the luckiest seed, which is damping 1's first."""
    values = {(1, 0): 0.0, (1, 100): 10.0, (16, 0): 3.0, (16, 100): 3.0}
    monkeypatch.setattr(
        "lml.runs.sweep.objective.read_objective",
        lambda cfg, folder: values.get((cfg["lml"]["damping"], cfg["seed"]), 7.0),
    )
    arguments = ["sweep=damping_rank", "sweep.objective=convergence/rmse", "sweep.num_images=2"]
    arguments += ["lml.rank=1", "lml.damping=1,16", "seed=0,100", "num_images=2"]
    outcome = script("sample", *SEARCH, *arguments)
    assert "best of 2 with lml.rank=1 lml.damping=16 (3); on 2 images" in outcome.out


def test_optuna_searches_and_finds_again(script, tmp_path, made, monkeypatch):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="NOT TESTED: no optuna extra")
    plan = planning.plan
    refused = []

    def refusing(cfg, *args):
        if cfg["seed"] == 1000000 and cfg["lml"].get("damping", 15) < 15:
            refused.append(cfg["lml"]["damping"])
            raise UserError("lml.damping: too small for this test")
        return plan(cfg, *args)

    monkeypatch.setattr("lml.runs.sweep.plan", refusing)
    arguments = ["sweep=optuna", "sweep.objective=convergence/cosine", "sweep.num_images=8"]
    arguments.append("hydra.sweeper.n_trials=6")
    outcome = script("sample", *SEARCH, *arguments)
    assert outcome.code == 0 and outcome.err.count("\n") == len(refused) > 0
    plan_line, *_, result = outcome.out.splitlines()
    assert plan_line.startswith(
        "study: a search of 6 trials; to make at most: 36 images, 144 evaluations, "
    )
    tried = values(tmp_path, "cosine", seed=1000000)
    assert len(tried) == 6 - len(refused) and len(made) == len(tried) + 2
    assert all(rank in (1, 2, 3, 4) and 15 <= damping <= 100 for rank, damping in tried)
    rank, damping = max(tried, key=tried.get)
    assert f" with lml.rank={rank} lml.damping={damping} " in result
    best = yaml.safe_load((tmp_path / "outputs/multirun/optimization_results.yaml").read_text())
    assert best["best_params"] == {"lml.rank": rank, "lml.damping": damping}
    again = script("sample", *SEARCH, *arguments)
    assert again.code == 0 and again.out.splitlines()[1:] == [result]
    assert len(made) == len(tried) + 2


def test_a_search_in_which_all_is_lost(script, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="NOT TESTED: no optuna extra")
    arguments = ["sweep=optuna", "sweep.objective=convergence/cosine", "hydra.sweeper.n_trials=2"]
    outcome = script("sample", *SEARCH, *arguments, "lml.damping=-1")
    assert (
        outcome.code == 2 and "lml.damping=-1: lml.damping=-1: expected null or a n" in outcome.err
    )
    assert "Traceback" not in outcome.err and not (tmp_path / "outputs/study").exists()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("sweep.objective=null", "expected convergence/rmse or convergence/cosine"),
        ("sweep.objective=convergence/rsme", "expected convergence/rmse or convergence/cosine"),
        ("sweep.objective=convergnce", "not one of the run's metrics; nearest: convergence"),
        (
            "sweep.objective=convergence/rmse sweep.final_seed=1000002",
            "share seeds with the search's, which start at 1000000",
        ),
        ("sweep.objective=convergence/rmse sweep.final_seed=x", "seed=x: expected a whole number"),
        ("hydra/sweeper=optuna", "a search needs an objective; add sweep=NAME"),
    ],
)
def test_a_search_that_is_not_clear(script, tmp_path, arguments, line):
    if "optuna" in arguments:
        reason = "NOT TESTED: no optuna extra"
        pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason=reason)
    search = [] if "optuna" in arguments else ["sweep=damping_rank"]
    outcome = script("sample", *SEARCH, *search, "lml.rank=1", *arguments.split())
    assert outcome.code == 2 and outcome.err.count("\n") == 1 and line in outcome.err, outcome.err
    assert not (tmp_path / "outputs/study").exists()


def test_objectives_of_metrics():
    def objective(metrics, asked=None):
        return find_objective({"sweep": {"objective": asked}, "metrics": metrics})

    def of(*names):
        return {name: configs.compose(f"+metrics={name}").metrics[name] for name in names}

    assert objective(of("fd_cifar")) == "fd_cifar"
    assert objective(of("kid", "fid"), "kid") == "kid/mean"
    assert objective(of("precision_recall"), "precision_recall/recall").endswith("/recall")
    for name in ("precision_recall", "hessian"):
        with pytest.raises(
            UserError, match=rf"sweep.objective=null: expected {name}/\w+ or {name}/"
        ):
            objective(of(name))
    with pytest.raises(UserError, match=r"sweep.objective=null: expected one of a, b"):
        objective({"a": {}, "b": {}})


def test_a_rate_that_is_given_is_used(script):
    outcome = script("sample", *TOY, "lml=off", "rate=0.5")
    assert "to make: 6 images, 24 evaluations, about 48 s at 0.5 evaluations/s\n" in outcome.out
    outcome = script("sample", *TOY, "rate=0")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1) and "rate=0" in outcome.err


def test_too_little_disk_is_said_before_the_start(script, tmp_path, made, monkeypatch):
    free = 11.9 * 4096  # twelve files take a block of 4096 bytes each
    usage = shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    (tmp_path / "outputs/study/there").mkdir(parents=True)
    cells = [*TOY, "lml=off", "seed=0,100"]
    outcome = script("sample", *cells)
    line = r".*: 0.0 GB free, but 12 images need at least 0.0 GB; free some space, or make fewer .*"
    assert outcome.code == 2 and re.fullmatch(line, outcome.err.strip()) and not made
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=12 * 4096))
    assert script("sample", *cells).code == 0 and len(made) == 2


@pytest.mark.parametrize(
    ("name", "size"), [("sd15", (16, 16)), ("celebahq_ldm", (16, 16)), ("pixel", (8, 8))]
)
def test_the_size_of_images_is_known_before_the_network_is_loaded(
    pipelines, tiny_model, name, size
):
    path = tiny_model if name == "pixel" else pipelines / name
    options = [f"model={'cifar10_ddpm' if name == 'pixel' else name}", f"model.path={path}"]
    config = OmegaConf.to_container(configs.compose(*options, config="sample").model)
    assert find_model(config).image_size() == size
    if name == "sd15":
        assert find_model({**config, "height": 32, "width": 24}).image_size() == (32, 24)


def test_cells_without_a_calibration_are_one_line_with_one_command(script, tmp_path):
    axes = ["lml=calibrated", "solver=ddim,deis", "nfe=3,4", "name=study"]
    outcome = script("sample", *[a for a in TOY if not a.startswith("nfe")], *axes)
    assert outcome.code == 2
    assert outcome.err.startswith(
        "lml=calibrated: no calibration for the settings of 4 cells; make them: python "
        "scripts/calibrate.py -m model=gaussian solver=ddim,deis grid=default nfe=3,4 "
        "model.network.sample_size=4; skipped\n"
    )
