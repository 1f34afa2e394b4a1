"""Runs metrics over a folder of images, in the steps of `evaluate`: prepare, feed, compute."""

from __future__ import annotations

import contextlib
import hashlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from lml.data.images import ImageFolder, latents_path
from lml.data.references import Reference
from lml.errors import UserError
from lml.instances import make
from lml.metrics.base import RunMetric, class_of, declared
from lml.pipelines.trajectory import Replay
from lml.processes import gather, rank_and_world


def _say(line: str) -> None:
    print(line, file=sys.stderr)


@dataclass
class Context:
    """What metrics may need beside the images.

    Attributes:
        reference_run: `reference_run(nfe=…, solver=…)` repeats the run with this number of
            evaluations and this solver, from the same noise, and returns its folder of images.
            None for images without a run.
        device: where the metrics compute.
        batch_size: how many images a metric is given at a time.
        prompts: the prompt of each image, in the order of the sorted file names.
        replay: `replay(count)` makes the run's first images again and returns their trajectories.
            None for images without a run.
        say: called with each line that the user should read.
    """

    reference_run: Callable[..., Path] | None = None
    device: str | torch.device = "cpu"
    batch_size: int = 256  # a multiple of 64, the batch size inside Inception
    prompts: list[str] | None = None
    replay: Callable[[int], Replay] | None = None
    say: Callable[[str], None] = _say


def build(metrics: Mapping[str, Any]) -> dict[str, Metric]:
    """Make the metrics that `metrics` describes, by name: `_target_` and its arguments for each.

    Metrics that exist already are returned as they are. UserError if one cannot be made.
    """
    made = {}
    for name, config in (metrics or {}).items():
        if not isinstance(config, Metric):
            config = make(config, f"metrics.{name}")
        if not isinstance(config, Metric):
            raise UserError(f"metrics.{name}: expected a _target_ that makes a torchmetrics Metric")
        made[name] = config
    return made


def check_prompts(metrics: Mapping[str, Any], available: bool) -> None:
    """Raise UserError if one of the metrics needs prompts and there are none.

    `metrics` are metrics or their configs, as for `build`. No network is loaded.
    """
    for name, metric in (metrics or {}).items():
        if not available and declared(class_of(metric)).needs_prompts:
            raise UserError(
                f"metrics=[{name}]: needs prompts; give prompts=text prompts.file=FILE, "
                "or a run that was made from prompts"
            )


def check_count(metrics: Mapping[str, Metric], count: int) -> None:
    """Raise UserError if one of the metrics has no value for as few as `count` images."""
    for name, metric in metrics.items():
        if count < (least := declared(metric).least_images):
            raise UserError(f"metrics=[{name}]: needs at least {least} images; there are {count}")


def evaluate(
    images: ImageFolder | str | Path,
    metrics: Mapping[str, Any],
    *,
    context: Context | None = None,
) -> dict[str, dict]:
    """Feed all images to all metrics in one pass, and return the result of each by its name.

    A result has `value` (a float, or a dict of floats), `protocol`, `seconds`, and `warning` if
    there are fewer images than the metric's protocol expects. If the metric computes `steps`, its
    lists of numbers, one a step, are there, too; null stands for a number that does not exist.

    `metrics` are metrics or their configs, as for `build`. What a metric is fed is declared by its
    class: see `lml.metrics.base.RunMetric`. Under torch.distributed every process reads its share
    of the fixed batches, and all return the numbers that one process would return.

    Raises:
        UserError: the folder is empty; a file is broken or of another size (the error names it);
            a metric cannot be made or lacks what it needs; memory runs out.
    """
    context = context or Context()
    folder = images if isinstance(images, ImageFolder) else ImageFolder(images)
    check_prompts(metrics, context.prompts is not None)
    feeds = _prepare(folder, build(metrics), context)
    if rank_and_world()[0] == 0:
        for line in _left_out(folder, [feed.metric for feed in feeds]):
            context.say(line)
    error = None
    try:
        _replay(folder, feeds, context)
        _feed(folder, feeds, context)
    except UserError as caught:
        error = caught
    _raise_together(error)
    return {feed.name: _result(feed, folder, context) for feed in feeds}


