"""Measures speed and memory of the project, as ratios that are each measured within one run.

Both sides of a ratio take turns, for a few milliseconds or one batch each. The result is the median
of the ratios of all turns. So other work on the machine disturbs both sides alike.
"""

from __future__ import annotations

import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import torch_fidelity
from diffusers import DDIMPipeline, DDIMScheduler, DPMSolverMultistepScheduler
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from lml import schema
from lml.configs import compose
from lml.correction import LMLCorrection
from lml.damping import default_damping
from lml.data.images import ImageFolder
from lml.device import find_device
from lml.errors import UserError
from lml.files import read_json, read_object, write_json
from lml.metrics.evaluate import evaluate
from lml.pipelines import find_model, pixel
from lml.runs.names import image_name
from lml.runs.observer import Observer
from lml.runs.records import check_output
from lml.runs.sample import run
from lml.runs.solver import make_scheduler
from lml.schedulers import OPTIONS

SETTINGS = {  # settings of a run: the name in the table, and the arguments
    "float32": ["dtype=float32"],
    "bfloat16": ["dtype=bfloat16"],
    "compiled": ["dtype=bfloat16", "compile=true"],
}
SPEED_GOALS = {"float32": 1.0, "bfloat16": 1.3, "compiled": 1.7}


@dataclass
class Row:
    """One line of the table. `goal` is a bound such as "<= 4" or ">= 1.3", or empty."""

    measured: str
    value: float
    goal: str = ""
    remark: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the goal is reached; None without a goal."""
        if not self.goal:
            return None
        relation, bound = self.goal.split()
        return self.value <= float(bound) if relation == "<=" else self.value >= float(bound)


# --- the correction ------------------------------------------------------------------------------


def correction_time(shape: Sequence[int], ranks: Sequence[int], repeats: int) -> list[Row]:
    """The time of one call of the correction with all its anchors, over a copy and a solver's step.

    The copy is of a float32 tensor of `shape` into allocated memory. The step is one of diffusers'
    DPM-Solver++(3M) at full order. All run on one thread.
    """
    with threads(1):
        directions = [torch.randn(*shape) for _ in range(max(ranks) + 2)]
        calls = {}
        for rank in ranks:
            correction, damping = LMLCorrection(rank=rank), default_damping(rank)
            anchors = ()
            for direction in directions[1 : rank + 2]:
                _, anchors = correction(direction, anchors, damping)
            calls[rank] = partial(correction, anchors=anchors, damping=damping)
        source, target = directions[0], torch.empty(*shape)
        steps = _full_order_steps(shape)
        seconds = {name: [] for name in ("copy", "step", *ranks)}
        for i in range(repeats + 2):  # the first two warm up
            turn = {"copy": _seconds(target.copy_, source), "step": next(steps)}
            for rank, call in calls.items():
                turn[rank] = _seconds(call, directions[0])
            for name, value in turn.items() if i >= 2 else ():
                seconds[name].append(value)

    size = "x".join(map(str, shape))
    rows = []
    for rank in ranks:
        ratios = _ratios(seconds[rank], seconds["copy"])
        goal = "<= 12" if rank == 2 else ""
        rows.append(_row(f"correction at rank {rank} / copy of {size}", ratios, goal))
    for rank in ranks:
        ratios = _ratios(seconds[rank], seconds["step"])
        goal = "<= 0.33" if rank == 2 else ""
        rows.append(_row(f"correction at rank {rank} / step of DPM-Solver++(3M)", ratios, goal))
    return rows


def _full_order_steps(shape: Sequence[int]) -> Iterator[float]:
    """The seconds of steps of order 3, one after the other."""
    scheduler = DPMSolverMultistepScheduler(solver_order=3, prediction_type="v_prediction")
    sample, outputs = torch.randn(*shape), [torch.randn(*shape) for _ in range(4)]
    while True:
        scheduler.set_timesteps(20)
        for i, t in enumerate(scheduler.timesteps[:-3]):
            start = time.perf_counter()
            scheduler.step(outputs[i % 4], t, sample)
            if i >= 3:
                yield time.perf_counter() - start


def correction_memory(shape: Sequence[int], ranks: Sequence[int]) -> list[Row]:
    """Peak memory of a whole trajectory, with the anchors and the corrected direction."""
    rows = []
    with threads(1):
        for rank in ranks:
            directions = [torch.randn(*shape) for _ in range(rank + 3)]

            def trajectory(rank: int = rank, directions: list[Tensor] = directions) -> None:
                correction, anchors = LMLCorrection(rank=rank), ()
                for direction in directions:
                    made = correction(direction, anchors, default_damping(rank))
                    anchors = made[1]
                    del made  # the solver that takes g' does not keep it

            tensors = peak_memory(trajectory) / directions[0].nbytes
            name = f"peak memory of the correction at rank {rank}, in samples"
            # the anchors, g', the copy of g that becomes an anchor, and little that is r x r
            rows.append(Row(name, tensors, f"<= {rank + 2.05:g}"))
    return rows


def peak_memory(function: Callable[[], Any]) -> int:
    """The most bytes that torch's CPU allocator held at a time during `function`.

    It counts every allocation in the profiler, also those inside an operation.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise it prints that there is no GPU
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = read_object(trace)["traceEvents"]
    events = [event["args"] for event in events if event.get("name") == "[memory]"]
    held, total, peak = {}, 0, 0
    for event in sorted(events, key=lambda event: event["Ev Idx"]):
        if event["Bytes"] > 0:
            held[event["Addr"]] = event["Bytes"]
            total += event["Bytes"]
        else:
            total -= held.pop(event["Addr"], 0)  # 0 for memory from before
        peak = max(peak, total)
    return peak


