"""Every evaluator against torch-fidelity, on the same folder and the same random weights."""

from __future__ import annotations

import json
import os
import pickle
import re
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from lml.benchmark import FLAGS, fidelity, largest_difference, random_inception
from lml.data.assets import ROOT
from lml.data.images import ImageFolder
from lml.errors import UserError
from lml.metrics.base import class_by_name
from lml.metrics.evaluate import Context, build, evaluate
from lml.metrics.inception import FID, KID, InceptionScore, PrecisionRecall, load_inception

COUNT, REFERENCES = 14, 10
OPTIONS = {  # so small that it matters which image is where
    "kid": {"subsets": 7, "subset_size": 6},
    "inception_score": {"splits": 3},
    "precision_recall": {"neighborhood": 1},
}
THEIR_OPTIONS = {
    "kid_subsets": 7,
    "kid_subset_size": 6,
    "isc_splits": 3,
    "prc_neighborhood": 1,
}


def write(folder, count, seed):
    """Smooth random images of 24x20 pixels."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4 + seed, 5, generator=generator)
    images = 255 * torch.nn.functional.interpolate(coarse, (20, 24), mode="bilinear")
    for index, image in enumerate(images.byte().permute(0, 2, 3, 1).numpy()):
        Image.fromarray(image).save(folder / f"{index:03d}.png")
    return folder


SIDE = 107  # of the images that the network sees; 299 takes ten times as long


@pytest.fixture(scope="module", autouse=True)
def small():
    """Both sides' network sees small images, but where its own size is asked for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "INPUT_IMAGE_SIZE", SIDE)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory, small):
    """Images, reference images, and random weights."""
    root = tmp_path_factory.mktemp("data")
    write(root / "images", COUNT, 0)
    reference = ImageFolder(write(root / "reference", REFERENCES, 1))
    random_inception(root / "weights.pth", reference.load(reference.names[:8]))
    return root


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """What TORCH_HOME is in this module, so that nothing is kept from another run."""
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("torch")
        patch.setenv("TORCH_HOME", str(path))
        yield path


def configs(data, *names):
    made = {}
    for name in names or FLAGS:
        config = OmegaConf.load(ROOT / f"configs/metrics/{name}.yaml")[name]
        made[name] = {**config, **OPTIONS.get(name, {}), "weights": str(data / "weights.pth")}
        if "reference" in config:
            made[name]["reference"] = str(data / "reference")
    return made


def values(results):
    return {name: result["value"] for name, result in results.items()}


@pytest.fixture(scope="module")
def network(data):
    return load_inception(data / "weights.pth", "metrics.fid")


@pytest.fixture(scope="module")
def passes(network):
    """How many images each call of the network saw."""
    seen = []
    network.network.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    return seen


@pytest.fixture(scope="module")
def in_blocks(data, home, passes):
    """The four in blocks of 4, and what the network saw meanwhile."""
    passes.clear()
    results = evaluate(data / "images", configs(data), context=Context(batch_size=4))
    return results, list(passes)


@pytest.fixture(scope="module")
def whole(data, home, in_blocks):
    """The four in one block, like torch-fidelity's."""
    return evaluate(data / "images", configs(data))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_the_numbers_are_torch_fidelitys(data, whole):
    theirs = fidelity(
        list(FLAGS),
        data / "weights.pth",
        input1=str(data / "images"),
        input2=str(data / "reference"),
        cache=False,
        **THEIR_OPTIONS,
    )
    ours = values(whole)
    assert largest_difference(ours, theirs) < 1e-6
    for name in ("kid", "inception_score", "precision_recall"):
        assert set(ours[name]) == set(class_by_name(name).parts)
    for name in ("kid", "inception_score"):
        assert ours[name]["std"] == pytest.approx(theirs[name]["std"], rel=1e-4)
    # and the problem has teeth: no number is one that any network would give
    assert ours["fid"] > 1 and abs(ours["kid"]["mean"]) > 1e-3
    assert ours["inception_score"]["mean"] > 1.1
    assert 0 < ours["precision_recall"]["precision"] < 1
    assert 0 < ours["precision_recall"]["recall"] < 1


def test_one_pass_serves_all_four(in_blocks, whole):
    results, passes = in_blocks
    assert sorted(passes) == sorted([REFERENCES, 4, 4, 4, 2])
    for name, value in values(results).items():
        assert value == pytest.approx(values(whole)[name], rel=1e-3), name


