"""Objects from configs."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from diffusers import SchedulerMixin
from hydra.errors import HydraException
from hydra.utils import instantiate

from lml.errors import UserError

# What the config of somebody else's run may have made: these, and the schedulers in these modules.
# Their arguments are numbers, names, and paths of data.
TARGETS = (
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
    """What the `_target_` of `config` makes. UserError, beginning with `label`, when it can't."""
    try:
        return instantiate(config)
    except HydraException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        reason = str(error.__cause__ or error).splitlines()[0]
        raise UserError(f"{label}: {reason}") from None


def check_targets(config: Any, label: str, key: str = "") -> None:
    """UserError, beginning with `label`, for a `_target_` that is not on the list, at any depth.

    Nor may there be interpolations, since they can make one.
    """
    if isinstance(config, Mapping):
        for name, value in config.items():
            check_targets(value, label, f"{key}.{name}" if key else str(name))
        if "_target_" in config and not _is_listed(config["_target_"]):
            raise UserError(
                f"{label}: {key}._target_={config['_target_']!a:.200} is none of lml's models, "
                "solvers and prompts; nothing else is made from a run's config.yaml; "
                "scripts/sample.py takes it and the metrics together"
            )
    elif isinstance(config, list):
        for number, value in enumerate(config):
            check_targets(value, label, f"{key}.{number}")
    elif isinstance(config, str) and "${" in config:
        raise UserError(f"{label}: {key}={config!a:.200}: a run's config.yaml has its values")


def _is_listed(target: Any) -> bool:
    if not isinstance(target, str):
        return False
    module, _, name = target.rpartition(".")
    return target in TARGETS or (module in SCHEDULERS and is_scheduler(module, name))


def is_scheduler(module: str, name: Any) -> bool:
    """Whether `name` is that of a scheduler's class in `module`, one of `SCHEDULERS`."""
    member = getattr(importlib.import_module(module), name, None) if isinstance(name, str) else None
    return isinstance(member, type) and issubclass(member, SchedulerMixin)
