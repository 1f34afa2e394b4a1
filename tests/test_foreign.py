"""Runs and models that somebody else made: data, of which nothing is executed."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers
from diffusers import DiffusionPipeline, ModelMixin
from omegaconf import OmegaConf

from lml import instances
from lml.configs import compose
from lml.errors import UserError
from lml.files import file_hash
from lml.metrics import frechet, networks
from lml.pipelines import find_model, loading, text
from lml.pipelines import tiny as tiny_pipelines
from lml.report import labels
from lml.runs import sample
from lml.runs.records import read_config
from lml.seals import settings_hash

CALLED = []  # what a foreign config had called
ROOT = Path(__file__).parents[1]


def call(*args: object, **options: object) -> None:
    """What a foreign config would have run."""
    CALLED.append((args, options))


@pytest.fixture(autouse=True)
def nothing_called(monkeypatch):
    """Nothing foreign runs in a test."""
    CALLED.clear()
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    yield
    assert CALLED == []


# --- runs ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A complete run of a model whose score is known; not to be written to."""
    folder = tmp_path_factory.mktemp("made") / "run"
    arguments = ["model=gaussian", "model.network.sample_size=4", "num_images=2", "batch_size=2"]
    arguments += ["nfe=4", "device=cpu", "progress=false", f"run_dir={folder}"]
    sample.run(compose(*arguments, "metrics=none", config="sample"))
    return folder


@pytest.fixture
def run(made, tmp_path) -> Path:
    """A copy of it, `run` in the folder that scripts run in."""
    return Path(shutil.copytree(made, tmp_path / "run"))


def put(run: Path, place: str, value: object, recorded: bool = True) -> None:
    """Write `value` at `place` of the run's config; with `recorded` as if it had been so made."""
    config = OmegaConf.load(run / "config.yaml")
    OmegaConf.update(config, place, value, merge=False, force_add=True)
    OmegaConf.save(config, run / "config.yaml")
    if recorded:
        file = run / "manifest.json"
        manifest = json.loads(file.read_text())
        manifest["config_sha256"] = file_hash(run / "config.yaml")
        settings = read_config(run)["settings"]
        manifest["settings_sha256"] = settings_hash(settings)
        file.write_text(json.dumps(manifest))


METRICS = ["convergence", "correction_cosine", "hessian", "ideal_direction"]
EVIL = {"_target_": "test_foreign.call"}
PLACES = {
    "model.network": EVIL,
    "model.network.scheduler": EVIL,
    "model.network.seed": EVIL,
    "model.scheduler": EVIL,
    "model.scheduler.trained_betas": [[EVIL]],
    "solver.scheduler": {**EVIL, "name": "x"},
    "solver.step": {"eta": EVIL},
    "prompts": EVIL,
    "prompts.file": {"deep": EVIL},
    "grid": {"timestep_spacing": EVIL},
    "lml": {"rank": EVIL},
}
TARGETS = [
    "os.system",
    "builtins.eval",
    "numpy.load",
    "torch.load",
    "diffusers.DiffusionPipeline.from_pretrained",
    "diffusers.DDPMScheduler.from_pretrained",
    "diffusers.UNet2DModel",
    "diffusers.utils.load_image",
    "diffusers.schedulers.scheduling_ddpm.os.system",
    "lml.schedulers.mixin",
    "lml.schedulers.SchedulerMixinX",
    "lml.export.os.system",
    "lml.data.prompts.Path",
    "lml.data.prompts.json.loads",
    "lml.files.write_atomic",
    "lml.exact.Gaussian.load_state_dict",
    "hydra.utils.instantiate",
    "",
    "${oc.env:HOME}",
    3,
    None,
    ["os.system"],
    {"_target_": "os.system"},
]


