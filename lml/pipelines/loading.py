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

ROOT_STEM = "diffusion_pytorch_model"  # name of weights in the repository's root folder
STEMS = {".safetensors": "(diffusion_pytorch_model|model)", ".bin": "(diffusion_)?pytorch_model"}
SHARD = r"-\d{5}-of-\d{5}"


def describe_key(config: Mapping[str, Any], group: str = "model") -> str:
    """The config key that says where a model is, and its value, as `key=value`."""
    name = "path" if config.get("path") else "hub_id"
    return f"{group}.{name}={config.get(name)}"


def find_folder(
    config: Mapping[str, Any],
    group: str = "model",
    download: Callable[..., str] | None = None,
    holds: str = "a model in diffusers' format",
    **options: Any,
) -> Path:
    """The folder of a model: `path`, or `hub_id` at `revision`, fetched unless it is cached.

    `download(hub_id, revision=..., **options)` replaces `fetch`. `holds` says in errors what the
    folder has to hold. UserError if there is no such model.
    """
    key = describe_key(config, group)
    if config.get("path"):
        folder = locate(str(config["path"]))
        if not folder.is_dir():
            raise UserError(f"{key}: no such folder; expected {holds}")
        return folder
    if not config.get("hub_id"):
        raise UserError(f"{group}.path=null: expected a folder with {holds}, or {group}.hub_id")
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
    """Download a hub model's configs, and those weights that `find_weights` would choose."""
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
    """What the hub's answer means, and what to do."""
    hub_id, local = config["hub_id"], f"{group}.path=FOLDER"
    if isinstance(answer, GatedRepoError):
        return (
            f"access must be granted; accept the license on https://huggingface.co/{hub_id}, "
            f"then use `hf auth login`; or give {local}"
        )
    if isinstance(answer, RepositoryNotFoundError):
        return (
            "the hub has no such repository, or it is private; if its owner has removed it, "
            f"give a mirror's name as {group}.hub_id, or a copy of the files as {local}; "
            "if it is private, use `hf auth login`"
        )
    if isinstance(answer, RevisionNotFoundError):
        return (
            f"it has no revision {config.get('revision')}; use {group}.revision=null for its main "
            f"branch, or give {local}"
        )
    if type(answer) in (OSError, ValueError) and getattr(answer, "errno", None) is None:
        # diffusers raised it: it found the repository, but not the files
        safe = config.get("use_safetensors", True)
        pickled = f"{group}.use_safetensors=false takes pickled ones, " if safe else ""
        return (
            f"it does not have these weights ({one_line(answer)}); {pickled}"
            f"{group}.variant=NAME takes a variant's; or give {local}"
        )
    return (
        f"cannot be fetched ({one_line(answer)}); get it elsewhere with "
        f"`hf download {hub_id} --local-dir FOLDER` and give {local}"
    )


def _answer(error: BaseException) -> BaseException:
    """The hub's own error if diffusers wrapped it in `error`; otherwise `error`."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, HfHubHTTPError):
        cause = cause.__cause__
    return cause or (type(error) is OSError and error.__cause__) or error


def one_line(error: BaseException) -> str:
    """The message of another library's error, as part of a one-line message."""
    text = re.sub(r"\s*\(Request ID: [^)]*\)", "", str(error)) or type(error).__name__
    return textwrap.shorten(text, 200, placeholder=" ...")


@contextmanager
def quiet() -> Iterator[None]:
    """Silence diffusers' warnings while it reads files: what matters is checked and raised here."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def read_config(folder: Path, key: str, classes: tuple[str, ...]) -> dict[str, Any]:
    """config.json of the network in `folder`. UserError unless its class is one of `classes`."""
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
    """A network on the disk: its folder, the files of its weights, and their variant."""

    folder: Path
    files: tuple[Path, ...]
    variant: str | None = None

    @property
    def sha256(self) -> str:
        """sha256 of the network's config and weights; their place makes no difference."""
        config = read_object(self.folder / "config.json", Network)
        kept = {key: value for key, value in config.items() if not key.startswith("_")}
        digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
        for file in self.files:
            digest.update(f"{file.name} {weights_hash(file)}".encode())
        return digest.hexdigest()


def sample_size(folder: Path) -> tuple[int, int] | None:
    """(height, width) of the samples of the network in `folder`; None if its config has none."""
    size = read_object(folder / "config.json").get("sample_size")
    sides = size if isinstance(size, list) else [size, size]
    return tuple(sides) if len(sides) == 2 and all(type(side) is int for side in sides) else None


def decoder_factor(folder: Path) -> int:
    """The side of an image over that of its latents, for the autoencoder in `folder`."""
    blocks = read_object(folder / "config.json").get("block_out_channels")
    return 2 ** (len(blocks) - 1) if isinstance(blocks, list) and 0 < len(blocks) < 16 else 1


