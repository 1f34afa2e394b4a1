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
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from torch import Tensor, nn
from torch.nn import functional as F

from lml.data.assets import locate
from lml.errors import UserError, first_line
from lml.files import read_object, weights_hash
from lml.instances import is_scheduler, make
from lml.schema import Network, PartConfig, check_call

ROOT_STEM = "diffusion_pytorch_model"  # of weights that lie in no folder of their own
STEMS = {".safetensors": "(diffusion_pytorch_model|model)", ".bin": "(diffusion_)?pytorch_model"}
SHARD = r"-\d{5}-of-\d{5}"


def describe_key(config: Mapping[str, Any], group: str = "model") -> str:
    """The configuration key that says where a model lies, and its value."""
    name = "path" if config.get("path") else "hub_id"
    return f"{group}.{name}={config.get(name)}"


def find_folder(
    config: Mapping[str, Any],
    group: str = "model",
    download: Callable[..., str] | None = None,
    **options: Any,
) -> Path:
    """The folder of a model: `path`, or `hub_id` at `revision`, fetched unless it is cached.

    `download(hub_id, revision=..., **options)` fetches, in place of `fetch`. UserError when there
    is no such model.
    """
    key = describe_key(config, group)
    if config.get("path"):
        folder = locate(str(config["path"]))
        if not folder.is_dir():
            raise UserError(f"{key}: no such folder (of diffusers' format)")
        return folder
    if not config.get("hub_id"):
        raise UserError(
            f"{group}.path=null: expected a folder in diffusers' format, or {group}.hub_id"
        )
    hub_id, revision = str(config["hub_id"]), config.get("revision")
    if download is None:
        download, options = fetch, {"config": config}
    try:
        with quiet():
            return Path(download(hub_id, revision=revision, **options))
    except Exception as error:  # the hub's errors and the network's share no base class
        reason = _why_not_fetched(_answer(error), config, group)
        raise UserError(f"{key}: {reason}") from None


def fetch(hub_id: str, revision: str | None, config: Mapping[str, Any]) -> str:
    """The configs and weights of a hub model: `snapshot_download` of what `find_weights` takes."""
    parts = ["*/", ROOT_STEM]
    for suffix in _suffixes(config):
        patterns = ["*.json", *(f"{part}*{suffix}" for part in parts)]
        folder = snapshot_download(hub_id, revision=revision, allow_patterns=patterns)
        root = Path(folder)
        networks = sorted(file.parent for file in root.rglob("config.json"))
        bare = [network for network in networks if not _matching(network, suffix, config)[0]]
        if not bare:
            break
        parts = [f"{n.relative_to(root)}/" if n != root else ROOT_STEM for n in bare]
    return folder


def _why_not_fetched(answer: BaseException, config: Mapping[str, Any], group: str) -> str:
    """What the hub's answer means, and what the user can do."""
    hub_id, local = config["hub_id"], f"{group}.path=FOLDER"
    if isinstance(answer, GatedRepoError):
        return (
            f"access is to be granted; accept the license on https://huggingface.co/{hub_id}, "
            f"then `hf auth login`, or give {local}"
        )
    if isinstance(answer, RepositoryNotFoundError):
        return (
            "the hub has no such repository, or a private one: where its owner has removed it, "
            f"give a mirror's name as {group}.hub_id, or a copy of the files as {local}; "
            "where it is private, `hf auth login`"
        )
    if isinstance(answer, RevisionNotFoundError):
        return (
            f"it has no revision {config.get('revision')}; {group}.revision=null is its main "
            f"branch; or give {local}"
        )
    if type(answer) in (OSError, ValueError) and getattr(answer, "errno", None) is None:
        # diffusers' own, which has found the repository, but not the files that it looks for
        safe = config.get("use_safetensors", True)
        pickled = f"{group}.use_safetensors=false takes pickled ones, " if safe else ""
        return (
            f"it has not the weights that are asked for ({one_line(answer)}); {pickled}"
            f"{group}.variant=NAME takes a variant's; or give {local}"
        )
    return (
        f"cannot be fetched ({one_line(answer)}); get it elsewhere with "
        f"`hf download {hub_id} --local-dir FOLDER` and give {local}"
    )


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
        config = read_object(folder / "config.json", PartConfig)
    except FileNotFoundError:
        where = f"config.json or {folder.name}/config.json" if folder.name else "config.json"
        raise UserError(f"{key}: no {expected} in it ({where})") from None
    except UserError as error:
        raise UserError(f"{key}: {error}; config.json is not a diffusers config") from None
    name = config["_class_name"]
    if name not in classes:
        raise UserError(f"{key}: a {name}; expected a {expected}")
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
        config = read_object(self.folder / "config.json", Network)
        kept = {key: value for key, value in config.items() if not key.startswith("_")}
        digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
        for file in self.files:
            digest.update(f"{file.name} {weights_hash(file)}".encode())
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
        raise UserError(f"{group}.use_safetensors={value}: expected true or false")
    if not (folder / "config.json").is_file():
        raise UserError(f"{key}: no {folder.name}/config.json in it")
    for suffix in _suffixes(config):
        files, variant = _matching(folder, suffix, config)
        if files:
            return Weights(folder, files, variant)
    hint = ""
    if config.get("use_safetensors", True):  # then pickled ones are not even fetched
        hint = f"; {group}.use_safetensors=false takes pickled ones, where there are some"
    for file in sorted(file.name for file in folder.iterdir()):
        if match := re.fullmatch(r".*model(?:\.(\w+))?.*\.(?:safetensors|bin)", file):
            option = f"variant={match[1]}" if match[1] else "use_safetensors=false"
            hint = f"; {group}.{option} takes {file}"
    raise UserError(f"{key}: no weights in {folder.name} ({' or '.join(_suffixes(config))}{hint})")