def refused(outcome, *words: str) -> None:
    """Check that it is one line with these words."""
    assert (outcome.code, outcome.out) == (2, ""), outcome
    assert outcome.err.count("\n") == 1 and "Traceback" not in outcome.err, outcome.err
    assert all(word in outcome.err for word in words), outcome.err


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("place", PLACES)
def test_a_runs_config_has_nothing_foreign_made(script, run, metric, place):
    put(run, place, PLACES[place])
    outcome = script("evaluate", "run_dir=run", f"metrics=[{metric}]", "device=cpu")
    refused(outcome, "run_dir=run: ", "_target_='test_foreign.call'")


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: str(target)[:40])
def test_a_target_that_is_not_on_the_list(target):
    for config in ({"a": [{"_target_": target}]}, {"_target_": target}):
        with pytest.raises(UserError, match=r"^run: a?"):
            instances.check_targets(config, "run")


@pytest.mark.parametrize(
    "value",
    ["${oc.env:HOME}", "${oc.create:'{_target_:test_foreign.call}'}", "a${model.name}"],
)
def test_interpolations_make_nothing(script, run, value):
    """One of them would be a `_target_` that no list sees."""
    put(
        run, "model.network.scheduler", {"_target_": "diffusers.DDPMScheduler", "beta_start": value}
    )
    outcome = script("evaluate", "run_dir=run", "metrics=[convergence]", "device=cpu")
    refused(outcome, "run_dir=run: model.network.scheduler.beta_start=")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("place", "value"), [("seed", 5), ("settings.seed", 5), ("device", "cuda"), ("nfe", 7)]
)
def test_nothing_is_made_of_an_edited_config(script, run, tmp_path, metric, place, value):
    put(run, place, value, recorded=False)
    outcome = script("evaluate", "run_dir=run", f"metrics=[{metric}]", "device=cpu")
    refused(outcome, "run_dir=run: config.yaml was edited after the run")
    assert not (tmp_path / "outputs").exists()


def test_nothing_is_made_of_edited_settings(script, run):
    """Also where the file's own hash was made to fit."""
    put(run, "settings.seed", 5)
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["settings_sha256"] = hashlib.sha256(b"").hexdigest()
    (run / "manifest.json").write_text(json.dumps(manifest))
    outcome = script("evaluate", "run_dir=run", "metrics=[convergence]", "device=cpu")
    refused(outcome, "settings_sha256")


@pytest.mark.parametrize("metric", METRICS)
def test_a_run_of_ours_is_made_again(script, run, metric):
    """Whatever metrics of his own its maker had; these are not made again."""
    put(run, "metrics", {"own": EVIL})
    options = ["metrics.convergence.nfe=6"] if metric == "convergence" else []
    outcome = script("evaluate", "run_dir=run", f"metrics=[{metric}]", "device=cpu", *options)
    assert (outcome.code, outcome.err) == (0, ""), outcome


def test_what_needs_no_config_makes_nothing_of_it(script, run):
    put(run, "model.network", EVIL)
    metric = "+metrics.mean._target_=torchmetrics.MeanMetric"
    outcome = script("evaluate", "run_dir=run", "metrics=none", metric, "device=cpu")
    assert outcome.code == 0, outcome


@pytest.mark.parametrize("group", ["model", "solver"])
def test_all_that_our_configs_have_made_is_on_the_list(group):
    for file in (ROOT / "configs" / group).glob("*.yaml"):
        cfg = compose(f"{group}={file.stem}", config="sample")[group]
        instances.check_targets(OmegaConf.to_container(cfg, resolve=True), "run")


@pytest.mark.parametrize("name", ["text", "table", "captions", "t2i_compbench", "coco14_30k"])
def test_our_prompts_are_on_the_list(name):
    instances.check_targets({"_target_": f"lml.data.prompts.{name}", "file": "x"}, "run")


def test_the_command_line_is_the_users_own(script, toy):
    metric = "+metrics.mean._target_=torchmetrics.MeanMetric"
    assert script("sample", *toy, metric, "run_dir=run").code == 0


@pytest.mark.parametrize("name", ["../model/cifar10", "x" * 300, "\0", "ddim,seed=1"])
def test_a_runs_solver_that_is_none_of_ours_is_only_a_name(name):
    assert labels.solver_label(name, "{}") == name
    assert labels.lml_label('{"rank": 2}', name, 10, name)


# --- models -------------------------------------------------------------------------------------

CODE = "from pathlib import Path\nPath({marker!r}).touch()\nraise SystemExit\n"


