"""Unconditional models in pixel space: finding and loading them, and the sampling loop."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import SchedulerMixin, UNet2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.utils import logging
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from lml.data.assets import locate
from lml.errors import UserError
from lml.instances import make

FILES = ("*.json", "diffusion_pytorch_model*.safetensors", "unet/*.safetensors")  # of a hub model


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] to 0 ... 255: round(127.5 x + 127.5), clamped. The project's one rule for it."""
    return (127.5 * x.float() + 127.5).round().clamp(0, 255).to(torch.uint8)


class SpaceToDepth(nn.Module):
    """A UNet2DModel trained on `patch` x `patch` blocks of pixels as channels, called on images.

    Call: as UNet2DModel's, images (B, C / patch², patch·H, patch·W) for a network of (B, C, H, W).
    The rearrangement is an orthonormal permutation, so a sampler need not know of it.
    """

    def __init__(self, network: UNet2DModel, patch: int):
        super().__init__()
        self.network, self.patch = network, patch
        height, width = size(network)
        self.config = diffusers.configuration_utils.FrozenDict(
            in_channels=network.config.in_channels // patch**2,
            sample_size=(height * patch, width * patch),
        )

    @property
    def dtype(self) -> torch.dtype:
        """The network's."""
        return self.network.dtype

    @property
    def device(self) -> torch.device:
        """The network's."""
        return self.network.device

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor]:
        x = pixel_unshuffle(sample, self.patch)
        if sample.is_contiguous(memory_format=torch.channels_last):
            x = x.contiguous(memory_format=torch.channels_last)
        x = self.network(x, timestep, class_labels, return_dict=False)[0]
        x = pixel_shuffle(x, self.patch)
        return UNet2DOutput(sample=x) if return_dict else (x,)


def size(network: nn.Module) -> tuple[int, int]:
    """(H, W) of a network's samples."""
    height_width = network.config.sample_size
    return (height_width,) * 2 if isinstance(height_width, int) else tuple(height_width)


@dataclass
class PixelModel:
    """A model that was found, and is not loaded yet.

    `settings` tells it from any other model, whatever path it was found under; `scheduler` holds
    its noise schedule.
    """

    name: str
    settings: dict[str, Any]
    scheduler: SchedulerMixin
    config: Mapping[str, Any]
    folder: Path | None = None  # of the network; None for networks that are made, not read

    def load(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The network, ready to be called. UserError when its files don't make one."""
        if self.folder is None:
            network = _make(self.config["network"], "model.network").to(dtype)
        else:
            network = _read_network(self.folder, dtype, _key(self.config))
        if device.type == "cpu" and dtype in (torch.bfloat16, torch.float16):
            network = normalize_in_float32(network)
        if self.config.get("patch", 1) > 1:
            network = SpaceToDepth(network, self.config["patch"])
        return network.to(device).eval().requires_grad_(False)


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


def find(config: Mapping[str, Any]) -> PixelModel:
    """The model that a config of the group `model` describes.

    Either `network` and `scheduler` are objects to make (`_target_`), or `path` (or `hub_id` and
    `revision`) is a folder in diffusers' format, of a pipeline or of a network alone; then
    `scheduler` is only asked where the folder has none. UserError when there is no such model.
    """
    if config.get("network"):
        made = {key: config[key] for key in ("network", "scheduler")}
        return PixelModel(config["name"], made, _make(made["scheduler"], "model.scheduler"), config)
    patch = config.get("patch", 1)
    if isinstance(patch, bool) or not isinstance(patch, int) or patch < 1:
        raise UserError(f"model.patch={patch}: a whole number of at least 1 is asked")
    root = _folder(config)
    folder = root / "unet" if (root / "unet").is_dir() else root
    key = _key(config)
    channels = _check_architecture(folder, key)
    if channels % patch**2:
        raise UserError(
            f"model.patch={patch}: the network's {channels} channels are no multiple of {patch**2}"
        )
    if config.get("scheduler"):
        scheduler, schedule = _make(config["scheduler"], "model.scheduler"), config["scheduler"]
    else:
        scheduler, schedule = _read_scheduler(root, key)
    settings = {
        "network": _fingerprint(folder),
        "scheduler": {k: v for k, v in schedule.items() if k != "_diffusers_version"},
        "patch": patch,
    }
    return PixelModel(config["name"], settings, scheduler, config, folder)


def _key(config: Mapping[str, Any]) -> str:
    name = "path" if config.get("path") else "hub_id"
    return f"model.{name}={config.get(name)}"


def _folder(config: Mapping[str, Any]) -> Path:
    if config.get("path"):
        folder = locate(str(config["path"]))
        if not folder.is_dir():
            raise UserError(f"{_key(config)}: no such folder (of diffusers' format)")
        return folder
    if not config.get("hub_id"):
        raise UserError("model.path=null: a folder in diffusers' format is asked, or model.hub_id")
    try:
        return Path(
            snapshot_download(
                str(config["hub_id"]),
                revision=config.get("revision"),
                allow_patterns=FILES,
            )
        )
    except Exception as error:  # the hub's errors and the network's share no base class
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{_key(config)}: cannot be fetched ({reason}); get it elsewhere with "
            f"`hf download {config['hub_id']} --local-dir FOLDER` and give model.path=FOLDER"
        ) from None


