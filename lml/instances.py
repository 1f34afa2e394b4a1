"""Objects from configs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hydra.errors import HydraException
from hydra.utils import instantiate

from lml.errors import UserError


def make(config: Mapping[str, Any], label: str) -> Any:
    """What the `_target_` of `config` makes. UserError, beginning with `label`, when it can't."""
    try:
        return instantiate(config)
    except HydraException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        reason = str(error.__cause__ or error).splitlines()[0]
        raise UserError(f"{label}: {reason}") from None
