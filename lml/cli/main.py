"""What all scripts share: Hydra's command line, errors in one line, and orderly interruption."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import pickle
import re
import shlex
import signal
import sys
import traceback
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from lml import schema
from lml.data.assets import ROOT
from lml.errors import UserError, first_line, nearest, say
from lml.files import check_path

CONFIGS = ROOT / "configs"
FULL_ERROR = "HYDRA_FULL_ERROR"
# The extras of setup.cfg that bring Hydra's launchers and sweepers.
EXTRAS = {"ray": "ray", "submitit_local": "slurm", "submitit_slurm": "slurm", "optuna": "optuna"}
# Keys whose values are paths. Of some the place counts: budget.images is a number.
PATHS = re.compile(
    r"run_dir|runs|out|images|layout\.images|metrics\.[^.]+\.model"
    r"|(.+\.)?(calibration|control_image|features|file|path|reference|tokenizer|weights)"
)
CONTROL = re.compile(r"[\x00-\x1f\x7f]")
# What is said in one line.
EXPECTED = (UserError, HydraException, OmegaConfBaseException)


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM. Whoever catches it may say more in its message."""

    def __init__(self, number: int):
        super().__init__("interrupted")
        self.exit_code = 128 + number


def main(
    config_name: str, makes_runs: bool = False
) -> Callable[[Callable[[DictConfig], Any]], Callable[[], None]]:
    """Make `task(cfg)` the body of a script with the config `configs/<config_name>.yaml`.

    What a user did wrong (a UserError, or what Hydra and OmegaConf refuse) becomes one line on
    stderr and exit code 2; an interruption one line and 128 + its signal's number; anything else
    keeps its traceback. In a sweep a cell that fails is named, and the others go on, here or, with
    hydra/launcher, in other processes and on other machines: there a cell runs in the folder that
    the sweep was started in, and its line is said here. With HYDRA_FULL_ERROR=1 in the environment
    every error keeps its traceback. With `makes_runs`, the cells are runs of configs/sample.yaml,
    and lml/sweep.py says what else happens to them; then `task` returns a search's objective.
    """

    def decorate(task: Callable[[DictConfig], Any]) -> Callable[[], None]:
        @functools.wraps(task)
        def script() -> None:
            with _lasting_streams():
                code = _run(task, config_name, makes_runs)
            sys.exit(code)

        return script

    return decorate


def _run(task: Callable[[DictConfig], Any], config_name: str, makes_runs: bool) -> int:
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
                raise  # sweepers have to know
            if keep_traceback or not isinstance(error, (UserError, OmegaConfBaseException)):
                raise
            failed.append(error)
            if not getattr(error, "elsewhere", False):  # else another process says it
                say(explain(error))

    try:
        _check_environment()
        with _plugins(failed, makes_runs), _arguments():
            hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=config_name)(job)()
    except Interrupted as interruption:
        # torchrun ends the others as soon as one has ended, which may cut short the way out of an
        # error that is still to be told.
        cause = interruption.__context__
        say(explain(cause) if isinstance(cause, UserError) else str(interruption))
        return interruption.exit_code
    except Exception as error:
        # Some of what Hydra refuses while composing is a plain ValueError.
        expected = isinstance(error, EXPECTED) or (not started and isinstance(error, ValueError))
        if keep_traceback or not expected:
            raise
        if error not in failed:
            say(explain(error))
        return 2
    for error in failed:  # of a sweep that has made all that it could
        if keep_traceback or not isinstance(error, EXPECTED):
            raise error
    return 2 if failed else 0


class _Lasting:
    """A stream that goes on in silence when nobody reads it any more, as in `... | head`.

    A summary that cannot be shown is no reason to end a run, or to say that it failed.
    """

    def __init__(self, stream: TextIO):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._try(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except BrokenPipeError:
            # what is still in the buffer goes there, too
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


@contextlib.contextmanager
def _lasting_streams() -> Iterator[None]:
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_Lasting, streams)
    try:
        yield
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        sys.stdout, sys.stderr = streams


def _interrupt(number: int, frame: object) -> None:
    # The second of two signals in a row (torchrun passes on what the terminal sent, too) must not
    # end the tidying up that the first one began.
    for other in (signal.SIGINT, signal.SIGTERM):
        signal.signal(other, signal.SIG_IGN)
    raise Interrupted(number)


# --- what was typed ----------------------------------------------------------------------------


@contextlib.contextmanager
def _arguments() -> Iterator[None]:
    """Let Hydra take overrides on both sides of its options, and say in one line what it can't."""
    module = sys.modules[hydra.main.__module__]
    make_parser = module.get_args_parser

    def refuse(message: str) -> None:
        raise UserError(message)

    def get_args_parser() -> ArgumentParser:
        parser = make_parser()
        parser.parse_args, parser.error = parser.parse_intermixed_args, refuse
        return parser

    module.get_args_parser = get_args_parser
    try:
        yield
    finally:
        module.get_args_parser = make_parser


