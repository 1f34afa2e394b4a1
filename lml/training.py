"""Trains the embedded CIFAR-10 denoiser and the feature network behind FD-CIFAR.

Both go through `fit`, which owns what they share: the time budget, the learning rate, the moving
average, the log, and a checkpoint from which a later sitting goes on.
"""

from __future__ import annotations

import copy
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    ModelMixin,
    UNet2DModel,
)
from diffusers.training_utils import EMAModel
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn
from torchvision.utils import save_image
from tqdm import tqdm

from lml.data import cifar10
from lml.data.statistics import make_reference
from lml.device import use_device
from lml.metrics.frechet import load_features
from lml.pipelines import pixel

SHARD = "15MB"  # small enough for git


@dataclass
class Budget:
    """How long and how to train. `minutes` is the total over all sittings."""

    minutes: float = 120.0
    batch_size: int = 128
    lr: float = 4e-4
    weight_decay: float = 0.0
    warmup: int = 500  # steps
    decay_from: float = 0.6  # the share of the minutes after which the rate falls linearly to 0
    ema_inv_gamma: float = 8.0  # the average reaches back over about the last eighth of the steps
    compile: bool = True
    save_minutes: float = 5.0
    seed: int = 0

    def rate(self, step: int, progress: float) -> float:
        """Learning rate after `step` steps and a share `progress` of the minutes."""
        fall = (1 - progress) / (1 - self.decay_from) if self.decay_from < 1 else 1.0
        return self.lr * min(1.0, (step + 1) / self.warmup, max(fall, 0.01))


def batches(count: int, batch_size: int, generator: torch.Generator):
    """Endless index batches; every image once an epoch, in a new order each time."""
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order[: count - count % batch_size].split(batch_size)


def fit(
    model: nn.Module,
    loss: Callable[[nn.Module, Tensor, torch.Generator], Tensor],
    count: int,
    budget: Budget,
    out: Path,
    on_save: Callable[[nn.Module, dict], dict] = lambda model, record: {},
    device: str | torch.device = "cpu",
) -> nn.Module:
    """Minimise `loss(model, indices, generator)` over `count` images until the minutes are spent.

    `out/state.pt` holds everything a later call needs to go on; `out/log.jsonl` gets a line at
    every save, with what `on_save(averaged model, record)` returns added to it. Returns the model
    with its averaged weights.
    """
    out.mkdir(parents=True, exist_ok=True)
    model = model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=budget.lr,
        betas=(0.9, 0.99),
        weight_decay=budget.weight_decay,
        fused=True,
    )
    ema = EMAModel(
        model.parameters(), use_ema_warmup=True, inv_gamma=budget.ema_inv_gamma, power=1.0
    )
    generator = torch.Generator().manual_seed(budget.seed)
    step, seconds, state_path = 0, 0.0, out / "state.pt"
    if state_path.exists():
        state = torch.load(state_path, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema.load_state_dict(state["ema"])
        step, seconds = state["step"], state["seconds"]
        generator.manual_seed(budget.seed + step)
    forward = torch.compile(model) if budget.compile else model

    def save(record: dict) -> None:
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "ema": ema.state_dict(),
            "step": step,
            "seconds": seconds,
        }
        torch.save(state, partial := state_path.with_suffix(".partial"))
        os.replace(partial, state_path)
        ema.store(model.parameters())
        ema.copy_to(model.parameters())
        model.eval()
        record |= on_save(model, record)
        model.train()
        ema.restore(model.parameters())
        with (out / "log.jsonl").open("a") as log:
            log.write(json.dumps(record) + "\n")

    model.train()
    order = batches(count, budget.batch_size, generator)
    bar = tqdm(total=round(budget.minutes * 60), initial=round(seconds), unit="s", mininterval=5)
    losses, since, saved = [], step, seconds
    clock = time.perf_counter()
    while seconds < budget.minutes * 60:
        progress = seconds / (budget.minutes * 60)
        for group in optimizer.param_groups:
            group["lr"] = budget.rate(step, progress)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            value = loss(forward, next(order), generator)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ema.step(model.parameters())
        losses.append(value.item())
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"the loss is {losses[-1]} at step {step}")
        step += 1
        now = time.perf_counter()
        seconds, clock = seconds + now - clock, now
        bar.update(round(seconds) - bar.n)
        bar.set_postfix(loss=f"{losses[-1]:.4f}", images=step * budget.batch_size, refresh=False)
        if seconds - saved >= budget.save_minutes * 60 or seconds >= budget.minutes * 60:
            rate = (step - since) * budget.batch_size / max(seconds - saved, 1e-9)
            save(
                {
                    "images": step * budget.batch_size,
                    "minutes": round(seconds / 60, 2),
                    "loss": round(sum(losses) / len(losses), 5),
                    "lr": round(optimizer.param_groups[0]["lr"], 7),
                    "images_per_second": round(rate, 1),
                }
            )
            losses, since, saved = [], step, seconds
            clock = time.perf_counter()
    bar.close()
    ema.copy_to(model.parameters())
    return model.eval()


