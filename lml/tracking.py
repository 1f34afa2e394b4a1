"""What a run shows while it runs: a progress bar or log lines, and Weights & Biases."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from lml.errors import first_line
from lml.runner import Observer
from lml.store import RunFolder

LINE_SECONDS = 15.0


class Progress:
    """Images made so far, images/s and the time left: a bar in a terminal, else a line at times."""

    def __init__(self, total: int, show: bool = True):
        self.total, self.count = total, 0
        self.start = self.said = time.monotonic()
        self.lines = show and not sys.stderr.isatty()
        hide = self.lines or not show
        self.bar = tqdm(total=total, unit="image", dynamic_ncols=True, disable=hide)

    def update(self, count: int) -> None:
        """`count` more images are made."""
        self.count += count
        self.bar.update(count)
        now = time.monotonic()
        if self.lines and now - self.said >= LINE_SECONDS and self.count < self.total:
            self.said = now
            rate = self.count / (now - self.start)
            left = tqdm.format_interval((self.total - self.count) / rate)
            print(
                f"{self.count} of {self.total} images, {rate:.1f} images/s, {left} left",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        """Leave the last state on the screen."""
        self.bar.close()


class Logger:
    """Logs nowhere; what `logger=none` is."""

    def log(self, values: Mapping[str, Any]) -> None:
        """Add numbers, by name."""

    def image(self, name: str, path: Path) -> None:
        """Add an image file."""

    def finish(self, failed: bool) -> None:
        """End it; called whatever happened."""


class WandbLogger(Logger):
    """Weights & Biases. Whatever fails in it is one warning, and then it is silent."""

    def __init__(self, settings: Mapping[str, Any], name: str, config: Mapping[str, Any]):
        self.run = None
        self.run = self._try(self._start, settings, name, config)

    def log(self, values: Mapping[str, Any]) -> None:
        self._try(lambda: self.run.log(dict(values)))

    def image(self, name: str, path: Path) -> None:
        import wandb

        self._try(lambda: self.run.log({name: wandb.Image(str(path))}))

    def finish(self, failed: bool) -> None:
        self._try(lambda: self.run.finish(exit_code=int(failed)))

    @staticmethod
    def _start(settings: Mapping[str, Any], name: str, config: Mapping[str, Any]) -> Any:
        import wandb
        from pydantic import ValidationError

        asked = {key: settings[key] for key in ("project", "entity", "group", "tags")}
        if settings["mode"] != "auto":
            asked["mode"] = settings["mode"]
        try:
            # What the config leaves open is as W&B's own variables and files have it.
            theirs = wandb.setup().settings
            ours = {"run_name": name, "silent": True, "init_timeout": 30}
            ours["mode"] = "online" if has_key(theirs.base_url) else "offline"
            ours = {key: ours[key] for key in ours.keys() - theirs.model_fields_set}
            return wandb.init(**asked, config=dict(config), settings=wandb.Settings(**ours))
        except ValidationError as error:  # of a variable, or of the config
            wrong = error.errors()[0]
            raise ValueError(f"{wrong['loc'][0]}={wrong['input']}: {wrong['msg']}") from None

    def _try(self, action: Any, *args: Any) -> Any:
        if action != self._start and self.run is None:
            return None
        try:
            return action(*args)
        except Exception as error:  # a logger must never stop a run
            reason = first_line(error)
            print(f"logger=wandb: {reason}; the run goes on without it", file=sys.stderr)
            self.run = None


def has_key(url: str) -> bool:
    """Whether there is a key for the W&B at `url`, in the environment or in netrc's file."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    try:
        # by its name, as W&B does: Python's own default refuses a file that others may read
        hosts = netrc(os.path.expanduser(os.environ.get("NETRC") or "~/.netrc")).hosts
    except (OSError, NetrcParseError):
        return False
    return any(host == urlsplit(url).hostname or "wandb" in host for host in hosts)


class Tracker(Observer):
    """Shows a run on the terminal and logs it. A context, so that the logger is always finished."""

    def __init__(self, cfg: DictConfig):
        config = OmegaConf.to_container(cfg, resolve=True)
        self.first = int(os.environ.get("RANK", 0)) == 0
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
        speed = "all were there"
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