# --- the run -------------------------------------------------------------------------------------


class TakingTurns(Observer):
    """After every batch of a run, `other(indices)` makes the same images. Measures both times.

    The run's batch ends when its images are on the disk.
    """

    def __init__(self, folder: Path, other: Callable[[range], np.ndarray]):
        self.folder, self.other = folder, other
        self.ours, self.theirs, self.images = [], [], []

    def begin(self, total: int) -> None:
        self.done, self.total = 0, total
        self.start = time.perf_counter()

    def made(self, count: int) -> None:
        indices = range(self.done, self.done + count)
        files = [self.folder / "images" / image_name(i, self.total) for i in indices]
        while not all(file.exists() for file in files):
            time.sleep(1e-4)
        now = time.perf_counter()
        self.ours.append(now - self.start)
        self.images.append(self.other(indices))
        self.start = time.perf_counter()
        self.theirs.append(self.start - now)
        self.done += count


class Quiet(Observer):
    """Prints nothing."""

    def say(self, line: str) -> None:
        pass


def run_speed(
    settings: str, batches: int, model: DictConfig, arguments: Sequence[str]
) -> tuple[list[Row], dict[str, Any]]:
    """Images/s of a DDIM run over those of diffusers' DDIMPipeline in float32, as it is.

    Weights, noise, steps, batch size and threads are the same. The run stores its images; the
    pipeline returns arrays. The first batch is a warm-up and does not count. Further rows are the
    largest difference between the images, in 1/255, and, without a goal, both speeds.
    """
    arguments = [*arguments, "solver=ddim", "lml=off", "metrics=none", *SETTINGS[settings]]
    with run_config(model, arguments) as config:
        config.num_images = config.batch_size * (batches + 1)
        folder = Path(config.run_dir)
        observer = TakingTurns(folder, ddim_pipeline(config))
        run(config, observer)
        ours = torch.cat(list(ImageFolder(folder / "images").batches(config.batch_size)))
    theirs = torch.from_numpy(np.concatenate(observer.images)).permute(0, 3, 1, 2)
    difference = (ours.double() - 255 * theirs.double()).abs()
    rates = [config.batch_size / statistics.median(s[1:]) for s in (observer.ours, observer.theirs)]
    remark = "{:.1f} against {:.1f} images/s".format(*rates)
    name = f"run / DDIMPipeline in float32, images/s: {settings}"
    ratios = _ratios(observer.theirs[1:], observer.ours[1:])
    rows = [_row(name, ratios, f">= {SPEED_GOALS[settings]}", remark)]
    goal = "<= 1" if settings == "float32" else ""
    name = f"largest difference of their pixels, in 1/255: {settings}"
    rows.append(Row(name, difference.max().item(), goal, f"mean {difference.mean():.3f}"))
    return rows, {"images_per_second": rates[0], "pipeline_images_per_second": rates[1]}


def ddim_pipeline(config: DictConfig) -> Callable[[range], np.ndarray]:
    """DDIMPipeline with a run's weights: makes the images of `indices`, (B, H, W, C) in [0, 1]."""
    config = OmegaConf.to_container(config, resolve=True)
    model = pixel.find_pixel_model(config["model"])
    device = find_device(config["device"])
    options = make_scheduler(config, model).config
    options = {name: value for name, value in options.items() if name not in OPTIONS}
    pipeline = DDIMPipeline(model.load(device, torch.float32), DDIMScheduler.from_config(options))
    pipeline.set_progress_bar_config(disable=True)

    def make(indices: range) -> np.ndarray:
        seeds = [config["seed"] + i for i in indices]
        return pipeline(
            batch_size=len(indices),
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            num_inference_steps=config["nfe"],
            output_type="np",
        ).images

    return make


