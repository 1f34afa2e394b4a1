"""Options of the config groups, composed as Hydra composes them for a script."""

from __future__ import annotations

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from lml.data.assets import ROOT

CONFIGS = ROOT / "configs"


def compose(*overrides: str, config: str | None = None) -> DictConfig:
    """configs/`config`.yaml (or an empty config) with the command line `overrides` applied.

    `compose("+solver=unipc").solver` is the file of that option, with its `defaults:` merged in.
    Raises Hydra's own errors.
    """
    # hydra.compose works only in a process in which no Hydra script runs.
    loader = ConfigLoaderImpl(create_config_search_path(str(CONFIGS)))
    cfg = loader.load_configuration(config, list(overrides), RunMode.RUN)
    return OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
