from __future__ import annotations

import json
import re
import shutil
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import transformers

from lml.errors import UserError
from lml.metrics import networks
from lml.metrics.evaluate import build
from lml.metrics.networks import Preprocessing, load_network, load_tokenizer

NAMES = ("clip_score", "clip_cosine", "image_reward", "fd_dinov2", "cmmd")


@pytest.mark.parametrize("crop", networks.CROPS)
def test_preprocessing_leaves_pixels_that_fit(crop):
    images = torch.randint(0, 256, (2, 3, 20, 20), dtype=torch.uint8)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
    made = Preprocessing(20, crop, mean, std)(images)
    expected = (images.permute(0, 2, 3, 1).double() / 255 - torch.tensor(mean)) / torch.tensor(std)
    torch.testing.assert_close(made, expected.permute(0, 3, 1, 2).float())


def test_what_each_crop_keeps():
    """A red centre between green sides: only 'none' sees green, 'last' and 'first' the centre."""
    images = torch.zeros(1, 3, 16, 48, dtype=torch.uint8)
    images[:, 0, :, 16:32] = 255
    images[:, 1, :, :16] = images[:, 1, :, 32:] = 255
    for crop in networks.CROPS:
        made = Preprocessing(16, crop, (0, 0, 0), (1, 1, 1))(images)
        assert made.shape == (1, 3, 16, 16)
        assert (made[:, 1].mean() > 0.5) == (crop == "none")
        assert (made[:, 0] == 1).all() == (crop != "none")


def test_weights_are_float32_and_frozen(clip_folder, tmp_path):
    shutil.copytree(clip_folder, tmp_path / "clip")
    transformers.CLIPModel.from_pretrained(clip_folder).half().save_pretrained(tmp_path / "clip")
    network = load_network("CLIPModel", tmp_path / "clip", None, "key")
    assert {weight.dtype for weight in network.parameters()} == {torch.float32}
    assert not network.training and not any(w.requires_grad for w in network.parameters())


def test_nothing_is_printed(clip_folder, capfd):
    load_network("CLIPVisionModelWithProjection", clip_folder, None, "key")
    tokenizer = load_tokenizer(clip_folder, None, "key")
    networks.tokenize(tokenizer, ["a " * 500], 12)
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")


@pytest.mark.parametrize("name", NAMES)
def test_without_transformers(tiny_configs, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "transformers", None)
    message = rf"^metrics\.{name}.*: needs the package transformers; `pip install transformers`$"
    with pytest.raises(UserError, match=message):
        build({name: tiny_configs[name]})


@pytest.mark.parametrize("source", ["/nowhere/clip", "no/such/model", "nobody/no-such-model"])
@pytest.mark.parametrize("name", NAMES)
def test_models_that_are_nowhere(tiny_configs, monkeypatch, name, source):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    key = "weights" if name == "image_reward" else "model"
    with pytest.raises(UserError) as caught:
        build({name: tiny_configs[name] | {key: source}})
    line = str(caught.value)
    assert line.startswith(f"metrics.{name}.{key}={source}: not there, and ") and "\n" not in line
    assert ("hf download" in line) == (source == "nobody/no-such-model")


def test_an_uncached_hub_model_is_asked_for_by_its_revision_and_in_no_other_format(monkeypatch):
    asked = []

    def snapshot_download(*arguments, **options):
        asked.append((arguments, options))
        raise OSError("no network\nat all")

    monkeypatch.setattr(networks, "snapshot_download", snapshot_download)
    with pytest.raises(UserError, match=r"^key=a/b: .*\(no network at all\)"):
        load_network("CLIPModel", "a/b", "abc", "key")
    files = {"revision": "abc", "allow_patterns": ["*.json", "*.safetensors"]}
    assert asked == [(("a/b",), files)]


