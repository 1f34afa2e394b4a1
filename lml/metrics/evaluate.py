"""Runs metrics over a folder of images."""

from __future__ import annotations

import contextlib
import hashlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from hydra.utils import get_object
from torch import Tensor
from torchmetrics import Metric

from lml.data.images import ImageFolder, latents_path
from lml.errors import UserError
from lml.instances import make
from lml.pipelines.trajectory import Replay


def _say(line: str) -> None:
    print(line, file=sys.stderr)


@dataclass
class Context:
    """What metrics may need beside the images.

    `reference_run(nfe=…, solver=…)` repeats the run at hand with that many evaluations of that
    solver, from the same noise, and returns its folder of images; None for images without a run.
    `prompts` are those of the images, in the order of their sorted names. `replay(count)` makes
    the run's first images again and shows the way that they take. `say` is given lines to be read.
    """

    reference_run: Callable[..., Path] | None = None
    device: str | torch.device = "cpu"
    batch_size: int = 256  # in whole batches of 64, which is what Inception sees
    prompts: list[str] | None = None
    replay: Callable[[int], Replay] | None = None
    say: Callable[[str], None] = _say


def build(metrics: Mapping[str, Any]) -> dict[str, Metric]:
    """Make the metrics that `metrics` describes, by name, as `_target_` and its arguments.

    Metrics that exist already pass through. UserError when one cannot be made.
    """
    made = {}
    for name, config in (metrics or {}).items():
        if not isinstance(config, Metric):
            config = make(config, f"metrics.{name}")
        if not isinstance(config, Metric):
            raise UserError(f"metrics.{name}: a _target_ that makes a torchmetrics Metric is asked")
        made[name] = config
    return made


def check_prompts(metrics: Mapping[str, Any], available: bool) -> None:
    """Raise UserError when one of the metrics needs prompts and there are none.

    `metrics` as `build` takes them: what needs no prompts is found out without its network.
    """
    for name, metric in (metrics or {}).items():
        if _needs_prompts(metric) and not available:
            raise UserError(
                f"metrics=[{name}]: needs prompts; give prompts=text prompts.file=FILE, "
                "or a run that was made from prompts"
            )


def _needs_prompts(metric: Any) -> bool:
    if isinstance(metric, Mapping):
        try:
            metric = get_object(str(metric.get("_target_")))
        except Exception:  # Hydra wraps whatever the import raised; `build` will say it
            return False
    return getattr(metric, "needs_prompts", False)


def check_count(metrics: Mapping[str, Metric], count: int) -> None:
    """Raise UserError when one of the metrics says nothing of so few images."""
    for name, metric in metrics.items():
        if count < (least := getattr(metric, "least_images", 1)):
            raise UserError(f"metrics=[{name}]: needs at least {least} images; there are {count}")


@contextlib.contextmanager
def _memory(name: str, device: str | torch.device, count: int) -> Iterator[None]:
    """Memory that runs out inside is a UserError: what the metric `name` does to `count` images."""
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        batch = f"a batch of {count} images" if count else "its network"
        raise UserError(
            f"metrics=[{name}]: {batch} needs more memory than {device} has; the images stay, and "
            "`python scripts/evaluate.py run_dir=FOLDER` scores them with a smaller batch_size or "
            "device=cpu"
        ) from None