def test_the_protocol_says_how(data, whole, home, network):
    for name, result in whole.items():
        protocol = result["protocol"]
        assert protocol["extractor"] == network.description
        assert protocol["extractor"]["name"] == "InceptionV3"
        assert "299x299" in protocol["resize"] and "TensorFlow" in protocol["resize"]
        assert protocol["images"] == COUNT and protocol["images_asked"] == 50_000
        assert result["warning"] == f"{COUNT} images; the protocol asks for 50000"
        if name != "inception_score":
            assert protocol["reference"]["source"] == str(data / "reference")
            assert protocol["reference"]["count"] == REFERENCES
            assert protocol["reference"]["size"] == [20, 24]
            assert re.fullmatch("[0-9a-f]{64}", protocol["reference"]["sha256"])
    assert whole["kid"]["protocol"]["subset_size"] == 6
    assert json.loads(json.dumps(whole)) == whole
    (kept,) = (home / "lml").glob("reference-*.npz")
    with np.load(kept) as file:
        assert file["features"].shape == (REFERENCES, 2048)


def test_fewer_images_than_kids_subsets(data, home, network):
    """Its default of 1000 becomes what there is; then every subset is the whole set."""
    metric = build({"kid": {**configs(data, "kid")["kid"], "subset_size": 1000}})["kid"]
    images = ImageFolder(data / "images")
    metric.update(images.load(images.names[:5]))
    value = metric.compute()
    assert metric.protocol["subset_size"] == 5
    assert metric.protocol["subsets"] == 7 and np.isfinite(value["mean"])


def test_a_batch_changed_in_place_is_another_one(network, passes, data):
    images = ImageFolder(data / "images").load(["000.png"])
    passes.clear()
    features = network(images)
    assert network.logits(images).shape == (1, 1008) and passes == [1]
    images //= 2
    assert not torch.equal(network(images), features) and passes == [1, 1]
    assert torch.equal(network(images.clone()), network(images)) and passes == [1, 1, 1, 1]
    with torch.inference_mode():
        fresh = images.clone()
        assert torch.equal(network(fresh), network(images))


def test_the_layers_in_pieces_give_the_same_bits(data, network, monkeypatch):
    """At the network's own size of images."""
    monkeypatch.setattr(FeatureExtractorInceptionV3, "INPUT_IMAGE_SIZE", 299)
    theirs = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], str(data / "weights.pth")
    )
    folder = ImageFolder(data / "images")
    images = folder.load(folder.names[:11])
    for ours, expected in zip(
        (network(images), network.logits(images)), theirs(images), strict=True
    ):
        assert torch.equal(ours, expected)


def test_the_network_stays_in_evaluation_mode(network):
    network.train()
    assert not any(module.training for module in network.modules())


def test_metrics_on_the_same_weights_share_the_network(data, home, network):
    made = build(configs(data))
    assert {id(metric.extractor) for metric in made.values()} == {id(network)}
    references = {id(made[n].reference) for n in ("fid", "kid", "precision_recall")}
    assert len(references) == 1


WORKER = textwrap.dedent(
    """
    import json, sys
    import torch
    import torch.distributed as dist
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from lml.metrics.evaluate import Context, evaluate

    FeatureExtractorInceptionV3.INPUT_IMAGE_SIZE = int(sys.argv[4])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    configs, results = json.loads(sys.argv[1]), []
    for batch_size in (4, 20):
        context = Context(batch_size=batch_size)
        results.append(evaluate(sys.argv[2], configs, context=context))
        configs.pop("fid", None)  # whose second time would only cost time
    open(f"{sys.argv[3]}.{dist.get_rank()}", "w").write(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()
    """
)


def test_two_processes_give_the_numbers_of_one(data, tmp_path, ranks, in_blocks, whole):
    """Two blocks each; and one process with all the images, the other with none."""
    (tmp_path / "worker.py").write_text(WORKER)
    arguments = [json.dumps(configs(data)), str(data / "images"), str(tmp_path / "out"), str(SIDE)]
    outcome = ranks(tmp_path / "worker.py", *arguments)
    assert outcome.code == 0, outcome.err
    for rank in range(2):
        made = json.loads((tmp_path / f"out.{rank}").read_text())
        for results, expected in zip(made, (in_blocks[0], whole), strict=True):
            for name in results:
                value = expected[name]["value"]
                assert results[name]["value"] == pytest.approx(value, rel=1e-6), name
                assert results[name]["protocol"] == expected[name]["protocol"]


# --- bad input ------------------------------------------------------------------------------------


def one_line(call, pattern):
    with pytest.raises(UserError, match=pattern) as caught:
        call()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


NAME = "weights-inception-2015-12-05-6726825d.pth"


def test_weights_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for proxy in ("http_proxy", "https_proxy", "all_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")  # there is no network
    one_line(
        lambda: FID(reference="nowhere"),
        rf"^metrics\.fid\.weights=null: {NAME} is not in {tmp_path}/hub/checkpoints and cannot be "
        rf"fetched .*put https://github\.com/.*/{NAME} there, or .* metrics\.fid\.weights=",
    )
    one_line(
        lambda: InceptionScore(weights="no.pth"),
        rf"^metrics\.inception_score\.weights=no\.pth: no such file; expected https://.*{NAME}$",
    )


