"""The images of a run: only those that are missing, over all processes."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from lml.data import prompts as prompt_sets
from lml.data.images import read
from lml.errors import UserError
from lml.files import write_atomic, write_json
from lml.pipelines import find_model
from lml.processes import is_first, on_first
from lml.runs.observer import Observer
from lml.runs.plan import choose_prompts, plan
from lml.runs.provenance import provenance
from lml.runs.records import CONTROL, read_metrics
from lml.runs.store import RunFolder
from lml.runs.worker import Worker
from lml.seals import sealed


def generate(
    cfg: Mapping[str, Any],
    device: torch.device,
    observer: Observer,
    wait: bool = False,
    latents: bool = False,
) -> tuple[RunFolder, dict[str, Any]]:
    """Make the images that are missing. Returns the run folder and the timing of those made now.

    The timing is {} if no image was missing. With `wait`, wait for another process that makes the
    same run; otherwise that is a UserError. With `latents`, also keep the latents that the images
    were decoded from, if the model has any.
    """
    model = find_model(cfg["model"])
    planned = plan(cfg, model, choose_prompts(cfg, model))
    folder, count = planned.folder, cfg["num_images"]
    latents = latents and model.has_latents
    stored = on_first(partial(_open, folder, planned.cfg, observer, wait, latents))
    try:
        timing = {}
        if len(stored) < count:
            worker = Worker(planned, device, stored, latents)
            timing = worker.make(observer)
            if is_first() and (control := worker.sampler().control_map) is not None:
                write_atomic(folder.path / CONTROL, _encode(control))
        if is_first():
            _finish(folder, count, planned.prompts, timing)
        return folder, timing
    except BaseException as error:
        if is_first() and not folder.is_replacing:
            with contextlib.suppress(UserError, OSError):
                done = folder.write_manifest(count, finished=False)
                if isinstance(error, KeyboardInterrupt):
                    error.args = (
                        f"interrupted: {done} of {count} images stored; "
                        "the same command completes the run",
                    )
        raise
    finally:
        if is_first():
            folder.close()


def _open(
    folder: RunFolder, cfg: Mapping[str, Any], observer: Observer, wait: bool, latents: bool
) -> set[int]:
    count = cfg["num_images"]
    folder.open({**cfg, "provenance": provenance()}, cfg["overwrite"], wait)
    try:
        if cfg.get("metrics") and not cfg["overwrite"]:  # before any work
            path = folder.path / "metrics.json"
            read_metrics(path, f"run_dir={folder.path}: {path.name}")
        stored, broken = folder.survey(count)
        complete = folder.read_manifest().get("complete")
    except BaseException:
        folder.close()
        raise
    if broken:
        more = f" and {len(broken) - 5} more" if len(broken) > 5 else ""
        names = ", ".join(broken[:5])
        observer.say(f"{folder.images}: broken or not this run's, made again: {names}{more}")
    if len(stored) == count and not complete and not (folder.path / "timing.json").exists():
        # Interrupted after its last image: make the last batch again, to have a timing.
        stored -= set(range(count - 1 - (count - 1) % cfg["batch_size"], count))
    # Where latents are needed but were not kept, the same image is made again.
    return {i for i in stored if not latents or folder.latents_path(i).exists()}


def _finish(
    folder: RunFolder, count: int, prompts: prompt_sets.PromptSet | None, timing: Mapping[str, Any]
) -> None:
    if timing:
        write_json(folder.path / "timing.json", sealed(timing, folder.hash, "timing"))
    if prompts is not None:
        write_atomic(folder.path / prompt_sets.FILE, prompts.to_jsonl())
    if timing or not (folder.path / "grid.png").exists():
        write_atomic(folder.path / "grid.png", draw_grid(folder, min(count, 64)))
    # The manifest comes last, since it says that the run is complete.
    if timing or not folder.read_manifest().get("complete"):
        folder.write_manifest(count)


def draw_grid(folder: RunFolder, count: int) -> bytes:
    """A PNG of the first `count` images in a square grid."""
    images = torch.stack([read(folder.image_path(i)) for i in range(count)])
    grid = make_grid(images, nrow=math.ceil(math.sqrt(count)), padding=2, pad_value=255)
    return _encode(grid)


def _encode(pixels: Tensor) -> bytes:
    """uint8 `pixels` (3, H, W) as a PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(buffer, "PNG")
    return buffer.getvalue()
