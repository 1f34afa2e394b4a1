"""The values of a config: resolved, with paths that begin at home, and checked."""

from __future__ import annotations

import os
import re

from omegaconf import DictConfig, ListConfig, OmegaConf

from lml import schema
from lml.cli.quoting import hydra_quoted, shell_quoted
from lml.errors import UserError
from lml.files import check_path

# Keys whose values are paths. Of some the place counts: budget.images is a number.
PATHS = re.compile(
    r"run_dir|runs|out|images|layout\.images|metrics\.[^.]+\.model"
    r"|(.+\.)?(calibration|control_image|features|file|path|reference|tokenizer|weights)"
)


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
            typed = shell_quoted(f"{name}={hydra_quoted(str(value))}")
            raise UserError(
                f"{name}={value}: a path is asked; one that reads as anything else is quoted, "
                f"as in {typed}"
            )
