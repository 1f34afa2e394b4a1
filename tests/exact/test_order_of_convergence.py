"""Each solver's order of convergence, measured on the Gaussian against its closed-form flow.

From t = 999 (pure noise) to t = 99 in 90, 180 and 450 equal steps, in float64: the slope of the
log of the error over the log of the steps. The end is not t = 0 because there equal steps in t are
steps of 1 and more in log(σ/α), and no solver's error is in its asymptotic range.
"""

from __future__ import annotations

import inspect

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DEISMultistepScheduler, DPMSolverMultistepScheduler, SchedulerMixin
from torch import Tensor

from lml import schedulers
from lml.exact import Gaussian
from lml.schedulers.ipndm import DiscreteIPNDMScheduler

# diffusers means to drop algorithm_type="dpmsolver", and says so at every construction
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

CLASSES = schedulers.LMLSchedulerMixin.__subclasses__()
START, STOP = 999, 99
STRIDES = (10, 5, 2)
TOLERANCE = 0.16  # of a measured order; the largest deviation is UniPC-3's, 3.86 for 4
USUAL = {
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "timestep_spacing": "trailing",
    "final_sigmas_type": "sigma_min",
    "lower_order_final": True,  # the trajectory stops before it applies
    "clip_sample": False,
    "skip_prk_steps": True,
}


def make(name: str, options: dict, prefix: str = "") -> SchedulerMixin:
    """The scheduler `name`, or with the `prefix` LML the one with LML, with `USUAL` options."""
    parent = DiscreteIPNDMScheduler
    if name != "DiscreteIPNDM":
        parent = getattr(diffusers, f"{name}Scheduler")
    known = inspect.signature(parent.__init__).parameters
    usual = {key: value for key, value in USUAL.items() if key in known}
    cls = getattr(schedulers, f"{prefix}{name}Scheduler") if prefix else parent
    return cls(**usual | options)


def noise() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8, 3, 4, 4, generator=generator, dtype=torch.float64)


def run(scheduler: SchedulerMixin, model: Gaussian, x: Tensor, at: list, timesteps: list) -> Tensor:
    """The scheduler's step at each of `timesteps`, the model called `at` those it knows."""
    for t_model, t in zip(at, timesteps, strict=True):
        has_scale = hasattr(scheduler, "scale_model_input")  # flow matching does not
        scaled = scheduler.scale_model_input(x, t) if has_scale else x
        prediction = model(scaled, t_model).sample
        x = scheduler.step(prediction, t, x).prev_sample
    return x


