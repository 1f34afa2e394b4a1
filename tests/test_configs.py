"""Every config of every group composes, makes what it describes, and runs."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import get_class, get_method
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from lml import configs
from lml.data import cifar10
from lml.data.assets import ROOT
from lml.errors import UserError
from lml.pipelines import pixel
from lml.pipelines.tiny import FLOW
from lml.runs.solver import find_steps, make_scheduler

CONFIGS = Path(__file__).parents[1] / "configs"
TOY = ["num_images=2", "batch_size=2", "nfe=5", "threads=1", "metrics=none"]


names = configs.names
FLOW_SOLVERS = {"flow_euler", "flow_euler_calibrated", "authors_fm_euler", "authors_lml_euler"}


def toy_model(solver: str) -> str:
    return "gaussian_flow" if solver in FLOW_SOLVERS else "gaussian"


def composed(*overrides: str, config: str = "sample") -> dict:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return OmegaConf.to_container(compose(config, list(overrides)), resolve=True)


def test_no_folder_of_configs_is_forgotten_here():
    groups = {folder.name for folder in CONFIGS.iterdir() if folder.is_dir()}
    mine = {"model", "solver", "grid", "lml", "metrics", "prompts", "logger", "experiment"}
    mine |= {"protocol", "sweep"}
    assert mine <= groups and groups - mine <= {"train", "layout", "base", "objective"}


def test_groups_that_are_offered_are_those_of_the_defaults():
    cfg = composed()
    for group in ("model", "solver", "grid", "lml", "logger"):
        assert cfg[group]
    assert list(cfg["metrics"]) == ["fd_cifar"]
    assert cfg["lml"]["rank"] > 0 and cfg["nfe"] == 10 and cfg["num_images"] == 64


GROUPS = ("solver", "grid", "lml", "metrics", "prompts", "logger")


@pytest.mark.parametrize("option", [f"{group}={n}" for group in GROUPS for n in names(group)])
def test_an_option_by_itself_is_what_the_command_line_makes_of_it(option):
    group = option.split("=")[0]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        whole = OmegaConf.to_container(compose("sample", [option]))
    assert OmegaConf.to_container(configs.option(*option.split("="))) == whole[group]


def test_configs_are_composed_in_one_way():
    """A file that is read by itself has lost its `defaults:`; a run's is complete."""
    reading = {"OmegaConf.load(": set(), " load_yaml(": set()}
    for file in (ROOT / "lml").rglob("*.py"):
        for call, names_of_files in reading.items():
            if call in file.read_text():
                names_of_files.add(file.name)
    runs = {"files.py", "records.py"}  # of runs and sweeps alone
    assert reading == {"OmegaConf.load(": set(), " load_yaml(": runs}


@cache
def with_solver(solver: str) -> DictConfig:
    """The config of a toy model with this solver, whose values are not looked up yet."""
    more = []
    if solver == "ipndm_diffusers":
        more = ["~model.scheduler", "+model.scheduler={_target_:diffusers.IPNDMScheduler}"]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("sample", [f"solver={solver}", f"model={toy_model(solver)}", *more])


option = cache(configs.option)


@pytest.mark.parametrize("solver", names("solver"))
@pytest.mark.parametrize("lml", sorted({*names("lml")} - {"calibrated"}))  # of a stored file
def test_every_solver_and_correction_makes_a_scheduler(solver, lml):
    cfg = with_solver(solver).copy()
    OmegaConf.set_struct(cfg, False)
    cfg.lml = option("lml", lml)
    cfg = OmegaConf.to_container(cfg, resolve=True)
    found = pixel.find_pixel_model(cfg["model"])
    if ".released." in cfg["solver"]["scheduler"]["_target_"] and lml == "default":
        with pytest.raises(UserError, match=r"^lml\.anchor=history: the released code has ema"):
            make_scheduler(cfg, found)
        return
    made = make_scheduler(cfg, found)
    assert isinstance(made, get_class(cfg["solver"]["scheduler"]["_target_"]))
    for key, value in {**cfg["lml"], **cfg["grid"], **cfg["solver"]["scheduler"]}.items():
        if key not in ("name", "_target_"):
            assert made.config[key] == value
    assert find_steps(made, 13, solver) >= 1


