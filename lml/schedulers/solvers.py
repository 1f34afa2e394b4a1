"""The solvers: diffusers' classes (and one of ours) with LML inside."""

from __future__ import annotations

from collections.abc import Callable

import diffusers
import torch
from torch import Tensor

from lml.schedulers import ipndm
from lml.schedulers.mixin import LMLSchedulerMixin


class LMLDDIMScheduler(LMLSchedulerMixin, diffusers.DDIMScheduler):
    """DDIM (arXiv 2010.02502) with LML; A = alpha_s / alpha_t."""

    convergence_order = 1
    targets = ("prediction", "increment", "direction")

    def _solve(self, step: Callable, arguments: dict):
        output = step(**arguments)
        if not arguments.get("eta"):
            return output, 0.0
        silent = dict(
            arguments, variance_noise=torch.zeros_like(arguments["sample"]), generator=None
        )
        noiseless = step(**silent)
        return noiseless, output.prev_sample - noiseless.prev_sample

    def _split(self, output, timestep, sample):
        previous = timestep - self.config.num_train_timesteps // self.num_inference_steps
        alphas = self.alphas_cumprod
        alpha_s = (alphas[previous] if previous >= 0 else self.final_alpha_cumprod) ** 0.5
        if self.config.target == "increment":
            return alpha_s / alphas[timestep] ** 0.5 * sample, 1.0
        return alpha_s * output.pred_original_sample, (1 - alpha_s**2) ** 0.5


def _scalar(scheduler, integrates_x0: bool) -> Tensor:
    """A of an exponential integrator: sigma_s / sigma_t in x0, alpha_s / alpha_t in the noise."""
    index = scheduler.step_index - 1  # the parent's step has increased it
    alpha_t, sigma_t = scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas[index])
    alpha_s, sigma_s = scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas[index + 1])
    return sigma_s / sigma_t if integrates_x0 else alpha_s / alpha_t


class LMLDPMSolverMultistepScheduler(LMLSchedulerMixin, diffusers.DPMSolverMultistepScheduler):
    """DPM-Solver (arXiv 2206.00927) and DPM-Solver++ (arXiv 2211.01095), multistep, with LML."""

    targets = ("prediction", "increment")

    @property
    def adds_noise(self) -> bool:
        return self.config.algorithm_type.startswith("sde")

    @property
    def damping_of(self) -> str:
        return "multistep in x0" if self.config.algorithm_type.endswith("++") else "plain"

    def _check_target(self, target):
        super()._check_target(target)
        if target != "prediction" and self.config.algorithm_type.startswith("sde"):
            raise ValueError(
                f"target={target}: not with algorithm_type={self.config.algorithm_type}"
            )

    def _split(self, output, timestep, sample):
        return _scalar(self, self.config.algorithm_type == "dpmsolver++") * sample, 1.0


class LMLDPMSolverSinglestepScheduler(LMLSchedulerMixin, diffusers.DPMSolverSinglestepScheduler):
    """DPM-Solver and DPM-Solver++, singlestep, with LML."""


class LMLUniPCMultistepScheduler(LMLSchedulerMixin, diffusers.UniPCMultistepScheduler):
    """UniPC (arXiv 2302.04867) with LML; the increment is the predictor's."""

    targets = ("prediction", "increment")
    convergence_order = 3  # or 2 or 4: the corrector adds one to `solver_order`
    damping_of = "predictor-corrector"

    def _split(self, output, timestep, sample):
        # the predictor starts from the corrected sample
        return _scalar(self, self.config.predict_x0) * self.last_sample, 1.0


class LMLDEISMultistepScheduler(LMLSchedulerMixin, diffusers.DEISMultistepScheduler):
    """DEIS (arXiv 2204.13902) with LML."""

    targets = ("prediction", "increment")

    def _split(self, output, timestep, sample):
        return _scalar(self, integrates_x0=False) * sample, 1.0


class LMLPNDMScheduler(LMLSchedulerMixin, diffusers.PNDMScheduler):
    """PNDM (arXiv 2202.09778) with LML."""

    convergence_order = 4
    damping_of = "Adams-Bashforth"

    def _position(self, timestep):
        return self.counter  # its grid repeats some timesteps


class LMLIPNDMScheduler(LMLSchedulerMixin, diffusers.IPNDMScheduler):
    """Improved PNDM with LML, on its own noise schedule, as in diffusers."""

    convergence_order = 4
    damping_of = "Adams-Bashforth"

    def _training_timesteps(self):
        return (self.timesteps * self.config.num_train_timesteps).tolist()  # its own are in [0, 1]


class LMLDiscreteIPNDMScheduler(LMLSchedulerMixin, ipndm.DiscreteIPNDMScheduler):
    """Improved PNDM (arXiv 2204.13902) on a DDPM's noise schedule, with LML."""

    convergence_order = 4
    damping_of = "Adams-Bashforth"


class LMLEulerDiscreteScheduler(LMLSchedulerMixin, diffusers.EulerDiscreteScheduler):
    """Euler's method in sigma (arXiv 2206.00364) with LML; A = 1."""

    convergence_order = 1
    targets = ("prediction", "increment")

    def _training_timesteps(self):
        if self.config.timestep_type == "discrete":
            return super()._training_timesteps()
        # Continuous ones may be log(sigma) / 4.
        alphas = self.alphas_cumprod.double()
        log_sigmas = (((1 - alphas) / alphas) ** 0.5).log().numpy()
        return self._sigma_to_t(self.sigmas[:-1].numpy(force=True), log_sigmas).tolist()

    def _solve(self, step, arguments):
        if arguments.get("s_churn"):
            raise ValueError(f"target=increment: not with s_churn={arguments['s_churn']}")
        return step(**arguments), 0.0

    def _split(self, output, timestep, sample):
        return sample, 1.0


class LMLEulerAncestralDiscreteScheduler(
    LMLSchedulerMixin, diffusers.EulerAncestralDiscreteScheduler
):
    """Euler's method in sigma with new noise at each step (ancestral sampling), with LML."""

    convergence_order = 1
    adds_noise = True


class LMLHeunDiscreteScheduler(LMLSchedulerMixin, diffusers.HeunDiscreteScheduler):
    """Heun's method in sigma (arXiv 2206.00364) with LML, at each of its two evaluations."""

    convergence_order = 2
    damping_of = "Heun"


class LMLFlowMatchEulerDiscreteScheduler(
    LMLSchedulerMixin, diffusers.FlowMatchEulerDiscreteScheduler
):
    """Euler's method on a flow-matching model (arXiv 2403.03206) with LML; A = 1."""

    convergence_order = 1
    targets = ("prediction", "increment")

    @property
    def adds_noise(self) -> bool:
        return self.config.stochastic_sampling

    def _check_target(self, target):
        super()._check_target(target)
        if target != "prediction" and self.config.stochastic_sampling:
            raise ValueError(f"target={target}: not with stochastic_sampling=True")

    def scale_model_input(self, sample: Tensor, timestep=None) -> Tensor:
        """Returns `sample`. Some pipelines call this unless the class is exactly the parent's."""
        return sample

    def _split(self, output, timestep, sample):
        return sample, 1.0
