"""Where the numbers of a run are logged: nowhere, or Weights & Biases."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit


class Logger:
    """Logs nowhere, as `logger=none` does. Other loggers inherit from it."""

    def log(self, values: Mapping[str, Any]) -> None:
        """Add numbers, by name."""

    def image(self, name: str, path: Path) -> None:
        """Add an image file."""

    def finish(self, failed: bool) -> None:
        """End the log. Always called, also after an error."""


class WandbLogger(Logger):
    """Weights & Biases. After a failure it prints one warning and logs nothing more.

    If its server does not answer, this run and all later runs of the process are logged offline.
    """

    is_unreachable = False

    def __init__(self, settings: Mapping[str, Any], name: str, config: Mapping[str, Any]):
        self.run = None
        self.run = self._try(self._start, settings, name, config)

    def log(self, values: Mapping[str, Any]) -> None:
        self._try(lambda: self.run.log(dict(values)))

    def image(self, name: str, path: Path) -> None:
        self._try(self._log_image, name, path)

    def finish(self, failed: bool) -> None:
        self._try(lambda: self.run.finish(exit_code=int(failed)))

    def _log_image(self, name: str, path: Path) -> None:
        import wandb

        self.run.log({name: wandb.Image(str(path))})

    def _start(self, settings: Mapping[str, Any], name: str, config: Mapping[str, Any]) -> Any:
        import wandb
        from pydantic import ValidationError
        from wandb.errors import AuthenticationError, CommError

        asked = {key: settings[key] for key in ("project", "entity", "group", "tags")}
        if settings["mode"] != "auto":
            asked["mode"] = settings["mode"]
        try:
            # W&B's own variables and files decide what the config leaves open.
            theirs = wandb.setup().settings
            ours = {"run_name": name, "silent": True, "init_timeout": 30}
            ours["mode"] = "online" if has_key(theirs.base_url) else "offline"
            ours = {key: ours[key] for key in ours.keys() - theirs.model_fields_set}
            mode = asked.get("mode") or ours.get("mode") or theirs.mode
            if self.is_unreachable and mode not in ("offline", "dryrun", "disabled"):
                asked["mode"] = "offline"

            def start() -> Any:
                return wandb.init(**asked, config=dict(config), settings=wandb.Settings(**ours))

            try:
                return start()
            except AuthenticationError:
                raise
            except CommError as error:
                WandbLogger.is_unreachable = True
                print(
                    f"logger=wandb: {_reason(error)}; runs are logged offline from now on, and "
                    "`wandb sync` sends them",
                    file=sys.stderr,
                )
                asked["mode"] = "offline"
                return start()
        except ValidationError as error:  # a wrong variable, or a wrong value in the config
            wrong = error.errors()[0]
            raise ValueError(f"{wrong['loc'][0]}={wrong['input']}: {wrong['msg']}") from None

    def _try(self, action: Any, *args: Any) -> Any:
        if action != self._start and self.run is None:
            return None
        try:
            return action(*args)
        except (Exception, SystemExit) as error:  # a logger must never stop a run
            print(f"logger=wandb: {_reason(error)}; the run goes on without it", file=sys.stderr)
            self.run = None


def _reason(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def has_key(url: str) -> bool:
    """Whether the environment or the netrc file has a key for the W&B server at `url`."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    try:
        # W&B names the file, too: without a name, Python refuses a file that others may read
        hosts = netrc(os.path.expanduser(os.environ.get("NETRC") or "~/.netrc")).hosts
    except (OSError, NetrcParseError):
        return False
    return any(host == urlsplit(url).hostname or "wandb" in host for host in hosts)
