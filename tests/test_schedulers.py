"""Every LML scheduler against its diffusers parent, and the targets against their formulas."""

from __future__ import annotations

import copy
import inspect
import json

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from lml import schedulers
from lml.correction import LMLCorrection

CLASSES = schedulers.LMLSchedulerMixin.__subclasses__()
TARGETS = [(cls, target) for cls in CLASSES for target in cls.targets]
STEPS = 8
# Options that reach other paths of the parents, and that users set.
VARIANTS = [
    (schedulers.LMLDDIMScheduler, {"clip_sample": False, "timestep_spacing": "trailing"}),
    (schedulers.LMLDDIMScheduler, {"prediction_type": "v_prediction", "set_alpha_to_one": False}),
    (schedulers.LMLDPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    (schedulers.LMLDPMSolverMultistepScheduler, {"use_karras_sigmas": True, "solver_order": 1}),
    (schedulers.LMLDPMSolverMultistepScheduler, {"solver_order": 3, "use_lu_lambdas": True}),
    (
        schedulers.LMLDPMSolverMultistepScheduler,
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", "solver_order": 3},
    ),
    (
        schedulers.LMLDPMSolverMultistepScheduler,
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True},
    ),
    (schedulers.LMLDPMSolverSinglestepScheduler, {"solver_order": 3, "lower_order_final": True}),
    # these two give NaN in diffusers itself when the last sigma is zero
    (
        schedulers.LMLUniPCMultistepScheduler,
        {"solver_order": 3, "predict_x0": False, "final_sigmas_type": "sigma_min"},
    ),
    (
        schedulers.LMLUniPCMultistepScheduler,
        {"solver_type": "bh1", "use_karras_sigmas": True, "final_sigmas_type": "sigma_min"},
    ),
    (schedulers.LMLDEISMultistepScheduler, {"solver_order": 3}),
    (schedulers.LMLPNDMScheduler, {"skip_prk_steps": True}),
    (schedulers.LMLEulerDiscreteScheduler, {"use_karras_sigmas": True}),
    (schedulers.LMLFlowMatchEulerDiscreteScheduler, {"shift": 3.0}),
]


def network(sample: Tensor, timestep: Tensor) -> Tensor:
    """A smooth stand-in for a network: its output turns as the timestep falls."""
    return torch.tanh(sample + 0.3 * torch.sin(sample.flip(-1) + float(timestep) / 200))


def scaled(scheduler, sample: Tensor, timestep: Tensor) -> Tensor:
    """What the network is given; flow matching has no scale_model_input."""
    return getattr(scheduler, "scale_model_input", lambda x, t: x)(sample, timestep)


