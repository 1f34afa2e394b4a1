"""iPNDM on a DDPM's noise schedule; diffusers' `IPNDMScheduler` has a schedule of its own."""

from __future__ import annotations

from diffusers import DDIMScheduler
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from torch import Tensor

from lml.schedulers.prediction import change_noise

# Adams-Bashforth, the newest first, of as many as there are.
WEIGHTS = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


class DiscreteIPNDMScheduler(DDIMScheduler):
    """DDIM's step along the Adams-Bashforth mean of the last four noise predictions.

    PNDM's transfer and formula (Liu et al., arXiv 2202.09778, equations 9, 11 and 12), begun at
    lower orders in place of its Runge-Kutta steps (iPNDM, Zhang and Chen, arXiv 2204.13902), so
    that every step costs one evaluation. The weights are those of equal steps in the variable that
    is integrated over, which a grid of timesteps does not have: it converges at second order.
    """

    predictions: tuple[Tensor, ...] = ()  # of noise, the newest first, detached
    predicted_at: int | None = None  # the timestep of the newest

    def set_timesteps(self, *args, **kwargs) -> None:
        """As DDIM's; forgets all earlier predictions."""
        super().set_timesteps(*args, **kwargs)
        self.predictions, self.predicted_at = (), None

    def step(
        self, model_output: Tensor, timestep: int, sample: Tensor, return_dict: bool = True
    ) -> DDIMSchedulerOutput | tuple:
        """The sample at the next timestep, as DDIM's without its options for added noise.

        Earlier predictions of another shape, or of timesteps that are not before this one, are
        of another trajectory and are forgotten.
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
