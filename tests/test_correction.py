"""The correction against its formula in float64, and every numeric bound that it promises."""

from __future__ import annotations

import math

import pytest
import torch
from along import along
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lml import numerics
from lml.correction import LMLCorrection, formula
from lml.damping import default_damping

DTYPES = {torch.float64: 1e-10, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def plain(
    anchors: list[Tensor], g: Tensor, damping: float, relative: bool = True, normed: bool = True
) -> Tensor:
    """The formula as it is written, in the type of `g`."""
    U = torch.stack([u.flatten(1) for u in anchors], 2)
    return formula(g.flatten(1), U, damping, relative, normed).view_as(g)


def by_inverse(
    anchors: list[Tensor], g: Tensor, damping: float, relative: bool, normed: bool
) -> Tensor:
    """d = lambda H^-1 g with the D x D matrix H itself: no Woodbury, no batch."""
    rows = []
    for b in range(len(g)):
        U = torch.stack([u[b].flatten() for u in anchors], 1)
        lam = damping * (U**2).sum(0).mean() if relative else damping
        H = U @ U.T + lam * torch.eye(len(U), dtype=U.dtype)
        d = lam * torch.linalg.solve(H, g[b].flatten())
        rows.append(d * g[b].norm() / d.norm() if normed else d)
    return torch.stack(rows).view_as(g)


def by_least_squares(anchors: list[Tensor], g: Tensor, damping: float, relative: bool) -> Tensor:
    """g' through the ridge regression of g on the anchors, by QR: good at any small damping."""
    rows = []
    for b in range(len(g)):
        U = torch.stack([u[b].double().flatten() for u in anchors], 1)
        lam = damping * (U**2).sum(0).mean() if relative else torch.tensor(damping).double()
        padded = torch.cat([U, lam.sqrt() * torch.eye(U.shape[1], dtype=torch.float64)])
        target = torch.cat([g[b].double().flatten(), torch.zeros(U.shape[1], dtype=torch.float64)])
        y = torch.linalg.lstsq(padded, target[:, None], driver="gelsd").solution
        d = g[b].double().flatten() - (U @ y)[:, 0]
        rows.append(d * g[b].double().norm() / d.norm())
    return torch.stack(rows).view_as(g)


def last(correction: LMLCorrection, directions: list[Tensor]) -> Tensor:
    correct = along(correction)
    for direction in directions:
        corrected = correct(direction)
    return corrected


def error(a: Tensor, b: Tensor) -> float:
    """Largest relative error of a sample."""
    a, b = a.double().flatten(1), b.double().flatten(1)
    return ((a - b).norm(dim=1) / b.norm(dim=1)).max().item()


def directions(count: int, seed: int, shape=(3, 2, 4, 4)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 2, 3, 5])
@pytest.mark.parametrize("scale", ["relative", "absolute"])
@pytest.mark.parametrize("normed", [True, False])
def test_equals_the_formula(dtype, rank, scale, normed):
    inputs = [v.to(dtype) for v in directions(rank + 3, seed=rank)]
    correction = LMLCorrection(rank, 0.7, scale, norm_preserving=normed)
    corrected = last(correction, inputs)
    assert corrected.dtype == dtype
    *anchors, g = (v.double() for v in inputs[-1 - rank :])
    expected = plain(anchors, g, 0.7, scale == "relative", normed)
    assert error(corrected, expected) < DTYPES[dtype]


@pytest.mark.parametrize("rank", [1, 2, 3, 5])
@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("normed", [True, False])
def test_the_formula_is_the_inverse_of_the_hessian(rank, relative, normed):
    *anchors, g = directions(rank + 1, seed=rank)
    expected = by_inverse(anchors, g, 0.7, relative, normed)
    assert error(plain(anchors, g, 0.7, relative, normed), expected) < 1e-12


@pytest.mark.parametrize("options", [{"rank": 3}, {"rank": 1, "anchor": "ema", "kappa": 0.3}])
def test_the_columns_of_the_formula_are_the_anchors(options):
    correction = LMLCorrection(**options)
    anchors = directions(correction.rank, seed=17)
    (g,) = directions(1, seed=18)
    expected = plain(correction.columns(anchors, g), g, 0.7)
    assert error(correction(g, anchors, 0.7)[0], expected) < 1e-10


def test_history_grows_to_the_rank_and_holds_uncorrected_directions():
    inputs = directions(5, seed=1)
    correct = along(LMLCorrection(rank=3, damping=2.0))
    for k, g in enumerate(inputs):
        corrected = correct(g)
        anchors = inputs[max(0, k - 3) : k]
        expected = plain(anchors, g, 2.0) if anchors else g
        assert error(corrected, expected) < 1e-10


