"""The base of the exact problems: noise levels, prediction types, and formulas of the score.

With x_t = α x_0 + σ ε and x̂_0 = E[x_0 | x_t], Tweedie's formula and its derivative say

    ∇ log p_t(x)    = (α x̂_0 − x) / σ²
    ∇² log p_t(x) v = (α² Cov[x_0 | x_t] v / σ² − v) / σ²

(Efron, "Tweedie's Formula and Selection Bias", 2011; Meng et al., arXiv 2111.04394). So a problem
needs only E[x_0 | x_t] and Cov[x_0 | x_t] v.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import numpy as np
import torch
from diffusers import DDPMScheduler, SchedulerMixin
from diffusers.configuration_utils import FrozenDict
from diffusers.models.unets.unet_2d import UNet2DOutput
from scipy.integrate import solve_ivp
from torch import Tensor, nn

from lml.errors import UserError, nearest

PREDICTIONS = {
    "epsilon": lambda x0, eps, alpha, sigma: eps,
    "sample": lambda x0, eps, alpha, sigma: x0,
    "v_prediction": lambda x0, eps, alpha, sigma: alpha * eps - sigma * x0,
    "flow_prediction": lambda x0, eps, alpha, sigma: eps - x0,
}


class ExactModel(nn.Module, ABC):
    """A distribution of images (C, H, W) whose noised score is known at every timestep.

    It computes in float64, whatever the dtype of the module or of its input is; outputs have the
    dtype of the input. `.to(dtype)` only changes the value of `.dtype`. The score is a difference
    of numbers near x, so it has an absolute error of about 1e-15 |x| / σ².

    Args:
        shape: (C, H, W) of an image.
        scheduler: any diffusers scheduler, for its noise levels and its prediction type. One
            without betas (flow matching) means α = 1 − t/T, σ = t/T. The default is
            `DDPMScheduler()`: T = 1000 linear betas from 1e-4 to 0.02.
        prediction_type: the type of the output, instead of the scheduler's: "epsilon", "sample",
            "v_prediction" or "flow_prediction".
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        scheduler: SchedulerMixin | None = None,
        prediction_type: str | None = None,
    ):
        super().__init__()
        scheduler = scheduler or DDPMScheduler()
        flow = "FlowMatch" in type(scheduler).__name__ or scheduler.config.get("use_flow_sigmas")
        if not flow and not hasattr(scheduler, "alphas_cumprod"):
            raise UserError(
                f"scheduler={type(scheduler).__name__}: expected alphas_cumprod or flow matching"
            )
        prediction_type = (
            prediction_type
            or scheduler.config.get("prediction_type")
            or ("flow_prediction" if flow else "epsilon")
        )
        if prediction_type not in PREDICTIONS:
            names = nearest(prediction_type, PREDICTIONS)
            raise UserError(f"prediction_type={prediction_type}: expected one of {names}")

        self.shape = tuple(shape)
        self.prediction_type = prediction_type
        self.num_train_timesteps = scheduler.config.num_train_timesteps
        # The float32 table and not a more precise one, since all solvers use this table.
        self.alphas_cumprod = None if flow else scheduler.alphas_cumprod.double().cpu()
        channels, height, width = self.shape
        self.config = FrozenDict(
            in_channels=channels,
            out_channels=channels,
            sample_size=height if height == width else (height, width),
        )
        self.register_buffer("_like", torch.empty(0), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        return self._like.dtype

    @property
    def device(self) -> torch.device:
        return self._like.device

    def _apply(self, fn, recurse=True):
        exact = {k: b for k, b in self.named_buffers() if k != "_like" and b.is_floating_point()}
        super()._apply(fn, recurse)
        for name, buffer in exact.items():  # a cast would change the problem itself
            setattr(self, name, buffer.to(self.device))
        return self

    @abstractmethod
    def _posterior_mean(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """E[x_0 | x_t = x]: float64 `x` (B, D), `alpha` and `sigma` (B, 1) or (1, 1)."""

    @abstractmethod
    def _posterior_covariance_vector(
        self, x: Tensor, v: Tensor, alpha: Tensor, sigma: Tensor
    ) -> Tensor:
        """Cov[x_0 | x_t = x] v: float64 `x` and `v` (B, D), `alpha` and `sigma` as above."""

    def noise_levels(self, t: float | Tensor) -> tuple[Tensor, Tensor]:
        """(α, σ) at timestep `t`, a number or a tensor of any shape; float64, on the CPU.

        Between whole timesteps log(σ/α) is linear in `t`, as in the `_sigma_to_t` of diffusers'
        schedulers. (For fractional `linspace` timesteps, `EulerDiscreteScheduler` and
        `HeunDiscreteScheduler` interpolate σ/α instead: a difference of 2 % between t = 0 and 1,
        and under 0.5 % from t = 2 on. A network gets the same timestep in both cases.)
        UserError outside [0, T − 1]; for flow matching, outside (0, T].
        """
        t = torch.as_tensor(t, dtype=torch.float64).detach().cpu()
        steps = self.num_train_timesteps
        if self.alphas_cumprod is None:
            if not ((t > 0) & (t <= steps)).all():
                raise UserError(f"timestep={t.tolist()}: expected above 0 and at most {steps}")
            return 1 - t / steps, t / steps
        if not ((t >= 0) & (t <= steps - 1)).all():
            raise UserError(f"timestep={t.tolist()}: expected from 0 to {steps - 1}")
        log_snr = torch.logit(self.alphas_cumprod)
        low, high = log_snr[t.floor().long()], log_snr[t.ceil().long()]
        # A zero terminal SNR is -inf here: lerp with weight 0 would turn its neighbour into NaN.
        log_snr = torch.where(t.frac() == 0, low, torch.lerp(low, high, t.frac()))
        return torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()

    def _levels(self, x: Tensor, t: float | Tensor) -> tuple[Tensor, Tensor]:
        """α and σ at `t`, shaped to multiply `x` flattened to (B, D)."""
        if x.shape[1:] != self.shape:
            raise UserError(f"sample={tuple(x.shape)}: expected (B, {str(self.shape)[1:]}")
        alpha, sigma = (level.to(x.device).reshape(-1, 1) for level in self.noise_levels(t))
        if len(alpha) not in (1, len(x)):
            shape = tuple(alpha.shape[:1])
            raise UserError(f"timestep={shape}: expected one, or one for each of {len(x)} samples")
        return alpha, sigma

    def posterior_mean(self, x: Tensor, t: float | Tensor) -> Tensor:
        """E[x_0 | x_t = x], the exact denoiser: `x` (B, C, H, W), `t` a number, () or (B,)."""
        mean = self._posterior_mean(x.flatten(1).double(), *self._levels(x, t))
        return mean.view(x.shape).to(x.dtype)

    def posterior_covariance_vector(self, x: Tensor, t: float | Tensor, v: Tensor) -> Tensor:
        """Cov[x_0 | x_t = x] v, per sample: `x` and `v` (B, C, H, W)."""
        x_, v_ = (z.flatten(1).double() for z in (x, v))
        return self._posterior_covariance_vector(x_, v_, *self._levels(x, t)).view_as(v).to(v.dtype)

    def score(self, x: Tensor, t: float | Tensor) -> Tensor:
        """∇ log p_t(x) = (α x̂_0 − x) / σ², of x's shape."""
        alpha, sigma = self._levels(x, t)
        x_ = x.flatten(1).double()
        score = (alpha * self._posterior_mean(x_, alpha, sigma) - x_) / sigma**2
        return score.view(x.shape).to(x.dtype)

    def hessian_vector(self, x: Tensor, t: float | Tensor, v: Tensor) -> Tensor:
        """∇² log p_t(x) v = (α² Cov[x_0 | x_t] v / σ² − v) / σ², per sample, of v's shape."""
        alpha, sigma = self._levels(x, t)
        x_, v_ = (z.flatten(1).double() for z in (x, v))
        cov_v = self._posterior_covariance_vector(x_, v_, alpha, sigma)
        return ((alpha**2 * cov_v / sigma**2 - v_) / sigma**2).view_as(v).to(v.dtype)

    def flow(self, x: Tensor, t_from: float, t_to: float, tolerance: float = 1e-4) -> Tensor:
        """The probability-flow ODE's solution at `t_to` that passes through `x` at `t_from`.

        `x` is (B, C, H, W). With cos φ : sin φ = α : σ, and x scaled to unit variance, the ODE is

            dx/dφ = cos φ ε̂ − sin φ x̂_0

        (Salimans and Ho, arXiv 2202.00512, appendix D). Dormand and Prince's method solves it. It
        chooses its steps so that the root mean square error of a step over the batch stays below
        `tolerance`. With the default, the cosines that `lml.metrics.trajectory` measures for the
        steps of a DDIM run with ten steps are right to 1e-5.
        """
        (alpha, sigma), (alpha_to, sigma_to) = map(self.noise_levels, (t_from, t_to))
        shape = x.flatten(1).shape

        def velocity(angle: float, y: np.ndarray) -> np.ndarray:
            x = torch.from_numpy(y).view(shape).to(self.device)
            cos, sin = (x.new_full((1, 1), f(angle)) for f in (math.cos, math.sin))
            x0 = self._posterior_mean(x, cos, sin)
            return (cos * (x - cos * x0) / sin - sin * x0).flatten().cpu().numpy()

        start = (x.double() / torch.hypot(alpha, sigma).item()).flatten().cpu().numpy()
        span = [math.atan2(s, a) for a, s in ((alpha, sigma), (alpha_to, sigma_to))]
        end = solve_ivp(velocity, span, start, rtol=tolerance, atol=tolerance).y[:, -1]
        return (torch.from_numpy(end).view_as(x) * torch.hypot(alpha_to, sigma_to).item()).to(x)

    def forward(
        self,
        sample: Tensor,
        timestep: float | Tensor,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor]:
        """The prediction of `prediction_type` for `sample` (B, C, H, W) at `timestep`, a number or
        a tensor () or (B,), also a fraction. `class_labels` is ignored."""
        alpha, sigma = self._levels(sample, timestep)
        x = sample.flatten(1).double()
        x0 = self._posterior_mean(x, alpha, sigma)
        eps = (x - alpha * x0) / sigma
        output = PREDICTIONS[self.prediction_type](x0, eps, alpha, sigma)
        output = output.view(sample.shape).to(sample.dtype)
        return UNet2DOutput(sample=output) if return_dict else (output,)
