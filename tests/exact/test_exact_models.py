"""What the three problems share, each against its density by torch.distributions and autograd."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    IPNDMScheduler,
    UniPCMultistepScheduler,
)
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch.testing import assert_close

from lml.configs import compose
from lml.data import cifar10
from lml.errors import UserError
from lml.exact import ExactModel, Gaussian

from .conftest import SHAPE, gaussian, levels

# 450: where the samples of these problems stand between the modes.
TIMESTEPS = [0, 3.25, 100, 450, 999]


@pytest.mark.parametrize("t", TIMESTEPS)
def test_score_is_the_gradient_of_the_log_density(problem, t):
    model, x = problem.make(), problem.sample(t).requires_grad_()
    log_density = problem.density(*levels(t)).log_prob(x.flatten(1)).sum()
    (expected,) = torch.autograd.grad(log_density, x)
    assert_close(model.score(x.detach(), t), expected, rtol=1e-8, atol=1e-8)

    alpha, sigma = levels(t)
    denoised = (x + sigma**2 * expected) / alpha
    assert_close(model.posterior_mean(x.detach(), t), denoised.detach(), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("t", TIMESTEPS)
def test_hessian_vector_is_autograds(problem, t):
    model, x = problem.make(), problem.sample(t)
    v = torch.randn_like(x)
    _, expected = torch.autograd.functional.hvp(
        lambda x: problem.density(*levels(t)).log_prob(x.flatten(1)).sum(), x, v
    )
    scale = 1 / levels(t)[1] ** 2
    assert_close(model.hessian_vector(x, t, v), expected, rtol=1e-7, atol=1e-8 * scale)


@pytest.mark.parametrize("t", TIMESTEPS)
def test_covariance_is_the_jacobian_of_the_denoiser(problem, t):
    model, x = problem.make(), problem.sample(t)
    v = torch.randn_like(x)
    _, jacobian_v = torch.autograd.functional.jvp(lambda x: model.posterior_mean(x, t), x, v)
    alpha, sigma = levels(t)
    covariance_v = model.posterior_covariance_vector(x, t, v)
    assert_close(covariance_v, sigma**2 / alpha * jacobian_v, rtol=1e-7, atol=1e-10)


def test_between_the_modes_the_covariance_is_not_degenerate(problem):
    """Otherwise the tests above would not notice a covariance of zero."""
    x = problem.sample(450)
    assert problem.make().posterior_covariance_vector(x, 450, torch.ones_like(x)).abs().max() > 0.01


def test_prediction_types_are_diffusers_own(problem):
    """The same DDIM and UniPC step whatever the network predicts."""
    t, x = 600, problem.sample(600)
    options = {"clip_sample": False}
    for scheduler in (DDIMScheduler, UniPCMultistepScheduler):
        steps = []
        for prediction_type in ("epsilon", "sample", "v_prediction"):
            solver = scheduler.from_config({**options, "prediction_type": prediction_type})
            solver.set_timesteps(5)
            model = problem.make(scheduler=solver)
            assert model.prediction_type == prediction_type
            begin = solver.timesteps[2]
            steps.append(solver.step(model(x, begin).sample, begin, x).prev_sample)
        assert_close(steps[1], steps[0], rtol=1e-5, atol=1e-5)
        assert_close(steps[2], steps[0], rtol=1e-5, atol=1e-5)
    x0 = problem.make().posterior_mean(x, t)
    assert_close(problem.make(prediction_type="sample")(x, t).sample, x0)
    noise = (x - levels(t)[0] * x0) / levels(t)[1]
    velocity = DDPMScheduler().get_velocity(x0, noise, torch.tensor([t]))
    assert_close(problem.make(prediction_type="v_prediction")(x, t).sample, velocity)


def test_flow_matching(problem):
    """α = 1 − t/T, σ = t/T, and x − σ · prediction is the denoised image."""
    model = problem.make(scheduler=FlowMatchEulerDiscreteScheduler())
    assert model.prediction_type == "flow_prediction"
    for t in (1e-2, 250.0, 1000.0):
        alpha, sigma = 1 - t / 1000, t / 1000
        x = problem.density(alpha, sigma).sample((5,)).view(5, *SHAPE).requires_grad_()
        log_density = problem.density(alpha, sigma).log_prob(x.flatten(1)).sum()
        (expected,) = torch.autograd.grad(log_density, x)
        x = x.detach()
        assert_close(model.score(x, t), expected, rtol=1e-7, atol=1e-7 + 1e-14 / sigma**2)
        assert_close(x - sigma * model(x, t).sample, model.posterior_mean(x, t))
    unipc = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    assert_close(problem.make(scheduler=unipc)(x, 250.0).sample, model(x, 250.0).sample)


def test_every_form_of_timestep_and_output(problem):
    model, x = problem.make(), problem.sample(500)
    each = torch.tensor([0.0, 3.25, 100.0, 450.0, 999.0])
    batched = model(x, each).sample
    for i, t in enumerate(each):
        for form in (t, float(t), t[None]):
            assert_close(model(x[i : i + 1], form).sample, batched[i : i + 1])
    assert_close(model(x, 450).sample, model(x, torch.tensor(450), class_labels=each).sample)
    assert_close(model(x, 450, return_dict=False)[0], model(x, 450).sample)


def test_a_batch_is_its_samples(problem):
    """Nothing of one sample in another, to the last bits of a matrix product."""
    model, x = problem.make(), problem.sample(450)
    v = torch.randn_like(x)
    for method in (model.posterior_covariance_vector, model.hessian_vector):
        one_by_one = [method(x[i : i + 1], 450, v[i : i + 1]) for i in range(len(x))]
        assert_close(method(x, 450, v), torch.cat(one_by_one), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("t", [1e-2, 10.0, 500.0])  # σ = 1e-5, 0.01, 0.5
def test_arithmetic_is_float64_whatever_the_dtype(problem, dtype, t):
    flow = FlowMatchEulerDiscreteScheduler()
    exact = problem.make(scheduler=flow).double()
    model = problem.make(scheduler=flow).to(dtype)
    assert (exact.dtype, model.dtype) == (torch.float64, dtype)
    torch.manual_seed(0)
    x = problem.density(1 - t / 1000, t / 1000).sample((5,)).view(5, *SHAPE).to(dtype)
    v = torch.randn(x.shape).to(dtype)
    for name, arguments in {
        "posterior_mean": (x, t),
        "score": (x, t),
        "posterior_covariance_vector": (x, t, v),
        "hessian_vector": (x, t, v),
    }.items():
        double = [a.double() if torch.is_tensor(a) else a for a in arguments]
        expected = getattr(exact, name)(*double).to(dtype)
        assert torch.equal(getattr(model, name)(*arguments), expected), name
    assert model(x, t).sample.dtype == dtype


def test_a_state_dict_holds_the_problem(problem):
    model, x = problem.make(), problem.sample(500)
    other = problem.make()
    for buffer in other.buffers():
        buffer.zero_()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x, 500).sample, model(x, 500).sample)


def test_diffusers_pipeline_takes_it_for_a_network(problem):
    scheduler = DDIMScheduler(clip_sample=False)
    model = problem.make(scheduler=scheduler)
    assert (model.config.in_channels, model.config["sample_size"]) == (2, (3, 4))
    pipeline = DDIMPipeline(model, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipeline(3, generator, num_inference_steps=4, output_type="np").images

    x = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    scheduler.set_timesteps(4)
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t).sample, t, x).prev_sample
    assert_close(torch.from_numpy(images).permute(0, 3, 1, 2), (x / 2 + 0.5).clamp(0, 1))


def test_zero_terminal_snr(problem):
    """α = 0 at the last timestep: nothing is known but the prior's mean."""
    model = problem.make(scheduler=DDPMScheduler(rescale_betas_zero_snr=True))
    x = torch.randn(3, *SHAPE, dtype=torch.float64)
    assert_close(model.score(x, 999), -x)
    assert_close(model.posterior_mean(x, 999), model.posterior_mean(0 * x, 999))
    assert model.posterior_mean(x, 998).isfinite().all()


