"""One process's share of a run: it makes images, stores them and measures the time."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from diffusers import SchedulerMixin
from torch import Tensor, nn

from lml.errors import RunError
from lml.pipelines import Sampler, pixel
from lml.processes import gather, on_first, rank_and_world
from lml.runs.observer import Observer
from lml.runs.plan import Plan
from lml.runs.sampling import guarded, load_sampler
from lml.runs.stopwatch import Stopwatch
from lml.runs.writer import Writer


@dataclass
class _Part:
    """The results of one process's share of a run."""

    images: int
    evaluations: int  # of all images together
    duration: float  # seconds until its last image is stored
    guided: bool
    seconds: Counter  # by part of the work


@dataclass
class Worker:
    """One process's share of a run: every Nth incomplete batch, with N processes."""

    plan: Plan
    device: torch.device
    stored: set[int] = field(default_factory=set)  # the indices of stored images
    latents: bool = False  # whether to store latents, too

    def make(self, observer: Observer) -> dict[str, Any]:
        """Make and store the images that are missing; returns the timing of all processes."""
        rank, world = rank_and_world()
        blocks = self.blocks(self.plan.cfg["num_images"])
        blocks = [block for block in blocks if not self.stored.issuperset(block)][rank::world]
        sampler = self.sampler() if blocks else None
        if sampler and self.plan.prompts is not None and rank == 0:
            for line in sampler.cut(self.plan.prompts.texts):
                observer.say(line)
        watch = self._watch(sampler)
        images = sum(map(len, blocks))
        observer.begin(images)
        start = time.perf_counter()
        with contextlib.closing(watch):
            self._store(blocks, sampler, watch, observer)
        duration = time.perf_counter() - start
        guided = bool(sampler and sampler.guided)
        return self._timing(_Part(images, watch.evaluations, duration, guided, watch.seconds()))

    def measure(self) -> float:
        """Network evaluations per second of this process, measured on the first batch.

        They are counted as `nfe` is. The network stays loaded, compiled for the run's batch size.
        """
        sampler, block = self.sampler(), self.blocks(self.plan.cfg["num_images"])[0]
        few = math.ceil(2 / (self.plan.cfg["model"].get("strength") or 1))
        steps, scheduler = min(few, self.plan.steps), self.plan.scheduler
        # a list has an entry for each step of the whole trajectory
        plain = {"damping": None, "length": 1.0}
        lists = [key for key in plain if isinstance(scheduler.config.get(key), Sequence)]
        scheduler = type(scheduler).from_config(
            scheduler.config, **{key: plain[key] for key in lists}
        )
        short = replace(self, plan=replace(self.plan, steps=steps, scheduler=scheduler))
        short._batch(sampler, block, Stopwatch(self.device))
        start = time.perf_counter()
        self._batch(sampler, block, Stopwatch(self.device))
        return self.plan.cfg["nfe"] * len(block) / (time.perf_counter() - start)

    def sampler(self) -> Sampler:
        """The loaded model."""
        return load_sampler(self.plan.cfg, self.plan.model, self.device)

    def blocks(self, count: int) -> list[range]:
        """The indices of the first `count` images, in batches."""
        size = self.plan.cfg["batch_size"]
        return [range(i, min(i + size, count)) for i in range(0, count, size)]

    def images(self, sampler: Sampler, block: range) -> Tensor:
        """The images with the indices in `block`, (B, C, H, W) in about [-1, 1]."""
        cfg, model, scheduler = self.plan.cfg, self.plan.model, self.plan.scheduler
        # config.yaml of a run older than this key has none
        repeated = cfg.get("seeds")
        seeds = [cfg["seed"] + (i % repeated if repeated else i) for i in block]
        prompts = self.plan.prompts
        texts = None if prompts is None else prompts[block.start : block.stop].texts
        options = cfg["solver"].get("step") or {}
        with guarded(cfg, model, self.device):
            try:
                with _finite_images(sampler, scheduler) as checked:
                    return checked(sampler(scheduler, self.plan.steps, seeds, texts, **options))
            except FloatingPointError as error:
                raise RunError(
                    f"model={model.name}: {error}; images {block[0]} to {block[-1]} not stored"
                ) from None

    def _watch(self, sampler: Sampler | None) -> Stopwatch:
        """A stopwatch for the sampler's networks and for the correction."""
        watch = Stopwatch(self.device)
        if sampler is None:
            return watch
        watch.attach(sampler.network, "network", count=True)
        for name, network in sampler.parts.items():
            watch.attach(network, name)
        if isinstance(correction := getattr(self.plan.scheduler, "correction", None), nn.Module):
            watch.attach(correction, "correction")
        return watch

    def _store(
        self, blocks: list[range], sampler: Sampler | None, watch: Stopwatch, observer: Observer
    ) -> None:
        """Make the images of `blocks`, and store those that are missing."""
        # A batch is made whole, even for one missing image: images depend on their batch.
        batches = ((block, self._batch(sampler, block, watch)) for block in blocks)
        with Writer(self.plan.folder) as writer:
            if self.plan.cfg["overwrite"]:
                # Only when the first batch is made does this run replace another.
                batches = itertools.chain(list(itertools.islice(batches, 1)), batches)
                on_first(self.plan.folder.begin)
            for block, pixels in batches:
                latents = [None] * len(block)
                if self.latents:
                    latents = sampler.latents.float().cpu().numpy()
                with watch.measure("writing"):
                    made = zip(block, pixels, latents, strict=True)
                    writer.submit(image for image in made if image[0] not in self.stored)
                observer.made(len(block))
            with watch.measure("writing"):
                writer.wait()

    def _batch(self, sampler: Sampler, block: range, watch: Stopwatch) -> np.ndarray:
        with watch.measure("sampling"):
            images = self.images(sampler, block)
        return pixel.to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()

    def _timing(self, part: _Part) -> dict[str, Any]:
        """The content of timing.json, for all processes together."""
        parts = gather(part)
        images = sum(part.images for part in parts)
        evaluations = sum(part.evaluations for part in parts)
        per_image, nfe = evaluations / images, self.plan.cfg["nfe"]
        # Most guided models evaluate with and without the prompt; some take guidance as an input.
        if per_image not in (nfe, 2 * nfe if any(part.guided for part in parts) else nfe):
            raise RuntimeError(f"nfe={nfe}, but {per_image:g} evaluations were counted")
        seconds, outside = _seconds(parts)
        return {
            "images": images,
            "images_per_second": round(images / max(part.duration for part in parts), 3),
            "evaluations_per_image": nfe,
            "guidance_evaluations_per_image": per_image - nfe,
            "seconds": {name: round(value, 4) for name, value in seconds.items()},
            "outside_network": round(outside, 4),
            "processes": len(parts),
            "threads": torch.get_num_threads(),
            "device": str(self.device),
        }