def test_anchors_are_copies():
    inputs = directions(2, seed=2)
    kept, mutated = along(LMLCorrection(rank=1)), along(LMLCorrection(rank=1))
    first = inputs[0].clone()
    kept(inputs[0])
    mutated(first)
    first.zero_()
    assert torch.equal(kept(inputs[1]), mutated(inputs[1]))


@pytest.mark.parametrize("kappa", [0.1, 0.5, 1.0])
def test_ema_mixes_the_previous_direction_into_the_anchor(kappa):
    inputs = directions(4, seed=3)
    correct = along(LMLCorrection(1, 0.3, anchor="ema", kappa=kappa))
    for k, g in enumerate(inputs):
        corrected = correct(g)
        expected = g if k == 0 else plain([kappa * inputs[k - 1] + (1 - kappa) * g], g, 0.3)
        assert error(corrected, expected) < 1e-8


@pytest.mark.parametrize("dtype", DTYPES)
def test_ema_of_the_largest_numbers_is_finite(dtype):
    g = torch.full((2, 5), torch.finfo(dtype).max, dtype=dtype)
    for kappa in torch.rand(50, generator=torch.Generator().manual_seed(0)).tolist():
        for previous in (g, -g):
            corrected, _ = LMLCorrection(1, anchor="ema", kappa=kappa)(g, (previous,), 1.0)
            assert corrected.isfinite().all()


@pytest.mark.parametrize("scale", ["relative", "absolute"])
@pytest.mark.parametrize("damping", [1e-12, 5e-5, 1.0])
def test_ema_with_kappa_0_is_the_identity(scale, damping):
    correct = along(LMLCorrection(1, damping, scale, "ema", 0.0))
    for g in directions(3, seed=4, shape=(2, 3, 32, 32)):
        assert torch.equal(correct(g.float()), g.float())


def test_ema_with_kappa_0_shrinks_without_norm_preservation():
    (g,) = directions(1, seed=5)
    shrunk = along(LMLCorrection(1, 0.25, anchor="ema", norm_preserving=False))(g)
    torch.testing.assert_close(shrunk, g * 0.25 / 1.25)


@st.composite
def trajectories(draw):
    """Float32 directions [u_1 ... u_r, g] whose cosines, and sizes, are drawn from wide ranges."""
    rank = draw(st.integers(1, 4))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    size = draw(st.sampled_from([1, 5, 48, 700]))
    vectors = [torch.randn(2, size, generator=generator, dtype=torch.float64)]
    for _ in range(rank):
        noise = draw(st.sampled_from([0.0, 1e-3, 0.1, 1.0, 30.0]))
        fresh = torch.randn(2, size, generator=generator, dtype=torch.float64)
        vectors.append(vectors[-1] + noise * fresh)
    scale = 10.0 ** draw(st.integers(-15, 15))
    return [(v * scale).float() for v in vectors]


def largest_cosine(vectors: list[Tensor]) -> float:
    """The cosine of g to the span of its anchors: the bound holds for every combination of them."""
    worst = 0.0
    for b in range(len(vectors[0])):
        U = torch.stack([u[b].double() for u in vectors[:-1]], 1)
        q, s, _ = torch.linalg.svd(U, full_matrices=False)
        q = q[:, s > 1e-9 * s[0]]
        g = vectors[-1][b].double()
        worst = max(worst, ((q.T @ g).norm() / g.norm()).item())
    return worst


def test_small_anchors_beside_a_large_one():
    """What tells two nearly parallel anchors apart is not lost in the rounding of a third."""
    g = torch.Generator().manual_seed(0)
    first, large, direction = (torch.randn(4, 5, generator=g) for _ in range(3))
    near = first + 4e-4 * torch.randn(4, 5, generator=g)
    vectors = [2e5 * first, 2e5 * near, 6e6 * large, 9e6 * direction]
    for damping in (1e-6, 1e-3, 0.1, 10.0):
        corrected = last(LMLCorrection(3, damping, "absolute"), vectors)
        assert error(corrected, by_least_squares(vectors[:-1], vectors[-1], damping, False)) < 1e-4


