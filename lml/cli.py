"""What all scripts share: Hydra's command line, errors in one line, and orderly interruption."""

from __future__ import annotations

import functools
import os
import re
import signal
import sys
from collections.abc import Callable

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lml.data.assets import ROOT
from lml.errors import UserError, nearest

CONFIGS = ROOT / "configs"
FULL_ERROR = "HYDRA_FULL_ERROR"


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM. Whoever catches it may say more in its message."""

    def __init__(self, number: int):
        super().__init__("interrupted")
        self.exit_code = 128 + number


def say(line: str) -> None:
    """Write one line to stderr, with the rank of this process where there are several."""
    rank = f"[rank {os.environ['RANK']}] " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    print(f"{rank}{line}", file=sys.stderr, flush=True)


def main(config_name: str) -> Callable[[Callable[[DictConfig], None]], Callable[[], None]]:
    """Make `task(cfg)` the body of a script with the config `configs/<config_name>.yaml`.

    What a user did wrong (a UserError, or what Hydra and OmegaConf refuse) becomes one line on
    stderr and exit code 2; an interruption one line and 128 + its signal's number; anything else
    keeps its traceback. In a sweep a cell that fails is named, and the others go on. With
    HYDRA_FULL_ERROR=1 in the environment every error keeps its traceback.
    """

    def decorate(task: Callable[[DictConfig], None]) -> Callable[[], None]:
        @functools.wraps(task)
        def script() -> None:
            sys.exit(_run(task, config_name))

        return script

    return decorate


def _run(task: Callable[[DictConfig], None], config_name: str) -> int:
    keep_traceback = os.environ.get(FULL_ERROR) == "1"
    os.environ[FULL_ERROR] = "1"  # else Hydra prints errors its own way and exits
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    started, failed = False, []

    @functools.wraps(task)
    def job(cfg: DictConfig) -> None:
        nonlocal started
        started = True
        try:
            _check_complete(cfg)
            return task(cfg)
        except Exception as error:
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                failed.append(error)
                say(f"{' '.join(HydraConfig.get().overrides.task)}: {_explain(error)}")
                raise  # sweepers have to know
            if keep_traceback or not isinstance(error, (UserError, OmegaConfBaseException)):
                raise
            failed.append(error)
            if not getattr(error, "elsewhere", False):  # else another process says it
                say(_explain(error))

    try:
        hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=config_name)(job)()
    except Interrupted as interruption:
        say(str(interruption))
        return interruption.exit_code
    except Exception as error:
        expected = isinstance(error, (UserError, HydraException, OmegaConfBaseException))
        # Some of what Hydra refuses while composing is a plain ValueError.
        if keep_traceback or not (expected or (not started and isinstance(error, ValueError))):
            raise
        if error not in failed:
            say(_explain(error))
        return 2
    return 2 if failed else 0


def _interrupt(number: int, frame: object) -> None:
    # The second of two signals in a row (torchrun passes on what the terminal sent, too) must not
    # end the tidying up that the first one began.
    for other in (signal.SIGINT, signal.SIGTERM):
        signal.signal(other, signal.SIG_IGN)
    raise Interrupted(number)


def _check_complete(cfg: DictConfig) -> None:
    OmegaConf.resolve(cfg)
    for key in sorted(OmegaConf.missing_keys(cfg)):
        raise UserError(f"{key}=???: a value is needed")


def _explain(error: Exception) -> str:
    """The key, the value and what is allowed, from whatever Hydra or OmegaConf raised."""
    text, cause = str(error), error.__cause__
    if match := re.search(r"Could not (?:find|load) '(.+)/(.+)'", text):
        group, option = match.groups()
        files = (CONFIGS / group).glob("*.yaml")
        known = getattr(error, "options", None) or [file.stem for file in files]
        return f"{group}={option}: unknown; nearest: {nearest(option, known)}"
    if match := re.search(r"Could not override '(.+)'.*\n.* use \+(.+)", text):
        key, override = match.groups()
        level = getattr(cause, "parent_node", None)
        choices = set(level) - {"hydra"} if isinstance(level, DictConfig) else set()
        if "." not in key:
            choices |= {folder.name for folder in CONFIGS.iterdir() if folder.is_dir()} - {key}
        if not choices:
            return f"{override}: {key.rpartition('.')[0]} has no keys"
        return f"{override}: unknown key; nearest: {nearest(key.split('.')[-1], choices)}"
    if isinstance(error, OverrideParseException):
        reason = text.replace("Error parsing override", "").splitlines()
        reason = next(line.strip() for line in reason if line.strip(" '") != error.override)
        return f"{error.override}: KEY=VALUE is asked ({reason})"
    if match := re.search(r"Ambiguous value for argument '(.+)'", text):
        return f"{match[1]}: one value, a list in [], or a sweep with --multirun is asked"
    if text.startswith("Config group override must be"):
        overrides = [a for a in sys.argv[1:] if (CONFIGS / a.split("=")[0]).is_dir()]
        return f"{' '.join(overrides)}: {text}"
    if isinstance(error, OmegaConfBaseException) and error.full_key:
        return f"{error.full_key}: {_first_line(error)}"
    return _first_line(error) or _first_line(cause)


def _first_line(error: BaseException | None) -> str:
    lines = [line.strip() for line in str(error or "").splitlines()]
    return next(filter(None, lines), "" if error is None else type(error).__name__)