def timestep_quantiles(scheduler: DDPMScheduler, uniform: float, mean: float, std: float) -> Tensor:
    """Cumulative distribution over the T timesteps from which training draws them.

    A mixture of the uniform one (share `uniform`, which holds the colours: they are decided at high
    noise) and of log(sigma/alpha) ~ N(mean, std) as in EDM (arXiv 2206.00364, table 1).
    """
    alphas = scheduler.alphas_cumprod.double()
    log_sigma = 0.5 * torch.log((1 - alphas) / alphas)
    width = torch.gradient(log_sigma)[0]
    density = torch.exp(-0.5 * ((log_sigma - mean) / std) ** 2) * width
    density = (1 - uniform) * density / density.sum() + uniform / len(alphas)
    return density.cumsum(0) / density.sum()


def train_denoiser(
    unet: UNet2DModel,
    scheduler: DDPMScheduler,
    images: Tensor,
    budget: Budget,
    out: Path,
    on_save: Callable[[nn.Module, dict], dict] = lambda model, record: {},
    device: str | torch.device = "cpu",
    uniform: float = 0.3,
    log_sigma_mean: float = -0.8,
    log_sigma_std: float = 1.2,
) -> UNet2DModel:
    """Train `unet` on uint8 `images` (N, C, H, W) with v-prediction (arXiv 2202.00512).

    Squared error in v, so no weight blows up at either end of the schedule; timesteps are drawn in
    strata over a batch, which takes their variance out of the loss.
    """
    if scheduler.config.prediction_type != "v_prediction":
        raise ValueError(f"prediction_type={scheduler.config.prediction_type}: v_prediction only")
    cdf = timestep_quantiles(scheduler, uniform, log_sigma_mean, log_sigma_std)
    patch = images.shape[-1] // unet.config.sample_size

    def loss(model: nn.Module, indices: Tensor, generator: torch.Generator) -> Tensor:
        batch = len(indices)
        flips = torch.rand(batch, 1, 1, 1, generator=generator) < 0.5
        clean = images[indices].float() / 127.5 - 1
        clean = F.pixel_unshuffle(torch.where(flips, clean.flip(-1), clean), patch)
        strata = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
        timesteps = torch.searchsorted(cdf, strata.double()).clamp_max(len(cdf) - 1)
        noise = torch.randn(clean.shape, generator=generator)
        noisy = scheduler.add_noise(clean, noise, timesteps)
        target = scheduler.get_velocity(clean, noise, timesteps)
        noisy = noisy.to(device, memory_format=torch.channels_last)
        prediction = model(noisy, timesteps.to(device)).sample
        return F.mse_loss(prediction.float(), target.to(device))

    return fit(unet, loss, len(images), budget, out, on_save, device)