def complete(cfg: DictConfig, config_name: str) -> None:
    """Resolve `cfg`, with `~` in its paths the home folder, and check it.

    UserError where a value is missing, or is not what configs/`config_name`.yaml may hold: before
    anything is made of it.
    """
    OmegaConf.resolve(cfg)
    for key in sorted(OmegaConf.missing_keys(cfg)):
        raise UserError(f"{key}=???: a value is needed")
    _complete_paths(cfg, "")
    config = OmegaConf.to_container(cfg)
    schema.check(config, schema.of_script(config_name, config))


def _check_environment() -> None:
    """UserError for what torchrun sets, when it is no number."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        value = os.environ.get(name, "0")
        if not re.fullmatch("[0-9]{1,6}", value):
            raise UserError(f"{name}={value!a:.80}: a whole number is asked, as torchrun sets it")


def _complete_paths(node: DictConfig | ListConfig, prefix: str) -> None:
    for key in node if isinstance(node, DictConfig) else range(len(node)):
        name, value = f"{prefix}{key}", node[key]
        is_path = PATHS.fullmatch(name)
        if isinstance(value, (DictConfig, ListConfig)) and not is_path:
            _complete_paths(value, f"{name}.")
        elif is_path and isinstance(value, str):
            check_path(value, name)
            node[key] = os.path.expanduser(value)
        elif is_path and value is not None:
            # 2024_10 is the number 202410 to Hydra: what was meant is lost by now
            typed = _typed(f"{name}={_quoted(str(value))}")
            raise UserError(
                f"{name}={value}: a path is asked; one that reads as anything else is quoted, "
                f"as in {typed}"
            )


def _quoted(text: str) -> str:
    """`text` as a value that Hydra takes as it is."""
    return QuotedString(text, Quote.double).with_quotes()


def _typed(word: str) -> str:
    """`word` as it is typed in a shell, on one line."""
    if not CONTROL.search(word):
        return shlex.quote(word)
    word = re.sub(r"[\\']", r"\\\g<0>", word)
    word = CONTROL.sub(lambda match: rf"\x{ord(match[0]):02x}", word)
    return f"$'{word}'"


def _suggest(override: str) -> str | None:
    """How `override` is typed so that its value is taken as it is; None if it never is."""
    key, equal, value = override.partition("=")
    quoted = f"{key}={_quoted(value)}"
    try:
        text = OverridesParser.create().parse_override(quoted).value()
        OmegaConf.create({"value": text})  # which refuses half an interpolation
    except (HydraException, OmegaConfBaseException):
        return None
    return _typed(quoted) if key and equal else None


# --- sweeps in other processes -----------------------------------------------------------------


def _run_elsewhere(
    task: Callable[[DictConfig], Any],
    config_name: str,
    cfg: DictConfig,
    here: str,
    arguments: list[str],
) -> Any:
    """One cell of a sweep, in a process that a launcher started. Fails with a UserError only."""
    try:
        os.chdir(here)
        sys.argv = arguments  # the run's record of its command line
        complete(cfg, config_name)
        return task(cfg)
    except Exception as error:
        reason = explain(error)
        if not isinstance(error, (UserError, OmegaConfBaseException)):
            traceback.print_exc()
            reason = f"{type(error).__name__}: {reason} (its traceback is in the job's log)"
        # one that every process can unpickle, which not all exceptions are
        raise UserError(reason) from None


@contextlib.contextmanager
def _plugins(failed: list[Exception], makes_runs: bool) -> Iterator[None]:
    """Let Hydra have sweepers and launchers of ours around its own; `failed` is what was said."""
    plugins = Plugins.instance()
    make_launcher, make_sweeper = plugins.instantiate_launcher, plugins.instantiate_sweeper
    sweeper = None

    def instantiate_launcher(**options: Any) -> _Launcher:
        name = options["config"].hydra.runtime.choices["hydra/launcher"]
        launcher = _Launcher(make_launcher(**options), name, failed)
        return launcher if sweeper is None else sweeper.around(launcher)

    def instantiate_sweeper(**options: Any) -> Any:
        nonlocal sweeper
        if not makes_runs:
            return make_sweeper(**options)
        sweeper = _Sweeper(options["config"], options["hydra_context"].config_loader, failed)
        sweeper.sweeper = make_sweeper(**options)
        # Hydra would compose every cell once more, and say nothing meanwhile; `cells` has to anyway
        sweeper.sweeper.validate_batch_is_legal = lambda batch: None
        return sweeper

    plugins.instantiate_launcher = instantiate_launcher
    plugins.instantiate_sweeper = instantiate_sweeper
    try:
        yield
    finally:
        del plugins.instantiate_launcher, plugins.instantiate_sweeper


class _Sweeper:
    """One of Hydra's sweepers, whose cells are runs, and the launcher that it is given."""

    def __init__(self, config: DictConfig, loader: Any, failed: list[Exception]):
        # not at the top: most of what is wrong needs no torch to be found
        from lml.sweep import Sweep

        compose = _Composer(config, loader)
        choices, options = config.hydra.runtime.choices, config.hydra.sweeper
        base = OmegaConf.to_container(_without_hydra(config), resolve=True)
        self.is_grid = choices["hydra/sweeper"] == "basic"
        if not self.is_grid and not base.get("sweep"):
            name = choices["hydra/sweeper"]
            raise UserError(f"hydra/sweeper={name}: sweep=NAME says what is searched for")
        schema.check(base, schema.Searching)
        local = choices["hydra/launcher"] == "basic"
        self.cells = Sweep(compose, base, local, options.get("n_trials"))
        if "direction" in options:
            options.direction = "maximize" if self.cells.higher_is_better else "minimize"
        # What becomes of a trial is said here; Optuna's own handler would say it again.
        logging.getLogger("hydra_plugins.hydra_optuna_sweeper").setLevel(logging.CRITICAL)
        self.config, self.failed = config, failed
        self.sweeper: Any = None

    def around(self, launcher: _Launcher) -> _Sweeper:
        self.launcher = launcher
        return self

    def sweep(self, arguments: list[str]) -> None:
        if optuna := sys.modules.get("optuna"):
            optuna.logging.set_verbosity(optuna.logging.ERROR)
        folder = Path(self.config.hydra.sweep.dir)
        with self.cells:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self.sweeper.sweep(arguments)
            except ValueError as error:
                # Optuna has no best trial where none came to its end.
                if isinstance(error, UserError) or not self.cells.are_lost:
                    raise
            except OSError as error:  # Hydra writes a file of its own there
                if isinstance(error, HydraException):  # what it does not find is an OSError, too
                    raise
                reason = error.strerror or first_line(error)
                raise UserError(
                    f"hydra.sweep.dir={folder}: {reason}; a writable folder is asked"
                ) from None
            self.cells.conclude(self._make)
        if self.cells.are_refused:
            self.failed.append(UserError("every cell is refused"))

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list:
        return [self._result(cell) for cell in self.cells.launch(job_overrides, self._make)]

    def _make(self, job_overrides: Sequence[Sequence[str]]) -> list[tuple[str | None, Any]]:
        """Why each failed, or None, and what it returned."""
        return [
            (explain(result._return_value), None)
            if result.status == JobStatus.FAILED
            else (None, result._return_value)
            for result in self.launcher.launch(job_overrides, initial_job_idx=0)
        ]

    def _result(self, cell: Any) -> JobReturn:
        # A grid goes on whatever became of a cell; other sweepers have to know.
        if cell.reason is None or self.is_grid:
            return JobReturn(status=JobStatus.COMPLETED, _return_value=cell.value)
        return _Failure(status=JobStatus.FAILED, _return_value=UserError(cell.reason))