def edit(file: Path, **entries: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


@pytest.fixture
def model(pipelines, tmp_path) -> Path:
    """Stable Diffusion with a Python file under every name that a library might look for."""
    folder = Path(shutil.copytree(pipelines / "sd15", tmp_path / "model"))
    code = CODE.format(marker=str(tmp_path / "ran"))
    for part in (folder, *(part for part in folder.iterdir() if part.is_dir())):
        for name in ("pipeline", "evil", "unet", part.name, "modeling_evil", "tokenization_evil"):
            (part / f"{name}.py").write_text(code)
    return folder


AUTO_MAP = {
    "AutoModel": "modeling_evil.Evil",
    "AutoConfig": "modeling_evil.Evil",
    "AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"],
}


def auto_map(folder: Path) -> None:
    edit(folder / "text_encoder/config.json", auto_map=AUTO_MAP, model_type="evil")
    edit(folder / "tokenizer/tokenizer_config.json", auto_map=AUTO_MAP, tokenizer_class="Evil")


def index(**entries: object) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "model_index.json", **entries)


FOREIGN = {
    "custom pipeline": (index(_class_name=["pipeline", "EvilPipeline"]), "describes no pipeline"),
    "pipeline of a file": (index(_class_name="EvilPipeline"), "which diffusers does not have"),
    "no pipeline": (index(_class_name="AutoPipeline"), "AutoPipeline"),
    "library": (
        index(unet=["evil", "Evil"]),
        "its unet is of ['evil', 'Evil']; expected a class of",
    ),
    "own folder": (index(unet=["unet", "UNet2DConditionModel"]), "its unet is of ['unet',"),
    "any module": (index(scheduler=["os", "system"]), "its scheduler is of ['os', 'system']"),
    "tokenizer": (index(tokenizer=["evil", "EvilTokenizer"]), "its tokenizer is of"),
    "other part": (index(other=["evil", "Evil"]), "its other is of"),
    "one name": (index(unet=["diffusers"]), "its unet is of ['diffusers']"),
    "three names": (index(unet=["diffusers", "UNet2DModel", "x"]), "its unet is of"),
    "number": (index(unet=["diffusers", 3]), "its unet is of ['diffusers', 3]"),
    "auto model": (index(text_encoder=["transformers", "AutoModel"]), "is an AutoModel"),
    "auto in diffusers": (index(unet=["diffusers", "AutoModel"]), "its unet is an AutoModel"),
    "auto tokenizer": (index(tokenizer=["transformers", "AutoTokenizer"]), "an AutoTokenizer"),
    "auto processor": (index(other=["transformers", "AutoProcessor"]), "an AutoProcessor"),
    "function": (index(text_encoder=["transformers", "pipeline"]), "which is no network"),
    "pipeline as a part": (index(unet=["diffusers", "DiffusionPipeline"]), "is no network"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_nothing_in_a_models_folder_is_run(script, model, prompts, tmp_path, kind):
    harm, says = FOREIGN[kind]
    auto_map(model)
    harm(model)
    arguments = ["model=sd15", f"model.path={model}", "nfe=2", "num_images=1", *prompts]
    outcome = script("sample", *arguments, "metrics=none", "device=cpu", "solver=ddim")
    refused(outcome, f"model.path={model}", says)
    assert not (tmp_path / "ran").exists()


def test_python_files_beside_a_model_are_let_lie(script, model, prompts, tmp_path):
    """Also a checker's library, which is not loaded."""
    index(safety_checker=["evil", "Evil"])(model)
    arguments = ["model=sd15", f"model.path={model}", "nfe=2", "num_images=1", *prompts]
    arguments += ["metrics=none", "device=cpu", "model.height=16", "model.width=16"]
    outcome = script("sample", *arguments, "solver=ddim", "progress=false")
    assert outcome.code == 0, outcome.err
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name", ["DiffusionPipeline", "UNet2DModel", "OPTIONS", "os", "", 3, ["a"]]
)
def test_a_noise_schedule_is_a_scheduler(tiny_model, tmp_path, name):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    edit(folder / "scheduler/scheduler_config.json", _class_name=name)
    with pytest.raises(UserError, match="makes no scheduler") as caught:
        find_model({"name": "tiny", "path": str(folder)})
    assert "\n" not in str(caught.value)


@pytest.fixture
def trusted(monkeypatch) -> dict[str, object]:
    """What `trust_remote_code` was in every call of a library, by the class that was called."""
    seen: dict[str, object] = {}

    def watch(owner: type, name: str) -> None:
        function = getattr(owner, name).__func__

        def watched(cls: type, *args: object, **options: object) -> object:
            seen.setdefault(owner.__name__, options.get("trust_remote_code"))
            return function(cls, *args, **options)

        monkeypatch.setattr(owner, name, classmethod(watched))

    for owner in (DiffusionPipeline, ModelMixin, transformers.PreTrainedModel):
        watch(owner, "from_pretrained")
    watch(transformers.AutoTokenizer, "from_pretrained")
    return seen


def test_no_library_is_left_to_ask(script, pipelines, prompts, trusted):
    arguments = ["model=sd15", f"model.path={pipelines / 'sd15'}", "nfe=2", "num_images=1"]
    arguments += [*prompts, "metrics=none", "device=cpu", "model.height=16", "model.width=16"]
    assert script("sample", *arguments, "solver=ddim", "progress=false").code == 0
    expected = {"DiffusionPipeline": False, "ModelMixin": False, "PreTrainedModel": False}
    assert trusted == expected


def test_no_library_is_left_to_ask_by_metrics(trusted, tmp_path):
    frechet.load_features("assets/features")
    folder = tmp_path / "clip"
    tokenizer = tiny_pipelines.clip_tokenizer(folder)
    tokenizer.save_pretrained(folder)
    transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        )
    ).save_pretrained(folder)
    networks.load_network("CLIPVisionModelWithProjection", folder, None, "k")
    networks.load_tokenizer(folder, None, "k")
    expected = {"ModelMixin": False, "PreTrainedModel": False, "AutoTokenizer": False}
    assert trusted == expected


