"""LML around a denoiser, held against the schedulers, the formula and the samplers of others."""

from __future__ import annotations

import copy
import io
import itertools
import re
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from test_correction import directions
from test_readme import README
from torch import Tensor, nn

from lml import LMLDenoiser
from lml.correction import LMLCorrection
from lml.damping import default_damping
from lml.denoiser import SAMPLERS
from lml.errors import UserError
from lml.exact import Gaussian, MixtureOfGaussians
from lml.schedulers import LMLDPMSolverMultistepScheduler, LMLEulerDiscreteScheduler

SHAPE = (3, 4, 4)
Denoiser = Callable[[Tensor, Tensor], Tensor]


class Exact(nn.Module):
    """E[x_0 | x_0 + sigma noise = x], in float64; it lists the sigmas that it is called at."""

    sigma_min, sigma_max = 0.002, 80.0

    def __init__(self, kind=Gaussian):
        super().__init__()
        self.inner_model = kind.random(sample_size=SHAPE[-1])
        self.calls: list[Tensor] = []

    def round_sigma(self, sigma):
        return sigma

    def forward(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        sigma = torch.as_tensor(sigma, dtype=torch.float64)
        self.calls.append(sigma)
        sigma = sigma.reshape(-1, 1)
        alpha = (1 + sigma**2) ** -0.5
        x0 = self.inner_model._posterior_mean(alpha * x.double().flatten(1), alpha, alpha * sigma)
        return x0.view(x.shape).to(x.dtype)


def karras(steps: int, low: float = 0.02, high: float = 80.0) -> Tensor:
    """Equation 5 of arXiv 2206.00364 with rho = 7."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    sigmas = (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def start(sigmas: Tensor, count: int = 4, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return sigmas[0] * torch.randn(count, *SHAPE, generator=generator, dtype=torch.float64)


# Samplers in k-diffusion's form, (denoiser, x, sigmas), from their papers.
def euler(denoiser: Denoiser, x: Tensor, sigmas: Tensor) -> Tensor:
    """arXiv 2206.00364, algorithm 1 without its correction."""
    for now, then in itertools.pairwise(sigmas):
        x = x + (then - now) * (x - denoiser(x, now.expand(len(x)))) / now
    return x


def heun(denoiser: Denoiser, x: Tensor, sigmas: Tensor) -> Tensor:
    """arXiv 2206.00364, algorithm 1."""
    for now, then in itertools.pairwise(sigmas):
        slope = (x - denoiser(x, now)) / now
        end = x + (then - now) * slope
        if then > 0:
            slope = (slope + (end - denoiser(end, then)) / then) / 2
        x = x + (then - now) * slope
    return x


def dpmpp_2m(denoiser: Denoiser, x: Tensor, sigmas: Tensor) -> Tensor:
    """arXiv 2211.01095, algorithm 2, in x / alpha, so that lambda = -log sigma."""
    last, h_last = None, None
    for now, then in itertools.pairwise(sigmas):
        x0, h = denoiser(x, now), (now / then).log()
        extrapolated = x0 if last is None or then == 0 else x0 + h / h_last / 2 * (x0 - last)
        x = then / now * x - torch.expm1(-h) * extrapolated
        last, h_last = x0, h
    return x


def lms(denoiser: Denoiser, x: Tensor, sigmas: Tensor, order: int = 4) -> Tensor:
    """Adams and Bashforth's method in sigma: the integral of the slopes' polynomial."""
    slopes: list[Tensor] = []
    nodes, weights = torch.tensor([-1, 1]) / 3**0.5, 0.5  # Gauss's, exact for a cubic
    for i, (now, then) in enumerate(itertools.pairwise(sigmas)):
        slopes = [*slopes, (x - denoiser(x, now)) / now][-order:]
        at = sigmas[i + 1 - len(slopes) : i + 1]
        for node in (now + then) / 2 + (then - now) / 2 * nodes:
            for j, slope in enumerate(slopes):
                others = torch.cat([at[:j], at[j + 1 :]])
                x = x + (then - now) * weights * ((node - others) / (at[j] - others)).prod() * slope
    return x


METHODS = {"euler": euler, "heun": heun, "dpmpp_2m": dpmpp_2m, "lms": lms}


# The schedulers, with their sigmas replaced, on the same problem.
def by_scheduler(scheduler, denoiser: Denoiser, x: Tensor, sigmas: Tensor) -> Tensor:
    scheduler.set_timesteps(len(sigmas) - 1)
    scheduler.sigmas = sigmas
    scaled = isinstance(scheduler, LMLEulerDiscreteScheduler)  # the others integrate alpha x
    alphas = torch.ones_like(sigmas) if scaled else (1 + sigmas**2) ** -0.5
    x = alphas[0] * x
    for t, sigma, alpha in zip(scheduler.timesteps, sigmas, alphas, strict=False):
        noise = (x / alpha - denoiser(x / alpha, sigma)) / sigma
        scheduler.is_scale_input_called = True
        x = scheduler.step(noise, t, x).prev_sample.double()
    return x


OPTIONS = [
    {"rank": 1, "damping": 2.0},
    {"rank": 2, "damping": 6.0},
    {"rank": 3, "damping": [None, 4.0, 8.0, 3.0, None, 12.0], "length": [1, 1.01, 1, 0.99, 1, 1]},
    {"rank": 2, "damping": 5.0, "norm_preserving": False},
    {"rank": 1, "damping": 3.0, "anchor": "ema", "kappa": 0.5},
    {"rank": 2, "damping": 100.0, "damping_scale": "absolute"},
]


@pytest.mark.parametrize("kind", [Gaussian, MixtureOfGaussians])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
def test_the_samples_are_those_of_the_schedulers(kind, options, sampler):
    exact, sigmas = Exact(kind), karras(6)
    x = start(sigmas)
    made = METHODS[sampler](LMLDenoiser(exact, **options), x, sigmas)
    if sampler == "euler":
        scheduler = LMLEulerDiscreteScheduler(**options)
    else:
        scheduler = LMLDPMSolverMultistepScheduler(
            solver_order=2, final_sigmas_type="zero", **options
        )
    torch.testing.assert_close(made, by_scheduler(scheduler, exact, x, sigmas), rtol=0, atol=1e-5)
    assert (made - METHODS[sampler](exact, x, sigmas)).abs().max() > 1e-3


@pytest.mark.parametrize("sampler", METHODS)
def test_rank_0_is_the_denoiser_itself(sampler):
    exact, sigmas = Exact(), karras(5)
    x = start(sigmas)
    off = METHODS[sampler](LMLDenoiser(exact, rank=0), x, sigmas)
    assert torch.equal(off, METHODS[sampler](exact, x, sigmas))


@pytest.mark.parametrize("sampler", METHODS)
def test_a_trajectory_after_another_is_as_by_a_fresh_wrapper(sampler):
    exact, sigmas = Exact(), karras(5)
    method, wrapped = METHODS[sampler], LMLDenoiser(exact, damping=3.0)
    for seed, count in ((1, 4), (2, 4), (3, 2)):
        x = start(sigmas, count, seed)
        fresh = method(LMLDenoiser(exact, damping=3.0), x, sigmas)
        assert torch.equal(method(wrapped, x, sigmas), fresh)
        assert not torch.equal(fresh, method(exact, x, sigmas))


def follow(
    wrapped: LMLDenoiser, noises: list[Tensor], sigmas: list[float | Tensor]
) -> list[Tensor]:
    """g' of calls at `sigmas` that imply `noises`, with x = 0: the noise is -D / sigma."""
    corrected = []
    for noise, sigma in zip(noises, sigmas, strict=True):
        level = torch.as_tensor(sigma, dtype=noise.dtype).reshape(-1, 1, 1, 1)
        wrapped.denoiser = lambda x, sigma, made=-level * noise: made
        corrected.append(-wrapped(torch.zeros_like(noise), sigma) / level)
    return corrected


def by_hand(noises: list[Tensor], steps: list[list[int]], damping: float, rank: int):
    """g' of each noise where `steps` says which ones are its anchors."""
    correction = LMLCorrection(rank, damping)
    return [
        correction(g, tuple(noises[i] for i in anchors)[-rank:], damping)[0]
        for g, anchors in zip(noises, steps, strict=True)
    ]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 2])