def _check_architecture(folder: Path, key: str) -> int:
    """The number of channels of the network in `folder`, if it is one of ours."""
    try:
        config = json.loads((folder / "config.json").read_text())
        name, channels = config["_class_name"], config.get("in_channels", 3)
    except FileNotFoundError:
        raise UserError(f"{key}: no UNet2DModel in it (config.json or unet/config.json)") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{key}: {folder / 'config.json'} is not a diffusers config") from None
    if name != "UNet2DModel":
        raise UserError(f"{key}: a {name}; a UNet2DModel is asked")
    if not list(folder.glob("*.safetensors")):
        raise UserError(f"{key}: no weights in it (diffusion_pytorch_model.safetensors)")
    return channels


def _read_network(folder: Path, dtype: torch.dtype, key: str) -> UNet2DModel:
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # what it warns of is an error here
    try:
        network, report = UNet2DModel.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            torch_dtype=dtype,
            output_loading_info=True,
        )
    except Exception as error:  # safetensors, JSON, shape and file errors share no base class
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{key}: the weights cannot be read ({reason})") from None
    finally:
        logging.set_verbosity(verbosity)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        for name in report.get(problem) or ():
            reason = problem.replace("_keys", "")
            raise UserError(f"{key}: the weights are not those of config.json ({reason}: {name})")
    if network.class_embedding is not None:
        raise UserError(f"{key}: conditional on a class; an unconditional model is asked")
    return network


def _read_scheduler(root: Path, key: str) -> tuple[SchedulerMixin, dict[str, Any]]:
    folder = root / "scheduler" if (root / "scheduler").is_dir() else root
    try:
        config = json.loads((folder / "scheduler_config.json").read_text())
        from lml import schedulers

        name = config["_class_name"]
        home = schedulers if hasattr(schedulers, name) else diffusers
        return getattr(home, name).from_config(config), config
    except FileNotFoundError:
        raise UserError(
            f"{key}: no scheduler_config.json in it; give the noise schedule as model.scheduler"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{key}: {folder / 'scheduler_config.json'} makes no scheduler ({reason})"
        ) from None


def _make(config: Any, key: str) -> Any:
    if not isinstance(config, Mapping) or "_target_" not in config:
        return config
    return make(config, f"{key}={config['_target_']}")


def _fingerprint(folder: Path) -> str:
    """sha256 of a network's config and weights, wherever they lie."""
    config = json.loads((folder / "config.json").read_text())
    kept = {key: value for key, value in config.items() if not key.startswith("_")}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(file.name.encode())
        with file.open("rb") as weights:
            while chunk := weights.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def draw_noise(seeds: Sequence[int], shape: Sequence[int]) -> tuple[Tensor, list[torch.Generator]]:
    """Standard normal float32 noise (B, *shape), each row from its own seed, and the generators.

    Drawn on the CPU, so that it is the same on every device.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.randn(*shape, generator=g) for g in generators]), generators


@torch.no_grad()
def sample(
    network: nn.Module,
    scheduler: SchedulerMixin,
    steps: int,
    noise: Tensor,
    generators: list[torch.Generator] | None = None,
    channels_last: bool = True,
    **step_options: Any,
) -> Tensor:
    """Integrate from `noise` (B, C, H, W) to images of the same shape, in about [-1, 1].

    The solver works in float32 (or float64, if the network does), whatever the network's type.
    `generators` feed solvers that add noise; `step_options` go to `scheduler.step`. Raises
    FloatingPointError, naming step and timestep, when the network returns NaN or inf.
    """
    device, dtype = network.device, network.dtype
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    if "generator" in inspect.signature(scheduler.step).parameters:
        step_options["generator"] = generators
    scheduler.set_timesteps(steps)
    # Flow matching knows neither: its noise has unit variance and its inputs are as they are.
    scale = getattr(scheduler, "scale_model_input", lambda x, t: x)
    x = noise.to(device, torch.promote_types(dtype, torch.float32))
    x = x * getattr(scheduler, "init_noise_sigma", 1.0)
    finite = torch.ones(len(scheduler.timesteps), dtype=torch.bool, device=device)
    for i, t in enumerate(scheduler.timesteps):
        inputs = scale(x, t).to(dtype, memory_format=memory_format)
        output = network(inputs, t.to(device), return_dict=False)[0].to(x.dtype)
        finite[i] = output.isfinite().all()
        # On an accelerator one look at the end: each look would make the host wait for it.
        if device.type == "cpu" or i + 1 == len(scheduler.timesteps):
            _check_finite(finite, scheduler.timesteps)
        x = scheduler.step(output, t, x, return_dict=False, **step_options)[0]
    return x


def _check_finite(finite: Tensor, timesteps: Tensor) -> None:
    if not finite.all():
        step = finite.tolist().index(False)
        raise FloatingPointError(
            f"the network returned NaN or inf at step {step + 1} of {len(timesteps)}, "
            f"timestep {timesteps[step].item():g}"
        )