def _seconds(parts: Sequence[_Part]) -> tuple[dict[str, float], float]:
    """The seconds of all processes by part of the work, and the share outside the networks."""
    total = sum(part.duration for part in parts)
    spent = sum((part.seconds for part in parts), Counter())
    known = ("sampling", "network", "correction", "writing")
    others = {name: value for name, value in spent.items() if name not in known}
    inside = spent["network"] + sum(others.values())
    seconds = {
        "network": spent["network"],
        **others,
        "correction": spent["correction"],
        "solver": spent["sampling"] - inside - spent["correction"],
        "writing": spent["writing"],
        "other": total - spent["sampling"] - spent["writing"],
        "total": total,
    }
    return seconds, 1 - inside / total


@contextlib.contextmanager
def _finite_images(
    sampler: Sampler, scheduler: SchedulerMixin
) -> Iterator[Callable[[Tensor], Tensor]]:
    """A function that checks images of `sampler` and returns them.

    FloatingPointError if a pixel is not finite, or if the decoder returned a value that is not
    finite, since pipelines cut infinite values to white. There is no error if the solver itself
    diverged and its scheduler says `may_diverge`.
    """
    decoded: list[Tensor] = []

    def look(_: nn.Module, args: tuple, output: Tensor) -> None:
        decoded.append(output.isfinite().all())

    def checked(images: Tensor) -> Tensor:
        latents = sampler.latents
        if torch.stack([images.isfinite().all(), *decoded]).all():
            return images
        if latents is not None and latents.isfinite().all():
            raise FloatingPointError("the decoder returned NaN or inf")
        if not getattr(scheduler, "may_diverge", False):
            raise FloatingPointError("the solver returned NaN or inf")
        return images

    decoder = sampler.parts.get("decoder")
    hook = None if decoder is None else decoder.register_forward_hook(look)
    try:
        yield checked
    finally:
        if hook is not None:
            hook.remove()
