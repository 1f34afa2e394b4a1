"""Trains the embedded CIFAR-10 denoiser and the feature network behind FD-CIFAR.

Both use `fit` for what they share: the budget, the learning rate, the moving average, the log, the
curve, and a checkpoint from which an interrupted training continues.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

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
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torchmetrics import Metric
from torchvision.utils import save_image
from tqdm import tqdm

from lml import schema
from lml.data import cifar10
from lml.data.statistics import make_reference
from lml.device import use_device
from lml.errors import RunError, UserError, first_line, nearest
from lml.files import disk_error, load_json, read_text, replacing
from lml.instances import make
from lml.metrics.features import FeatureNetwork
from lml.metrics.frechet import load_features
from lml.pipelines import pixel
from lml.schema import find_problem

Loss = Callable[[nn.Module, Tensor, torch.Generator], Tensor]
Report = Callable[[nn.Module], Any]  # is called with the model with its averaged weights


class Budget(schema.Budget):
    """How much and how to train, and the learning rate at each moment."""

    def rate(self, step: int, progress: float) -> float:
        """The learning rate after `step` steps and a share `progress` of the images."""
        fall = (1 - progress) / (1 - self.decay_from) if self.decay_from < 1 else 1.0
        return self.lr * min(1.0, (step + 1) / self.warmup, max(fall, 0.01))


def batches(count: int, batch_size: int, seed: int, start: int = 0) -> Iterator[Tensor]:
    """Endless batches of indices, from the `start`th on. Each epoch has a new order."""
    size = count // batch_size
    if size == 0:
        raise UserError(
            f"budget.batch_size={batch_size}: expected at most {count}, the number of images"
        )
    for epoch in itertools.count(start // size):
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed + epoch))
        yield from order[: size * batch_size].split(batch_size)[max(0, start - epoch * size) :]


def choose_dtype(step: Callable[[torch.dtype], object], asked: str) -> torch.dtype:
    """The dtype that `asked` names; for "auto", the one for which `step(dtype)` is faster."""
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if asked != "auto":
        return dtypes[asked]

    def seconds(dtype: torch.dtype) -> float:
        step(dtype), step(dtype)  # the first calls compile
        start = time.perf_counter()
        step(dtype), step(dtype)
        return time.perf_counter() - start

    return min(dtypes.values(), key=seconds)


class _Training:
    """A model, its optimiser and its averaged weights: the state that a checkpoint keeps."""

    def __init__(
        self, model: nn.Module, loss: Loss, budget: Budget, out: Path, device: torch.device
    ):
        self.model = model.to(device, memory_format=torch.channels_last)
        self.loss, self.budget, self.out, self.device = loss, budget, out, device
        self.optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=budget.lr,
            betas=(0.9, 0.99),
            weight_decay=budget.weight_decay,
            fused=True,
        )
        self.ema = EMAModel(
            model.parameters(),
            use_ema_warmup=True,
            inv_gamma=budget.ema_inv_gamma,
            power=1.0,
            foreach=True,
        )
        self.done = {"step": 0, "images": 0, "seconds": 0.0, "saves": 0}
        self.state, self.log = out / "state.pt", out / "log.jsonl"
        if self.state.exists():
            self._go_on()
        self.forward = torch.compile(model) if budget.compile else model

    @property
    def is_done(self) -> bool:
        """Whether the budget is spent."""
        return self.done["images"] >= self.budget.images

    def _go_on(self) -> None:
        try:
            state = torch.load(self.state, map_location=self.device, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.ema.load_state_dict(state["ema"])
            self.done = {key: state["done"][key] for key in self.done}
        except Exception as error:  # pickle, zip, key and shape errors share no base class
            raise UserError(
                f"run_dir={self.out}: state.pt is not of this training ({first_line(error)}); "
                "choose another folder"
            ) from None

    def backward(self, dtype: torch.dtype, indices: Tensor, step: int) -> float:
        """Compute the loss of a step's batch, and set its gradients."""
        seed = self.budget.seed + 1_000_003 * (step + 1)
        generator = torch.Generator(self.device).manual_seed(seed)
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            value = self.loss(self.forward, indices.to(self.device), generator)
        self.optimizer.zero_grad()
        value.backward()
        return value.item()

    def step(self, dtype: torch.dtype, indices: Tensor) -> float:
        """Change the weights, and return the loss before. RunError if it is not finite."""
        rate = self.budget.rate(self.done["step"], self.done["images"] / self.budget.images)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = self.backward(dtype, indices, self.done["step"])
        if not math.isfinite(loss):
            raise RunError(
                f"budget.lr={self.budget.lr}: the loss is {loss} at step {self.done['step']}; try "
                "a lower rate; the last checkpoint is kept"
            )
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.ema.step(self.model.parameters())
        self.done["step"] += 1
        self.done["images"] += self.budget.batch_size
        return loss

    def save(self, record: dict[str, Any], on_save: Report, report: Report) -> None:
        """Write the checkpoint, then do what `fit` says; `record` is the line of the log."""
        self.done["saves"] += 1
        state = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "ema")}
        with replacing(self.state) as file:
            torch.save({**state, "done": self.done}, file)
        self.ema.store(self.model.parameters())
        self.ema.copy_to(self.model.parameters())
        self.model.eval()
        on_save(self.model)
        is_reported = self.is_done or self.done["saves"] % self.budget.report_every == 0
        if is_reported:
            record |= report(self.model)
        self.model.train()
        self.ema.restore(self.model.parameters())
        with self.log.open("a") as log:
            log.write(json.dumps(record) + "\n")
        if is_reported:
            draw_curve(self.log, self.out / "curve.png")

    def summary(self, dtype: torch.dtype, losses: list[float], speed: float) -> dict[str, Any]:
        """A line of the log about the steps since the last line; `speed` is in images a second."""
        return {
            "images": self.done["images"],
            "minutes": round(self.done["seconds"] / 60, 2),
            "loss": round(sum(losses) / len(losses), 5),
            "lr": round(self.optimizer.param_groups[0]["lr"], 7),
            "dtype": str(dtype).removeprefix("torch."),
            "images_per_second": round(speed, 1),
        }


