"""Loaded models, and the errors of their code and of the accelerator's memory."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from lml.device import is_memory
from lml.errors import RunError, UserError, first_line
from lml.pipelines import Model, Sampler
from lml.seals import canonical

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
ATTENTION = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
_loaded: dict[str, Sampler] = {}  # only the last one, which the runs of a sweep share


def load_sampler(cfg: Mapping[str, Any], model: Model, device: torch.device) -> Sampler:
    """Load the model, or take it from the run before."""
    options = (device, DTYPES[cfg["dtype"]], cfg["channels_last"], cfg["compile"])
    key = canonical({"config": cfg["model"], **model.settings, "options": str(options)})
    if key not in _loaded:
        _loaded.clear()
        with _enough_memory(cfg, model, device):
            _loaded[key] = model.sampler(*options)
    return _loaded[key]


@contextlib.contextmanager
def guarded(cfg: Mapping[str, Any], model: Model, device: torch.device) -> Iterator[None]:
    """A context to make samples of the model in, with the attention of `cfg`.

    RunError for too little memory, and for errors in other people's code.
    """
    name = cfg["attention"]
    attention = sdpa_kernel(ATTENTION[name]) if name else contextlib.nullcontext()
    try:
        with attention, _enough_memory(cfg, model, device):
            yield
    except RuntimeError as error:
        if re.search("No (available kernel|viable backend)", str(error)):
            raise RunError(f"attention={name}: not for this model, dtype and device") from None
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            _refuse(error, model)
        reason = first_line(error)
        raise RunError(f"compile=true: torch.compile fails here ({reason})") from None
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        _refuse(error, model)


@contextlib.contextmanager
def _enough_memory(cfg: Mapping[str, Any], model: Model, device: torch.device) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_memory(error):
            raise
        less = ["a smaller batch_size", "dtype=bfloat16"]
        if "cpu_offload" in cfg["model"]:
            less += ["model.slicing=true", "model.cpu_offload=true"]
        raise RunError(
            f"batch_size={cfg['batch_size']}: too large for {model.name} and the memory of "
            f"{device}; use less: {', '.join(less)}"
        ) from None


def _refuse(error: Exception, model: Model) -> NoReturn:
    """RunError if other people's code raised `error`, as for a wrong config; otherwise `error`."""
    last = error.__traceback__
    while last.tb_next is not None:
        last = last.tb_next
    where = last.tb_frame.f_globals.get("__name__", "")
    if isinstance(error, UserError) or where.partition(".")[0] == "lml":
        raise error
    raise RunError(
        f"model={model.name}: fails in {where} ({first_line(error)}); the configs of its "
        "parts may not be those of its weights; HYDRA_FULL_ERROR=1 shows where"
    ) from error