def pipeline_overhead(batches: int) -> list[Row]:
    """The time of our sampling of each tiny random pipeline over that of diffusers' own loop.

    Networks, LML scheduler, prompts, noise and steps are the same. Both return tensors.
    """
    from lml.pipelines import tiny  # only this part needs transformers

    rows, prompts, seeds = [], ["a cat", "a dog"], [0, 1]
    with tempfile.TemporaryDirectory() as folder:
        for name, build in tiny.PIPELINES.items():
            torch.manual_seed(0)
            path = Path(folder, name)
            build(Path(folder, "tokenizers", name)).save_pretrained(path)
            solver = "flow_euler" if name in tiny.FLOW else "dpmsolverpp"
            overrides = [f"model={name}", f"model.path={path}", f"solver={solver}"]
            with run_config(None, [*overrides, "model.height=16", "model.width=16"]) as config:
                cfg = OmegaConf.to_container(config, resolve=True)
            model = find_model(cfg["model"])
            scheduler = make_scheduler(cfg, model)
            sampler = model.sampler(torch.device("cpu"), torch.float32, False, False)

            def theirs(sampler: Any = sampler, scheduler: Any = scheduler) -> None:
                sampler.pipe.scheduler = scheduler
                generators = [torch.Generator().manual_seed(seed) for seed in seeds]
                options = {"generator": generators, "output_type": "pt", **sampler.options}
                sampler.pipe(prompts, num_inference_steps=10, **options)

            turns = [
                (_seconds(sampler, scheduler, 10, seeds, prompts), _seconds(theirs))
                for _ in range(batches + 2)
            ][2:]  # the first two warm up
            ratios = _ratios(*zip(*turns, strict=True))
            rows.append(_row(f"sampling of a tiny {name} / diffusers' loop", ratios, "<= 1.03"))
    return rows


def outside_network(batches: int, model: DictConfig, arguments: Sequence[str]) -> list[Row]:
    """The share of time outside the network in a run with LML, from timing.json."""
    rows = []
    for settings, options in SETTINGS.items():
        if settings == "compiled":
            continue  # the time to compile would count as the network's
        with run_config(model, [*arguments, "metrics=none", *options]) as config:
            config.num_images = config.batch_size * batches
            timing = read_object(run(config, Quiet()) / "timing.json", schema.Timing)
        parts = {k: v for k, v in timing["seconds"].items() if k not in ("network", "total")}
        total = timing["seconds"]["total"]
        remark = ", ".join(f"{name} {100 * value / total:.1f}" for name, value in parts.items())
        share = 100 * timing["outside_network"]
        goal = "<= 3" if settings == "float32" else ""
        rows.append(Row(f"share of a run outside the network, %: {settings}", share, goal, remark))
    return rows


def fd_change(
    settings: str, num_images: int, model: DictConfig, arguments: Sequence[str]
) -> list[Row]:
    """The difference of FD-CIFAR to that of a float32 run, in %."""
    values = {}
    for name in ("float32", settings):
        options = [*arguments, "solver=ddim", "lml=off", "metrics=[fd_cifar]", *SETTINGS[name]]
        with run_config(model, [*options, f"num_images={num_images}"]) as config:
            folder = run(config, Quiet())
            metrics = read_object(folder / "metrics.json", dict[str, schema.Score])
        values[name] = metrics["fd_cifar"]["value"]
    change = 100 * abs(values[settings] / values["float32"] - 1)
    remark = f"{values[settings]:.4g} against {values['float32']:.4g}, {num_images} images"
    return [Row(f"difference of FD-CIFAR, %: {settings}", change, "<= 2", remark)]


@contextmanager
def run_config(model: DictConfig | None, arguments: Sequence[str]) -> Iterator[DictConfig]:
    """The config of scripts/sample.py with these arguments, a model, and a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = [*arguments, f"run_dir={folder}/run", "progress=false"]
        config = compose(*arguments, config="sample")
        if model is not None:
            config.model = model
        yield config


# --- the evaluators ------------------------------------------------------------------------------

FLAGS = {  # by our name: the flag of torch-fidelity's calculate_metrics, and its names of values
    "fid": ("fid", {None: "frechet_inception_distance"}),
    "kid": ("kid", {k: f"kernel_inception_distance_{k}" for k in ("mean", "std")}),
    "inception_score": ("isc", {k: f"inception_score_{k}" for k in ("mean", "std")}),
    "precision_recall": ("prc", {k: k for k in ("precision", "recall", "f_score")}),
}


class _Untrained(FeatureExtractorInceptionV3):
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load nothing: the file is empty."""


