"""The values of a config: interpolations resolved, `~` expanded in paths, and checked."""

from __future__ import annotations

import os
import re

from omegaconf import DictConfig, ListConfig, OmegaConf

from lml import schema
from lml.errors import UserError
from lml.files import check_path
from lml.quoting import hydra_quoted, shell_quoted

# Keys whose values are paths. The first line has whole keys: budget.images is a number.
PATHS = re.compile(
    r"run_dir|run_dirs\.\d+|runs|out|evaluations|images|layout\.images|(metrics\.[^.]+|extractor)\.model"
    r"|(.+\.)?(calibration|control_(image|photo)|features|file|path|reference|tokenizer|weights)"
)


def complete(cfg: DictConfig, config_name: str) -> None:
    """Resolve `cfg`, expand `~` in its paths, and check it against the schema of `config_name`.

    UserError when a value is missing or not allowed, before anything is made of the config.
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
            # Hydra reads 2024_10 as the number 202410; what the user typed is lost
            typed = shell_quoted(f"{name}={hydra_quoted(str(value))}")
            raise UserError(
                f"{name}={value}: expected a path; quote a path that reads as another type, "
                f"as in {typed}"
            )