@pytest.mark.parametrize(
    ("solver", "target"),
    [("flow_euler", "prediction"), ("ddim", "direction"), ("dpmsolver", "increment")],
)
def test_what_the_authors_correct(solver, target):
    """The velocity of flow matching, DDIM's re-noising term, DPM-Solver's increment."""
    assert composed(f"solver={solver}", "lml=published")["lml"]["target"] == target


# Those with a calibration need a stored one, of their model.
RUNNING = [s for s in names("solver") if s != "ipndm_diffusers" and not s.endswith("_calibrated")]


@pytest.mark.parametrize("solver", RUNNING)
def test_every_solver_runs(script, tmp_path, solver):
    nfe = 14 if solver == "authors_pndm" else 5
    arguments = [f"model={toy_model(solver)}", f"solver={solver}", f"nfe={nfe}", "run_dir=run"]
    outcome = script("sample", *TOY, *arguments)
    assert (outcome.code, outcome.err) == (0, "")
    assert len(list((tmp_path / "run/images").iterdir())) == 2


@pytest.mark.parametrize(
    ("arguments", "damping"),
    [
        (["nfe=5"], 8e-4),
        (["nfe=20"], 5e-4),
        (["nfe=100"], 5e-5),
        (["nfe=11"], 1e-3),  # not in the authors' table
        (["nfe=5", "model=ideal_cifar10"], 8e-4),
        (["nfe=5", "lml.damping=5e-3"], 5e-3),
        (["nfe=5", "model=celebahq_ldm"], 5e-3),
        (["nfe=5", "model=sd15"], 1e-3),
        (["nfe=5", "model=sd15_pose"], 1e-3),
        (["nfe=10", "model=sd2_base"], 1e-3),
        (["nfe=10", "model=sd15", "solver=authors_coco_dpmpp_lm"], 1e-3),
        (["nfe=10", "model=sd15", "solver=authors_compbench_dpm_lm"], 6e-3),
        (["nfe=10", "model=sdxl"], 6e-3),
        (["nfe=10", "model=pixart", "solver=authors_dpm_lm"], 6e-3),
        (["nfe=10", "model=flux", "solver=authors_lml_euler"], 1e-2),
        (["nfe=5", "model=gaussian"], 1e-3),  # none of theirs
    ],
)
def test_the_published_damping_goes_by_the_model_and_the_number_of_steps(arguments, damping):
    assert composed("lml=published", *arguments)["lml"]["damping"] == damping


@pytest.mark.parametrize("solver", [s for s in names("solver") if s.startswith("authors_")])
def test_a_preset_of_the_authors_has_its_correction_with_it(solver):
    """Unless another is asked for, by the command line or by an experiment."""
    cfg = composed(f"solver={solver}")
    assert (cfg["solver"]["name"], cfg["lml"]["rank"]) == (solver, 1 if "lm" in solver else 0)
    if cfg["lml"]["rank"]:
        assert cfg["lml"] == composed("lml=published", f"solver={solver}")["lml"]
    assert composed(f"solver={solver}", "lml=default")["lml"] == composed()["lml"]
    audit = composed("experiment=audit", f"solver={solver}", "model=cifar10")
    assert audit["lml"]["anchor"] == "ema"


@pytest.mark.parametrize("grid", names("grid"))
def test_every_grid_runs_and_differs(script, toy, tmp_path, grid):
    more = ["+model.aligned_timesteps=[900,500,100]"] if grid == "ays" else []  # the models' own
    outcome = script("sample", *toy, f"grid={grid}", *more, "nfe=6", "run_dir=run")
    assert (outcome.code, outcome.err) == (0, "")
    cfg = composed(f"grid={grid}", "model=gaussian", *more)
    plain = composed("model=gaussian")
    model = pixel.find_pixel_model(cfg["model"])
    ours, default = (make_scheduler(c, model) for c in (cfg, plain))
    ours.set_timesteps(6)
    default.set_timesteps(6)
    same = ours.sigmas.tolist() == default.sigmas.tolist()
    # linspace is DPM-Solver++'s own, and this model's scheduler names none
    assert same == (grid in ("default", "linspace", "model"))


def test_off_is_the_base_solver(script, toy, tmp_path):
    for name, lml in (("off", "off"), ("zero", "default"), ("on", "default")):
        rank = ["lml.rank=0"] if name == "zero" else []
        assert script("sample", *toy, f"lml={lml}", *rank, f"run_dir={name}").code == 0
    images = {
        name: [f.read_bytes() for f in sorted((tmp_path / name / "images").iterdir())]
        for name in ("off", "zero", "on")
    }
    assert images["off"] == images["zero"]
    assert not set(images["off"]) & set(images["on"])