@pytest.mark.parametrize("t", [-1, 999.5, float("nan")])
def test_timesteps_outside_the_schedule(problem, t):
    x = torch.zeros(1, *SHAPE)
    with pytest.raises(UserError, match=r"^timestep=.*: expected from 0 to 999$"):
        problem.make()(x, t)
    with pytest.raises(UserError, match=r"^timestep=.*: expected above 0 and at most 1000$"):
        problem.make(scheduler=FlowMatchEulerDiscreteScheduler())(x, 1000.5 if t > 0 else t)


def test_other_bad_input(problem):
    with pytest.raises(UserError, match=r"^prediction_type=epsilom: expected one of epsilon"):
        problem.make(prediction_type="epsilom")
    with pytest.raises(UserError, match=r"^scheduler=IPNDMScheduler: "):
        problem.make(scheduler=IPNDMScheduler())
    with pytest.raises(UserError, match=r"^sample=\(1, 3, 3, 4\): expected \(B, 2, 3, 4\)"):
        problem.make()(torch.zeros(1, 3, 3, 4), 0)
    with pytest.raises(UserError, match=r"^timestep=\(2,\): expected one, or one for each of 3"):
        problem.make()(torch.zeros(3, *SHAPE), torch.tensor([1, 2]))


@pytest.mark.parametrize("name", ["gaussian", "mixture", "ideal_cifar10"])
def test_the_configs_make_what_they_say(name):
    if name == "ideal_cifar10" and cifar10.find_folder() is None:
        pytest.skip(f"CIFAR-10 is not in {' or '.join(map(str, cifar10.SEARCHED))}")
    config = compose(f"+model={name}")
    toy = {"count": 20} if name == "ideal_cifar10" else {"sample_size": 4}
    config.model.network.update(toy)
    config.model.scheduler.prediction_type = "v_prediction"
    made = instantiate(OmegaConf.to_container(config, resolve=True)["model"])
    network, scheduler = made["network"], made["scheduler"]
    assert made["name"] == name
    assert network.prediction_type == scheduler.config.prediction_type == "v_prediction"
    size = network.config.sample_size
    x = torch.randn(2, 3, size, size)
    assert network(x, scheduler.timesteps[0]).sample.shape == x.shape
    assert network.dtype == torch.float32