def _matching(
    folder: Path, suffix: str, config: Mapping[str, Any]
) -> tuple[tuple[Path, ...], str | None]:
    """The weights in `folder` with that suffix, of the variant asked for or none; and which."""
    there = sorted(file for file in folder.iterdir() if file.is_file())
    for variant in dict.fromkeys([config.get("variant"), None]):
        name = f"\\.{re.escape(str(variant))}" if variant else ""
        name = f"{STEMS[suffix]}(({SHARD})?{name}|{name}{SHARD})\\{suffix}"
        if files := tuple(file for file in there if re.fullmatch(name, file.name)):
            return files, variant and str(variant)
    return (), None


def _suffixes(config: Mapping[str, Any]) -> list[str]:
    return list(STEMS)[: 1 if config.get("use_safetensors", True) else 2]


def read_network(cls: type, weights: Weights, dtype: torch.dtype, key: str) -> nn.Module:
    """The network of class `cls` (diffusers' or transformers'), all weights its own.

    UserError when a weight is missing, left over or of another shape, or a file is broken.
    """
    config = read_object(weights.folder / "config.json", Network)
    check_call(cls, config, f"{key}: config.json", lenient=True)
    try:
        with quiet():
            network, report = cls.from_pretrained(
                weights.folder,
                local_files_only=True,
                torch_dtype=dtype,
                output_loading_info=True,
                variant=weights.variant,
                use_safetensors=weights.files[0].suffix == ".safetensors",
                trust_remote_code=False,
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
        return make_scheduler(config["scheduler"]), config["scheduler"]
    folder = root / "scheduler" if (root / "scheduler").is_dir() else root
    try:
        stored = read_object(folder / "scheduler_config.json", PartConfig)
        from lml import schedulers

        name = stored["_class_name"]
        home = schedulers if hasattr(schedulers, name) else diffusers
        if not is_scheduler(home.__name__, name):
            raise ValueError(f"{name} is none of diffusers' or lml's")
        schedule = {k: v for k, v in stored.items() if k != "_diffusers_version"}
        check_call(getattr(home, name), stored, "scheduler_config.json", lenient=True)
        with quiet():
            return getattr(home, name).from_config(stored), schedule
    except FileNotFoundError:
        raise UserError(
            f"{key}: no scheduler_config.json in it; give the noise schedule as model.scheduler"
        ) from None
    except Exception as error:  # whatever a scheduler stumbles on in numbers that are no schedule
        reason = first_line(error)
        raise UserError(
            f"{key}: {folder / 'scheduler_config.json'} makes no scheduler ({reason})"
        ) from None


def make_part(config: Mapping[str, Any], key: str) -> Any:
    """What a `_target_` makes."""
    return make(config, f"{key}={config['_target_']}")


def make_scheduler(config: Mapping[str, Any]) -> SchedulerMixin:
    """The noise schedule that `model.scheduler` makes. UserError where it makes anything else."""
    made = make_part(config, "model.scheduler")
    if not isinstance(made, SchedulerMixin):
        raise UserError(f"model.scheduler._target_={config['_target_']}: expected a scheduler")
    return made


class GroupNormInFloat32(nn.GroupNorm):
    """A group norm that works in float32 whatever its weights and inputs are, as under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (p if p is None else p.float() for p in (self.weight, self.bias))
        return F.group_norm(x.float(), self.num_groups, weight, bias, self.eps).to(x.dtype)


def lay_out(network: nn.Module, device: torch.device, channels_last: bool) -> nn.Module:
    """`network`, not moved, as inference on `device` and the memory layout asked for have it."""
    if device.type == "cpu" and network.dtype in (torch.bfloat16, torch.float16):
        # On CPUs torch's own kernel for group norms takes five times as long in bfloat16.
        for module in network.modules():
            if type(module) is nn.GroupNorm:
                module.__class__ = GroupNormInFloat32
    if channels_last:
        network = network.to(memory_format=torch.channels_last)
    return network.eval().requires_grad_(False)


def prepare(network: nn.Module, device: torch.device, channels_last: bool) -> nn.Module:
    """`network` for inference on `device`, in the memory layout that is asked for."""
    return lay_out(network, device, channels_last).to(device)


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