def trajectory(scheduler, batch=2, dtype=torch.float32, seed=0, begin=0, steps=STEPS, **kwargs):
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randn(batch, 3, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    sample = sample * getattr(scheduler, "init_noise_sigma", 1.0)
    if "generator" in inspect.signature(scheduler.step).parameters:
        kwargs["generator"] = generator
    if begin:
        scheduler.set_begin_index(begin)
    samples = []
    for timestep in scheduler.timesteps[begin:]:
        prediction = network(scaled(scheduler, sample, timestep), timestep).to(dtype)
        sample = scheduler.step(prediction, timestep, sample, **kwargs).prev_sample
        samples.append(sample)
    return torch.stack(samples)


def parent_of(cls: type) -> type:
    return cls.__bases__[-1]


def options_of(scheduler) -> dict:
    return {name: scheduler.config[name] for name in schedulers.OPTIONS}


def test_every_scheduler_of_the_design_is_there():
    names = "DDIM DPMSolverMultistep DPMSolverSinglestep UniPCMultistep DEISMultistep PNDM IPNDM"
    names += " EulerDiscrete HeunDiscrete FlowMatchEulerDiscrete DiscreteIPNDM"
    assert {c.__name__ for c in CLASSES} == {f"LML{name}Scheduler" for name in names.split()}
    for cls in CLASSES:
        assert cls.__name__ == f"LML{parent_of(cls).__name__}"


@pytest.mark.parametrize(
    ("cls", "options"),
    [(c, {}) for c in CLASSES] + VARIANTS,
    ids=lambda v: getattr(v, "__name__", v),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rank_0_is_the_parent_bit_for_bit(cls, options, dtype):
    expected = trajectory(parent_of(cls)(**options), dtype=dtype)
    assert torch.equal(trajectory(cls(**options, rank=0), dtype=dtype), expected)
    assert expected.dtype == dtype


@pytest.mark.parametrize(("cls", "target"), TARGETS)
def test_a_huge_damping_is_the_parent_and_a_small_one_is_not(cls, target):
    expected = trajectory(parent_of(cls)())
    loose = trajectory(cls(target=target, damping=1e12))
    assert torch.allclose(loose, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(trajectory(cls(target=target, damping=1.0)), expected, atol=1e-2)


@pytest.mark.parametrize(("cls", "target"), TARGETS)
def test_one_object_serves_many_trajectories(cls, target):
    scheduler = cls(target=target, damping=2.0)
    first = trajectory(scheduler)
    other = trajectory(scheduler, batch=5, seed=1, steps=STEPS + 3)
    assert torch.equal(trajectory(scheduler), first)
    assert torch.equal(
        trajectory(copy.deepcopy(scheduler), batch=5, seed=1, steps=STEPS + 3), other
    )


@pytest.mark.parametrize(("cls", "target"), TARGETS)
def test_half_precision_follows_float32(cls, target):
    scheduler = cls(target=target, damping=8.0)
    expected = trajectory(scheduler, steps=4)
    half = trajectory(scheduler, dtype=torch.bfloat16, steps=4)
    assert half.dtype == torch.bfloat16
    assert (half.float() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize(("cls", "target"), TARGETS)
def test_return_dict_false_gives_the_same_numbers(cls, target):
    scheduler = cls(target=target)
    expected = trajectory(scheduler)[-1]
    scheduler.set_timesteps(STEPS)
    sample = torch.randn(
        2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    sample = sample.float() * getattr(scheduler, "init_noise_sigma", 1.0)
    for timestep in scheduler.timesteps:
        prediction = network(scaled(scheduler, sample, timestep), timestep)
        output = scheduler.step(prediction, timestep, sample, return_dict=False)
        assert isinstance(output, tuple)
        sample = output[0]
    assert torch.equal(sample, expected)


@pytest.mark.parametrize("cls", [c for c in CLASSES if hasattr(c, "set_begin_index")])
def test_begin_index_of_image_to_image(cls):
    parent = parent_of(cls)
    expected = trajectory(parent(), begin=2)
    assert torch.equal(trajectory(cls(rank=0), begin=2), expected)
    assert trajectory(cls(), begin=2).isfinite().all()


@pytest.mark.parametrize("cls", CLASSES)
def test_signatures_are_the_parents(cls):
    parent = parent_of(cls)
    for name in ("step", "set_timesteps"):
        assert inspect.signature(getattr(cls, name)) == inspect.signature(getattr(parent, name))
    own = list(inspect.signature(cls).parameters)
    assert own == [*inspect.signature(parent).parameters, *schedulers.OPTIONS]
    correction = inspect.signature(LMLCorrection).parameters
    for name in set(schedulers.OPTIONS) - {"target"}:
        assert inspect.signature(cls).parameters[name].default == correction[name].default


@pytest.mark.parametrize(("cls", "options"), VARIANTS, ids=lambda v: getattr(v, "__name__", v))
def test_options_survive_saving_and_conversion(cls, options, tmp_path):
    lml = {
        "rank": 1,
        "damping": 3.5,
        "damping_scale": "absolute",
        "anchor": "ema",
        "kappa": 0.25,
        "target": "prediction",
        "norm_preserving": False,
        "freeze": 0.125,
    }
    scheduler = cls(**options, **lml)
    assert options_of(scheduler) == lml
    scheduler.save_pretrained(tmp_path)
    assert (
        json.loads((tmp_path / "scheduler_config.json").read_text())["_class_name"] == cls.__name__
    )
    loaded = cls.from_pretrained(tmp_path)
    assert options_of(loaded) == lml
    for key, value in options.items():
        assert loaded.config[key] == value
    plain = parent_of(cls).from_config(scheduler.config)
    assert type(plain) is parent_of(cls)
    assert torch.equal(trajectory(plain), trajectory(parent_of(cls)(**options)))
    back = cls.from_config(plain.config)
    assert options_of(back) == lml
    assert torch.equal(trajectory(back), trajectory(scheduler))
    assert cls.from_config(plain.config, damping=9.0).correction.damping == 9.0
    parent_loaded = parent_of(cls).from_pretrained(tmp_path)
    assert torch.equal(trajectory(parent_loaded), trajectory(plain))


def test_from_config_of_any_compatible_scheduler():
    stable_diffusion = diffusers.PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True
    )
    for cls in CLASSES:
        if parent_of(cls) in stable_diffusion.compatibles:
            made = cls.from_config(stable_diffusion.config, rank=2, damping=8.0)
            expected = parent_of(cls).from_config(stable_diffusion.config)
            assert made.config.beta_end == 0.012
            assert torch.equal(made.betas, expected.betas)
            assert set(parent_of(cls)().compatibles) < set(made.compatibles)
            assert cls in made.compatibles


@pytest.mark.parametrize("cls", CLASSES)
def test_a_target_without_meaning_is_refused_by_name(cls):
    for target in {"prediction", "increment", "direction", "x0"} - set(cls.targets):
        with pytest.raises(ValueError, match=f"target={target}: {cls.__name__}"):
            cls(target=target)


def test_stochastic_solvers_have_no_increment():
    with pytest.raises(ValueError, match="sde-dpmsolver"):
        schedulers.LMLDPMSolverMultistepScheduler(
            algorithm_type="sde-dpmsolver++", target="increment"
        )
    with pytest.raises(ValueError, match="stochastic_sampling"):
        schedulers.LMLFlowMatchEulerDiscreteScheduler(stochastic_sampling=True, target="increment")
    scheduler = schedulers.LMLEulerDiscreteScheduler(target="increment")
    with pytest.raises(ValueError, match="s_churn"):
        trajectory(scheduler, s_churn=1.0)


@pytest.mark.parametrize("cls", CLASSES)
def test_bad_options_are_refused_when_the_scheduler_is_made(cls):
    with pytest.raises(ValueError, match="damping=-1"):
        cls(damping=-1)
    with pytest.raises(ValueError, match=r"rank=1\.5"):
        cls.from_config(parent_of(cls)().config, rank=1.5)


@pytest.mark.parametrize("cls", CLASSES)
def test_prediction_is_corrected_before_the_solver_sees_it(cls):
    scheduler, parent = cls(rank=2, damping=1.5), parent_of(cls)()
    correction = LMLCorrection(rank=2, damping=1.5)
    scheduler.set_timesteps(STEPS), parent.set_timesteps(STEPS)
    sample = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    for timestep in scheduler.timesteps:
        prediction = network(sample, timestep)
        scaled(scheduler, sample, timestep), scaled(parent, sample, timestep)
        corrected = scheduler.step(prediction, timestep, sample).prev_sample
        expected = parent.step(correction(prediction), timestep, sample).prev_sample
        assert torch.equal(corrected, expected)
        sample = expected


def alpha_sigma(scheduler, timestep) -> tuple[Tensor, Tensor]:
    square = scheduler.alphas_cumprod[int(timestep)].double()
    return square.sqrt(), (1 - square).sqrt()


def increments(scheduler, target, split, dtype=torch.float64):
    """Runs `scheduler` beside its parent and holds each step against `split`'s formula."""
    parent = parent_of(type(scheduler))(
        **{k: v for k, v in scheduler.config.items() if k not in schedulers.OPTIONS and k[0] != "_"}
    )
    correction = LMLCorrection(scheduler.config.rank, scheduler.config.damping)
    scheduler.set_timesteps(STEPS), parent.set_timesteps(STEPS)
    generator = torch.Generator().manual_seed(5)
    sample = torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    steps = list(scheduler.timesteps)
    for timestep, following in zip(steps, [*steps[1:], None], strict=True):
        scaled(scheduler, sample, timestep), scaled(parent, sample, timestep)
        prediction = network(sample, timestep).to(dtype)
        corrected = scheduler.step(prediction, timestep, sample).prev_sample
        plain = parent.step(prediction, timestep, sample).prev_sample
        part, scale = split(scheduler, sample, prediction, timestep, following)
        expected = part + scale * correction((plain - part) / scale) if scale else plain
        assert (corrected - expected).norm() < 1e-5 * expected.norm()
        sample = plain  # both stay on the parent's trajectory, whose inner state they share


def test_ddim_direction_is_the_renoising_term():
    def split(scheduler, sample, prediction, timestep, following):
        alpha_t, sigma_t = alpha_sigma(scheduler, timestep)
        clean = ((sample - sigma_t * prediction) / alpha_t).clamp(-1, 1)
        if following is None:
            return clean, 0.0
        alpha_s, sigma_s = alpha_sigma(scheduler, following)
        return alpha_s * clean, sigma_s

    increments(schedulers.LMLDDIMScheduler(target="direction", damping=1.0), "direction", split)


def test_ddim_increment():
    def split(scheduler, sample, prediction, timestep, following):
        alpha_s = 1.0 if following is None else alpha_sigma(scheduler, following)[0]
        return alpha_s / alpha_sigma(scheduler, timestep)[0] * sample, 1.0

    increments(schedulers.LMLDDIMScheduler(target="increment", damping=1.0), "increment", split)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("algorithm", ["dpmsolver", "dpmsolver++"])
def test_dpmsolver_increment(algorithm, order):
    def split(scheduler, sample, prediction, timestep, following):
        alpha_t, sigma_t = alpha_sigma(scheduler, timestep)
        # final_sigmas_type="sigma_min" ends at the noise of timestep 0
        alpha_s, sigma_s = alpha_sigma(scheduler, 0 if following is None else following)
        ratio = sigma_s / sigma_t if algorithm == "dpmsolver++" else alpha_s / alpha_t
        return ratio * sample, 1.0

    scheduler = schedulers.LMLDPMSolverMultistepScheduler(
        algorithm_type=algorithm,
        solver_order=order,
        final_sigmas_type="sigma_min",
        target="increment",
        damping=1.0,
    )
    increments(scheduler, "increment", split)


def test_deis_increment():
    def split(scheduler, sample, prediction, timestep, following):
        alpha_s = alpha_sigma(scheduler, 0 if following is None else following)[0]
        return alpha_s / alpha_sigma(scheduler, timestep)[0] * sample, 1.0

    scheduler = schedulers.LMLDEISMultistepScheduler(target="increment", damping=1.0)
    increments(scheduler, "increment", split)


@pytest.mark.parametrize("predict_x0", [True, False])
def test_unipc_increment_without_corrector(predict_x0):
    def split(scheduler, sample, prediction, timestep, following):
        alpha_t, sigma_t = alpha_sigma(scheduler, timestep)
        alpha_s, sigma_s = alpha_sigma(scheduler, 0 if following is None else following)
        return (sigma_s / sigma_t if predict_x0 else alpha_s / alpha_t) * sample, 1.0

    scheduler = schedulers.LMLUniPCMultistepScheduler(
        target="increment",
        damping=1.0,
        predict_x0=predict_x0,
        disable_corrector=list(range(STEPS)),
        final_sigmas_type="sigma_min",
    )
    increments(scheduler, "increment", split)


def test_unipc_increment_starts_from_the_corrected_sample():
    scheduler = schedulers.LMLUniPCMultistepScheduler(target="increment", rank=1, damping=1e-9)
    parent = diffusers.UniPCMultistepScheduler()
    scheduler.set_timesteps(STEPS), parent.set_timesteps(STEPS)
    sample = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(6))
    for k, timestep in enumerate(scheduler.timesteps[:3]):
        prediction = network(sample, timestep)
        corrected = scheduler.step(prediction, timestep, sample).prev_sample
        plain = parent.step(prediction, timestep, sample).prev_sample
        ratio = parent.sigmas[k + 1] / parent.sigmas[k]
        ratio = ratio * ((1 + parent.sigmas[k] ** 2) / (1 + parent.sigmas[k + 1] ** 2)).sqrt()
        increment, whole = (x - ratio * parent.last_sample for x in (corrected, plain))
        assert torch.allclose(increment.norm(), whole.norm(), rtol=1e-4)
        sample = plain


@pytest.mark.parametrize(
    "cls", [schedulers.LMLEulerDiscreteScheduler, schedulers.LMLFlowMatchEulerDiscreteScheduler]
)
def test_euler_increment(cls):
    increments(
        cls(target="increment", damping=1.0),
        "increment",
        lambda scheduler, sample, *_: (sample, 1.0),
        torch.float32,
    )


@pytest.mark.parametrize("target", ["increment", "direction"])
def test_ddim_noise_is_added_after_the_correction(target):
    """With eta > 0 a huge damping is still the parent, noise included."""
    expected = trajectory(diffusers.DDIMScheduler(), eta=0.8)
    loose = trajectory(schedulers.LMLDDIMScheduler(target=target, damping=1e12), eta=0.8)
    assert torch.allclose(loose, expected, atol=1e-4)


def test_a_learned_variance_is_left_alone():
    scheduler = schedulers.LMLDPMSolverMultistepScheduler(
        variance_type="learned_range", rank=1, damping=1.0
    )
    plain = schedulers.LMLDPMSolverMultistepScheduler(rank=1, damping=1.0)
    for s in (scheduler, plain):
        s.set_timesteps(STEPS)
    sample = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(7))
    for timestep in scheduler.timesteps[:4]:
        prediction = network(sample, timestep)
        both = torch.cat([prediction, torch.full_like(prediction, 50.0)], 1)
        wide = scheduler.step(both, timestep, sample).prev_sample
        narrow = plain.step(prediction, timestep, sample).prev_sample
        assert torch.equal(wide, narrow)
        sample = narrow


@pytest.mark.parametrize(
    ("cls", "options", "expected"),
    [
        # first order: r (r + 1), however many steps
        (schedulers.LMLDDIMScheduler, {}, 6),
        (schedulers.LMLDDIMScheduler, {"rank": 3}, 12),
        (schedulers.LMLEulerDiscreteScheduler, {}, 6),
        (schedulers.LMLFlowMatchEulerDiscreteScheduler, {}, 6),
        (schedulers.LMLDPMSolverMultistepScheduler, {"solver_order": 1}, 6),
        # higher orders: times (evaluations / 5)²
        (schedulers.LMLDPMSolverMultistepScheduler, {"solver_order": 3}, 24),
        (schedulers.LMLDPMSolverSinglestepScheduler, {}, 24),
        (schedulers.LMLDEISMultistepScheduler, {}, 24),
        (schedulers.LMLHeunDiscreteScheduler, {}, 6 * 3.8**2),  # 19 evaluations
        (schedulers.LMLUniPCMultistepScheduler, {"solver_order": 1}, 48),
        (schedulers.LMLIPNDMScheduler, {}, 384),
        (schedulers.LMLDiscreteIPNDMScheduler, {}, 384),
        (schedulers.LMLPNDMScheduler, {"skip_prk_steps": True}, 384 * 1.1**2),
        # grids that are even in log-SNR
        (schedulers.LMLDPMSolverMultistepScheduler, {"use_karras_sigmas": True}, 192),
        (schedulers.LMLUniPCMultistepScheduler, {"use_exponential_sigmas": True}, 384),
        # given ones are left alone
        (schedulers.LMLDPMSolverMultistepScheduler, {"damping": 9.0}, 9),
    ],
)
def test_the_default_damping_is_the_solvers(cls, options, expected):
    scheduler = cls(**options)
    for steps in (30, 10):  # chosen anew for each trajectory
        scheduler.set_timesteps(steps)
    assert scheduler.correction.damping == pytest.approx(expected)
    assert scheduler.config.damping == options.get("damping")
    assert cls.from_config(scheduler.config).config.damping == options.get("damping")


def test_the_default_damping_is_not_that_of_the_solver_it_was_converted_from():
    fine = schedulers.LMLDPMSolverMultistepScheduler(solver_order=3, use_karras_sigmas=True)
    scheduler = schedulers.LMLDDIMScheduler.from_config(fine.config)
    scheduler.set_timesteps(10)
    assert scheduler.correction.damping == 6


@pytest.mark.parametrize("cls", CLASSES)
def test_freeze_leaves_the_early_steps_alone(cls):
    expected, frozen = trajectory(parent_of(cls)()), trajectory(cls(freeze=1.0))
    assert torch.allclose(frozen, expected)


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
@pytest.mark.parametrize(
    "cls",
    [
        c
        for c in CLASSES
        if "prediction_type" in inspect.signature(c).parameters
        # PNDM itself mixes the outputs of several steps before it takes them for noise
        and c is not schedulers.LMLPNDMScheduler
    ],
)
def test_the_parametrisation_of_the_network_does_not_matter(cls, kind):
    config = {"rank": 2, "damping": 2.0}
    if issubclass(cls, diffusers.DDIMScheduler):
        config["clip_sample"] = False
    results = []
    for prediction_type in ("epsilon", kind):
        scheduler = cls(**config, prediction_type=prediction_type)
        scheduler.set_timesteps(STEPS)
        generator = torch.Generator().manual_seed(8)
        x = torch.randn(2, 3, 8, 8, generator=generator) * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            model_input = scaled(scheduler, x, timestep)
            noise = network(model_input, timestep)
            square = np.interp(float(timestep), np.arange(1000), scheduler.alphas_cumprod.numpy())
            alpha, sigma = square**0.5, (1 - square) ** 0.5
            clean = (model_input - sigma * noise) / alpha
            output = {
                "epsilon": noise,
                "sample": clean,
                "v_prediction": alpha * noise - sigma * clean,
            }
            x = scheduler.step(output[prediction_type], timestep, x).prev_sample
        results.append(x)
    assert (results[0] - results[1]).norm() < 2e-3 * results[0].norm()