def error(scheduler: SchedulerMixin, stride: int, start: int = START, exact: bool = True) -> float:
    """Root mean square error at `STOP` of the solution by steps of `stride` from `start`.

    With `exact`, the scheduler's noise levels are float64 in place of diffusers' float32, whose
    rounding would hide the small errors.
    """
    model, x = Gaussian.random(4), noise()
    solution = model.flow(x, start, STOP)
    if "timestep_spacing" in scheduler.config:
        scheduler.set_timesteps(1000 // stride)  # "trailing": 999, 999 - stride, ...
    else:
        scheduler.set_timesteps(timesteps=list(range(999, -1, -stride)))
    if exact and hasattr(scheduler, "sigmas"):
        alpha, sigma = model.noise_levels(scheduler.timesteps)
        scheduler.sigmas = torch.cat([sigma / alpha, scheduler.sigmas[-1:].double()])
    elif exact:
        scheduler.alphas_cumprod = model.alphas_cumprod

    evaluations = (start - STOP) // stride * scheduler.order  # Heun's second is an entry too
    if isinstance(scheduler, diffusers.PNDMScheduler):
        evaluations += 1  # its first step takes two
    timesteps = scheduler.timesteps[int((scheduler.timesteps == start).nonzero()[0]) :]
    assert timesteps[evaluations] == STOP
    timesteps = timesteps[:evaluations]

    # Euler and Heun integrate x/α
    scaled = isinstance(
        scheduler, (diffusers.EulerDiscreteScheduler, diffusers.HeunDiscreteScheduler)
    )
    x = x / model.noise_levels(start)[0] if scaled else x
    x = run(scheduler, model, x, timesteps, timesteps)
    x = x * model.noise_levels(STOP)[0] if scaled else x
    return (x - solution).square().mean().sqrt().item()


def ipndm_error(scheduler: SchedulerMixin, stride: int) -> float:
    """The same for IPNDM, whose noise levels are its own: σ = sin²(πu/2), from u = 0.8 to 0.2."""
    model, x = Gaussian.random(4, prediction_type="v_prediction"), noise()
    steps = 1000 // stride
    scheduler.set_timesteps(steps)
    scheduler.betas = scheduler.betas.double()
    scheduler.alphas = (1 - scheduler.betas**2).sqrt()
    first, last = steps // 5, 4 * steps // 5
    alpha, sigma = model.noise_levels(torch.arange(1000))
    ratio = (scheduler.betas / scheduler.alphas)[first : last + 1]
    at = np.interp(ratio.log(), (sigma / alpha).log(), np.arange(1000))
    solution = model.flow(x, at[0], at[-1])
    scheduler.set_begin_index(first)
    x = run(scheduler, model, x, at[:-1], scheduler.timesteps[first:last])
    return (x - solution).square().mean().sqrt().item()


def flow_matching_error(scheduler: SchedulerMixin, stride: int) -> float:
    """The same for flow matching, from t = 1000 to 100 in T."""
    model, x = Gaussian.random(4, scheduler=scheduler), noise()
    scheduler.set_timesteps(sigmas=np.linspace(1, 0.1, 900 // stride + 1))
    timesteps = scheduler.timesteps
    solution = model.flow(x, timesteps[0], timesteps[-1])
    x = run(scheduler, model, x, timesteps[:-1], timesteps[:-1])
    return (x - solution).square().mean().sqrt().item()


ERRORS = {"IPNDM": ipndm_error, "FlowMatchEulerDiscrete": flow_matching_error}


def slope(errors: list[float]) -> float:
    return np.polyfit(np.log(STRIDES), np.log(errors), 1)[0]


def dpm(kind: str, order: int, algorithm: str) -> tuple[str, dict]:
    return f"DPMSolver{kind}step", {"solver_order": order, "algorithm_type": algorithm}


def uni(order: int, corrector: bool = True) -> tuple[str, dict]:
    disable = [] if corrector else list(range(1000))
    return "UniPCMultistep", {"solver_order": order, "disable_corrector": disable}


# name: (diffusers' class, its options, order)
SOLVERS = {
    # First order: DDIM (= DPM-Solver-1, arXiv 2206.00927); second: Heun (arXiv 2206.00364).
    "ddim": ("DDIM", {}, 1),
    "euler": ("EulerDiscrete", {}, 1),
    "flow-euler": ("FlowMatchEulerDiscrete", {}, 1),
    "heun": ("HeunDiscrete", {}, 2),
    # Second order although its multistep formula is of the fourth (arXiv 2202.09778): the
    # formula is for equal steps, and those of the variable it integrates over are not equal. So
    # IPNDM loses nothing by its start with a first-order step, an error of h² once.
    "pndm": ("PNDM", {}, 2),
    "ipndm": ("IPNDM", {}, 2),
    "discrete-ipndm": ("DiscreteIPNDM", {}, 2),
    # DPM-Solver of order k has order k (arXiv 2206.00927), DPM-Solver++ too (arXiv 2211.01095).
    "dpmsolver-1m": (*dpm("Multi", 1, "dpmsolver"), 1),
    "dpmsolver-2m": (*dpm("Multi", 2, "dpmsolver"), 2),
    "dpmsolver-2s": (*dpm("Single", 2, "dpmsolver"), 2),
    "dpmsolver-3s": (*dpm("Single", 3, "dpmsolver"), 3),
    "dpmsolver++-1m": (*dpm("Multi", 1, "dpmsolver++"), 1),
    "dpmsolver++-2m": (*dpm("Multi", 2, "dpmsolver++"), 2),
    "dpmsolver++-2s": (*dpm("Single", 2, "dpmsolver++"), 2),
    "dpmsolver++-3s": (*dpm("Single", 3, "dpmsolver++"), 3),
    # Not 3, see test_third_order_multistep_lacks_half_a_difference.
    "dpmsolver-3m": (*dpm("Multi", 3, "dpmsolver"), 2),
    "dpmsolver++-3m": (*dpm("Multi", 3, "dpmsolver++"), 2),
    # DEIS with k points has order k (arXiv 2204.13902).
    "deis-1": ("DEISMultistep", {"solver_order": 1}, 1),
    "deis-2": ("DEISMultistep", {"solver_order": 2}, 2),
    "deis-3": ("DEISMultistep", {"solver_order": 3}, 3),
    # UniP-k has order k, its corrector adds one (arXiv 2302.04867).
    "unip-1": (*uni(1, corrector=False), 1),
    "unip-2": (*uni(2, corrector=False), 2),
    "unip-3": (*uni(3, corrector=False), 3),
    "unipc-1": (*uni(1), 2),
    "unipc-2": (*uni(2), 3),
    "unipc-3": (*uni(3), 4),
}


@pytest.mark.parametrize(("name", "options", "order"), SOLVERS.values(), ids=SOLVERS)
def test_order(name, options, order):
    measure = ERRORS.get(name, error)
    errors = [measure(make(name, options), stride) for stride in STRIDES]
    assert slope(errors) == pytest.approx(order, abs=TOLERANCE), errors


def is_seen_to_add_noise(scheduler: SchedulerMixin) -> bool:
    """Whether a step depends on the generator that it is given."""
    if "generator" not in inspect.signature(scheduler.step).parameters:
        return False
    results = []
    for seed in range(2):
        scheduler.set_timesteps(5)
        timestep, generator = scheduler.timesteps[0], torch.Generator().manual_seed(seed)
        scale = getattr(scheduler, "scale_model_input", lambda x, t: x)
        step = scheduler.step(scale(noise(), timestep), timestep, noise(), generator=generator)
        results.append(step.prev_sample)
    return not torch.equal(*results)


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        *((cls, {}) for cls in CLASSES),
        (schedulers.LMLDPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
        (schedulers.LMLFlowMatchEulerDiscreteScheduler, {"stochastic_sampling": True}),
    ],
)
def test_a_solver_says_whether_it_adds_noise(cls, options):
    scheduler = cls(**options)
    assert scheduler.adds_noise == is_seen_to_add_noise(scheduler)


def test_every_solver_is_measured_and_knows_whether_it_is_of_first_order():
    """All but those that add noise, which follow no flow. The default damping goes by the order."""
    for cls in CLASSES:
        if cls().adds_noise is True:
            continue
        orders = [
            order for name, _, order in SOLVERS.values() if cls.__name__ == f"LML{name}Scheduler"
        ]
        assert orders, f"{cls.__name__}: not in SOLVERS"
        if "solver_order" not in inspect.signature(cls.__bases__[-1]).parameters:
            assert {order == 1 for order in orders} == {cls.convergence_order == 1}, cls.__name__


class ThirdOrder(DPMSolverMultistepScheduler):
    """With the other half of D2: diffusers' is h² m''/2, its coefficient is that of h² m''."""

    def multistep_dpm_solver_third_order_update(self, model_outputs, *args, sample, **kwargs):
        update = super().multistep_dpm_solver_third_order_update
        i = self.step_index
        alpha, sigma = self._sigma_to_alpha_sigma_t(self.sigmas[[i + 1, i, i - 1, i - 2]])
        h, h0, h1 = (alpha / sigma).log().diff().neg()
        m0, m1, m2 = reversed(model_outputs)
        d2 = h**2 * ((m0 - m1) / h0 - (m1 - m2) / h1) / (h0 + h1)
        if self.config.algorithm_type == "dpmsolver++":
            missing = -alpha[0] * ((torch.expm1(-h) + h) / h**2 - 0.5) * d2
        else:
            missing = -sigma[0] * ((torch.expm1(h) - h) / h**2 - 0.5) * d2
        return update(model_outputs, *args, sample=sample, **kwargs) + missing


@pytest.mark.parametrize("algorithm", ["dpmsolver", "dpmsolver++"])
def test_third_order_multistep_lacks_half_a_difference(algorithm):
    """DPM-Solver's multistep third order is of second order, here and in its authors' code.

    Their D2 is half the second difference that its coefficient is for (the singlestep solver has
    the factor of 2). With it, order 3. Coarser steps than above: float32 samples inside `step`.
    """
    options = dpm("Multi", 3, algorithm)[1] | {"final_sigmas_type": "sigma_min"}
    scheduler = ThirdOrder(**options, timestep_spacing="trailing")
    errors = [error(scheduler, stride) for stride in (20, 10)]
    assert np.log2(errors[0] / errors[1]) == pytest.approx(3, abs=TOLERANCE), errors


@pytest.mark.parametrize("solver", ["deis-3", "unip-3", "unipc-3", "unipc-2"])
def test_start_in_the_middle(solver):
    """Begun at t = 499, as img2img does, the first step's first order shows: an error of h².

    At t = 999 it does not, as the denoised image hardly changes there. The corrector takes that
    step to second order, an error of h³, with which UniPC-2 keeps its order and UniPC-3 too
    as far as it shows here, down to errors of 1e-8.
    """
    name, options, order = SOLVERS[solver]
    order = 2 if "unipc" not in solver else order
    errors = [error(make(name, options), stride, start=499) for stride in STRIDES]
    assert slope(errors) == pytest.approx(order, abs=0.25), errors


def test_deis_in_float32_diverges_with_the_steps():
    """Its coefficients are differences of nearly equal numbers, taken in float32.

    From 90 steps on DEIS-3 gets worse with every step, so it is no solver for a fine solution.
    """
    fine = [
        error(DEISMultistepScheduler(solver_order=3, timestep_spacing="trailing"), s, exact=False)
        for s in (20, 10, 2)
    ]
    assert fine[2] > 5 * fine[1] > 5 * fine[0]


# LML on: with a damping that does not grow with the steps, no solver keeps its higher order.


def lml_order(solver: str, damping: float | str, **options) -> float:
    """At rank 2 by 90 and 180 steps, with this relative damping, "as steps²", or the "default"."""
    name, own, _ = SOLVERS[solver]
    errors = []
    for stride in (10, 5):
        number = {"default": None, "as steps²": 0.24 * (900 / stride) ** 2}.get(damping, damping)
        lml = {"rank": 2, "damping": number, "damping_scale": "relative", **options}
        errors.append(ERRORS.get(name, error)(make(name, own | lml, "LML"), stride))
    return np.log2(errors[0] / errors[1])


@pytest.mark.parametrize("solver", SOLVERS)
def test_lml_with_constant_damping_is_of_first_order(solver):
    """Consecutive predictions differ by O(h), and so do g and a g' that is g less a fixed share
    of its anchors, normalised: an error of h² a step, whatever the solver's own order."""
    assert lml_order(solver, damping=8.0) == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("solver", SOLVERS)
def test_lml_with_damping_as_steps_squared_keeps_the_order_up_to_three(solver):
    """Then g' − g is O(h · h²)."""
    order = min(SOLVERS[solver][2], 3)
    assert lml_order(solver, damping="as steps²") == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize("solver", SOLVERS)
def test_lml_at_its_default_keeps_the_order(solver):
    """Up to three, as with steps²; first-order solvers have a constant damping by default."""
    assert lml_order(solver, damping="default") > min(SOLVERS[solver][2], 3) - 0.3


@pytest.mark.parametrize(
    ("solver", "target", "constant", "grown"),
    [
        ("ddim", "increment", 1, 1),
        ("euler", "increment", 1, 1),
        ("flow-euler", "increment", 1, 1),
        ("deis-2", "increment", 1, 2),
        ("dpmsolver++-2m", "increment", 1, 2),
        # The corrector makes the step anew: the error stays in where the network is evaluated.
        ("unipc-2", "increment", 2, 3),
        # The re-noising term isn't proportional to the step: O(h) a step, no convergence at all.
        ("ddim", "direction", 0, 1),
    ],
)
def test_lml_on_other_targets(solver, target, constant, grown):
    assert lml_order(solver, 8.0, target=target) == pytest.approx(constant, abs=0.2)
    assert lml_order(solver, "as steps²", target=target) == pytest.approx(grown, abs=0.3)
