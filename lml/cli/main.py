"""The frame of every script: Hydra's command line, errors in one line, orderly interruption."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import signal
import sys
import traceback
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from lml.cli.hydra_sweeps import own_plugins
from lml.cli.messages import explain
from lml.cli.streams import lasting_streams
from lml.cli.values import complete
from lml.configs import CONFIGS
from lml.errors import UserError, say
from lml.quoting import gathered

FULL_ERROR = "HYDRA_FULL_ERROR"
# Errors that are reported in one line.
EXPECTED = (UserError, HydraException, OmegaConfBaseException)


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM. Code that catches it may raise it again with a longer message."""

    def __init__(self, number: int):
        super().__init__("interrupted")
        self.exit_code = 128 + number


def main(
    config_name: str, makes_runs: bool = False, words: str | None = None
) -> Callable[[Callable[[DictConfig], Any]], Callable[[], None]]:
    """Make `task(cfg)` the body of a script with the config `configs/<config_name>.yaml`.

    A user's error (a UserError, or an error of Hydra or OmegaConf) becomes one line on stderr and
    exit code 2. An interruption becomes one line and exit code 128 + the signal's number. All other
    errors keep their traceback. With HYDRA_FULL_ERROR=1 in the environment, every error does.

    In a sweep, a cell that fails is named, and the others continue. With hydra/launcher, cells run
    in other processes or on other machines, in the folder where the sweep started; their errors
    are printed here. With `makes_runs`, the cells are runs of configs/sample.yaml, `lml.runs.sweep`
    manages them, and `task` returns the objective of a search.

    Arguments without a `=` become the list of the key `words`, where one is given.
    """

    def decorate(task: Callable[[DictConfig], Any]) -> Callable[[], None]:
        @functools.wraps(task)
        def script() -> None:
            with lasting_streams():
                code = _run(task, config_name, makes_runs, words)
            sys.exit(code)

        return script

    return decorate


def _run(
    task: Callable[[DictConfig], Any], config_name: str, makes_runs: bool, words: str | None
) -> int:
    keep_traceback = os.environ.get(FULL_ERROR) == "1"
    os.environ[FULL_ERROR] = "1"  # else Hydra prints errors its own way and exits
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    started, failed = False, []
    here, arguments, process = os.getcwd(), sys.argv, os.getpid()

    @functools.wraps(task)
    def job(cfg: DictConfig) -> Any:
        nonlocal started
        started = True
        if os.getpid() != process:
            return _run_elsewhere(task, config_name, cfg, here, arguments)
        try:
            complete(cfg, config_name)
            return task(cfg)
        except Exception as error:
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                failed.append(error)
                say(f"{' '.join(HydraConfig.get().overrides.task)}: {explain(error)}")
                raise  # sweepers must know
            if keep_traceback or not isinstance(error, (UserError, OmegaConfBaseException)):
                raise
            failed.append(error)
            if not getattr(error, "elsewhere", False):  # else another process prints it
                say(explain(error))

    try:
        _check_environment()
        with own_plugins(failed, makes_runs), _arguments(words):
            hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=config_name)(job)()
    except Interrupted as interruption:
        # torchrun stops all processes as soon as one ends. This may interrupt an error before it
        # was printed.
        cause = interruption.__context__
        say(explain(cause) if isinstance(cause, UserError) else str(interruption))
        return interruption.exit_code
    except Exception as error:
        # While composing, Hydra raises some of its errors as a plain ValueError.
        expected = isinstance(error, EXPECTED) or (not started and isinstance(error, ValueError))
        if keep_traceback or not expected:
            raise
        if error not in failed:
            say(explain(error))
        return 2
    for error in failed:  # a sweep has made all other cells by now
        if keep_traceback or not isinstance(error, EXPECTED):
            raise error
    return 2 if failed else 0


def _interrupt(number: int, frame: object) -> None:
    # Two signals may arrive: the terminal's own, and torchrun's copy of it. The second must not
    # interrupt the cleanup that the first one started.
    for other in (signal.SIGINT, signal.SIGTERM):
        signal.signal(other, signal.SIG_IGN)
    raise Interrupted(number)


@contextlib.contextmanager
def _arguments(words: str | None) -> Iterator[None]:
    """Accept overrides before and after Hydra's options; report wrong arguments in one line.

    Arguments without a `=` become the list of the key `words`.
    """
    module = sys.modules[hydra.main.__module__]
    make_parser = module.get_args_parser

    def refuse(message: str) -> None:
        raise UserError(message)

    def get_args_parser() -> ArgumentParser:
        parser = make_parser()

        def parse_args(args: list[str] | None = None) -> Namespace:
            parsed = parser.parse_intermixed_args(args)
            if words:
                parsed.overrides = gathered(parsed.overrides, words)
            return parsed

        parser.parse_args, parser.error = parse_args, refuse
        return parser

    module.get_args_parser = get_args_parser
    try:
        yield
    finally:
        module.get_args_parser = make_parser


def _check_environment() -> None:
    """UserError when a variable that torchrun sets is not a whole number."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        value = os.environ.get(name, "0")
        if not re.fullmatch("[0-9]{1,6}", value):
            raise UserError(f"{name}={value!a:.80}: expected a whole number, as torchrun sets it")


def _run_elsewhere(
    task: Callable[[DictConfig], Any],
    config_name: str,
    cfg: DictConfig,
    here: str,
    arguments: list[str],
) -> Any:
    """Run one cell of a sweep in a process that a launcher started. Raises only UserError."""
    try:
        os.chdir(here)
        sys.argv = arguments  # the run records its command line
        complete(cfg, config_name)
        return task(cfg)
    except Exception as error:
        reason = explain(error)
        if not isinstance(error, (UserError, OmegaConfBaseException)):
            traceback.print_exc()
            reason = f"{type(error).__name__}: {reason} (its traceback is in the job's log)"
        # a UserError can be unpickled in every process; not every exception can
        raise UserError(reason) from None