def evaluate(
    images: ImageFolder | str | Path,
    metrics: Mapping[str, Any],
    *,
    context: Context | None = None,
) -> dict[str, dict]:
    """Feed all images to all metrics in one pass, and return by name what each one says.

    That is `value` (a float, or a dict of floats), `protocol`, `seconds` and, for fewer images than
    the metric's protocol asks for, `warning`. What a metric computes under the name `steps` (lists
    of numbers, one a step, null where there is none) goes beside its value. Under torch.distributed
    every process reads its share of the fixed batches, and all return the numbers of one process.

    A metric is updated with uint8 (B, 3, H, W). One that has `reference_folder(reference_run)` is
    given the images of the same names in that folder as second argument, with `takes_latents` and
    where runs kept them both sets' latents as third, and one whose
    `needs_prompts` is true the images' prompts, a list of B strings. One that has `trajectories`,
    a number, is updated once, with the replay of as many images. It may carry a `protocol`, a
    `num_images`, and in `least_images` how many it cannot do without. Raises UserError for an empty
    folder, for a broken file or one of another size, by its name, and for memory that runs out.
    """
    context = context or Context()
    folder = images if isinstance(images, ImageFolder) else ImageFolder(images)
    # torchmetrics sums features in float64, which Apple's GPUs don't have
    device = "cpu" if torch.device(context.device).type == "mps" else context.device
    seconds, references, latents = {}, {}, set()
    check_prompts(metrics, context.prompts is not None)
    made = build(metrics)
    for name, metric in made.items():
        with _memory(name, device, 0):
            metric.to(device)
    prompted = [name for name, metric in made.items() if _needs_prompts(metric)]
    if prompted and len(context.prompts) != len(folder):
        raise UserError(
            f"metrics=[{prompted[0]}]: {len(context.prompts)} prompts for the {len(folder)} images "
            f"in {folder.path}"
        )
    prompts = dict(zip(folder.names, context.prompts, strict=True)) if prompted else {}
    check_count(made, len(folder))
    for name, metric in made.items():
        metric.reset()
        seconds[name] = 0.0
        if hasattr(metric, "reference_folder"):
            references[name] = _paired(folder, metric.reference_folder(context.reference_run), name)
            both = folder.path, references[name].path
            files = (latents_path(path / file) for path in both for file in folder.names)
            if getattr(metric, "takes_latents", False) and all(file.is_file() for file in files):
                latents.add(name)
        if hasattr(metric, "trajectories") and context.replay is None:
            raise UserError(f"metrics=[{name}]: needs a run to make again; give run_dir=FOLDER")
    replayed = {name: m for name, m in made.items() if hasattr(m, "trajectories")}
    scoring = {name: m for name, m in made.items() if name not in replayed}

    rank, world = (dist.get_rank(), dist.get_world_size()) if _distributed() else (0, 1)
    if rank == 0:
        for line in _left_out(folder, made):
            context.say(line)
    error = None
    try:
        for name, metric in replayed.items():
            start = time.perf_counter()
            metric.update(context.replay(min(metric.trajectories, len(folder))))
            seconds[name] += time.perf_counter() - start
        blocks = folder.blocks(context.batch_size)[rank::world] if scoring else []
        for block, batch in zip(blocks, folder.load_blocks(blocks), strict=True):
            batch = batch.to(device)
            for name, metric in scoring.items():
                start = time.perf_counter()
                paired = ()
                if name in references:
                    paired = (references[name].load(block).to(device),)
                    if name in latents:
                        paired += (_load_latents(folder, references[name], block, device),)
                texts = ([prompts[file] for file in block],) if name in prompted else ()
                with _memory(name, device, len(batch)):
                    metric.update(batch, *paired, *texts)
                seconds[name] += time.perf_counter() - start
    except UserError as caught:
        error = caught
    _raise_together(error)

    results = {}
    left_out = {"left_out": folder.left_out.total()} if folder.left_out else {}
    for name, metric in made.items():
        start = time.perf_counter()
        value = _floats(metric.compute())
        # not in the value, so that a table of it is one of few numbers
        steps = (
            {"steps": value.pop("steps")} if isinstance(value, dict) and "steps" in value else {}
        )
        seconds[name] += time.perf_counter() - start
        protocol = getattr(metric, "protocol", {"metric": type(metric).__name__})
        if name in prompted:
            digest = hashlib.sha256("\n".join(context.prompts).encode()).hexdigest()
            protocol = {**protocol, "prompts_sha256": digest}
        results[name] = {
            "value": value,
            "protocol": {**protocol, "images": len(folder), **left_out},
            "seconds": round(seconds[name], 3),
            **steps,
        }
        if len(folder) < getattr(metric, "num_images", 0):
            results[name]["warning"] = (
                f"{len(folder)} images; the protocol asks for {metric.num_images}"
            )
    return results


def _left_out(folder: ImageFolder, metrics: Mapping[str, Metric]) -> list[str]:
    """What files are left out of the images and of the sets that they are compared with."""
    references = (getattr(metric, "reference", None) for metric in metrics.values())
    sets = [folder, *(getattr(reference, "images", None) for reference in references)]
    lines = {
        images.path: images.describe_left_out()
        for images in sets
        if isinstance(images, ImageFolder)
    }
    return [line for line in lines.values() if line]


def _paired(folder: ImageFolder, path: Path, name: str) -> ImageFolder:
    reference = ImageFolder(path)
    missing = sorted(set(folder.names) - set(reference.names))
    if missing:
        raise UserError(f"metrics=[{name}]: the reference {path} has no {missing[0]}")
    if reference.size != folder.size:
        (height, width), (h, w) = folder.size, reference.size
        raise UserError(f"metrics=[{name}]: {path} has {w}x{h} pixels; {width}x{height} is needed")
    return reference


def _load_latents(
    folder: ImageFolder, reference: ImageFolder, block: list[str], device: str | torch.device
) -> tuple[Tensor, Tensor]:
    both = []
    for images in (folder, reference):
        files = [latents_path(images.path / name) for name in block]
        try:
            # mapped: a file that is shorter than its header says is an error before any memory
            arrays = [np.load(file, mmap_mode="r") for file in files]
            both.append(torch.from_numpy(np.stack(arrays)).to(device))
        except (OSError, ValueError) as error:
            raise UserError(f"{files[0].parent}: no readable latents ({error})") from None
    return both[0], both[1]


def _floats(value: Any) -> float | list[float | None] | dict[str, Any]:
    if isinstance(value, Mapping):
        return {name: _floats(v) for name, v in value.items()}
    if isinstance(value, Tensor) and value.ndim:
        return [None if math.isnan(number) else number for number in value.tolist()]
    return float(value.item() if isinstance(value, Tensor) else value)


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _raise_together(error: UserError | None) -> None:
    """Raise it in every process: the others would wait forever for the one that left."""
    errors = [error]
    if _distributed():
        errors = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error)
    for error in errors:
        if error is not None:
            raise error
