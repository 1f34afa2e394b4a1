"""Unconditional latent diffusion (arXiv 2112.10752): a UNet2DModel between noise and a decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import SchedulerMixin
from torch import Tensor, nn

from lml.errors import UserError
from lml.pipelines import loading, pixel

DECODERS = ("VQModel", "AutoencoderKL")


@dataclass
class LatentModel(pixel.PixelModel):
    """A latent diffusion model that was found, and is not loaded yet."""

    decoder: Path | None = None  # the folder of the autoencoder

    def sampler(
        self, device: torch.device, dtype: torch.dtype, channels_last: bool, compile: bool
    ) -> LatentSampler:
        """What makes images with the loaded networks."""
        latents = super().sampler(device, dtype, channels_last, compile)
        key = loading.describe_key(self.config)
        name = loading.read_config(self.decoder, key, DECODERS)["_class_name"]
        decoder = loading.read_network(getattr(diffusers, name), self.decoder, dtype, key)
        decoder = loading.prepare(decoder, device, channels_last)
        return LatentSampler(latents, decoder, bool(self.config.get("slicing")))


class LatentSampler(pixel.PixelSampler):
    """Makes images from seeds by way of latents."""

    def __init__(self, latents: pixel.PixelSampler, decoder: nn.Module, slicing: bool):
        super().__init__(latents.network, latents.channels_last)
        self.decoder, self.slicing = decoder, slicing
        self.parts = {"decoder": decoder.decoder}

    @torch.no_grad()
    def __call__(
        self,
        scheduler: SchedulerMixin,
        steps: int,
        seeds: Sequence[int],
        prompts: Sequence[str] | None = None,
        **step_options: Any,
    ) -> Tensor:
        """Images (B, 3, H, W) in about [-1, 1], one of each seed."""
        latents = super().__call__(scheduler, steps, seeds, prompts, **step_options)
        latents = (latents / self.decoder.config.scaling_factor).to(self.decoder.dtype)
        blocks = latents.split(1 if self.slicing else len(latents))
        return torch.cat([self.decoder.decode(block).sample for block in blocks])


def find(config: Mapping[str, Any]) -> LatentModel:
    """The model in the folder of an LDMPipeline: `unet`, `vqvae` or `vae`, and `scheduler`.

    `path`, `hub_id`, `revision` and `scheduler` as for pixel models. UserError when there is none.
    """
    root, key = loading.find_folder(config), loading.describe_key(config)
    decoder = next((root / name for name in ("vqvae", "vae") if (root / name).is_dir()), None)
    if decoder is None:
        raise UserError(f"{key}: no autoencoder in it (vqvae or vae)")
    loading.read_config(decoder, key, DECODERS)
    folder, _ = pixel.find_network(root, key)
    scheduler, schedule = loading.read_scheduler(root, key, config)
    settings = {
        "network": loading.fingerprint(folder),
        "decoder": loading.fingerprint(decoder),
        "scheduler": schedule,
    }
    return LatentModel(config["name"], settings, scheduler, config, folder, decoder)