# --- the steps of evaluate ---------------------------------------------------------------------


@dataclass
class _Feed:
    """A metric, what it is fed beside the images, and the time that it has taken."""

    name: str
    metric: Metric
    reference: ImageFolder | None = None
    takes_latents: bool = False
    prompts: Mapping[str, str] | None = None  # by file name
    seconds: float = 0.0

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Add the seconds spent inside to the metric's own."""
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start


def _prepare(folder: ImageFolder, metrics: dict[str, Metric], context: Context) -> list[_Feed]:
    """What each metric is fed. UserError if anything is missing. Moves metrics to the device."""
    device = _device(context)
    for name, metric in metrics.items():
        with _memory(name, device, 0):
            metric.to(device)
    feeds = [_Feed(name, metric) for name, metric in metrics.items()]
    for feed in feeds:
        if declared(feed.metric).needs_prompts:
            feed.prompts = _prompts(folder, feed.name, context.prompts)
    check_count(metrics, len(folder))
    for feed in feeds:
        feed.metric.reset()
        _find_reference(folder, feed, context)
        if declared(feed.metric).trajectories and context.replay is None:
            raise UserError(
                f"metrics=[{feed.name}]: needs a run to make again; give run_dir=FOLDER"
            )
    return feeds


def _device(context: Context) -> str | torch.device:
    # torchmetrics sums features in float64, which Apple's GPUs don't have
    return "cpu" if torch.device(context.device).type == "mps" else context.device


def _prompts(folder: ImageFolder, name: str, prompts: list[str]) -> dict[str, str]:
    """The prompt of each file. UserError, naming the metric, if their numbers differ."""
    if len(prompts) != len(folder):
        raise UserError(
            f"metrics=[{name}]: {len(prompts)} prompts for the {len(folder)} images "
            f"in {folder.path}"
        )
    return dict(zip(folder.names, prompts, strict=True))


def _find_reference(folder: ImageFolder, feed: _Feed, context: Context) -> None:
    """Give `feed` its folder of reference images, if it has one, and say if there are latents."""
    if not isinstance(feed.metric, RunMetric):
        return
    path = feed.metric.reference_folder(context.reference_run)
    if path is None:
        return
    feed.reference = _paired(folder, path, feed.name)
    if feed.metric.takes_latents:
        both = folder.path, feed.reference.path
        files = (latents_path(path / file) for path in both for file in folder.names)
        feed.takes_latents = all(file.is_file() for file in files)


def _paired(folder: ImageFolder, path: Path, name: str) -> ImageFolder:
    """The images in `path`. UserError unless every image of `folder` has one of its size there."""
    reference = ImageFolder(path)
    missing = sorted(set(folder.names) - set(reference.names))
    if missing:
        raise UserError(f"metrics=[{name}]: the reference {path} has no {missing[0]}")
    if reference.size != folder.size:
        (height, width), (h, w) = folder.size, reference.size
        raise UserError(f"metrics=[{name}]: {path} has {w}x{h} pixels; expected {width}x{height}")
    return reference


def _left_out(folder: ImageFolder, metrics: Sequence[Metric]) -> list[str]:
    """A line for each set, the images or a reference, from which files are left out."""
    references = (declared(metric).reference for metric in metrics)
    sets = [folder, *(r.images for r in references if isinstance(r, Reference))]
    lines = {
        images.path: images.describe_left_out()
        for images in sets
        if isinstance(images, ImageFolder)
    }
    return [line for line in lines.values() if line]


def _replay(folder: ImageFolder, feeds: Sequence[_Feed], context: Context) -> None:
    """Update the metrics that look along trajectories."""
    for feed in feeds:
        if count := declared(feed.metric).trajectories:
            with feed.timed():
                feed.metric.update(context.replay(min(count, len(folder))))


