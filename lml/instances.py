"""Objects from configs."""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Mapping
from typing import Any

from diffusers import SchedulerMixin
from hydra.errors import HydraException
from hydra.utils import get_object, instantiate
from omegaconf import OmegaConf

from lml.errors import UserError, first_line
from lml.schema import Made, check, check_call

# Hydra logs what is wrong with a `_target_`, but its error says the same.
logging.getLogger("hydra").addHandler(logging.NullHandler())

# A run's config may come from somebody else. It may make only these, and the schedulers of these
# modules. Their arguments are numbers, names, and paths of data.
TARGETS = (
    "lml.data.prompts.captions",
    "lml.data.prompts.coco14_30k",
    "lml.data.prompts.t2i_compbench",
    "lml.data.prompts.table",
    "lml.data.prompts.text",
    "lml.exact.Empirical.cifar10",
    "lml.exact.Gaussian.random",
    "lml.exact.MixtureOfGaussians.random",
)
SCHEDULERS = ("diffusers", "lml.schedulers", "lml.schedulers.released")


def make(config: Mapping[str, Any], label: str) -> Any:
    """The object that the `_target_` of `config` makes.

    Arguments are checked against the type hints of what is called, at any depth. UserError,
    beginning with `label`, when the object cannot be made.
    """
    if OmegaConf.is_config(config):
        config = OmegaConf.to_container(config, resolve=True)
    try:
        check_arguments(config, label.partition("=")[0])
        return instantiate(config, _convert_="all")
    except HydraException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise UserError(f"{label}: {first_line(error.__cause__ or error)}") from None
    except RecursionError:
        raise UserError(f"{label}: nested too deep") from None


def check_arguments(config: Any, key: str) -> None:
    """UserError, naming the key, for an argument of a wrong type. `config` is at `key`."""
    if isinstance(config, Mapping):
        for name, value in config.items():
            check_arguments(value, f"{key}.{name}")
        if "_target_" in config:
            check(config, Made, key)
            target = None
            with contextlib.suppress(Exception):  # whatever the import raises, Hydra reports it
                target = get_object(config["_target_"])
            if callable(target):
                check_call(target, config, key)
    elif isinstance(config, list):
        for number, value in enumerate(config):
            check_arguments(value, f"{key}[{number}]")


def check_targets(config: Any, label: str, key: str = "") -> None:
    """UserError, beginning with `label`, for a `_target_` that is not listed above, at any depth.

    Interpolations are errors, too, since they could produce a `_target_`.
    """
    if isinstance(config, Mapping):
        for name, value in config.items():
            check_targets(value, label, f"{key}.{name}" if key else str(name))
        if "_target_" in config and not _is_listed(config["_target_"]):
            raise UserError(
                f"{label}: {key}._target_={config['_target_']!a:.200}: not one of lml's models, "
                "solvers and prompts, and a run's config.yaml may make nothing else; "
                "to use your own class, run scripts/sample.py with the metrics"
            )
    elif isinstance(config, list):
        for number, value in enumerate(config):
            check_targets(value, label, f"{key}.{number}")
    elif isinstance(config, str) and "${" in config:
        raise UserError(
            f"{label}: {key}={config!a:.200}: an interpolation; expected the value that the run had"
        )


def _is_listed(target: Any) -> bool:
    if not isinstance(target, str):
        return False
    module, _, name = target.rpartition(".")
    return target in TARGETS or (module in SCHEDULERS and is_scheduler(module, name))


def is_scheduler(module: str, name: Any) -> bool:
    """Whether `name` is a class of schedulers in `module`, one of `SCHEDULERS`."""
    member = getattr(importlib.import_module(module), name, None) if isinstance(name, str) else None
    return isinstance(member, type) and issubclass(member, SchedulerMixin)