@settings(max_examples=150, deadline=None)
@given(trajectories(), st.integers(-12, 12), st.booleans())
def test_float32_agrees_with_a_second_method_in_float64(vectors, exponent, relative):
    damping = 10.0**exponent
    mean_square = max(
        torch.stack([u.double().square().sum(1) for u in vectors[:-1]]).mean(0).max().item(), 1e-300
    )
    small = damping < 0.1 if relative else damping < 0.1 * mean_square
    if small and largest_cosine(vectors) > 0.99:
        return
    scale = "relative" if relative else "absolute"
    corrected = last(LMLCorrection(len(vectors) - 1, damping, scale), vectors)
    expected = by_least_squares(vectors[:-1], vectors[-1], damping, relative)
    # The floor under the damping is felt where anchors are nearly parallel to one another.
    values = [
        torch.linalg.svdvals(torch.stack(us, 1).double()) for us in zip(*vectors[:-1], strict=True)
    ]
    spread = max((s[0] / s[s > 1e-9 * s[0]][-1]).item() if s[0] > 0 else 1.0 for s in values)
    assert error(corrected, expected) < 1e-4 + 1e-12 * spread**2


@pytest.mark.parametrize("rank", [1, 2, 3, 5])
@pytest.mark.parametrize("relative", [True, False])
def test_float32_is_taken_where_it_is_enough_and_only_there(rank, relative, monkeypatch):
    """At any cosine of the anchors; the damping goes from where float32 fails to far above."""
    again, scale = [], "relative" if relative else "absolute"
    monkeypatch.setattr(numerics, "_in_float64", _counting(numerics._in_float64, again))
    base, *others = directions(rank + 2, seed=19, shape=(32, 3, 8, 8))
    turn = torch.logspace(-4, 1, 32, dtype=torch.float64)[:, None, None, None]
    *anchors, g = [(base + turn * other).float() for other in others]
    doubles = [v.double() for v in (*anchors, g)]
    for damping in (1e-3, 0.03, 0.1, 0.3, 1.0, rank, 2 * rank, 100.0):
        again.clear()
        corrected, _ = LMLCorrection(rank, 1.0, scale)(g, anchors, damping)
        assert error(corrected, plain(doubles[:-1], doubles[-1], damping, relative)) < 2e-5
        ratio = corrected.double().flatten(1).norm(dim=1) / doubles[-1].flatten(1).norm(dim=1)
        assert torch.all((ratio - 1).abs() < 1e-6)
        if relative and not 0.03 < damping < 1:
            assert bool(again) == (damping < 1)


def _counting(function, calls: list):
    def counted(*args):
        calls.append(len(args[0][0]))
        return function(*args)

    return counted


def test_the_naive_float32_formula_fails_where_ours_holds():
    base, other, g = directions(3, seed=6, shape=(4, 3072))
    anchors = [base.float(), (base + 1e-3 * other).float()]
    g = g.float()
    expected = by_least_squares(anchors, g, 1e-12, True)
    assert error(last(LMLCorrection(2, 1e-12), [*anchors, g]), expected) < 1e-4
    failed = plain(anchors, g, 1e-12)
    assert not error(failed, expected) < 1e-4

    # The published case: the anchor is g itself, damping far below |g|^2.
    failed = plain([g], g, 1e-3 / 3072)
    assert not error(failed, g) < 1e-4
    assert error(along(LMLCorrection(1, 1e-3, "absolute", "ema", 0.0))(g), g) == 0


extremes = st.sampled_from([0.0, 1e-45, 1e-38, 1e-20, 1.0, 1e19, 3.4e38])


@settings(max_examples=150, deadline=None)
@given(
    st.lists(extremes, min_size=2, max_size=4),
    st.integers(-300, 300),
    st.booleans(),
    st.sampled_from(list(DTYPES)),
    st.sampled_from(["history", "ema"]),
    st.floats(0, 1),
    st.integers(0, 2**31),
)
def test_finite_input_gives_finite_output(sizes, exponent, relative, dtype, anchor, kappa, seed):
    limit = torch.finfo(dtype).max
    generator = torch.Generator().manual_seed(seed)
    correct = along(
        LMLCorrection(
            1 if anchor == "ema" else 3,
            10.0**exponent,
            "relative" if relative else "absolute",
            anchor,
            kappa,
        )
    )
    for size in sizes:
        size = size**7 if dtype == torch.float64 else size
        g = (torch.rand(2, 6, generator=generator, dtype=torch.float64) * 2 - 1) * size
        corrected = correct(g.clamp(-limit, limit).to(dtype))
        assert corrected.isfinite().all()


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_equal_anchors_and_zeros(rank):
    (u, g) = directions(2, seed=7)
    correction = LMLCorrection(rank, 1e-12)
    repeated = last(correction, [u.float()] * rank + [g.float()])
    assert error(repeated, by_least_squares([u.float()], g.float(), 1e-12, True)) < 1e-5
    zero = torch.zeros_like(g)
    assert torch.equal(last(LMLCorrection(rank), [u, u, zero]), zero)
    unexplained = last(LMLCorrection(rank), [zero] * rank + [g])
    torch.testing.assert_close(unexplained, g, rtol=1e-15, atol=0)