def _feed(folder: ImageFolder, feeds: Sequence[_Feed], context: Context) -> None:
    """Update the other metrics with this process's share of the batches."""
    feeds = [feed for feed in feeds if not declared(feed.metric).trajectories]
    rank, world = rank_and_world()
    device = _device(context)
    blocks = folder.blocks(context.batch_size)[rank::world] if feeds else []
    for block, batch in zip(blocks, folder.load_blocks(blocks), strict=True):
        batch = batch.to(device)
        for feed in feeds:
            with feed.timed():
                more = _arguments(folder, feed, block, device)
                with _memory(feed.name, device, len(batch)):
                    feed.metric.update(batch, *more)


def _arguments(
    folder: ImageFolder, feed: _Feed, block: list[str], device: str | torch.device
) -> list[Any]:
    """What `update` gets after the images of the files `block`."""
    arguments = []
    if feed.reference is not None:
        arguments.append(feed.reference.load(block).to(device))
        if feed.takes_latents:
            arguments.append(_load_latents(folder, feed.reference, block, device))
    if feed.prompts is not None:
        arguments.append([feed.prompts[file] for file in block])
    return arguments


def _load_latents(
    folder: ImageFolder, reference: ImageFolder, block: list[str], device: str | torch.device
) -> tuple[Tensor, Tensor]:
    """The latents (B, ...) of the files `block` in both folders. UserError for a broken file."""
    both = []
    for images in (folder, reference):
        files = [latents_path(images.path / name) for name in block]
        try:
            # mapped: a file shorter than its header says is an error before memory is taken
            arrays = [np.load(file, mmap_mode="r") for file in files]
            both.append(torch.from_numpy(np.stack(arrays)).to(device))
        except (OSError, ValueError) as error:
            raise UserError(f"{files[0].parent}: no readable latents ({error})") from None
    return both[0], both[1]


def _result(feed: _Feed, folder: ImageFolder, context: Context) -> dict[str, Any]:
    """What metrics.json says of one metric."""
    with feed.timed():
        value = _floats(feed.metric.compute())
    # beside the value: a table shows only single numbers
    steps = {"steps": value.pop("steps")} if isinstance(value, dict) and "steps" in value else {}
    declarations = declared(feed.metric)
    protocol = dict(declarations.protocol) or {"metric": type(feed.metric).__name__}
    if feed.prompts is not None:
        digest = hashlib.sha256("\n".join(context.prompts).encode()).hexdigest()
        protocol["prompts_sha256"] = digest
    protocol["images"] = len(folder)
    if folder.left_out:
        protocol["left_out"] = folder.left_out.total()
    result = {"value": value, "protocol": protocol, "seconds": round(feed.seconds, 3), **steps}
    if len(folder) < declarations.num_images:
        expected = declarations.num_images
        result["warning"] = f"{len(folder)} images; the protocol asks for {expected}"
    return result


def _floats(value: Any) -> float | list[float | None] | dict[str, Any]:
    """The value in types of JSON; None for NaN in a list."""
    if isinstance(value, Mapping):
        return {name: _floats(v) for name, v in value.items()}
    if isinstance(value, Tensor) and value.ndim:
        return [None if math.isnan(number) else number for number in value.tolist()]
    return float(value.item() if isinstance(value, Tensor) else value)


@contextlib.contextmanager
def _memory(name: str, device: str | torch.device, count: int) -> Iterator[None]:
    """UserError if memory runs out inside, where the metric `name` is given `count` images."""
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        batch = f"a batch of {count} images" if count else "its network"
        raise UserError(
            f"metrics=[{name}]: {batch} needs more memory than {device} has; the images stay, and "
            "`python scripts/evaluate.py run_dir=FOLDER` scores them with a smaller batch_size or "
            "device=cpu"
        ) from None


def _raise_together(error: UserError | None) -> None:
    """Raise the error of any process in all of them: else the others would wait for it forever."""
    for found in gather(error):
        if found is not None:
            raise found
