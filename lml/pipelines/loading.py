"""Finding models on disk or on the hub, and reading their parts strictly."""

from __future__ import annotations

import hashlib
import json
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import SchedulerMixin
from diffusers.utils import logging
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError
from torch import Tensor, nn

from lml.data.assets import locate
from lml.errors import UserError
from lml.files import file_hash
from lml.instances import make

FILES = ("*.json", "diffusion_pytorch_model*{suffix}", "*/*{suffix}")  # of a hub model
STEMS = {".safetensors": "(diffusion_pytorch_model|model)", ".bin": "(diffusion_)?pytorch_model"}
SHARD = r"-\d{5}-of-\d{5}"


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
    patterns = [name.format(suffix=suffix) for suffix in _suffixes(config) for name in FILES]
    options = options or {"allow_patterns": list(dict.fromkeys(patterns))}
    try:
        with quiet():
            return Path(download(hub_id, revision=config.get("revision"), **options))
    except Exception as error:  # the hub's errors and the network's share no base class
        answer = _answer(error)
        if isinstance(answer, GatedRepoError):
            raise UserError(
                f"{key}: access is to be granted; accept the license on "
                f"https://huggingface.co/{hub_id}, then `hf auth login`, or give "
                f"{group}.path=FOLDER"
            ) from None
        raise UserError(
            f"{key}: cannot be fetched ({one_line(answer)}); get it elsewhere with "
            f"`hf download {hub_id} --local-dir FOLDER` and give {group}.path=FOLDER"
        ) from None


def _answer(error: BaseException) -> BaseException:
    """The hub's answer, which diffusers wraps into an error of its own; else `error`."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, HfHubHTTPError):
        cause = cause.__cause__
    return cause or (type(error) is OSError and error.__cause__) or error


def one_line(error: BaseException) -> str:
    """The message of anybody's error, as a part of one line of ours."""
    text = re.sub(r"\s*\(Request ID: [^)]*\)", "", str(error)) or type(error).__name__
    return textwrap.shorten(text, 200, placeholder=" ...")


@contextmanager
def quiet() -> Iterator[None]:
    """What diffusers warns of while it finds and reads files is an error here, or nothing."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


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


@dataclass(frozen=True)
class Weights:
    """A network that was found: its folder, the files that hold its weights, and their variant."""

    folder: Path
    files: tuple[Path, ...]
    variant: str | None = None

    @property
    def sha256(self) -> str:
        """Over the network's config and weights, wherever they lie."""
        config = json.loads((self.folder / "config.json").read_text())
        kept = {key: value for key, value in config.items() if not key.startswith("_")}
        digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
        for file in self.files:
            digest.update(f"{file.name} {file_hash(file)}".encode())
        return digest.hexdigest()


def find_weights(
    folder: Path, key: str, config: Mapping[str, Any], group: str = "model"
) -> Weights:
    """The network in `folder`, beside its config.json, with the weights that diffusers would read.

    These are files of `config["variant"]` or, as diffusers has it, of none where a network has no
    such variant; safetensors, or pickled ones if there are no others and
    `config["use_safetensors"]` is false. UserError when there are none.
    """
    if not isinstance(config.get("use_safetensors", True), bool):
        value = config["use_safetensors"]
        raise UserError(f"{group}.use_safetensors={value}: true or false is asked")
    there = {file.name: file for file in sorted(folder.iterdir())}
    if "config.json" not in there:
        raise UserError(f"{key}: no {folder.name}/config.json in it")
    for suffix in _suffixes(config):
        for variant in dict.fromkeys([config.get("variant"), None]):
            name = f"\\.{re.escape(str(variant))}" if variant else ""
            name = f"{STEMS[suffix]}(({SHARD})?{name}|{name}{SHARD})\\{suffix}"
            if files := tuple(there[file] for file in there if re.fullmatch(name, file)):
                return Weights(folder, files, variant and str(variant))
    hint = ""
    for file in there:
        if match := re.fullmatch(r".*model(?:\.(\w+))?.*\.(?:safetensors|bin)", file):
            option = f"variant={match[1]}" if match[1] else "use_safetensors=false"
            hint = f"; {group}.{option} takes {file}"
    raise UserError(f"{key}: no weights in {folder.name} ({' or '.join(_suffixes(config))}{hint})")


def _suffixes(config: Mapping[str, Any]) -> list[str]:
    return list(STEMS)[: 1 if config.get("use_safetensors", True) else 2]


def read_network(cls: type, weights: Weights, dtype: torch.dtype, key: str) -> nn.Module:
    """The network of class `cls` (diffusers' or transformers'), all weights its own.

    UserError when a weight is missing, left over or of another shape, or a file is broken.
    """
    try:
        with quiet():
            network, report = cls.from_pretrained(
                weights.folder,
                local_files_only=True,
                torch_dtype=dtype,
                output_loading_info=True,
                variant=weights.variant,
                use_safetensors=weights.files[0].suffix == ".safetensors",
            )
    except Exception as error:  # safetensors, JSON, shape and file errors share no base class
        raise UserError(f"{key}: the weights cannot be read ({one_line(error)})") from None
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
def finite_outputs(network: nn.Module, scheduler: SchedulerMixin) -> Iterator[None]:
    """FloatingPointError, naming step and timestep, when `network` returns NaN or inf inside.

    Not where the scheduler `may_diverge`. Its timesteps are those of the trajectory.
    """
    if getattr(scheduler, "may_diverge", False):
        yield
        return
    finite: list[Tensor] = []

    def check() -> None:
        flags = torch.stack(finite).tolist() if finite else [True]
        if all(flags):
            return
        step, times = flags.index(False), scheduler.timesteps
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
