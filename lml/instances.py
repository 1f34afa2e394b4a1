"""Objects from configs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers import SchedulerMixin
from hydra.errors import HydraException
from hydra.utils import get_class, instantiate

from lml.errors import UserError

# What a run's config names, as a class or a function of these modules. Their arguments are numbers,
# names and paths of data.
OURS = (
    "lml.exact",
    "lml.metrics",
    "lml.schedulers",
    "lml.data.prompts",
)
SCHEDULERS = ("lml.schedulers", "diffusers")  # classes of schedulers, and nothing else
FUNCTIONS = (
    "lml.data.prompts.coco14_30k",
    "lml.data.prompts.t2i_compbench",
    "lml.data.prompts.table",
    "lml.data.prompts.text",
    "lml.exact.Empirical.cifar10",
    "lml.exact.Gaussian",
    "lml.exact.Gaussian.random",
    "lml.exact.MixtureOfGaussians",
    "lml.exact.MixtureOfGaussians.random",
)


def make(config: Mapping[str, Any], label: str) -> Any:
    """What the `_target_` of `config` makes. UserError, beginning with `label`, when it can't."""
    try:
        return instantiate(config)
    except HydraException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        reason = str(error.__cause__ or error).splitlines()[0]
        raise UserError(f"{label}: {reason}") from None