def find_weights(
    folder: Path, key: str, config: Mapping[str, Any], group: str = "model"
) -> Weights:
    """The network in `folder`, with the weights that diffusers would read.

    As in diffusers, a network that lacks the variant `config["variant"]` uses the files without a
    variant. Pickled weights are used only if there are no safetensors and
    `config["use_safetensors"]` is false. UserError if there are no weights.
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
    if config.get("use_safetensors", True):  # pickled ones were not fetched
        hint = f"; {group}.use_safetensors=false takes pickled ones, if there are any"
    for file in sorted(file.name for file in folder.iterdir()):
        if match := re.fullmatch(r".*model(?:\.(\w+))?.*\.(?:safetensors|bin)", file):
            option = f"variant={match[1]}" if match[1] else "use_safetensors=false"
            hint = f"; {group}.{option} takes {file}"
    raise UserError(f"{key}: no weights in {folder.name} ({' or '.join(_suffixes(config))}{hint})")


def _matching(
    folder: Path, suffix: str, config: Mapping[str, Any]
) -> tuple[tuple[Path, ...], str | None]:
    """The files of weights in `folder` with `suffix`, and their variant (None: no variant)."""
    there = sorted(file for file in folder.iterdir() if file.is_file())
    for variant in dict.fromkeys([config.get("variant"), None]):
        name = f"\\.{re.escape(str(variant))}" if variant else ""
        name = f"{STEMS[suffix]}(({SHARD})?{name}|{name}{SHARD})\\{suffix}"
        if files := tuple(file for file in there if re.fullmatch(name, file.name)):
            return files, variant and str(variant)
    return (), None


def _suffixes(config: Mapping[str, Any]) -> list[str]:
    return list(STEMS)[: 1 if config.get("use_safetensors", True) else 2]


def read_network(
    cls: type, weights: Weights, dtype: torch.dtype, key: str, unused: str = ""
) -> nn.Module:
    """Read a network of class `cls` (diffusers' or transformers').

    UserError if a weight is missing, left over or of another shape, or if a file is broken. Weights
    whose whole name the expression `unused` matches may be missing.
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
            if problem == "missing_keys" and re.fullmatch(unused, name):
                continue
            reason = problem.replace("_keys", "")
            raise UserError(f"{key}: the weights are not those of config.json ({reason}: {name})")
    return network


def read_scheduler(
    root: Path, key: str, config: Mapping[str, Any]
) -> tuple[SchedulerMixin, dict[str, Any]]:
    """The noise schedule of a model, and the settings that determine it.

    The settings are `config["scheduler"]`, or, if that is empty, those in the folder `root`.
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
            raise ValueError(f"{name} is no scheduler of diffusers or lml")
        schedule = {k: v for k, v in stored.items() if k != "_diffusers_version"}
        check_call(getattr(home, name), stored, "scheduler_config.json", lenient=True)
        with quiet():
            return getattr(home, name).from_config(stored), schedule
    except FileNotFoundError:
        raise UserError(
            f"{key}: no scheduler_config.json in it; give the noise schedule as model.scheduler"
        ) from None
    except Exception as error:  # a scheduler may raise anything for wrong numbers
        reason = first_line(error)
        raise UserError(
            f"{key}: {folder / 'scheduler_config.json'} makes no scheduler ({reason})"
        ) from None


def make_part(config: Mapping[str, Any], key: str) -> Any:
    """The object that the `_target_` of `config` makes."""
    return make(config, f"{key}={config['_target_']}")


def make_scheduler(config: Mapping[str, Any]) -> SchedulerMixin:
    """The noise schedule that `model.scheduler` makes. UserError if it makes anything else."""
    made = make_part(config, "model.scheduler")
    if not isinstance(made, SchedulerMixin):
        raise UserError(f"model.scheduler._target_={config['_target_']}: expected a scheduler")
    return made


class GroupNormInFloat32(nn.GroupNorm):
    """A group norm that computes in float32, as under autocast, for any type of its inputs."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (p if p is None else p.float() for p in (self.weight, self.bias))
        return F.group_norm(x.float(), self.num_groups, weight, bias, self.eps).to(x.dtype)


def lay_out(network: nn.Module, device: torch.device, channels_last: bool) -> nn.Module:
    """`network`, changed for inference on `device` with that memory layout, but not moved."""
    if device.type == "cpu" and network.dtype in (torch.bfloat16, torch.float16):
        # On CPUs, torch's own kernel for group norms takes five times as long in bfloat16.
        for module in network.modules():
            if type(module) is nn.GroupNorm:
                module.__class__ = GroupNormInFloat32
    if channels_last:
        network = network.to(memory_format=torch.channels_last)
    return network.eval().requires_grad_(False)


def prepare(network: nn.Module, device: torch.device, channels_last: bool) -> nn.Module:
    """`network` for inference on `device`, with that memory layout."""
    return lay_out(network, device, channels_last).to(device)


@contextmanager
def finite_outputs(network: nn.Module, scheduler: SchedulerMixin, first: int = 0) -> Iterator[None]:
    """FloatingPointError, with step and timestep, if `network` returns NaN or inf inside.

    There is no error if `scheduler` says `may_diverge`. Its timesteps, from number `first` on, must
    be the trajectory's.
    """
    if getattr(scheduler, "may_diverge", False):
        yield
        return
    finite: list[Tensor] = []

    def check() -> None:
        flags = torch.stack(finite).tolist() if finite else [True]
        if all(flags):
            return
        step, times = flags.index(False), scheduler.timesteps[first:]
        raise FloatingPointError(
            f"the network returned NaN or inf at step {step + 1} of {len(times)}, "
            f"timestep {times[step].item():g}"
        )

    def look(_: nn.Module, args: tuple, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output.sample
        finite.append(output.isfinite().all())
        # An accelerator is checked at the end only: each check would make the host wait for it.
        if output.device.type == "cpu":
            check()

    hook = network.register_forward_hook(look)
    try:
        yield
        check()
    finally:
        hook.remove()