class _Composer:
    """The resolved config of a cell, by its overrides.

    Hydra takes a fifth of a second for a cell: it reads and merges all files again. Which files
    these are is up to the choices of config groups alone, and most axes of a sweep are values.
    """

    def __init__(self, config: DictConfig, loader: Any):
        self.config, self.loader = config, loader
        self.parsed: dict[str, Override] = {}
        self.composed: dict[tuple[str, ...], bytes] = {}

    def __call__(self, overrides: Sequence[str]) -> dict[str, Any]:
        choices = tuple(text for text in overrides if not self._is_value(text))
        if choices not in self.composed:
            cfg = self.loader.load_sweep_config(self.config, list(choices))
            with open_dict(cfg):
                del cfg["hydra"]
            self.composed[choices] = pickle.dumps(cfg)
        cfg = pickle.loads(self.composed[choices])  # a copy, in a seventh of deepcopy's time
        values = [self.parsed[text] for text in overrides if text not in choices]
        self.loader._apply_overrides_to_config(values, cfg)
        try:
            complete(cfg, "sample")
        except OmegaConfBaseException as error:
            raise UserError(explain(error)) from None
        return OmegaConf.to_container(cfg, resolve=True)

    def _is_value(self, text: str) -> bool:
        """Whether Hydra applies this override to what the files say; it has the same rule."""
        if text not in self.parsed:
            self.parsed[text] = OverridesParser.create().parse_override(text)
        override = self.parsed[text]
        if override.is_hydra_override():
            return False
        is_group = self.loader.repository.group_exists(override.key_or_group)
        return not is_group or isinstance(override.value(), dict)


