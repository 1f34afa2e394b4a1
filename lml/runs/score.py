"""Scores of a run, or of any folder of images."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from omegaconf import DictConfig, OmegaConf

from lml import schema
from lml.data import prompts as prompt_sets
from lml.data.images import LATENTS
from lml.device import use_device
from lml.errors import UserError
from lml.files import read_json
from lml.metrics.evaluate import Context, evaluate
from lml.pipelines.trajectory import Replay
from lml.processes import joined, on_first
from lml.runs.observer import Observer
from lml.runs.records import (
    check_output,
    check_recorded,
    hold,
    merge_metrics,
    read_config,
    read_metrics,
)
from lml.runs.repeat import read_made, reference_run, replay
from lml.runs.store import RunFolder
from lml.seals import sealed, settings_hash, why_not_sealed


def is_finished(folder: RunFolder, metrics: Mapping[str, Any]) -> bool:
    """Whether the run has all its images, and scores for all of the config `metrics`.

    Image files that are newer than the manifest are read again. A score counts only with its seal.
    """
    if any(folder.changes(quick=True)):
        return False
    results = read_json(folder.path / "metrics.json")
    for name, config in metrics.items():
        entry, digest = results.get(name), settings_hash(config)
        if not isinstance(entry, dict) or why_not_sealed(entry, folder.hash, name):
            return False
        # The scores of older versions of scripts/evaluate.py lack the hash of their config.
        if schema.find_problem(schema.Score, entry, name):
            return False
        if entry.get("config_sha256", digest) != digest:
            return False
    return True


@dataclass(frozen=True)
class _Asked:
    """The images to score: those of a `run`, which can be made again, or of any folder."""

    images: str | Path  # as the user gave it
    scores: Path  # the file for the scores, unless `out` names another
    run: RunFolder | None = None
    reference: Callable[..., Path] | None = None
    replay: Callable[[int], Replay] | None = None


def evaluate_folder(cfg: DictConfig, observer: Observer | None = None) -> Path:
    """Score a run, or any folder of images (configs/evaluate.yaml), and return the JSON file."""
    config = OmegaConf.to_container(cfg, resolve=True)
    schema.check(config, schema.Evaluate)
    observer = observer or Observer()
    run_dir, images = config["run_dir"], config["images"]
    if (run_dir is None) == (images is None):
        raise UserError(f"run_dir={run_dir}: expected one of run_dir and images (images={images})")
    device = use_device(config["device"], config["threads"])
    asked = _of_folder(images) if run_dir is None else _of_run(run_dir, device, observer)
    run, images = asked.run, asked.images
    out = Path(config["out"] or asked.scores)
    is_runs = run is not None and out.resolve() == asked.scores.resolve()
    _check_out(out, images, is_runs)
    with joined():
        manifest = on_first(partial(_check_images, run, images)) if run is not None else {}
        texts = on_first(partial(prompt_sets.find_texts, images, config["prompts"]))
        size = config["batch_size"]
        context = Context(asked.reference, device, size, texts, asked.replay, observer.say)
        results = evaluate(images, config["metrics"], context=context)
        observer.scored(results)  # shown before they are written, as the disk may be full
        if run is not None:
            results = seal_scores(results, config["metrics"], run)
        if is_runs:
            on_first(partial(run.add_metrics, results, manifest))
        else:
            on_first(partial(_add_apart, out, results))
    return out


def _of_run(run_dir: str, device: torch.device, observer: Observer) -> _Asked:
    """UserError if `run_dir` has no complete run, or if its config.yaml was edited."""
    images = Path(run_dir) / "images"
    latents = (Path(run_dir) / LATENTS).is_dir()

    def reference(**options: Any) -> Path:
        return reference_run(read_made(run_dir), device, observer, latents=latents, **options)

    def again(count: int) -> Replay:
        return replay(read_made(run_dir), device, count)

    made = read_config(run_dir)  # UserError if it is no run's folder
    if not read_json(Path(run_dir) / "manifest.json", schema.Manifest).get("complete"):
        raise UserError(f"run_dir={run_dir}: not complete; finish the run, or give images={images}")
    check_recorded(run_dir, made)
    run = RunFolder(run_dir, made["settings"])
    return _Asked(images, Path(run_dir) / "metrics.json", run, reference, again)


def _of_folder(images: str) -> _Asked:
    # Beside the folder: a run, and an exported folder, refuse files that aren't theirs.
    folder = Path(os.path.abspath(images))
    return _Asked(images, folder.parent / f"{folder.name}.metrics.json")


def _check_out(out: Path, images: str | Path, is_runs: bool) -> None:
    """UserError if scores cannot be added to the file `out`."""
    if not is_runs:
        check_output(out, "out")
    if Path(images).is_dir() and not os.access(out.parent, os.W_OK):
        raise UserError(f"out={out}: {out.parent} cannot be written to; give out=FILE elsewhere")
    read_metrics(out, f"out={out}")


def _check_images(run: RunFolder, images: Path) -> dict[str, Any]:
    """The manifest of the run. UserError if the images are no longer those that it made."""
    manifest = run.read_manifest()
    if change := next(run.changes(), None):
        raise UserError(
            f"run_dir={run.path}: {change}; repeat the run's command to mend it, or give "
            f"images={images} to score them as they are"
        )
    return manifest


def _add_apart(out: Path, results: Mapping[str, dict]) -> None:
    with hold(FileLock(out.with_name(f".{out.name}.lock")), f"out={out}"):
        merge_metrics(out, results, f"out={out}")


def seal_scores(
    results: Mapping[str, dict], metrics: Mapping[str, Any], run: RunFolder
) -> dict[str, dict]:
    """The results of the config `metrics`, each with the hash of its config and the run's seal."""
    asked = {name: {"config_sha256": settings_hash(metrics[name])} for name in results}
    return {name: sealed(entry | asked[name], run.hash, name) for name, entry in results.items()}