def train_classifier(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    budget: Budget,
    out: Path,
    on_save: Callable[[nn.Module, dict], dict] = lambda model, record: {},
    device: str | torch.device = "cpu",
) -> nn.Module:
    """Train `network` (its `head` on its features) with flips, shifts and smoothed labels."""
    padded = F.pad(images, (4, 4, 4, 4))
    size = images.shape[-1]

    def loss(model: nn.Module, indices: Tensor, generator: torch.Generator) -> Tensor:
        batch = len(indices)
        row, column = torch.randint(0, 9, (2, batch, 1), generator=generator)
        rows, columns = row + torch.arange(size), column + torch.arange(size)
        flips = torch.rand(batch, 1, generator=generator) < 0.5
        columns = torch.where(flips, columns.flip(1), columns)
        view = padded[indices.view(-1, 1, 1), :, rows.unsqueeze(2), columns.unsqueeze(1)]
        view = view.permute(0, 3, 1, 2).to(device)
        logits = model.head(model(view)).float()
        return F.cross_entropy(logits, labels[indices].to(device), label_smoothing=0.1)

    return fit(network, loss, len(images), budget, out, on_save, device)


def sample_grid(unet: UNet2DModel, scheduler: DDPMScheduler, patch: int, count: int = 64) -> Tensor:
    """Samples (count, C, H, W) in [-1, 1] of a 20-evaluation run, always from the same noise."""
    solver = DPMSolverMultistepScheduler.from_config(scheduler.config)
    shape = (count, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.autocast(unet.device.type, torch.bfloat16):
        return pixel.sample(
            pixel.SpaceToDepth(unet, patch), solver, 20, F.pixel_shuffle(noise, patch)
        )


def half(network: ModelMixin) -> ModelMixin:
    """A copy of `network` in half precision, as the repository keeps its weights."""
    return copy.deepcopy(network).half()


def run_denoiser(cfg: DictConfig) -> None:
    """Train the denoiser of `cfg`; `run_dir/model` is a diffusers pipeline folder at every save."""
    images, _ = cifar10.load("train", cfg.data.path, cfg.data.download)
    out, device = Path(cfg.run_dir), use_device(cfg.device, cfg.threads)
    torch.manual_seed(0)
    unet, scheduler = instantiate(cfg.unet, _convert_="all"), instantiate(cfg.scheduler)
    patch = images.shape[-1] // unet.config.sample_size

    def on_save(model: UNet2DModel, record: dict) -> dict:
        grid = sample_grid(model, scheduler, patch)
        (out / "grids").mkdir(exist_ok=True)
        save_image(
            grid.cpu() / 2 + 0.5, out / "grids" / f"{record['images']:09d}.png", nrow=8, padding=2
        )
        pipeline = DDPMPipeline(half(model), scheduler)
        pipeline.save_pretrained(out / "model", max_shard_size=SHARD)
        return {
            "sample_mean": round(grid.mean().item(), 3),
            "sample_std": round(grid.std().item(), 3),
        }

    train_denoiser(
        unet, scheduler, images, Budget(**cfg.budget), out, on_save, device, **cfg.timesteps
    )


def run_features(cfg: DictConfig) -> None:
    """Train the feature network of `cfg`: `run_dir/model`, and `run_dir/fd_cifar.npz` beside it."""
    images, labels = cifar10.load("train", cfg.data.path, cfg.data.download)
    test_images, test_labels = cifar10.load("test", cfg.data.path, cfg.data.download)
    out, device = Path(cfg.run_dir), use_device(cfg.device, cfg.threads)
    torch.manual_seed(0)

    @torch.no_grad()
    def on_save(model: nn.Module, record: dict) -> dict:
        right = 0
        for view, label in zip(test_images.split(500), test_labels.split(500), strict=True):
            right += (model.head(model(view.to(device))).argmax(1).cpu() == label).sum().item()
        return {"test_accuracy": right / len(test_labels)}

    network = train_classifier(
        instantiate(cfg.network), images, labels, Budget(**cfg.budget), out, on_save, device
    )
    half(network).save_pretrained(out / "model", max_shard_size=SHARD)
    # As it is read back: half precision has rounded the weights.
    make_reference(load_features(out / "model"), images, out / "fd_cifar.npz")