def random_inception(path: Path, images: Tensor) -> None:
    """Write random weights of torch-fidelity's Inception to `path`, in the published format.

    For images like uint8 `images` (B, 3, H, W), features and logits have the scale of a trained
    network and differ from image to image.
    """
    torch.save({}, path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = _Untrained("inception-v3-compat", ["logits"], str(path))
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = None  # the mean over all batches
        nn.init.normal_(network.fc.weight, std=0.1)
    with torch.no_grad():
        network.train()(images)
    torch.save(network.state_dict(), path)


def fidelity(names: Sequence[str], weights: Path, **options: Any) -> dict[str, Any]:
    """torch-fidelity's values of these metrics, by the names in our configs."""
    values = torch_fidelity.calculate_metrics(
        **{FLAGS[name][0]: True for name in names},
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(weights),
        cuda=False,
        verbose=False,
        **options,
    )
    found = {}
    for name in names:
        named = {key: values[value] for key, value in FLAGS[name][1].items()}
        found[name] = named.get(None, named)
    return found


def _draw_images(folder: Path, sets: Mapping[str, int]) -> None:
    """Write smooth random 32x32 images. `sets` are the names of folders and their counts."""
    generator = torch.Generator().manual_seed(0)
    for seed, (name, count) in enumerate(sets.items()):
        coarse = torch.rand(count, 3, 4 + seed, 4 + seed, generator=generator)
        images = 255 * nn.functional.interpolate(coarse, (32, 32), mode="bilinear")
        (folder / name).mkdir()
        for i, image in enumerate(images.byte().permute(0, 2, 3, 1).numpy()):
            Image.fromarray(image).save(folder / name / f"{i:06d}.png")


def evaluator_speed(num_images: int, turns: int) -> list[Row]:
    """Images/s of FID, and of four metrics in one run, over torch-fidelity's with a run for each.

    These are whole evaluations of a folder of 32x32 images with random weights. Both sides have the
    reference's statistics in their caches. A further row is the largest relative difference of the
    values.
    """
    with tempfile.TemporaryDirectory() as folder:
        folder, hub = Path(folder), torch.hub.get_dir()
        sets = {"images": num_images, "reference": max(num_images // 2, 10), "few": 10}
        _draw_images(folder, sets)
        weights, reference = folder / "weights.pth", folder / "reference"
        random_inception(weights, ImageFolder(reference).load(ImageFolder(reference).names[:64]))

        def ours(names: Sequence[str], images: str = "images") -> dict[str, Any]:
            configs = {}
            for name in names:
                config = compose(f"+metrics={name}").metrics[name]
                configs[name] = {**config, "weights": str(weights)}
                if "reference" in config:
                    configs[name]["reference"] = str(reference)
            results = evaluate(folder / images, configs)
            return {name: result["value"] for name, result in results.items()}

        def theirs(names: Sequence[str], images: str = "images") -> dict[str, Any]:
            options = {
                "input1": str(folder / images),
                "input2": str(reference),
                "input2_cache_name": "reference",
                "cache_root": str(folder / "cache"),
                "kid_subset_size": min(sets[images], sets["reference"], 1000),
            }
            runs = [fidelity([name], weights, **options) for name in names]
            return {name: value for run in runs for name, value in run.items()}

        try:
            torch.hub.set_dir(str(folder / "hub"))  # the cache of references
            ours(FLAGS, "few")
            theirs(["fid", "kid"], "few")
            rows = []
            for label, names, goal in (
                ("FID", ["fid"], ">= 1"),
                ("FID, KID, IS, precision/recall in one run / four runs", FLAGS, ">= 2.5"),
            ):
                seconds = []
                for _ in range(turns):
                    mine, values = _timed(ours, names)
                    other, their_values = _timed(theirs, names)
                    seconds.append((mine, other))
                mine, other = zip(*seconds, strict=True)
                rates = [num_images / statistics.median(side) for side in (mine, other)]
                remark = "{:.1f} against {:.1f} images/s".format(*rates)
                name = f"{label}, images/s / torch-fidelity's"
                rows.append(_row(name, _ratios(other, mine), goal, remark))
            difference = largest_difference(values, their_values)
            label = "largest relative difference of the four's values"
            return [*rows, Row(label, difference, "<= 1e-6", f"{num_images} images")]
        finally:
            torch.hub.set_dir(hub)


def largest_difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> float:
    """The largest relative difference of the metrics' values, without spreads, which may be 0."""
    worst = 0.0
    for name, theirs_ in theirs.items():
        pairs = [(ours[name], theirs_)]
        if isinstance(theirs_, Mapping):
            pairs = [(ours[name][key], value) for key, value in theirs_.items() if key != "std"]
        worst = max([worst, *(abs(a - b) / abs(b) if b else abs(a) for a, b in pairs)])
    return worst


# --- everything ----------------------------------------------------------------------------------


def benchmark(cfg: DictConfig) -> list[Row]:
    """Measure the parts in `cfg` (configs/benchmark.yaml); prints and returns the table."""
    schema.check(OmegaConf.to_container(cfg, resolve=True), schema.Benchmark)
    if cfg.out is not None:
        check_output(cfg.out, "out")
        if not os.access(folder := Path(cfg.out).absolute().parent, os.W_OK):
            raise UserError(f"out={cfg.out}: {folder} cannot be written to; give out=FILE")
        if Path(cfg.out).exists() and not read_json(Path(cfg.out)).keys() >= {"machine", "rows"}:
            raise UserError(f"out={cfg.out}: not a file of this script; choose another")
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    load = os.getloadavg()[0]
    arguments = [f"nfe={cfg.nfe}", f"batch_size={cfg.batch_size}", "device=cpu"]
    if cfg.threads is not None:
        arguments.append(f"threads={cfg.threads}")

    rows, speeds = [], {}
    if "correction" in cfg.parts:
        rows += correction_time(cfg.shape, cfg.ranks, cfg.repeats)
    if "memory" in cfg.parts:
        rows += correction_memory(cfg.shape, cfg.ranks)
    for setting in cfg.settings if "run" in cfg.parts else ():
        more, speeds[setting] = run_speed(setting, cfg.batches, cfg.model, arguments)
        rows += more
    if "outside" in cfg.parts:
        rows += outside_network(cfg.batches, cfg.model, arguments)
    if "pipelines" in cfg.parts:
        rows += pipeline_overhead(cfg.repeats)
    for setting in cfg.settings if "fd" in cfg.parts else ():
        if setting != "float32":
            rows += fd_change(setting, cfg.fd_images, cfg.model, arguments)
    if "evaluators" in cfg.parts:
        rows += evaluator_speed(cfg.evaluator_images, cfg.evaluator_turns)

    machine = describe_machine() | {"load": round(load, 2)}
    print(table(rows, machine))
    if cfg.out is not None:
        lines = [{**asdict(row), "met": row.met} for row in rows]
        result = {"machine": machine, "rows": lines, "speeds": speeds}
        write_json(Path(cfg.out), result, "out")
    return rows


def describe_machine() -> dict[str, Any]:
    """The machine and the versions that the numbers depend on."""
    try:
        info = Path("/proc/cpuinfo").read_text().split("model name")[1]
        processor = info.split(":", 1)[1].splitlines()[0].strip()
    except (OSError, IndexError):
        processor = platform.processor() or platform.machine()
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "processor": processor,
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
    }


def table(rows: Sequence[Row], machine: Mapping[str, Any]) -> str:
    """The rows in Markdown, under a line about the machine."""
    lines = [
        "{processor}, {cores} cores ({instructions}), {threads} threads, load {load} at the "
        "start; torch {torch}, diffusers {diffusers}, Python {python}".format(**machine),
        "",
        "| measured | value | goal | met | |",
        "|---|---:|---:|---|---|",
    ]
    for row in rows:
        met = {True: "yes", False: "no", None: ""}[row.met]
        goal = row.goal.replace("<=", "≤").replace(">=", "≥")
        lines.append(f"| {row.measured} | {row.value:.3g} | {goal} | {met} | {row.remark} |")
    return "\n".join(lines)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Use `count` CPU threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _timed(function: Callable, *args: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function(*args)
    return time.perf_counter() - start, result


def _seconds(function: Callable, *args: Any) -> float:
    return _timed(function, *args)[0]


def _ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(over, under, strict=True)]


def _row(name: str, ratios: list[float], goal: str, remark: str = "") -> Row:
    low, high = np.quantile(ratios, [0.25, 0.75])
    spread = f"middle half of {len(ratios)}: {low:.3g} to {high:.3g}"
    return Row(name, statistics.median(ratios), goal, f"{remark}; {spread}" if remark else spread)
