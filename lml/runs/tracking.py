"""Shows and logs the progress of a run."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from lml.processes import is_first
from lml.runs.loggers import Logger, WandbLogger
from lml.runs.observer import Observer
from lml.runs.progress import Progress
from lml.runs.store import RunFolder


class Tracker(Observer):
    """Shows a run on the terminal and logs it. A context, so that the logger is always finished."""

    def __init__(self, cfg: DictConfig):
        config = OmegaConf.to_container(cfg, resolve=True)
        self.first = is_first()
        self.show = bool(config.get("progress", True)) and self.first
        self.logger = Logger()
        if self.first and config.get("logger", {}).get("name") == "wandb":
            self.logger = WandbLogger(config["logger"], config["name"], config)
        self.progress = None

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type | None, *exception: object) -> None:
        self._close()
        self.logger.finish(failed=kind is not None)

    def say(self, line: str) -> None:
        tqdm.write(line, file=sys.stderr)

    def begin(self, total: int) -> None:
        self._close()
        self.progress = Progress(total, self.show)

    def made(self, count: int) -> None:
        self.progress.update(count)

    def finish(self, folder: RunFolder, timing: Mapping[str, Any]) -> None:
        self._close()
        self.logger.image("grid", folder.path / "grid.png")
        speed = "all were stored before"
        if timing:
            self.logger.log(_flatten({"timing": timing}))
            speed = f"{timing['images_per_second']:.4g} images/s"
        if self.first:
            print(f"{folder.settings['num_images']} images in {folder.images} ({speed})")

    def scored(self, results: Mapping[str, dict]) -> None:
        values = {name: result["value"] for name, result in results.items()}
        self.logger.log(_flatten(values))
        if not self.first:
            return
        for name, value in _flatten(values).items():
            warning = results[name.split("/")[0]].get("warning")
            print(f"{name:24} {value:12.5g}" + (f"  ({warning})" if warning else ""))

    def _close(self) -> None:
        if self.progress is not None:
            self.progress.close()


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    flat = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)):
            flat[f"{prefix}{key}"] = value
    return flat
