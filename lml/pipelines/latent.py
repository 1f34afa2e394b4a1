"""Unconditional latent diffusion (arXiv 2112.10752): a UNet2DModel between noise and a decoder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import diffusers
import torch
from diffusers import SchedulerMixin
from torch import Tensor, nn

from lml.errors import UserError
from lml.pipelines import loading, pixel

DECODERS = ("VQModel", "AutoencoderKL")


@dataclass
class LatentModel(pixel.PixelModel):
    """A latent diffusion model whose files were found and are not loaded yet."""

    decoder: loading.Weights | None = None
    has_latents: ClassVar[bool] = True

    def image_size(self) -> tuple[int, int] | None:
        """(height, width) of the images; None if it is not known before the network is loaded."""
        latents, factor = super().image_size(), loading.decoder_factor(self.decoder.folder)
        return None if latents is None else (latents[0] * factor, latents[1] * factor)

    def sampler(
        self, device: torch.device, dtype: torch.dtype, channels_last: bool, compile: bool
    ) -> LatentSampler:
        """Load the networks, and return the sampler."""
        latents = super().sampler(device, dtype, channels_last, compile)
        key = loading.describe_key(self.config)
        name = loading.read_config(self.decoder.folder, key, DECODERS)["_class_name"]
        decoder = loading.read_network(getattr(diffusers, name), self.decoder, dtype, key)
        decoder = loading.prepare(decoder, device, channels_last)
        scale = self.config.get("scaling_factor")
        scale = decoder.config.scaling_factor if scale is None else scale
        return LatentSampler(latents, decoder, scale, bool(self.config.get("slicing")))


class LatentSampler(pixel.PixelSampler):
    """Makes images from seeds. Its latents are `scale` times those that the decoder takes."""

    def __init__(
        self, latents: pixel.PixelSampler, decoder: nn.Module, scale: float, slicing: bool
    ):
        super().__init__(latents.network, latents.channels_last)
        self.decoder, self.scale, self.slicing = decoder, scale, slicing
        self.parts = {"decoder": decoder.decoder}

    @torch.no_grad()
    def __call__(
        self,
        scheduler: SchedulerMixin,
        steps: int,
        seeds: Sequence[int],
        prompts: Sequence[str] | None = None,
        decode: bool = True,
        **step_options: Any,
    ) -> Tensor:
        """Images (B, 3, H, W) in about [-1, 1], one for each seed."""
        latents = super().__call__(scheduler, steps, seeds, prompts, **step_options)
        self.latents = latents
        if not decode:
            return latents
        latents = (latents / self.scale).to(self.decoder.dtype)
        blocks = latents.split(1 if self.slicing else len(latents))
        return torch.cat([self.decoder.decode(block).sample for block in blocks])


def find_latent_model(config: Mapping[str, Any]) -> LatentModel:
    """The model in the folder of an LDMPipeline: `unet`, `vqvae` or `vae`, and `scheduler`.

    `path`, `hub_id`, `revision` and `scheduler` are as for pixel models. `scaling_factor` times
    the autoencoder's latents are the model's; None takes it from the autoencoder's config.
    UserError if there is no such model.
    """
    scale = config.get("scaling_factor")
    real = isinstance(scale, (int, float)) and not isinstance(scale, bool)
    if scale is not None and not (real and 0 < scale < math.inf):
        raise UserError(f"model.scaling_factor={scale}: expected a number > 0, or null")
    root, key = loading.find_folder(config), loading.describe_key(config)
    folder = next((root / name for name in ("vqvae", "vae") if (root / name).is_dir()), None)
    if folder is None:
        raise UserError(f"{key}: no autoencoder in it (vqvae or vae)")
    loading.read_config(folder, key, DECODERS)
    decoder = loading.find_weights(folder, key, config)
    network, _ = pixel.find_network(root, key, config)
    scheduler, schedule = loading.read_scheduler(root, key, config)
    settings = {
        "network": network.sha256,
        "decoder": decoder.sha256,
        "scheduler": schedule,
        "scaling_factor": scale,
    }
    return LatentModel(config["name"], settings, scheduler, config, network, decoder)
