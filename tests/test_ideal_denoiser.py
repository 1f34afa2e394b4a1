"""What LML does where the score is exact: the ideal denoiser of 2,000 CIFAR-10 images."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler

from lml import schedulers
from lml.data import cifar10
from lml.exact import Empirical
from lml.pipelines import pixel

SOLVERS = {
    "DDIM": (schedulers.LMLDDIMScheduler, {}),
    "DPM-Solver-3": (
        schedulers.LMLDPMSolverMultistepScheduler,
        {"algorithm_type": "dpmsolver", "solver_order": 3, "final_sigmas_type": "sigma_min"},
    ),
    "DPM-Solver++(3M)": (schedulers.LMLDPMSolverMultistepScheduler, {"solver_order": 3}),
    "DEIS-3": (schedulers.LMLDEISMultistepScheduler, {"solver_order": 3}),
    "UniPC-3": (schedulers.LMLUniPCMultistepScheduler, {"solver_order": 3}),
    "PNDM": (schedulers.LMLPNDMScheduler, {"skip_prk_steps": True}),
    "iPNDM": (schedulers.LMLDiscreteIPNDMScheduler, {}),
}
EXTRAPOLATING = ("PNDM", "iPNDM")  # so much that LML can only do harm, and should do little
IMAGES = 32


@pytest.fixture(scope="module")
def problem():
    """The ideal denoiser, starting noise, and its solution in 200 steps of DPM-Solver++(3M)."""
    if cifar10.find_folder() is None:
        pytest.skip(f"NOT TESTED: CIFAR-10 is not in {' or '.join(map(str, cifar10.SEARCHED))}")
    schedule = DDPMScheduler(prediction_type="v_prediction", clip_sample=False)
    network = Empirical.cifar10(count=2000, scheduler=schedule)
    noise, _ = pixel.draw_noise(range(IMAGES), (3, 32, 32))
    fine = schedulers.LMLDPMSolverMultistepScheduler.from_config(
        schedule.config, solver_order=3, rank=0
    )
    return network, schedule, noise, pixel.sample(network, fine, 200, noise)


@pytest.mark.parametrize("nfe", [5, 8, 20])
@pytest.mark.parametrize("solver", SOLVERS)
def test_lml_at_its_default_lowers_the_error_or_leaves_it(problem, solver, nfe):
    network, schedule, noise, solution = problem
    cls, options = SOLVERS[solver]
    steps = nfe - 1 if solver == "PNDM" else nfe  # its second step costs two evaluations

    def error(**lml) -> torch.Tensor:
        scheduler = cls.from_config(schedule.config, timestep_spacing="trailing", **options, **lml)
        return (pixel.sample(network, scheduler, steps, noise) - solution).square().mean().sqrt()

    plain, corrected = error(rank=0), error()
    print(f"{solver} at {nfe} evaluations: error {plain:.4f} without LML, {corrected:.4f} with it")
    if solver in EXTRAPOLATING:
        assert corrected < 1.06 * plain
    else:
        # at 20 the steps end at one of the images themselves, but for rounding
        assert corrected < (plain if nfe < 20 else 1.02 * plain + 1e-6)