def test_torchs_hub_folder_is_looked_in(data, home, network):
    folder = home / "hub/checkpoints"
    folder.mkdir(parents=True)
    os.link(data / "weights.pth", folder / NAME)
    metric = InceptionScore()
    assert metric.protocol["extractor"] == network.description
    (folder / NAME).unlink()


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("evil"),))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_weights_that_are_none(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights.pth"
    whole = (data / "weights.pth").read_bytes()
    state = torch.load(data / "weights.pth", weights_only=True)
    state.pop("fc.bias")
    for harm in (b"", b"text", whole[: len(whole) // 2], pickle.dumps({"x": Evil()}), state):
        if isinstance(harm, bytes):
            path.write_bytes(harm)
        else:
            torch.save(harm, path)
        message = rf"^metrics\.kid\.weights={path}: not the weights of torch-fidelity's .*{NAME}"
        one_line(lambda: KID(reference="nowhere", weights=path), message)
    assert not Path("evil").exists()


def test_references_that_are_none(data, tmp_path, home):
    weights = data / "weights.pth"
    message = r"^metrics\.fid\.reference=null: expected a folder of .*; reference= sets it for all"
    one_line(lambda: FID(weights=weights), message)
    np.savez(tmp_path / "theirs.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    assert FID(tmp_path / "theirs.npz", weights).reference.size is None
    for cls, name in ((KID, "kid"), (PrecisionRecall, "precision_recall")):
        message = (
            rf"^metrics\.{name}\.reference=.*theirs\.npz: has only mean and covariance, .*images"
        )
        one_line(lambda cls=cls: cls(tmp_path / "theirs.npz", weights), message)
    np.savez(tmp_path / "other.npz", mu=np.zeros(768), sigma=np.eye(768))
    message = r"^metrics\.fid\.reference=other\.npz: statistics of 768 features; InceptionV3 has 2"
    one_line(lambda: FID(tmp_path / "other.npz", weights), message)
    one_line(lambda: FID(ROOT / "assets/fd_cifar.npz", weights), "statistics of 256 features")
    small = write(tmp_path / "small", 1, 3)
    Image.new("RGB", (8, 8)).save(small / "000.png")
    message = "images of 24x20 pixels: the reference's have 8x8"
    one_line(lambda: evaluate(data / "images", {"fid": FID(small, weights)}), message)
    one_line(lambda: evaluate(data / "images", {"kid": KID(small, weights)}), message)


def test_too_few_images(data, home):
    weights, images = data / "weights.pth", ImageFolder(data / "images")
    one = images.load(images.names[:1])
    few = build(configs(data))
    for name, message in (
        ("fid", "^num_images=1: .* at least 2"),
        ("kid", "^num_images=1: KID needs at least 2"),
        ("inception_score", r"^num_images=1: metrics\.inception_score\.splits=3 needs at least 3"),
        ("precision_recall", "^num_images=1: 1 neighbours need at least 2 images"),
    ):
        few[name].update(one)
        one_line(few[name].compute, message)
    metric = PrecisionRecall(data / "reference", weights, neighborhood=REFERENCES)
    metric.update(images.load(images.names))
    one_line(
        metric.compute,
        rf"^metrics\.precision_recall\.reference=.*: {REFERENCES} images; 10 neighbours need at",
    )
    for make in (
        lambda: KID(data / "reference", weights, subset_size=1),
        lambda: KID(data / "reference", weights, subsets=0),
        lambda: InceptionScore(weights, splits=1.5),
        lambda: PrecisionRecall(data / "reference", weights, neighborhood=0),
    ):
        one_line(make, r"^metrics\.\w+\.\w+=.*: expected a whole number of at least")


def test_from_the_command_line(script, data, home, whole):
    """One reference for all, one for one alone; and each thing that is missing is one line."""
    arguments = [f"images={data / 'images'}", "threads=1", "metrics=[fid,kid]", "batch_size=64"]
    arguments += [f"metrics.{name}.weights={data / 'weights.pth'}" for name in ("fid", "kid")]
    arguments += ["metrics.kid.subsets=7", "metrics.kid.subset_size=6"]
    outcome = script("evaluate", *arguments)
    assert outcome.code == 2 and outcome.err.count("\n") == 1
    assert outcome.err.startswith("metrics.fid.reference=null: ")
    outcome = script("evaluate", *arguments, f"metrics.fid.reference={data / 'reference'}")
    assert outcome.code == 2 and outcome.err.startswith("metrics.kid.reference=null: ")
    outcome = script("evaluate", *arguments, f"reference={data / 'reference'}", "out=all.json")
    assert (outcome.code, outcome.err) == (0, ""), outcome
    results = json.loads(Path("all.json").read_text())
    for name in ("fid", "kid"):
        assert results[name]["value"] == pytest.approx(whole[name]["value"], rel=1e-6)