def test_random_problems_are_their_seed():
    for seed, same in ((5, True), (6, False)):
        a, b = Gaussian.random(4, seed=5), Gaussian.random(4, seed=seed)
        assert torch.equal(a.covariance, b.covariance) == same


@pytest.mark.parametrize("ends", [(999, 700), (600, 200), (200, 0), (0, 999)])
def test_flow_is_converged(problem, ends):
    """Against itself at a hundredth of the tolerance, on the Gaussian against its closed form."""
    model, x = problem.make(), problem.sample(ends[0])
    flow = partial(ExactModel.flow, model)
    solution = model.flow(x, *ends) if isinstance(model, Gaussian) else flow(x, *ends, 1e-6)
    assert (flow(x, *ends) - solution).square().mean().sqrt() < 3e-3
    assert_close(flow(x.float(), *ends), solution.float(), rtol=0, atol=0.01)


@pytest.mark.parametrize("flow_matching", [False, True])
def test_flow_at_a_tight_tolerance_is_the_closed_form(flow_matching):
    problem = gaussian()
    schedule = FlowMatchEulerDiscreteScheduler() if flow_matching else None
    model, x = problem.make(scheduler=schedule), problem.sample(600)
    expected = model.flow(x, 900, 100)
    assert_close(ExactModel.flow(model, x, 900, 100, 1e-9), expected, rtol=1e-7, atol=1e-7)