def test_a_model_in_the_cache_of_the_hub(clip_folder, tmp_path, monkeypatch):
    """As hf lays it out, without a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--openai--tiny"
    (repository / "refs").mkdir(parents=True)
    commit = "0123456789" * 4
    (repository / "refs/main").write_text(commit)
    shutil.copytree(clip_folder, repository / "snapshots" / commit)
    network = load_network("CLIPModel", "openai/tiny", None, "key")
    assert isinstance(network, transformers.CLIPModel)


def copy(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def test_half_a_download(clip_folder, dinov2_folder, tmp_path):
    kinds = {"CLIPModel": clip_folder, "Dinov2Model": dinov2_folder}
    for kind, folder in kinds.items():
        path = copy(folder, tmp_path / kind)
        weights = path / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        with pytest.raises(UserError, match=rf"^key={path}: {kind} cannot be read \(.+\)$") as e:
            load_network(kind, path, None, "key")
        assert "\n" not in str(e.value)
        weights.unlink()
        with pytest.raises(UserError, match=rf"^key={path}: no \*\.safetensors in .*{kind}"):
            load_network(kind, path, None, "key")
        weights.touch()
        for content in ("[]", "{", None):
            if content is None:
                (path / "config.json").unlink()
            else:
                (path / "config.json").write_text(content)
            with pytest.raises(UserError, match=rf"^key={path}: no model's config\.json in"):
                load_network(kind, path, None, "key")


def test_a_model_of_another_kind(clip_folder, dinov2_folder):
    for kind, folder, message in (
        ("CLIPModel", dinov2_folder, "a dinov2; expected a clip"),
        ("Dinov2Model", clip_folder, "a clip; expected a dinov2"),
    ):
        with pytest.raises(UserError, match=rf"^key={folder}: {message}$"):
            load_network(kind, folder, None, "key")


def test_a_weight_that_is_missing(clip_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    path = copy(clip_folder, tmp_path / "clip")
    state = load_file(path / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, path / "model.safetensors", {"format": "pt"})
    message = r"not the weights of CLIPModel \(missing: visual_projection\.weight\)$"
    with pytest.raises(UserError, match=message):
        load_network("CLIPModel", path, None, "key")


def test_pickled_weights_only_where_they_are_published_so(clip_folder, tmp_path):
    path = copy(clip_folder, tmp_path / "clip")
    state = transformers.CLIPModel.from_pretrained(path).state_dict()
    (path / "model.safetensors").unlink()
    torch.save(state, path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no \*\.safetensors in"):
        load_network("CLIPModel", path, None, "key")
    network = load_network("CLIPModel", path, None, "key", pickled=True)
    assert all(torch.equal(weight, state[name]) for name, weight in network.state_dict().items())
    (path / "pytorch_model.bin").write_bytes(b"\x80\x02]")
    with pytest.raises(UserError, match=r"CLIPModel cannot be read"):
        load_network("CLIPModel", path, None, "key", pickled=True)


def test_by_the_script_on_any_folder(script, tiny_configs, pictures, tmp_path):
    keys = [
        f"metrics.{name}.{key}={tiny_configs[name][key]}"
        for name in ("fd_dinov2", "cmmd")
        for key in ("model", "reference")
    ]
    arguments = [f"images={pictures.path}", "metrics=[fd_dinov2,cmmd]", "out=metrics.json", *keys]
    outcome = script("evaluate", *arguments)
    assert (outcome.code, outcome.err) == (0, "")
    results = json.loads((tmp_path / "metrics.json").read_text())
    assert set(results) == {"fd_dinov2", "cmmd"}
    for result in results.values():
        assert result["value"] > 0.01
        assert re.fullmatch(r"11 images; the protocol asks for [35]0000", result["warning"])
    model = next(key for key in keys if key.startswith("metrics.cmmd.model="))
    outcome = script("evaluate", f"images={pictures.path}", "metrics=[cmmd]", model)
    assert outcome.code == 2
    assert outcome.err.startswith("metrics.cmmd.reference=null: expected a folder of images")


WORKER = textwrap.dedent(
    """
    import json, sys
    import torch
    import torch.distributed as dist
    from lml.data.images import ImageFolder
    from lml.metrics.evaluate import build

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    configs, folder, prompts, out = json.loads(sys.argv[1])
    made, results = build(configs), []
    folder = ImageFolder(folder)
    prompts = dict(zip(folder.names, prompts, strict=True))
    for batch_size in (3, 50):  # with 50, one process has no images
        for metric in made.values():
            metric.reset()
            for block in folder.blocks(batch_size)[dist.get_rank() :: 2]:
                text = metric.needs_prompts
                words = ([prompts[name] for name in block],) if text else ()
                metric.update(folder.load(block), *words)
            value = metric.compute()
            value = value if isinstance(value, dict) else {"value": value}
            results.append([{k: v.item() for k, v in value.items()}, metric.protocol])
    open(f"{out}.{dist.get_rank()}", "w").write(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()
    """
)


def test_two_processes_give_the_numbers_of_one(tiny_configs, pictures, tmp_path, ranks):
    script, out = tmp_path / "worker.py", tmp_path / "out"
    script.write_text(WORKER)
    job = json.dumps([tiny_configs, str(pictures.path), pictures.prompts, str(out)])
    outcome = ranks(script, job)
    assert outcome.code == 0, outcome.err
    expected = []
    for metric in build(tiny_configs).values():
        prompts = (pictures.prompts,) if metric.needs_prompts else ()
        metric.update(pictures.images, *prompts)
        value = metric.compute()
        value = value if isinstance(value, dict) else {"value": value}
        expected.append(({k: v.item() for k, v in value.items()}, metric.protocol))
    for rank in range(2):
        results = json.loads(Path(f"{out}.{rank}").read_text())
        for (value, protocol), (value_of_one, protocol_of_one) in zip(
            results, expected * 2, strict=True
        ):
            assert value == pytest.approx(value_of_one, rel=1e-4)
            assert protocol == protocol_of_one