@pytest.fixture
def tiny(tiny_model, pipelines, prompts, tmp_path) -> Callable[[dict], list[str]]:
    """`tiny(cfg["model"])`: arguments that put a tiny random model in place of one on the hub."""

    def arguments(model: dict) -> list[str]:
        if not model.get("hub_id"):
            return []
        if model.get("kind") == "latent":
            return [f"model.path={pipelines / 'celebahq_ldm'}"]
        if model.get("kind") != "text":
            return [f"model.path={tiny_model}"]
        control = []
        if model["controlnet"]:
            Image.new("RGB", (16, 16)).save(tmp_path / "control.png")
            control = [
                f"model.controlnet.path={pipelines / 'controlnet'}",
                f"model.control_image={tmp_path / 'control.png'}",
            ]
        if model["strength"]:  # begins with a photograph
            control[-1] = f"model.control_photo={tmp_path / 'control.png'}"
            control.append(f"model.control_map.path={pipelines / 'depth'}")
        size = ["model.height=16", "model.width=16"]
        family = "sd15" if model["controlnet"] else model["name"]
        return [f"model.path={pipelines / family}", *size, *prompts, *control]

    return arguments


@pytest.mark.parametrize("model", names("model"))
def test_every_model_is_found_and_runs(script, tiny, model):
    cfg = composed(f"model={model}")["model"]
    if model == "ideal_cifar10" and cifar10.find_folder(None) is None:
        pytest.skip(f"CIFAR-10 is looked for in {' or '.join(map(str, cifar10.SEARCHED))}")
    flow = model.endswith("flow") or model in FLOW
    solver = "flow_euler" if flow else "dpmsolverpp"
    arguments = [*TOY, f"model={model}", f"solver={solver}", *tiny(cfg), "run_dir=run"]
    outcome = script("sample", *arguments)
    assert (outcome.code, outcome.err) == (0, "")


@pytest.mark.parametrize(
    "metrics", ["none", "[]", "fd_cifar", "[fd_cifar]", "[fd_cifar,convergence]"]
)
@pytest.mark.parametrize("config", ["sample", "evaluate"])
def test_metrics_are_chosen_in_every_spelling(metrics, config):
    chosen = composed(f"metrics={metrics}", config=config)["metrics"]
    assert sorted(chosen) == sorted(set(re.findall(r"\w+", metrics)) - {"none"})


@pytest.mark.parametrize("metric", [name for name in names("metrics") if name != "none"])
def test_every_metric_names_something_that_makes_it(metric):
    target = composed(f"metrics={metric}")["metrics"][metric]["_target_"]
    assert callable(get_method(target)) if target.islower() else get_class(target)


def experiment_files() -> list[Path]:
    return sorted((CONFIGS / "experiment").glob("*.yaml"))


@pytest.mark.parametrize("file", experiment_files(), ids=lambda file: file.stem)
def test_an_experiment_begins_with_its_command_and_says_only_what_differs(file):
    lines = file.read_text().splitlines()
    assert lines[0] == "# @package _global_"
    assert re.match(f"# python scripts/sample.py (-m )?experiment={file.stem}", lines[1])
    base = OmegaConf.create(composed())
    for key, value in OmegaConf.to_container(OmegaConf.load(file)).items():
        if key not in ("defaults", "metrics", "hydra"):
            assert OmegaConf.select(base, key) != value, f"{key} is the default"


@pytest.mark.parametrize("file", experiment_files(), ids=lambda file: file.stem)
def test_every_experiment_runs_at_toy_size(script, tiny, tmp_path, file):
    """With its own model's class, solver and correction; metrics need networks of their own."""
    if "ideal_cifar10" in file.read_text() and cifar10.find_folder(None) is None:
        pytest.skip(f"CIFAR-10 is looked for in {' or '.join(map(str, cifar10.SEARCHED))}")
    experiment = f"experiment={file.stem}"
    cfg = composed(experiment, "prompts=none")  # a text model's are a file of the user's
    arguments = [experiment, *TOY, *tiny(cfg["model"]), "dtype=float32", "logger=none"]
    arguments.append("compile=false")
    outcome = script("sample", *arguments)
    assert (outcome.code, outcome.err) == (0, "")
    (run,) = (tmp_path / "outputs" / file.stem).iterdir()
    assert len(list((run / "images").iterdir())) == 2
