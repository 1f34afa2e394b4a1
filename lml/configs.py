"""Options of the config groups, composed as Hydra composes them for a script."""

from __future__ import annotations

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from lml.data.assets import ROOT

CONFIGS = ROOT / "configs"


def compose(*overrides: str, config: str | None = None) -> DictConfig:
    """What the command line `overrides` makes of configs/`config`.yaml, or, without it, of nothing.

    `compose("+solver=unipc").solver` is that option with all that its `defaults:` bring in. A file
    that is read by itself lacks them. Raises what Hydra raises for what it cannot compose.
    """
    # hydra.compose is for a process in which no Hydra script runs.
    loader = ConfigLoaderImpl(create_config_search_path(str(CONFIGS)))
    cfg = loader.load_configuration(config, list(overrides), RunMode.RUN)
    return OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
