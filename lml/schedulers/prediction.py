"""The noise that a network's output implies, for predictions of noise, v and x0."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import SchedulerMixin
from torch import Tensor


def noise_level(scheduler: SchedulerMixin, timestep: float | Tensor) -> tuple[float, float]:
    """alpha and sigma of x_t = alpha x0 + sigma noise, the network's input at this step.

    They belong to the step index if the scheduler has sigmas, since its timesteps may be rounded or
    on another scale; otherwise to `timestep`, in [0, T].
    """
    if getattr(scheduler, "step_index", None) is None:
        index = min(round(float(timestep)), len(scheduler.alphas_cumprod) - 1)
        alpha = float(scheduler.alphas_cumprod[index]) ** 0.5
        return alpha, (1 - alpha**2) ** 0.5
    sigma = scheduler.sigmas[scheduler.step_index]
    if hasattr(scheduler, "_sigma_to_alpha_sigma_t"):
        alpha, sigma = scheduler._sigma_to_alpha_sigma_t(sigma)
        return float(alpha), float(sigma)
    alpha = 1 / (1 + float(sigma) ** 2) ** 0.5
    return alpha, alpha * float(sigma)


def change_noise(
    scheduler: SchedulerMixin,
    model_output: Tensor,
    timestep: float | Tensor,
    sample: Tensor,
    change: Callable[[Tensor], Tensor],
) -> Tensor:
    """The model output that implies the noise `change(noise)`, if `model_output` implies `noise`.

    All are (B, C, H, W); `sample` is in the solver's own coordinates. For a scheduler without a
    `prediction_type`, and for flow matching, `change` is applied to the output itself.
    """
    kind = scheduler.config.get("prediction_type", "epsilon")
    if kind not in ("v_prediction", "sample"):
        return change(model_output)

    alpha, sigma = noise_level(scheduler, timestep)
    x = scheduler.scale_model_input(sample, timestep).to(
        torch.promote_types(sample.dtype, torch.float32)
    )
    output = model_output.to(x.dtype)
    if kind == "v_prediction":
        noise, slope = alpha * output + sigma * x, 1 / max(alpha, 1e-8)
    else:
        noise, slope = (x - alpha * output) / max(sigma, 1e-8), -sigma / max(alpha, 1e-8)
    # adds the difference, so that an unchanged noise leaves the output unchanged to the last bit
    return (output + slope * (change(noise) - noise)).to(model_output.dtype)