def fit(
    model: nn.Module,
    loss: Loss,
    count: int,
    budget: Budget,
    out: Path,
    on_save: Report = lambda model: None,
    report: Report = lambda model: {},
    device: str | torch.device = "cpu",
) -> nn.Module:
    """Minimise `loss(model, indices, generator)` over `count` images until the budget is spent.

    A step depends only on its number and on the checkpoint. So an interrupted training continues as
    if there had been no interruption. A save writes the state to `out/state.pt`, calls
    `on_save(averaged model)` and adds a line to `out/log.jsonl`. Every `budget.report_every`th save
    and the last one also add `report(averaged model)` to the line and draw `out/curve.png`.
    Returns the model with its averaged weights.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(out, error) from None
    training = _Training(model, loss, budget, out, torch.device(device))
    done = training.done
    model.train()
    order = batches(count, budget.batch_size, budget.seed, done["images"] // budget.batch_size)
    if not training.is_done:
        trial = torch.arange(budget.batch_size) % count
        dtype = choose_dtype(lambda dtype: training.backward(dtype, trial, 0), budget.dtype)
    bar = tqdm(total=budget.images, initial=done["images"], unit="img", mininterval=5)
    losses, since, saved = [], done["images"], done["seconds"]
    clock = time.perf_counter()
    try:
        while not training.is_done:
            losses.append(training.step(dtype, next(order)))
            now = time.perf_counter()
            done["seconds"] += now - clock
            clock = now
            bar.update(budget.batch_size)
            bar.set_postfix(loss=f"{losses[-1]:.4f}", refresh=False)
            if training.is_done or done["seconds"] - saved >= budget.save_minutes * 60:
                speed = (done["images"] - since) / max(done["seconds"] - saved, 1e-9)
                training.save(training.summary(dtype, losses, speed), on_save, report)
                losses, since, saved = [], done["images"], done["seconds"]
                clock = time.perf_counter()
    except KeyboardInterrupt as interruption:
        interruption.args = (
            f"interrupted after {done['images']:,} of {budget.images:,} images; the same command "
            "continues from the last checkpoint",
        )
        raise
    finally:
        bar.close()
    training.ema.copy_to(model.parameters())
    return model.eval()


def _record(line: str) -> dict[str, float]:
    """A line of the log as a dict; {} for a line that a full disk cut short."""
    try:
        record = load_json(line)
    except ValueError:
        return {}
    return {} if find_problem(dict[str, float | str], record, "") else record


def draw_curve(log: Path, out: Path) -> None:
    """Draw the reports in `log` against images seen, one panel for each quantity, as a PNG."""
    from matplotlib.figure import Figure  # imported here: training itself does not need it

    records = list(filter(None, map(_record, read_text(log).splitlines())))
    known = ("held_out_loss", "fd_cifar", "test_accuracy")
    names = [name for name in known if any(name in record for record in records)]
    if not names:
        return
    figure = Figure(figsize=(4 * len(names), 3), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        points = [(r["images"] / 1e6, r[name]) for r in records if name in r]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3)
        axes.set(xlabel="images seen, millions", ylabel=name.replace("_", " "))
        axes.grid(alpha=0.3)
    figure.savefig(out, dpi=150)


def timestep_quantiles(scheduler: DDPMScheduler, uniform: float, mean: float, std: float) -> Tensor:
    """Cumulative distribution over the T timesteps, from which training draws timesteps.

    It mixes two distributions: with share `uniform` the uniform one, which keeps the colours right,
    since high noise decides them; and log(sigma/alpha) ~ N(mean, std) as in EDM (arXiv 2206.00364,
    table 1).
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
    on_save: Report = lambda model: None,
    report: Report = lambda model: {},
    device: str | torch.device = "cpu",
    uniform: float = 0.3,
    log_sigma_mean: float = -0.8,
    log_sigma_std: float = 1.2,
) -> UNet2DModel:
    """Train `unet` on uint8 `images` (N, C, H, W) with v-prediction (arXiv 2202.00512).

    The loss is the squared error in v, so that no weight diverges at either end of the schedule.
    Timesteps are drawn in strata over a batch, so that the loss varies less. The images are kept on
    `device`.
    """
    if (kind := scheduler.config.prediction_type) != "v_prediction":
        raise UserError(f"scheduler.prediction_type={kind}: expected v_prediction")
    cdf = timestep_quantiles(scheduler, uniform, log_sigma_mean, log_sigma_std).to(device)
    images = images.to(device)

    def loss(model: nn.Module, indices: Tensor, generator: torch.Generator) -> Tensor:
        batch = len(indices)
        flips = torch.rand(batch, 1, 1, 1, generator=generator, device=device) < 0.5
        clean = images[indices]
        clean = torch.where(flips, clean.flip(-1), clean)
        strata = torch.rand(batch, generator=generator, device=device)
        strata = (torch.arange(batch, device=device) + strata) / batch
        timesteps = torch.searchsorted(cdf, strata.double()).clamp_max(len(cdf) - 1)
        return velocity_loss(model, scheduler, clean, timesteps, generator)

    return fit(unet, loss, len(images), budget, out, on_save, report, device)


