"""How the project wraps Hydra's sweepers and launchers."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from lml import schema
from lml.cli.messages import explain
from lml.cli.values import complete
from lml.data.assets import ROOT
from lml.errors import UserError, first_line, say


@contextlib.contextmanager
def own_plugins(failed: list[Exception], makes_runs: bool) -> Iterator[None]:
    """Wrap Hydra's sweepers and launchers in ours, which add the errors they print to `failed`."""
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
        # Hydra would silently compose every cell a second time; `cells` composes them anyway
        sweeper.sweeper.validate_batch_is_legal = lambda batch: None
        return sweeper

    plugins.instantiate_launcher = instantiate_launcher
    plugins.instantiate_sweeper = instantiate_sweeper
    try:
        yield
    finally:
        del plugins.instantiate_launcher, plugins.instantiate_sweeper


class _Sweeper:
    """Wraps one of Hydra's sweepers, whose cells are runs, and serves as its launcher."""

    def __init__(self, config: DictConfig, loader: Any, failed: list[Exception]):
        # imported here: most user errors are found without loading torch
        from lml.runs.sweep import Sweep

        compose = _Composer(config, loader)
        choices, options = config.hydra.runtime.choices, config.hydra.sweeper
        base = OmegaConf.to_container(_without_hydra(config), resolve=True)
        self.is_grid = choices["hydra/sweeper"] == "basic"
        if not self.is_grid and not base.get("sweep"):
            name = choices["hydra/sweeper"]
            raise UserError(f"hydra/sweeper={name}: a search needs an objective; add sweep=NAME")
        schema.check(base, schema.Searching)
        local = choices["hydra/launcher"] == "basic"
        self.cells = Sweep(compose, base, local, options.get("n_trials"))
        if "direction" in options:
            options.direction = "maximize" if self.cells.higher_is_better else "minimize"
        # We report each trial; Optuna's own handler would report it a second time.
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
                # Optuna raises this when no trial finished.
                if isinstance(error, UserError) or not self.cells.are_lost:
                    raise
            except OSError as error:  # Hydra writes its own file there
                if isinstance(error, HydraException):  # its "not found" errors are OSErrors, too
                    raise
                reason = error.strerror or first_line(error)
                raise UserError(
                    f"hydra.sweep.dir={folder}: {reason}; expected a writable folder"
                ) from None
            self.cells.conclude(self._make)
        if self.cells.are_refused:
            self.failed.append(UserError("every cell is refused"))

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list:
        return [self._result(cell) for cell in self.cells.launch(job_overrides, self._make)]

    def _make(self, job_overrides: Sequence[Sequence[str]]) -> list[tuple[str | None, Any]]:
        """For each cell: why it failed, or None, and its return value."""
        return [
            (explain(result._return_value), None)
            if result.status == JobStatus.FAILED
            else (None, result._return_value)
            for result in self.launcher.launch(job_overrides, initial_job_idx=0)
        ]

    def _result(self, cell: Any) -> JobReturn:
        # A grid continues after a failed cell; other sweepers must know that it failed.
        if cell.reason is None or self.is_grid:
            return JobReturn(status=JobStatus.COMPLETED, _return_value=cell.value)
        return _Failure(status=JobStatus.FAILED, _return_value=UserError(cell.reason))


class _Composer:
    """Composes the resolved config of a cell from its overrides.

    Hydra needs 0.2 s for a cell, since it reads and merges all files again. Only the choices of
    config groups decide which files are read, so the result is cached by these choices. Most axes
    of a sweep are plain values.
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
        cfg = pickle.loads(self.composed[choices])  # a copy, seven times faster than deepcopy
        values = [self.parsed[text] for text in overrides if text not in choices]
        self.loader._apply_overrides_to_config(values, cfg)
        try:
            complete(cfg, "sample")
        except OmegaConfBaseException as error:
            raise UserError(explain(error)) from None
        return OmegaConf.to_container(cfg, resolve=True)

    def _is_value(self, text: str) -> bool:
        """Whether the override sets a value and chooses no file. Hydra has the same rule."""
        if text not in self.parsed:
            self.parsed[text] = OverridesParser.create().parse_override(text)
        override = self.parsed[text]
        if override.is_hydra_override():
            return False
        is_group = self.loader.repository.group_exists(override.key_or_group)
        return not is_group or isinstance(override.value(), dict)


class _Launcher:
    """Wraps one of Hydra's launchers: all jobs end before the first failure is raised."""

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
            # A running cluster has its own environment, and refuses the plugin's default size.
            defaults = {
                "object_store_memory": None,
                "runtime_env": {"env_vars": {"PYTHONPATH": str(ROOT)}},
            }
            init = self.launcher.ray_cfg.init
            self.launcher.ray_cfg.init = OmegaConf.merge(defaults, init)
        before = os.environ.get("PYTHONPATH")
        # so that a clone runs without being installed
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
    """Hydra's result without Hydra's extra line on stderr when the value is read."""

    @property
    def return_value(self) -> Any:
        raise self._return_value


@contextlib.contextmanager
def _patience() -> Iterator[None]:
    """Count a submitit job whose process died as failed, so that the other results are kept."""
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
            reason = f"its process died; see {self.paths.stderr}"
            error = UserError(f"{reason}; the same command completes the sweep")
            return [JobReturn(status=JobStatus.FAILED, _return_value=error)]

    Job.results = all_results
    try:
        yield
    finally:
        Job.results = results


def _without_hydra(cfg: DictConfig) -> DictConfig:
    return OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