def test_what_is_fetched_brings_no_code(monkeypatch):
    def download(*args: object, **options: object) -> None:
        assert options["trust_remote_code"] is False
        raise OSError("no network")

    monkeypatch.setattr(DiffusionPipeline, "download", download)
    config = {"name": "m", "hub_id": "somebody/something", "guidance_scale": 1.0}
    with pytest.raises(UserError, match=r"^model\.hub_id=somebody/something: "):
        text.find_text_model(config)


@pytest.mark.parametrize("place", ["metrics.image_reward.tokenizer", "metrics.clip_score.model"])
def test_a_tokenizers_code_is_not_run_and_nobody_is_asked(tmp_path, place, monkeypatch):
    folder = tmp_path / "words"
    tiny_pipelines.clip_tokenizer(folder).save_pretrained(folder)
    for name in ("tokenization_evil", "modeling_evil"):
        (folder / f"{name}.py").write_text(CODE.format(marker=str(tmp_path / "ran")))
    (folder / "config.json").write_text(json.dumps({"auto_map": AUTO_MAP, "model_type": "evil"}))
    edit(folder / "tokenizer_config.json", auto_map=AUTO_MAP, tokenizer_class="EvilTokenizer")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    with pytest.raises(UserError, match=rf"^{place}=.*no tokenizer in it"):
        networks.load_tokenizer(folder, None, place)
    assert not (tmp_path / "ran").exists()


def test_a_network_of_the_metrics_is_one_class(tmp_path):
    """Whatever its auto_map says."""
    folder = tmp_path / "clip"
    transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        )
    ).save_pretrained(folder)
    (folder / "modeling_evil.py").write_text(CODE.format(marker=str(tmp_path / "ran")))
    edit(folder / "config.json", auto_map=AUTO_MAP)
    networks.load_network("CLIPVisionModelWithProjection", folder, None, "k")
    assert not (tmp_path / "ran").exists()


def test_weights_that_are_a_link_to_a_name_of_the_hub(tmp_path):
    """Its cache is believed; what is exported of a run, and a run's own files, are read."""
    (tmp_path / ("0" * 64)).write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / ("0" * 64))
    assert loading.weights_hash(tmp_path / "link") == "0" * 64
    assert file_hash(tmp_path / "link") == hashlib.sha256(b"x").hexdigest()