def velocity_loss(
    model: nn.Module,
    scheduler: DDPMScheduler,
    images: Tensor,
    timesteps: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Mean squared error in v for uint8 `images` (B, C, H, W) at `timesteps` (B,), a scalar.

    The noise is drawn on the generator's device; all else is computed on the images' device.
    """
    clean = images.float() / 127.5 - 1
    noise = torch.randn(clean.shape, generator=generator, device=generator.device).to(clean.device)
    noisy = scheduler.add_noise(clean, noise, timesteps)
    target = scheduler.get_velocity(clean, noise, timesteps)
    noisy = noisy.contiguous(memory_format=torch.channels_last)
    return F.mse_loss(model(noisy, timesteps).sample.float(), target)


@torch.no_grad()
def held_out_loss(
    model: nn.Module,
    scheduler: DDPMScheduler,
    images: Tensor,
    device: str | torch.device = "cpu",
) -> float:
    """Mean squared error in v on uint8 `images` (N, C, H, W), with the same noise on any device.

    Timesteps are evenly spaced over [0, T), one for each image. So networks can be compared,
    whatever their training was.
    """
    generator = torch.Generator().manual_seed(0)
    T = scheduler.config.num_train_timesteps
    timesteps = (torch.arange(len(images)) * T) // len(images)
    timesteps = timesteps[torch.randperm(len(images), generator=generator)]
    total = 0.0
    for part, times in zip(images.split(100), timesteps.split(100), strict=True):
        value = velocity_loss(model, scheduler, part.to(device), times.to(device), generator)
        total += len(part) * value.item()
    return total / len(images)


def train_classifier(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    budget: Budget,
    out: Path,
    on_save: Report = lambda model: None,
    report: Report = lambda model: {},
    device: str | torch.device = "cpu",
) -> nn.Module:
    """Train `network`, with its `head` on its features, on flips, shifts and smoothed labels.

    Each view hides a square with a quarter of the image's side (Cutout, arXiv 1708.04552).
    """
    padded = F.pad(images, (4, 4, 4, 4)).to(device)
    labels = labels.to(device)
    size = images.shape[-1]
    along = torch.arange(size, device=device)

    def loss(model: nn.Module, indices: Tensor, generator: torch.Generator) -> Tensor:
        batch = len(indices)

        def draw(limit: int) -> Tensor:
            return torch.randint(0, limit, (2, batch, 1), generator=generator, device=device)

        (rows, columns), hidden = draw(9) + along, along - draw(size - size // 4 + 1)
        flips = torch.rand(batch, 1, generator=generator, device=device) < 0.5
        columns = torch.where(flips, columns.flip(1), columns)
        view = padded[indices.view(-1, 1, 1), :, rows.unsqueeze(2), columns.unsqueeze(1)]
        row, column = (hidden >= 0) & (hidden < size // 4)
        view = view.permute(0, 3, 1, 2).masked_fill(
            (row.unsqueeze(2) & column.unsqueeze(1)).unsqueeze(1), 127
        )
        logits = model.head(model(view)).float()
        return F.cross_entropy(logits, labels[indices], label_smoothing=0.1)

    return fit(network, loss, len(images), budget, out, on_save, report, device)


def sample(
    unet: UNet2DModel, scheduler: DDPMScheduler, count: int, batch_size: int = 100
) -> Tensor:
    """Samples (count, C, H, W) in about [-1, 1], made in 20 evaluations from fixed noise."""
    solver = DPMSolverMultistepScheduler.from_config(scheduler.config)
    shape = (unet.config.in_channels, *pixel.size(unet))
    parts = []
    for seeds in torch.arange(count).split(batch_size):
        noise, _ = pixel.draw_noise(seeds.tolist(), shape)
        parts.append(pixel.sample(unet, solver, 20, noise).cpu())
    return torch.cat(parts)


def half(network: ModelMixin) -> ModelMixin:
    """A copy of `network` in half precision, like the weights in the repository."""
    return copy.deepcopy(network).half()


def _make(cfg: DictConfig, key: str, kind: type) -> Any:
    """The object that the config `key` makes. UserError unless it is a `kind`."""
    config = OmegaConf.to_container(cfg[key], resolve=True)
    if not isinstance(made := make(config, key), kind):
        raise UserError(f"{key}._target_={config['_target_']}: expected a {kind.__name__}")
    return made


def _budget(cfg: DictConfig) -> Budget:
    known = {field.name for field in fields(Budget)}
    for key, value in cfg.budget.items():
        if key not in known:
            raise UserError(f"budget.{key}={value}: unknown; nearest: {nearest(str(key), known)}")
    return Budget(**cfg.budget)


def run_denoiser(cfg: DictConfig) -> None:
    """Train the denoiser of `cfg`. Every save writes a diffusers pipeline to `run_dir/model`.

    It reports the held-out loss (1,000 test images) and FD-CIFAR (1,000 images, 20 evaluations of
    DPM-Solver++(2M)); `run_dir/grids` has 64 of those images.
    """
    images, _ = cifar10.load("train", cfg.data.path, cfg.data.download)
    test_images, _ = cifar10.load("test", cfg.data.path, cfg.data.download)
    out, device = Path(cfg.run_dir), use_device(cfg.device, cfg.threads)
    metric = _make(cfg, "fd_cifar", Metric).to(device)
    torch.manual_seed(0)
    unet, scheduler = _make(cfg, "unet", UNet2DModel), _make(cfg, "scheduler", DDPMScheduler)
    shape = tuple(images.shape[1:])
    try:
        made = unet(torch.zeros(1, *shape), torch.tensor([0])).sample.shape[1:]
    except Exception as error:  # its layers may raise anything
        raise UserError(f"unet: does not take {shape} ({first_line(error)})") from None
    if made != shape:
        raise UserError(f"unet: makes {tuple(made)} of {shape}; expected the same shape")

    def on_save(model: UNet2DModel) -> None:
        pipeline = DDPMPipeline(half(model), scheduler)
        pipeline.save_pretrained(out / "model")

    def report(model: UNet2DModel) -> dict:
        try:
            samples = sample(model, scheduler, cfg.report_images)
        except FloatingPointError as error:
            raise RunError(f"scheduler: cannot make images with it ({error})") from None
        (out / "grids").mkdir(exist_ok=True)
        name = f"{len(list((out / 'grids').iterdir())):04d}.png"
        save_image(samples[:64] / 2 + 0.5, out / "grids" / name, nrow=8, padding=2)
        metric.reset()
        for part in pixel.to_uint8(samples).split(250):
            metric.update(part.to(device))
        loss = held_out_loss(model, scheduler, test_images[:1000], device)
        return {
            "held_out_loss": round(loss, 5),
            "fd_cifar": round(metric.compute().item(), 3),
            "sample_mean": round(samples.mean().item(), 3),
            "sample_std": round(samples.std().item(), 3),
        }

    budget = _budget(cfg)
    train_denoiser(unet, scheduler, images, budget, out, on_save, report, device, **cfg.timesteps)


def run_features(cfg: DictConfig) -> None:
    """Train the feature network of `cfg`. Writes `run_dir/model` and `run_dir/fd_cifar.npz`."""
    images, labels = cifar10.load("train", cfg.data.path, cfg.data.download)
    test_images, test_labels = cifar10.load("test", cfg.data.path, cfg.data.download)
    out, device = Path(cfg.run_dir), use_device(cfg.device, cfg.threads)
    torch.manual_seed(0)

    @torch.no_grad()
    def report(model: nn.Module) -> dict:
        right = 0
        for view, label in zip(test_images.split(500), test_labels.split(500), strict=True):
            right += (model.head(model(view.to(device))).argmax(1).cpu() == label).sum().item()
        return {"test_accuracy": right / len(test_labels)}

    network = _make(cfg, "network", FeatureNetwork)
    network = train_classifier(
        network, images, labels, _budget(cfg), out, report=report, device=device
    )
    half(network).save_pretrained(out / "model")
    # Read back from its file, because half precision rounded the weights.
    make_reference(load_features(out / "model"), images, out / "fd_cifar.npz")
