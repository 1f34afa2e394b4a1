"""iPNDM on a DDPM's noise schedule; diffusers' `IPNDMScheduler` has its own schedule."""

from __future__ import annotations

from diffusers import DDIMScheduler
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from torch import Tensor

from lml.schedulers.prediction import change_noise

# Adams-Bashforth weights for one to four predictions, the newest first.
WEIGHTS = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


class DiscreteIPNDMScheduler(DDIMScheduler):
    """DDIM's step along the Adams-Bashforth mean of the last four noise predictions.

    The step and the formula are PNDM's (Liu et al., arXiv 2202.09778, equations 9, 11 and 12). The
    first steps have lower orders in place of Runge-Kutta steps (iPNDM, Zhang and Chen, arXiv
    2204.13902), so that every step costs one evaluation. It converges at second order only: the
    weights assume equal steps in the integration variable, and grids of timesteps don't have them.
    """

    predictions: tuple[Tensor, ...] = ()  # of noise, the newest first, detached
    predicted_at: int | None = None  # the timestep of the newest

    def set_timesteps(self, *args, **kwargs) -> None:
        """As DDIM's. Also forgets all earlier predictions."""
        super().set_timesteps(*args, **kwargs)
        self.predictions, self.predicted_at = (), None

    def step(
        self, model_output: Tensor, timestep: int, sample: Tensor, return_dict: bool = True
    ) -> DDIMSchedulerOutput | tuple:
        """The sample at the next timestep, as DDIM's `step` without its options for added noise.

        Earlier predictions belong to another trajectory if they have another shape, or if their
        timesteps are not before this one. Then they are forgotten.
        """

        def mean(noise: Tensor) -> Tensor:
            begins = self.predicted_at is None or timestep >= self.predicted_at
            earlier = () if begins else self.predictions[: len(WEIGHTS) - 1]
            earlier = tuple(e for e in earlier if e.shape == noise.shape)
            weights = WEIGHTS[len(earlier)]
            result = sum(w * e for w, e in zip(weights, (noise, *earlier), strict=True))
            self.predictions, self.predicted_at = (noise.detach(), *earlier), int(timestep)
            return result

        direction = change_noise(self, model_output, timestep, sample, mean)
        return super().step(direction, timestep, sample, return_dict=return_dict)