def test_the_second_call_at_a_sigma_has_the_anchors_of_the_first_and_takes_its_place(rank):
    noises = directions(8, seed=1)
    wrapped = LMLDenoiser(None, rank, 2.0)
    # 0.7 once more after a rounding of its logarithm
    found = follow(wrapped, noises, [4.0, 4.0, 2.0, 2.0, 0.7, 0.7 * (1 + 1e-6), 0.7, 0.1])
    steps = [[], [], [1], [1], [1, 3], [1, 3], [1, 3], [1, 3, 6]]
    assert_same(found, by_hand(noises, steps, 2.0, rank))
    assert wrapped.step == 3


@pytest.mark.parametrize(
    "begin", ["rises", "one of the batch rises", "another shape", "reset", "another trajectory"]
)
def test_a_new_trajectory_has_no_anchors(begin):
    noises, wrapped = directions(5, seed=2), LMLDenoiser(None, 2, [2.0, 2.0, 2.0])
    sigmas = [4.0, 2.0, {"rises": 3.0, "another trajectory": 9.0}.get(begin, 1.0), 0.5, 0.2]
    if begin == "one of the batch rises":
        sigmas[2] = torch.tensor([1.0, 2.5, 1.0])
    if begin == "another shape":
        noises[2:] = [noise[:2] for noise in noises[2:]]
    found = follow(wrapped, noises[:2], sigmas[:2])
    if begin == "reset":
        wrapped.reset()
    found += follow(wrapped, noises[2:], sigmas[2:])
    assert_same(found, by_hand(noises, [[], [0], [], [2], [2, 3]], 2.0, 2))