@settings(max_examples=60, deadline=None)
@given(trajectories(), st.integers(-12, 12))
def test_the_norm_is_preserved(vectors, exponent):
    corrected = last(LMLCorrection(len(vectors) - 1, 10.0**exponent), vectors)
    norm = vectors[-1].double().norm(dim=1)
    ratio = corrected.double().norm(dim=1) / norm
    assert torch.all((ratio - 1).abs() < 1e-6)


@pytest.mark.parametrize("damping", [0.5, 8.0])
@pytest.mark.parametrize("poison", [math.nan, 3e38, 1e-30, 0.0])
def test_samples_do_not_influence_one_another(damping, poison):
    # More numbers than one block holds, so that blocks are covered too.
    inputs = [v.float() for v in directions(3, seed=8, shape=(100, 3, 32, 32))]
    together = last(LMLCorrection(2, damping), inputs)
    for k in (0, 41, 42, 43, 99):
        alone = last(LMLCorrection(2, damping), [v[k : k + 1] for v in inputs])
        assert error(alone, together[k : k + 1]) < 1e-6
    poisoned = [v.clone() for v in inputs]
    poisoned[0][50] = poison
    rest = last(LMLCorrection(2, damping), poisoned)
    others = torch.arange(100) != 50
    assert torch.equal(rest[others], together[others])


def test_the_norm_is_preserved_in_float32_at_a_million_numbers():
    inputs = [v.float() for v in directions(3, seed=15, shape=(1, 3, 600, 600))]
    corrected = last(LMLCorrection(2, 8.0), inputs)
    ratio = corrected.double().norm() / inputs[-1].double().norm()
    assert (ratio - 1).abs() < 1e-6


def test_half_precision_is_the_rounding_of_float32():
    for dtype in (torch.float16, torch.bfloat16):
        halves = [v.to(dtype) for v in directions(3, seed=9)]
        expected = last(LMLCorrection(2), [v.float() for v in halves]).to(dtype)
        assert torch.equal(last(LMLCorrection(2), halves), expected)


@pytest.mark.parametrize("rank", [1, 2, 3, 5])
def test_the_default_damping_turns_by_half_a_step(rank):
    """Directions that turn by the same small angle each step: g' is g turned by half of it more."""
    step = 1e-3
    turning = [
        torch.tensor([[math.cos(k * step), math.sin(k * step)]], dtype=torch.float64)
        for k in range(rank + 1)
    ]
    x, y = last(LMLCorrection(rank=rank), turning)[0].tolist()
    assert math.atan2(y, x) - rank * step == pytest.approx(0.5 * step, rel=1e-2)


def test_the_default_damping_by_steps():
    assert [default_damping(r) for r in (0, 1, 2, 3)] == [1, 2, 6, 12]
    assert [default_damping(2, n, order=2) for n in (2, 5, 10, 20)] == [12, 12, 96, 768]
    assert [default_damping(2, n, order=1) for n in (2, 20)] == [6, 6]
    assert default_damping(1, 10, 3, "Adams-Bashforth", "use_karras_sigmas") == 2 * 8 * 256 * 16
    assert default_damping(1, 10, 1, "Adams-Bashforth", "use_karras_sigmas") == 2


def test_the_damping_of_each_step():
    times = (900, 600, 300)
    for options, expected in [
        ({}, (6, 6, 6)),
        ({"damping": 3}, (3, 3, 3)),
        ({"damping": [3, None, 0.5]}, (3, None, 0.5)),
        ({"freeze": 0.4}, (None, None, 6)),
        ({"damping": (3, 2, None), "freeze": 0.2}, (None, 2, None)),
    ]:
        assert LMLCorrection(**options).dampings(times, 1000, default=6) == expected
    with pytest.raises(ValueError, match=r"^damping=\[1\.0, 2\.0\]: has 2 entries for 3 steps$"):
        LMLCorrection(damping=[1, 2]).dampings(times, 1000, default=6)


def test_a_default_damping_is_relative_whatever_the_scale_of_a_given_one():
    assert LMLCorrection(damping_scale="absolute").is_relative
    assert not LMLCorrection(damping=[None, 1.0], damping_scale="absolute").is_relative


