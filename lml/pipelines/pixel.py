"""Unconditional models in pixel space: finds and loads them; and the sampling loop."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import torch
from diffusers import SchedulerMixin, UNet2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from lml.errors import UserError
from lml.pipelines import loading
from lml.schema import check_whole


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] to 0 ... 255: round(127.5 x + 127.5), clamped. All of the project uses this rule.

    NaN becomes 0, as in the images that diffusers' own pipelines store.
    """
    return (127.5 * x.float() + 127.5).round().clamp(0, 255).nan_to_num(0).to(torch.uint8)


class SpaceToDepth(nn.Module):
    """A UNet2DModel trained on `patch` x `patch` blocks of pixels as channels, called on images.

    It is called as the UNet2DModel is, with images (B, C / patch², patch·H, patch·W) for a network
    of (B, C, H, W). Samplers need not know of the rearrangement, since it is an orthonormal
    permutation.
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
    """A model whose files were found and are not loaded yet.

    `settings` identify the model, whatever its path is; `scheduler` holds its noise schedule.
    """

    name: str
    settings: dict[str, Any]
    scheduler: SchedulerMixin
    config: Mapping[str, Any]
    weights: loading.Weights | None = None  # None if the network is made, not read
    _: KW_ONLY
    sample_size: int | None = None  # of the network's samples; None for the network's own size
    has_latents: ClassVar[bool] = False

    def image_size(self) -> tuple[int, int] | None:
        """(height, width) of the images; None if it is not known before the network is loaded."""
        if self.weights is None:
            side = self.config["network"].get("sample_size")
            return None if side is None else (side, side)
        height_width = loading.sample_size(self.weights.folder)
        if self.sample_size is not None:
            height_width = (self.sample_size,) * 2
        factor = self.config.get("patch", 1)
        if height_width is None:
            return None
        return height_width[0] * factor, height_width[1] * factor

    def load(
        self, device: torch.device, dtype: torch.dtype, channels_last: bool = False
    ) -> nn.Module:
        """Load the network. UserError if its files don't make one."""
        if self.weights is None:
            network = loading.make_part(self.config["network"], "model.network").to(dtype)
        else:
            key = loading.describe_key(self.config)
            network = loading.read_network(UNet2DModel, self.weights, dtype, key)
            if network.class_embedding is not None:
                raise UserError(f"{key}: conditional on a class; expected an unconditional model")
            if self.sample_size is not None:
                network.register_to_config(sample_size=self.sample_size)
        if self.config.get("patch", 1) > 1:
            network = SpaceToDepth(network, self.config["patch"])
        return loading.prepare(network, device, channels_last)

    def sampler(
        self, device: torch.device, dtype: torch.dtype, channels_last: bool, compile: bool
    ) -> PixelSampler:
        """Load the network, and return the sampler."""
        network = self.load(device, dtype, channels_last)
        return PixelSampler(torch.compile(network) if compile else network, channels_last)


class PixelSampler:
    """Makes images from seeds with one network.

    Evaluations are calls of `network`. `parts` are its other networks, by the name of their time
    in timing.json. `guided` says whether `network` is called on twice the batch. `latents`
    (B, ...) are the solver's result in the last call; None if the model has none. `control_map`,
    uint8 (3, H, W), is what a text model made of a photograph.
    """

    guided = False
    control_map: Tensor | None = None

    def __init__(self, network: nn.Module, channels_last: bool):
        self.network, self.channels_last = network, channels_last
        self.parts: dict[str, nn.Module] = {}
        self.latents: Tensor | None = None

    def __call__(
        self,
        scheduler: SchedulerMixin,
        steps: int,
        seeds: Sequence[int],
        prompts: Sequence[str] | None = None,
        decode: bool = True,
        **step_options: Any,
    ) -> Tensor:
        """Images (B, C, H, W) in about [-1, 1], one for each seed.

        Without `decode`, the latents, if the model has any.
        """
        shape = (self.network.config.in_channels, *size(self.network))
        noise, generators = draw_noise(seeds, shape)
        return sample(
            self.network, scheduler, steps, noise, generators, self.channels_last, **step_options
        )