def test_a_sigma_for_each_sample_or_one_for_all():
    noises, sigmas = directions(4, seed=3), [5.0, 2.0, 0.5, 0.1]
    one, *others = (
        follow(LMLDenoiser(None, 2, 2.0), noises, [shaped(sigma) for sigma in sigmas])
        for shaped in (
            float,
            torch.tensor,
            lambda sigma: torch.full((3,), sigma),
            lambda sigma: torch.full((3, 1, 1, 1), sigma, dtype=torch.float64),
        )
    )
    for other in others:
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    each = [sigma * torch.tensor([1.0, 2.0, 0.3]) for sigma in sigmas]
    together = follow(LMLDenoiser(None, 2, 2.0), noises, each)
    for b in range(3):
        alone = [noise[b : b + 1] for noise in noises]
        alone = follow(LMLDenoiser(None, 2, 2.0), alone, [sigma[b] for sigma in each])
        assert_same([g[b : b + 1] for g in together], alone)


def test_a_list_has_an_entry_for_each_noise_level():
    sigmas, x = karras(4), start(karras(4))
    exact = Exact()
    for sampler in (euler, heun):
        sampler(LMLDenoiser(exact, damping=[None, 8.0, 8.0, 8.0], steps=4), x, sigmas)
        with pytest.raises(UserError, match=r"^damping=\[8.0, 8.0, 8.0\]: has 3 entries, and"):
            sampler(LMLDenoiser(exact, damping=[8, 8, 8]), x, sigmas)
        with pytest.raises(UserError, match=r"^length=\[1.0, 1.1\]: has 2 entries, and"):
            sampler(LMLDenoiser(exact, damping=8, length=[1, 1.1]), x, sigmas)
    for option in ("damping", "length"):
        with pytest.raises(ValueError, match=rf"^{option}=\[1.0, 2.0\]: has 2 entries for 4 steps"):
            LMLDenoiser(exact, **{"damping": 8, option: [1, 2], "steps": 4})


