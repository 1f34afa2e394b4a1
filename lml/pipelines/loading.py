"""Finding models on disk or on the hub, and reading their parts strictly."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import SchedulerMixin
from diffusers.utils import logging
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError
from torch import Tensor, nn

from lml.data.assets import locate
from lml.errors import UserError
from lml.files import file_hash
from lml.instances import make

FILES = ("*.json", "diffusion_pytorch_model*.safetensors", "*/*.safetensors")  # of a hub model


def describe_key(config: Mapping[str, Any], group: str = "model") -> str:
    """The configuration key that says where a model lies, and its value."""
    name = "path" if config.get("path") else "hub_id"
    return f"{group}.{name}={config.get(name)}"


def find_folder(
    config: Mapping[str, Any],
    group: str = "model",
    download: Callable[..., str] = snapshot_download,
    **options: Any,
) -> Path:
    """The folder of a model: `path`, or `hub_id` at `revision`, fetched unless it is cached.

    `download(hub_id, revision=..., **options)` fetches. UserError when there is no such model.
    """
    key = describe_key(config, group)
    if config.get("path"):
        folder = locate(str(config["path"]))
        if not folder.is_dir():
            raise UserError(f"{key}: no such folder (of diffusers' format)")
        return folder
    if not config.get("hub_id"):
        raise UserError(
            f"{group}.path=null: a folder in diffusers' format is asked, or {group}.hub_id"
        )
    hub_id = str(config["hub_id"])
    options = options or {"allow_patterns": FILES}
    try:
        return Path(download(hub_id, revision=config.get("revision"), **options))
    except GatedRepoError:
        raise UserError(
            f"{key}: access is to be granted; accept the license on https://huggingface.co/{hub_id}"
            f", then `hf auth login`, or give {group}.path=FOLDER"
        ) from None
    except Exception as error:  # the hub's errors and the network's share no base class
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{key}: cannot be fetched ({reason}); get it elsewhere with "
            f"`hf download {hub_id} --local-dir FOLDER` and give {group}.path=FOLDER"
        ) from None


def read_config(folder: Path, key: str, classes: tuple[str, ...]) -> dict[str, Any]:
    """config.json of the network in `folder`. UserError unless it is one of `classes`."""
    expected = " or ".join(classes)
    try:
        config = json.loads((folder / "config.json").read_text())
        name = config["_class_name"]
    except FileNotFoundError:
        where = f"config.json or {folder.name}/config.json" if folder.name else "config.json"
        raise UserError(f"{key}: no {expected} in it ({where})") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{key}: {folder / 'config.json'} is not a diffusers config") from None
    if name not in classes:
        raise UserError(f"{key}: a {name}; a {expected} is asked")
    return config


def read_network(
    cls: type, folder: Path, dtype: torch.dtype, key: str, **options: Any
) -> nn.Module:
    """The network of class `cls` (diffusers' or transformers') in `folder`, all weights its own.

    UserError when a weight is missing, left over or of another shape, or a file is broken.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # what it warns of is an error here
    try:
        network, report = cls.from_pretrained(
            folder,
            local_files_only=True,
            torch_dtype=dtype,
            output_loading_info=True,
            **{"use_safetensors": True, **options},
        )
    except Exception as error:  # safetensors, JSON, shape and file errors share no base class
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{key}: the weights cannot be read ({reason})") from None
    finally:
        logging.set_verbosity(verbosity)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        for name in sorted(map(str, report.get(problem) or ())):
            reason = problem.replace("_keys", "")
            raise UserError(f"{key}: the weights are not those of config.json ({reason}: {name})")
    return network


def read_scheduler(
    root: Path, key: str, config: Mapping[str, Any]
) -> tuple[SchedulerMixin, dict[str, Any]]:
    """The noise schedule of a model, and what determines it.

    That is `config["scheduler"]` where it is given, else what the folder `root` holds.
    """
    if config.get("scheduler"):
        return make_part(config["scheduler"], "model.scheduler"), config["scheduler"]
    folder = root / "scheduler" if (root / "scheduler").is_dir() else root
    try:
        stored = json.loads((folder / "scheduler_config.json").read_text())
        from lml import schedulers

        name = stored["_class_name"]
        home = schedulers if hasattr(schedulers, name) else diffusers
        schedule = {k: v for k, v in stored.items() if k != "_diffusers_version"}
        return getattr(home, name).from_config(stored), schedule
    except FileNotFoundError:
        raise UserError(
            f"{key}: no scheduler_config.json in it; give the noise schedule as model.scheduler"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{key}: {folder / 'scheduler_config.json'} makes no scheduler ({reason})"
        ) from None


def make_part(config: Any, key: str) -> Any:
    """What a `_target_` makes; anything else as it is."""
    if not isinstance(config, Mapping) or "_target_" not in config:
        return config
    return make(config, f"{key}={config['_target_']}")


def fingerprint(folder: Path, suffixes: tuple[str, ...] = (".safetensors",)) -> str:
    """sha256 of a network's config and weights, wherever they lie."""
    config = json.loads((folder / "config.json").read_text())
    kept = {key: value for key, value in config.items() if not key.startswith("_")}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
    for file in sorted(file for file in folder.iterdir() if file.suffix in suffixes):
        digest.update(f"{file.name} {file_hash(file)}".encode())
    return digest.hexdigest()


def normalize_in_float32(network: nn.Module) -> nn.Module:
    """Let the group norms of a half-precision `network` work in float32, as under autocast.

    On CPUs torch's own kernel for them takes five times as long in bfloat16.
    """
    for module in network.modules():
        if isinstance(module, nn.GroupNorm):
            module.float()
            module.register_forward_pre_hook(lambda _, args: (args[0].float(),))
            module.register_forward_hook(lambda _, args, output, to=network.dtype: output.to(to))
    return network


def prepare(network: nn.Module, device: torch.device, channels_last: bool) -> nn.Module:
    """`network` for inference, in the memory layout that is asked for."""
    if device.type == "cpu" and network.dtype in (torch.bfloat16, torch.float16):
        network = normalize_in_float32(network)
    if channels_last:
        network = network.to(memory_format=torch.channels_last)
    return network.to(device).eval().requires_grad_(False)


@contextmanager
def finite_outputs(network: nn.Module, timesteps: Callable[[], Tensor]) -> Iterator[None]:
    """FloatingPointError, naming step and timestep, when `network` returns NaN or inf inside.

    `timesteps()` are those of the trajectory, known once its first step is taken.
    """
    finite: list[Tensor] = []

    def check() -> None:
        flags = torch.stack(finite).tolist() if finite else [True]
        if all(flags):
            return
        step, times = flags.index(False), timesteps()
        raise FloatingPointError(
            f"the network returned NaN or inf at step {step + 1} of {len(times)}, "
            f"timestep {times[step].item():g}"
        )

    def look(_: nn.Module, args: tuple, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output.sample
        finite.append(output.isfinite().all())
        # On an accelerator one look at the end: each look would make the host wait for it.
        if output.device.type == "cpu":
            check()

    hook = network.register_forward_hook(look)
    try:
        yield
        check()
    finally:
        hook.remove()