def test_a_step_without_damping_is_left_alone_and_remembered():
    first, second, third = directions(3, seed=16)
    correction = LMLCorrection(2, 1.0)
    unchanged, anchors = correction(second, (first,), None)
    assert unchanged is second
    corrected, _ = correction(third, anchors, 1.0)
    assert error(corrected, plain([first, second], third, 1.0)) < 1e-10


def test_limits_of_the_damping():
    inputs = directions(3, seed=10)
    assert error(last(LMLCorrection(2, 1e12), inputs), inputs[-1]) < 1e-9
    residual = last(LMLCorrection(2, 1e-12, norm_preserving=False), inputs)
    for u in inputs[:2]:
        assert (residual * u).flatten(1).sum(1).abs().max() < 1e-9


def test_memory_format_does_not_matter():
    inputs = [v.float() for v in directions(3, seed=11)]
    strided = [v.contiguous(memory_format=torch.channels_last) for v in inputs]
    for damping in (6.0, 1e-6):  # in float32, and in float64
        corrected = last(LMLCorrection(2, damping), strided)
        assert torch.equal(last(LMLCorrection(2, damping), inputs), corrected)
        assert corrected.is_contiguous(memory_format=torch.channels_last)


def test_gradients_flow():
    u, g = directions(2, seed=12, shape=(2, 5))
    g.requires_grad_(True)
    torch.autograd.gradcheck(lambda g: last(LMLCorrection(1, 0.5), [u, g]), (g,))


def test_gradients_do_not_flow_through_anchors():
    u, g = directions(2, seed=12, shape=(2, 5))
    correct = along(LMLCorrection(1, 0.5))
    correct(u.requires_grad_(True))
    correct(g.requires_grad_(True)).sum().backward()
    assert u.grad is None and g.grad.isfinite().all()


def test_rank_0_returns_its_argument():
    (g,) = directions(1, seed=14)
    assert LMLCorrection(rank=0)(g, (), 1.0) == (g, ())


def test_anchors_of_another_shape_are_dropped():
    correction = LMLCorrection(2, 1.0)
    old, g = torch.randn(4, 3), torch.randn(2, 3)
    corrected, anchors = correction(g, (old,), 1.0)
    assert torch.equal(corrected, g) and [u.shape for u in anchors] == [g.shape]


@pytest.mark.parametrize(
    "option",
    [
        {"rank": -1},
        {"rank": 1.5},
        {"rank": True},
        {"rank": "2"},
        {"damping": 0},
        {"damping": -1.0},
        {"damping": math.nan},
        {"damping": math.inf},
        {"damping": "8"},
        {"damping": []},
        {"damping": [1.0, 0]},
        {"damping": [1.0, "2"]},
        {"damping": [[1.0]]},
        {"damping": {1.0: 2.0}},
        {"damping_scale": "log"},
        {"anchor": "mean"},
        {"kappa": 1.1},
        {"kappa": -0.1},
        {"kappa": math.nan},
        {"freeze": 2},
        {"freeze": math.nan},
        {"norm_preserving": "yes"},
        {"anchor": "ema", "rank": 2},
    ],
)
def test_options_out_of_range_are_refused_by_name(option):
    with pytest.raises(ValueError, match=f"^{list(option)[-1]}="):
        LMLCorrection(**option)


def test_inner_products_are_kept_from_step_to_step():
    """A step of a trajectory gives the bits of a step that knows no product yet."""
    correction = LMLCorrection(rank=3)
    directions = [torch.randn(5, 3, 8, 8) for _ in range(7)]
    directions[3][0] *= 1e25  # its square overflows: done again in float64
    anchors = ()
    for g in directions:
        alone, _ = correction(g, tuple(anchors), 2.0)
        corrected, anchors = correction(g, anchors, 2.0)
        assert torch.equal(corrected, alone)
    assert anchors.products.shape == (5, 3, 3)
    expected = torch.einsum("ib...,jb...->bij", *2 * [torch.stack(anchors).double()])
    assert error(anchors.products[1:].double(), expected[1:]) < 1e-6
    others = numerics.Anchors(anchors)
    others.products = 2 * anchors.products
    pairs = [correction(directions[0], u, 2.0)[0] for u in (anchors, others)]
    assert error(*pairs) > 1e-3  # they are used
    _, anchors = correction(directions[0], anchors, None)  # a step that is left as it is
    assert anchors.products is None
    _, anchors = correction(directions[0][:2], anchors, 2.0)  # another batch size
    assert len(anchors) == 1 and anchors.products is None
