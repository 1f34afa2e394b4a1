"""One process's part of a run: it makes images, stores them and takes the time."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from diffusers import SchedulerMixin
from torch import Tensor, nn

from lml.data import prompts as prompt_sets
from lml.errors import RunError
from lml.pipelines import Model, Sampler, pixel
from lml.processes import gather, on_first, rank_and_world
from lml.runs.observer import Observer
from lml.runs.sampling import guarded, load_sampler
from lml.runs.stopwatch import Stopwatch
from lml.runs.store import RunFolder
from lml.runs.writer import Writer


@dataclass
class Share:
    """What one of N processes makes of a run: each Nth of the blocks that miss an image."""

    cfg: Mapping[str, Any]
    device: torch.device
    model: Model
    prompts: prompt_sets.PromptSet | None
    scheduler: SchedulerMixin
    steps: int
    folder: RunFolder
    stored: set[int]
    latents: bool = False  # keep them, too

    def make(self, observer: Observer) -> dict[str, Any]:
        """Make and store the images that are missing; returns the timing of all processes."""
        rank, world = rank_and_world()
        blocks = self.blocks(self.cfg["num_images"])
        blocks = [block for block in blocks if not self.stored.issuperset(block)][rank::world]
        sampler = self.sampler() if blocks else None
        if sampler and self.prompts is not None and rank == 0:
            for line in sampler.cut(self.prompts.texts):
                observer.say(line)
        watch = Stopwatch(self.device)
        if blocks:
            watch.attach(sampler.network, "network", count=True)
            for name, network in sampler.parts.items():
                watch.attach(network, name)
            if isinstance(correction := getattr(self.scheduler, "correction", None), nn.Module):
                watch.attach(correction, "correction")
        observer.begin(sum(map(len, blocks)))
        start = time.perf_counter()
        with contextlib.closing(watch), Writer(self.folder) as writer:
            # A block is made whole, even if one image is missing: its composition is fixed.
            batches = ((block, self._batch(sampler, block, watch)) for block in blocks)
            if self.cfg["overwrite"]:
                # What cannot be made, for whatever reason, replaces nothing.
                batches = itertools.chain(list(itertools.islice(batches, 1)), batches)
                on_first(self.folder.begin)
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
        guided = bool(sampler and sampler.guided)
        return self._timing(watch, sum(map(len, blocks)), time.perf_counter() - start, guided)

    def measure(self) -> float:
        """Network evaluations per second of this process, as `nfe` counts them: of its first batch.

        The network stays loaded, compiled for the size of batch that the run has.
        """
        sampler, block = self.sampler(), range(min(self.cfg["batch_size"], self.cfg["num_images"]))
        replace(self, steps=min(2, self.steps))._batch(sampler, block, Stopwatch(self.device))
        start = time.perf_counter()
        self._batch(sampler, block, Stopwatch(self.device))
        return self.cfg["nfe"] * len(block) / (time.perf_counter() - start)

    def sampler(self) -> Sampler:
        """The loaded model; it is kept for the next run."""
        return load_sampler(self.cfg, self.model, self.device)

    def blocks(self, count: int) -> list[range]:
        """The first `count` images in batches."""
        size = self.cfg["batch_size"]
        return [range(i, min(i + size, count)) for i in range(0, count, size)]

    def _batch(self, sampler: Sampler, block: range, watch: Stopwatch) -> np.ndarray:
        with watch.measure("sampling"):
            images = self.images(sampler, block)
        return pixel.to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()

    def images(self, sampler: Sampler, block: range) -> Tensor:
        """Those of the numbers in `block`, (B, C, H, W) in about [-1, 1]."""
        seeds = [self.cfg["seed"] + i for i in block]
        prompts = None if self.prompts is None else self.prompts[block.start : block.stop].texts
        options = self.cfg["solver"].get("step") or {}
        with guarded(self.cfg, self.model, self.device):
            try:
                with _finite_images(sampler, self.scheduler) as checked:
                    return checked(sampler(self.scheduler, self.steps, seeds, prompts, **options))
            except FloatingPointError as error:
                raise RunError(
                    f"model={self.model.name}: {error}; images {block[0]} to {block[-1]} not stored"
                ) from None

    def _timing(
        self, watch: Stopwatch, images: int, seconds: float, guided: bool
    ) -> dict[str, Any]:
        shares = gather((watch.seconds(), watch.evaluations, images, seconds, guided))
        parts = sum((share[0] for share in shares), Counter())
        evaluations, images = (sum(share[i] for share in shares) for i in (1, 2))
        per_image, nfe = evaluations / images, self.cfg["nfe"]
        # Most guided models are evaluated with and without the prompt; some take guidance as input.
        if per_image not in (nfe, 2 * nfe if any(share[4] for share in shares) else nfe):
            raise RuntimeError(f"nfe={nfe}, but {per_image:g} evaluations were counted")
        total = sum(share[3] for share in shares)
        known = ("sampling", "network", "correction", "writing")
        others = {name: value for name, value in parts.items() if name not in known}
        inside = parts["network"] + sum(others.values())
        seconds = {
            "network": parts["network"],
            **others,
            "correction": parts["correction"],
            "solver": parts["sampling"] - inside - parts["correction"],
            "writing": parts["writing"],
            "other": total - parts["sampling"] - parts["writing"],
            "total": total,
        }
        return {
            "images": images,
            "images_per_second": round(images / max(share[3] for share in shares), 3),
            "evaluations_per_image": nfe,
            "guidance_evaluations_per_image": per_image - nfe,
            "seconds": {name: round(value, 4) for name, value in seconds.items()},
            "outside_network": round(1 - inside / total, 4),
            "processes": len(shares),
            "threads": torch.get_num_threads(),
            "device": str(self.device),
        }


@contextlib.contextmanager
def _finite_images(
    sampler: Sampler, scheduler: SchedulerMixin
) -> Iterator[Callable[[Tensor], Tensor]]:
    """A function that returns images of `sampler` if all their pixels are finite.

    FloatingPointError when they aren't, or when a decoder inside returned what isn't: pipelines cut
    infinite values to white. Not where the scheduler `may_diverge` and its latents have.
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
