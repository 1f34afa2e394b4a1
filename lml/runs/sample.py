"""The work of scripts/sample.py: make a run's images, and score them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from lml import schema
from lml.data import prompts as prompt_sets
from lml.device import use_device
from lml.metrics.base import declared
from lml.metrics.evaluate import Context, build, check_count, check_prompts, evaluate
from lml.processes import joined, on_first
from lml.runs.generate import generate
from lml.runs.observer import Observer
from lml.runs.repeat import reference_run, replay
from lml.runs.score import seal_scores


def run(cfg: DictConfig, observer: Observer | None = None) -> Path:
    """Make the images of `cfg` (configs/sample.yaml), score them, and return the run's folder.

    Makes only what is missing. Raises UserError for bad input, RunError when the run cannot
    continue.
    """
    config = OmegaConf.to_container(cfg, resolve=True)
    observer = observer or Observer()
    schema.check(config, schema.Sample)
    device = use_device(config["device"], config["threads"])
    with joined():
        check_prompts(config["metrics"], bool(config["prompts"]))
        metrics = build(config["metrics"])  # before any work, since a name may be misspelt
        check_count(metrics, config["num_images"])
        latents = any(declared(metric).takes_latents for metric in metrics.values())
        folder, timing = generate(config, device, observer, latents=latents)
        observer.finish(folder, timing)
        if metrics:
            reference = partial(reference_run, config, device, observer, latents=latents)
            texts = on_first(partial(prompt_sets.find_texts, folder.images))
            again = partial(replay, config, device)
            context = Context(reference, device, prompts=texts, replay=again, say=observer.say)
            manifest = on_first(folder.read_manifest)
            results = evaluate(folder.images, metrics, context=context)
            observer.scored(results)  # shown before they are written, as the disk may be full
            results = seal_scores(results, config["metrics"], folder)
            on_first(partial(folder.add_metrics, results, manifest))
    return folder.path
