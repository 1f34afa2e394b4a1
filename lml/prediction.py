"""What a network's output says of the noise, whichever of noise, v and x0 it predicts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import SchedulerMixin
from torch import Tensor


def change_noise(
    scheduler: SchedulerMixin,
    model_output: Tensor,
    timestep: float | Tensor,
    sample: Tensor,
    change: Callable[[Tensor], Tensor],
) -> Tensor:
    """The output that amounts to the noise `change(noise)` where `model_output` amounts to `noise`.

    All are (B, C, H, W), `sample` in the solver's own coordinates and `timestep` in [0, T]. Of a
    scheduler without a `prediction_type`, and of flow matching, the output itself is changed.
    """
    kind = scheduler.config.get("prediction_type", "epsilon")
    if kind not in ("v_prediction", "sample"):
        return change(model_output)

    index = min(round(float(timestep)), len(scheduler.alphas_cumprod) - 1)
    alpha = scheduler.alphas_cumprod[index].sqrt().item()
    sigma = (1 - alpha**2) ** 0.5
    x = scheduler.scale_model_input(sample, timestep).to(
        torch.promote_types(sample.dtype, torch.float32)
    )
    output = model_output.to(x.dtype)
    if kind == "v_prediction":
        noise, slope = alpha * output + sigma * x, 1 / max(alpha, 1e-8)
    else:
        noise, slope = (x - alpha * output) / max(sigma, 1e-8), -sigma / max(alpha, 1e-8)
    # by its difference, so that what is not changed stays as it is to the last bit
    return (output + slope * (change(noise) - noise)).to(model_output.dtype)
