"""Options of the config groups, composed as Hydra composes them for a script."""

from __future__ import annotations

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from lml.data.assets import ROOT

CONFIGS = ROOT / "configs"


# Options of a group that choose an option of another, by `override` in their `defaults:`.
CHOOSES = {"model": "grid", "solver": "lml"}


def names(group: str) -> list[str]:
    """The options of a group that the command line takes as group=NAME, sorted."""
    return sorted(file.stem for file in (CONFIGS / group).glob("*.yaml"))


def option(group: str, name: str) -> DictConfig:
    """The config group=`name` by itself, not resolved, as a run has it.

    Raises what Hydra raises where there is none.
    """
    before = [f"+{CHOOSES[group]}=default"] if group in CHOOSES else []
    return compose(*before, f"+{group}={name}").get(group) or OmegaConf.create({})


def compose(*overrides: str, config: str | None = None) -> DictConfig:
    """configs/`config`.yaml (or an empty config) with the command line `overrides` applied.

    Raises Hydra's own errors.
    """
    # hydra.compose works only in a process in which no Hydra script runs.
    loader = ConfigLoaderImpl(create_config_search_path(str(CONFIGS)))
    cfg = loader.load_configuration(config, list(overrides), RunMode.RUN)
    return OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