def find_pixel_model(config: Mapping[str, Any]) -> PixelModel:
    """The model that a config of the group `model` describes.

    Either `network` and `scheduler` are objects to make (`_target_`), or `path` (or `hub_id` and
    `revision`) is a folder in diffusers' format, of a pipeline or of a network alone. In the second
    case, `scheduler` is needed only if the folder has none. With `sample_size`, a convolutional
    network makes images of another size than its own. UserError if there is no such model.
    """
    if config.get("network"):
        made = {key: config.get(key) for key in ("network", "scheduler")}
        if made["scheduler"] is None:
            raise UserError("model.scheduler=null: expected the noise schedule of model.network")
        scheduler = loading.make_scheduler(made["scheduler"])
        return PixelModel(config["name"], made, scheduler, config)
    patch = config.get("patch", 1)
    check_whole(patch, "model.patch")
    root, key = loading.find_folder(config), loading.describe_key(config)
    weights, network = find_network(root, key, config)
    channels = network.get("in_channels", 3)
    if channels % patch**2:
        raise UserError(
            f"model.patch={patch}: the network's {channels} channels are not a multiple of "
            f"{patch**2}"
        )
    scheduler, schedule = loading.read_scheduler(root, key, config)
    settings = {"network": weights.sha256, "scheduler": schedule, "patch": patch}
    size = choose_size(config.get("sample_size"), network, patch)
    if size is not None:
        settings["sample_size"] = size
    return PixelModel(config["name"], settings, scheduler, config, weights, sample_size=size)


def choose_size(asked: int | None, network: Mapping[str, Any], patch: int) -> int | None:
    """The size of the network's samples for images of `asked` pixels; None for its own size.

    UserError unless the network's convolutions can halve it often enough.
    """
    if asked is None:
        return None
    blocks = len(network.get("down_block_types") or range(4))  # diffusers' default is four
    step = patch * 2 ** (blocks - 1)
    if isinstance(asked, bool) or not isinstance(asked, int) or asked < step or asked % step:
        raise UserError(f"model.sample_size={asked}: expected null or a multiple of {step}")
    return None if asked // patch == network.get("sample_size") else asked // patch


def find_network(
    root: Path, key: str, config: Mapping[str, Any]
) -> tuple[loading.Weights, dict[str, Any]]:
    """The UNet2DModel in `root`, and its config."""
    folder = root / "unet" if (root / "unet").is_dir() else root
    network = loading.read_config(folder, key, ("UNet2DModel",))
    return loading.find_weights(folder, key, config), network


def draw_noise(seeds: Sequence[int], shape: Sequence[int]) -> tuple[Tensor, list[torch.Generator]]:
    """Standard normal float32 noise (B, *shape), each row from its own seed, and the generators.

    It is drawn on the CPU, so that it is the same for every device.
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

    The solver computes in float32, or in float64 if the network does. Solvers that add noise draw
    it from `generators`; `step_options` go to `scheduler.step`. FloatingPointError, with step and
    timestep, if the network returns NaN or inf, unless the solver `may_diverge`.
    """
    device, dtype = network.device, network.dtype
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    if "generator" in inspect.signature(scheduler.step).parameters:
        step_options["generator"] = generators
    scheduler.set_timesteps(steps)
    # Flow matching has neither: its noise has unit variance, and its inputs are not scaled.
    scale = getattr(scheduler, "scale_model_input", lambda x, t: x)
    x = noise.to(device, torch.promote_types(dtype, torch.float32))
    x = x * getattr(scheduler, "init_noise_sigma", 1.0)
    with loading.finite_outputs(network, scheduler):
        for t in scheduler.timesteps:
            inputs = scale(x, t).to(dtype, memory_format=memory_format)
            output = network(inputs, t.to(device), return_dict=False)[0].to(x.dtype)
            x = scheduler.step(output, t, x, return_dict=False, **step_options)[0]
    return x