class _Launcher:
    """One of Hydra's launchers, whose jobs all end before the first failure is raised."""

    def __init__(self, launcher: Any, name: str, failed: list[Exception]):
        self.launcher, self.name, self.failed = launcher, name, failed

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list:
        if self.name == "basic":
            results = self.launcher.launch(job_overrides, initial_job_idx=initial_job_idx)
        else:
            results = self._launch_elsewhere(job_overrides, initial_job_idx)
        quiet = []
        for overrides, result in zip(job_overrides, results, strict=True):
            if result.status == JobStatus.FAILED:
                error = result._return_value
                if error not in self.failed:
                    self.failed.append(error)
                    say(f"{' '.join(filter_overrides(overrides))}: {error}")
                result = _Failure(**vars(result))
            quiet.append(result)
        return quiet

    def _launch_elsewhere(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        if self.name == "ray" and self.launcher.ray_cfg.init.get("address"):
            # A running cluster has its own environment, and refuses the size that the plugin adds.
            defaults = {
                "object_store_memory": None,
                "runtime_env": {"env_vars": {"PYTHONPATH": str(ROOT)}},
            }
            init = self.launcher.ray_cfg.init
            self.launcher.ray_cfg.init = OmegaConf.merge(defaults, init)
        before = os.environ.get("PYTHONPATH")
        # a clone runs without being installed
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), before]))
        try:
            with _patience():
                return self.launcher.launch(job_overrides, initial_job_idx=initial_job_idx)
        except Exception as error:
            raise UserError(f"hydra/launcher={self.name}: {first_line(error)}") from error
        finally:
            os.environ.pop("PYTHONPATH")
            if before is not None:
                os.environ["PYTHONPATH"] = before


class _Failure(JobReturn):
    """Hydra's, but for a second line on stderr when it is looked at."""

    @property
    def return_value(self) -> Any:
        raise self._return_value


@contextlib.contextmanager
def _patience() -> Iterator[None]:
    """Make a job of submitit's whose process died a failed one: its launcher leaves the others."""
    try:
        from submitit import Job
    except ImportError:
        yield
        return
    results = Job.results

    def all_results(self: Job) -> list:
        try:
            return results(self)
        except Exception:
            reason = f"its process ended, see {self.paths.stderr}"
            error = UserError(f"{reason}; the same command completes the sweep")
            return [JobReturn(status=JobStatus.FAILED, _return_value=error)]

    Job.results = all_results
    try:
        yield
    finally:
        Job.results = results


# --- errors in one line ------------------------------------------------------------------------


def _without_hydra(cfg: DictConfig) -> DictConfig:
    return OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])


def explain(error: Exception) -> str:
    """One line: the key, the value and what is allowed, from whatever Hydra or OmegaConf raised."""
    text, cause = str(error), error.__cause__
    if isinstance(error, UserError):  # whose paths may have a line's end in them
        return CONTROL.sub(lambda match: repr(match[0])[1:-1], text)
    if match := re.search(r"Could not (?:find|load) '(.+)/(.+)'", text):
        group, option = match.groups()
        if group in ("hydra/launcher", "hydra/sweeper") and option in EXTRAS:
            return f"{group}={option}: needs `pip install -e '.[{EXTRAS[option]}]'`"
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
        return _explain_override(error.override, text)
    if match := re.search(r"(?:Ambiguous value for argument|Sweep parameters) '(.+)'", text):
        asked = "one value, a list in [], or a sweep with --multirun is asked"
        return f"{match[1]}: {asked}; a text with a comma is quoted: {_suggest(match[1])}"
    if text.startswith("Config group override must be"):
        overrides = [a for a in sys.argv[1:] if (CONFIGS / a.split("=")[0]).is_dir()]
        return f"{' '.join(overrides)}: {text}"
    if isinstance(error, OmegaConfBaseException) and error.full_key:
        return f"{error.full_key}: {first_line(error)}"
    return first_line(error) or first_line(cause)


def _explain_override(override: str, text: str) -> str:
    shown = _typed(override) if CONTROL.search(override) else override
    typed = _suggest(override)
    quoted = f"; a text with such characters is quoted: {typed}" if typed else ""
    reason = ""
    # of brackets that do not close, and functions that are none, Hydra says what is wrong with them
    if not typed or re.search(r"[\[{(]", override):
        lines = [line.strip(" ^") for line in text.splitlines() if override not in line]
        lines = [line for line in lines if line and not line.startswith(("Lexer", "See "))]
        reason = f" ({lines[0]})" if lines else ""
    return f"{shown}: KEY=VALUE is asked{reason}{quoted}"