def test_sigma_zero_is_no_step():
    noises = directions(3, seed=4)
    wrapped = LMLDenoiser(None, 1, [1.0, 1.0])
    follow(wrapped, noises[:2], [2.0, 1.0])
    anchors = wrapped.anchors
    denoised = torch.randn(3, 2, 4, 4)
    wrapped.denoiser = lambda x, sigma: denoised
    for zero in (0, torch.zeros(()), torch.zeros(3)):
        assert wrapped(torch.randn(3, 2, 4, 4), zero) is denoised
    assert wrapped.anchors is anchors and wrapped.step == 1
    # or for one sample alone, which is then left as it is
    made = LMLDenoiser(lambda x, sigma: denoised, 1, 1.0)
    made(torch.randn(3, 2, 4, 4), torch.tensor([1.0, 1.0, 1.0]))
    found = made(torch.randn(3, 2, 4, 4), torch.tensor([0.5, 0.0, 1e-30]))
    assert found.isfinite().all() and torch.equal(found[1], denoised[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_the_rounding_of_float32(dtype):
    xs, denoised = directions(3, seed=5), directions(3, seed=6)
    results = []
    for wide in (False, True):
        wrapped = LMLDenoiser(None, 2, 2.0)
        for x, made, sigma in zip(xs, denoised, (4.0, 2.0, 0.5), strict=True):
            x, made = x.to(dtype), made.to(dtype)
            x, made = (x.float(), made.float()) if wide else (x, made)
            wrapped.denoiser = lambda x, sigma, made=made: made
            result = wrapped(x, torch.full((3,), sigma, dtype=x.dtype))
            assert result.dtype == x.dtype
            results.append(result.to(dtype))
    assert all(torch.equal(a, b) for a, b in zip(results[:3], results[3:], strict=True))


def test_the_type_is_that_of_the_denoised_where_x_has_another():
    """EDM's sampler holds x in float64, and its network returns float32."""
    wrapped = LMLDenoiser(lambda x, sigma: (0.5 * x).float().sin(), 1, 1.0)
    x = torch.randn(2, 3, dtype=torch.float64)
    assert [wrapped(x, sigma).dtype for sigma in (2.0, 1.0)] == [torch.float32] * 2
    assert wrapped.anchors[0].dtype == torch.float64


def test_gradients_flow_but_not_through_anchors():
    first, x = (v.requires_grad_() for v in directions(2, seed=7, shape=(2, 5)))
    weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def made(x: Tensor, weight: Tensor) -> Tensor:
        wrapped = LMLDenoiser(lambda x, sigma: weight * x.sin(), 1, 0.5)
        wrapped(first, 2.0)
        return wrapped(x, 1.0)

    # by differences, the weight would also change the anchor
    torch.autograd.gradcheck(lambda x: made(x, weight), (x,))
    made(x, weight).sum().backward()
    assert first.grad is None and weight.grad.isfinite() and weight.grad != 0


def test_it_is_a_module_and_has_what_its_denoiser_has():
    exact = Exact()
    wrapped = LMLDenoiser(exact, damping=3.0)
    assert (wrapped.sigma_min, wrapped.sigma_max) == (0.002, 80.0)
    assert wrapped.inner_model is exact.inner_model and wrapped.round_sigma(3) == 3
    with pytest.raises(AttributeError, match="no attribute 'sigma_mean'"):
        _ = wrapped.sigma_mean
    assert LMLDenoiser(lambda x, sigma: x, 1, 1.0).eval().to(torch.float16).correction.rank == 1
    assert dict(wrapped.named_modules())["denoiser"] is exact
    moved = LMLDenoiser(nn.Linear(2, 2), 1, 1.0).to(torch.float64)
    assert moved.weight.dtype == torch.float64


def test_a_copy_in_mid_trajectory_goes_on_by_itself():
    exact, sigmas = Exact(), karras(4)
    x = start(sigmas)
    wrapped = LMLDenoiser(exact, damping=3.0)
    for sigma in sigmas[:2]:
        wrapped(x, sigma)
    file = io.BytesIO()
    torch.save(wrapped, file)
    file.seek(0)
    copies = [copy.deepcopy(wrapped), torch.load(file, weights_only=False)]
    expected = wrapped(x, sigmas[2])
    assert all(torch.equal(other(x, sigmas[2]), expected) for other in copies)


def test_what_else_a_sampler_passes_reaches_the_denoiser():
    seen = []

    def denoiser(x: Tensor, sigma: float, *args, **extra) -> Tensor:
        seen.append((args, extra))
        return x.sin()

    LMLDenoiser(denoiser, damping=3.0)(torch.ones(1, 2), 1.0, "labels", cond=7)
    assert seen == [(("labels",), {"cond": 7})]


def test_the_default_damping():
    def damping(**options):
        return LMLDenoiser(None, **options)._damping

    karras = "use_karras_sigmas"
    assert damping(sampler="euler") == damping(sampler="ddim", steps=20) == default_damping(2) == 6
    assert damping(sampler="dpmpp_2m", steps=10) == default_damping(
        2, 10, 2, "multistep in x0", karras
    )
    others = [damping(rank=1, sampler=name, steps=20) for name in SAMPLERS]
    assert (
        damping(rank=1, steps=20)
        == max(others)
        == default_damping(1, 20, 4, "Adams-Bashforth", karras)
    )
    assert damping(damping=3, sampler="lms") == 3 and damping(rank=0) is None
    for options, message in [
        ({}, "steps=None: the default damping needs the number of steps"),
        ({"sampler": "dpmpp_2m"}, "steps=None: "),
        ({"sampler": "dpmpp_2m_sde", "steps": 5}, "sampler=dpmpp_2m_sde: one of dpmpp_2m, or None"),
        ({"steps": 0}, "steps=0: must be a whole number > 0"),
        ({"steps": 2.5}, "steps=2.5: "),
        ({"steps": True}, "steps=True: "),
        ({"freeze": 0.2, "damping": 3}, "freeze=0.2: "),
    ]:
        with pytest.raises(UserError, match=f"^{re.escape(message)}"):
            damping(**options)
    with pytest.raises(ValueError, match=r"^rank=-1: "):
        LMLDenoiser(None, rank=-1, damping=3)


def even_in_time(steps: int) -> Tensor:
    """Sigmas of a DDPM's timesteps 999 ... 1, and 0."""
    timesteps = torch.linspace(999, 1, steps, dtype=torch.float64)
    alpha, sigma = Gaussian.random(2).noise_levels(timesteps)
    return torch.cat([sigma / alpha, sigma.new_zeros(1)])


@pytest.mark.parametrize("kind", [Gaussian, MixtureOfGaussians])
@pytest.mark.parametrize("grid", [karras, even_in_time])
@pytest.mark.parametrize("sampler", METHODS)
def test_the_default_does_no_harm(kind, grid, sampler):
    exact, method = Exact(kind), METHODS[sampler]
    for steps in (5, 10, 20):
        sigmas = grid(steps)
        x = start(sigmas, 8)
        share = torch.linspace(0, 1, 200, dtype=torch.float64)
        fine = sigmas[0] * (sigmas[-2] / sigmas[0]) ** share
        solution = dpmpp_2m(exact, x, torch.cat([fine, sigmas[-1:]]))
        errors = []
        for rank in (0, 1, 2):
            made = method(LMLDenoiser(exact, rank, sampler=sampler, steps=steps), x, sigmas)
            errors.append((made - solution).square().mean().sqrt().item())
        for rank, error in enumerate(errors[1:], 1):
            assert error <= 1.05 * errors[0], f"{steps} steps, rank {rank}: {errors}"
            if sampler == "euler" and grid is even_in_time:
                assert error <= 0.97 * errors[0]


def test_the_block_of_the_readme_runs():
    text = README.read_text()
    section = text[text.index("### In k-diffusion, EDM or ComfyUI") :]
    (block,) = re.findall(r"```python\n(.*?)```", section[: section.index("\n## ")], re.S)
    sigmas = karras(10)
    x, exact = start(sigmas), Exact()
    names = {"denoiser": exact, "sample_dpmpp_2m": dpmpp_2m, "x": x, "sigmas": sigmas}
    exec(block, names)
    assert isinstance(names["denoiser"], LMLDenoiser)
    made = names["samples"]
    assert made.shape == x.shape and not torch.equal(made, dpmpp_2m(exact, x, sigmas))


def test_importing_the_package_is_light():
    code = "import sys, lml; assert 'torch' not in sys.modules; from lml import LMLDenoiser; " + (
        "assert not {'diffusers', 'hydra', 'scipy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    import lml

    with pytest.raises(AttributeError, match="module 'lml' has no attribute 'Denoiser'"):
        _ = lml.Denoiser
