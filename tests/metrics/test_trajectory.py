"""Metrics along the trajectory: closed forms on the Gaussian, and second implementations."""

from __future__ import annotations

import copy
import itertools
import json

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from omegaconf import OmegaConf
from torch import Tensor

from lml import schedulers
from lml.data.assets import ROOT
from lml.data.images import read
from lml.errors import UserError
from lml.exact import Gaussian, MixtureOfGaussians
from lml.metrics.base import class_by_name
from lml.metrics.evaluate import build
from lml.metrics.trajectory import CorrectionCosine, Hessian, IdealDirection
from lml.pipelines import pixel
from lml.pipelines.trajectory import Correction, Replay, Trajectory, record
from lml.runs import repeat
from lml.runs.records import read_config

SCHEDULE = DDPMScheduler(prediction_type="v_prediction", clip_sample=False)
STEPS = 5


def replay(
    cls: type = schedulers.LMLDDIMScheduler,
    model: torch.nn.Module | None = None,
    batches: tuple[int, ...] = (3, 2),
    spacing: str = "trailing",
    **options,
) -> Replay:
    """A run from the seeds 0, 1, ... in float64."""
    model = (model or Gaussian.random(4, scheduler=SCHEDULE)).double()
    scheduler = cls.from_config(SCHEDULE.config, timestep_spacing=spacing, **options)
    scheduler.set_timesteps(STEPS)
    made = []
    for k, count in enumerate(batches):
        seeds = range(sum(batches[:k]), sum(batches[:k]) + count)
        noise, _ = pixel.draw_noise(seeds, model.shape)
        with record(model, scheduler) as trajectory:
            trajectory.images = pixel.sample(model, scheduler, STEPS, noise)
        made.append(trajectory)
    return Replay(model, scheduler, scheduler.timesteps.tolist(), sum(batches), made)


def computed(metric, run: Replay) -> dict:
    metric.update(run)
    return metric.compute()


def cosine(x: Tensor, y: Tensor) -> np.ndarray:
    x, y = (v.double().flatten(1).numpy() for v in (x, y))
    return (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)


# --- the record of a trajectory


def test_what_is_recorded():
    """At each step x_t, g and g', with the step that the solver makes of them."""
    run = replay(rank=2, damping=1.0)
    for trajectory in run.batches:
        times = [t for t, _ in trajectory.evaluations]
        assert times == run.timesteps
        assert [len(c.anchors) for c in trajectory.corrections] == [0, 1, 2, 2, 2][:STEPS]
        ends = [x for _, x in trajectory.evaluations[1:]] + [trajectory.images]
        path = zip(trajectory.evaluations, trajectory.corrections, ends, strict=True)
        for (t, x), correction, x_s in path:
            g, corrected = correction.direction, correction.corrected
            alpha, sigma = run.network.noise_levels(t)
            alpha_s, sigma_s = run.network.noise_levels(t - 200) if t > 200 else (1.0, 0.0)
            noise = (x - alpha * run.network.posterior_mean(x, t)) / sigma
            torch.testing.assert_close(g, noise, rtol=1e-5, atol=1e-5)
            clean = (x - sigma * corrected) / alpha
            torch.testing.assert_close(
                x_s, alpha_s * clean + sigma_s * corrected, rtol=1e-4, atol=1e-4
            )
    assert not run.network._forward_hooks and not run.scheduler.correction._forward_hooks


def test_without_lml_and_without_an_exact_model(tiny_unet):
    assert replay(rank=0).batches[0].corrections == []
    network, scheduler = tiny_unet(), schedulers.LMLDDIMScheduler(clip_sample=False)
    with record(network, scheduler) as trajectory:
        noise, _ = pixel.draw_noise([0], (3, 8, 8))
        pixel.sample(network, scheduler, STEPS, noise)
    assert trajectory.evaluations == [] and len(trajectory.corrections) == STEPS


def test_a_replay_is_the_run(script, tmp_path):
    """Same images to the last bit, from another seed than 0, and no more than are asked."""
    arguments = ["model=gaussian", "model.network.sample_size=4", "seed=7", "threads=1"]
    arguments += ["num_images=5", "batch_size=2", "nfe=4", "metrics=none", "run_dir=run"]
    assert script("sample", *arguments).code == 0
    config = read_config(tmp_path / "run")
    again = repeat.replay(config, torch.device("cpu"), 4)
    assert again.timesteps == [999, 749, 500, 250]
    images = torch.cat([trajectory.images for trajectory in again.batches])
    stored = [read(tmp_path / f"run/images/{i:06d}.png") for i in range(4)]
    assert torch.equal(pixel.to_uint8(images), torch.stack(stored))


# --- cosine of the correction


def test_correction_cosine_by_numpy():
    run = replay(rank=2, damping=1.0)
    result = computed(CorrectionCosine(5), run)
    expected = np.array(
        [
            np.concatenate(
                [cosine(c.direction, c.corrected) for c in (b.corrections[k] for b in run.batches)]
            )
            for k in range(STEPS)
        ]
    )
    assert result["steps"]["timestep"].tolist() == run.timesteps
    np.testing.assert_allclose(result["steps"]["cosine"], expected.mean(1), rtol=1e-6)
    assert result["cosine"].item() == pytest.approx(expected.mean(), rel=1e-6)
    assert result["min"].item() == pytest.approx(expected.min(), rel=1e-6)
    assert expected[0] == pytest.approx(np.ones(5)) and expected.min() < 0.99
    assert result["non_finite"] == 0


def test_without_lml_there_is_no_cosine():
    assert computed(CorrectionCosine(5), replay(rank=0)) == {"non_finite": 0}


def test_samples_that_are_not_finite_are_counted_and_left_out():
    run = replay(rank=1, damping=1.0)
    expected = computed(CorrectionCosine(5), replay(rank=1, damping=1.0, batches=(2,)))
    spoilt = [copy.deepcopy(run.batches[0])]
    spoilt[0].images[2, 0, 0, 0] = torch.inf
    for correction in spoilt[0].corrections:
        correction.corrected[2] = torch.nan
    result = computed(
        CorrectionCosine(5), Replay(run.network, run.scheduler, run.timesteps, 3, spoilt)
    )
    assert result["non_finite"] == 1
    for name in ("cosine", "min"):
        assert result[name].item() == pytest.approx(expected[name].item(), rel=1e-6)


# --- the ideal direction


def test_ideal_direction_of_ddim_on_the_gaussian():
    """By numpy in the eigenbasis: exact noise, exact flow; and DDIM goes where it is told to."""
    run = replay(rank=0)
    model = run.network
    result = computed(IdealDirection(5), run)
    V, s, mu = (v.numpy() for v in (model.basis, model.variances, model.mean))
    times = [*run.timesteps, 0]
    for k, (t, s_) in enumerate(itertools.pairwise(times)):
        (a, b), (a_s, b_s) = ([v.item() for v in model.noise_levels(u)] for u in (t, s_))
        x = torch.cat([batch.evaluations[k][1] for batch in run.batches]).flatten(1).numpy()
        z = (x - a * mu) @ V
        noise = b * z / (a**2 * s + b**2) @ V.T
        x_s = a_s * mu + z * np.sqrt((a_s**2 * s + b_s**2) / (a**2 * s + b**2)) @ V.T
        ideal = (x_s - a_s / a * x) / (b_s - a_s / a * b)
        expected = cosine(torch.from_numpy(noise), torch.from_numpy(ideal))
        assert result["steps"]["prediction"][k].item() == pytest.approx(expected.mean(), abs=1e-9)
        degrees = np.degrees(np.arccos(np.minimum(expected, 1))).mean()
        angle = result["steps"]["angle_prediction"][k].item()
        assert angle == pytest.approx(degrees, rel=1e-4, abs=1e-4)
    assert result["steps"]["timestep"].tolist() == run.timesteps
    assert result["prediction"] == result["corrected"]  # nothing corrects it
    step, prediction = result["steps"]["step"], result["steps"]["prediction"]
    torch.testing.assert_close(step, prediction, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "cls",
    [
        "DDIM",
        "DiscreteIPNDM",
        "DPMSolverMultistep",
        "DEISMultistep",
        "PNDM",
        "HeunDiscrete",
        "UniPCMultistep",
        "EulerDiscrete",
    ],
)
def test_a_direction_that_is_exact_has_cosine_one(cls):
    """Where the noise does not turn: an isotropic Gaussian around zero."""
    isotropic = Gaussian(torch.zeros(3, 2, 2), torch.full((12,), 0.3), scheduler=SCHEDULE)
    cls = getattr(schedulers, f"LML{cls}Scheduler")
    more = {}
    if cls is schedulers.LMLHeunDiscreteScheduler:
        more = {"spacing": "linspace"}
    if cls is schedulers.LMLPNDMScheduler:
        more = {"skip_prk_steps": True}
    run = replay(cls, isotropic, rank=2, **more)
    result = computed(IdealDirection(5), run)
    assert len(run.batches[0].evaluations) > 4
    seen = result["steps"]["timestep"].tolist()
    assert seen == sorted(set(seen), reverse=True)  # of two evaluations at a timestep one
    for name in ("prediction", "corrected", "step"):
        np.testing.assert_allclose(result["steps"][name], 1, atol=1e-4)


def test_corrected_is_what_the_solver_was_given():
    run = replay(rank=2, damping=1.0)
    result = computed(IdealDirection(5), run)
    ideal = computed(IdealDirection(5), replay(rank=0))
    first = result["steps"]["prediction"][0]
    assert first == pytest.approx(ideal["steps"]["prediction"][0].item(), abs=1e-9)
    # DDIM steps along g', so its step is as near to the ideal direction as that
    torch.testing.assert_close(
        result["steps"]["step"], result["steps"]["corrected"], rtol=0, atol=1e-5
    )
    assert (result["steps"]["corrected"] - result["steps"]["prediction"]).abs()[1:].max() > 1e-4


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of algorithm_type="dpmsolver"
@pytest.mark.parametrize(
    ("algorithm", "end"),
    [("dpmsolver", "sigma_min"), ("dpmsolver++", "sigma_min"), ("dpmsolver++", "zero")],
)
def test_a_solver_of_first_order_goes_along_its_prediction(algorithm, end):
    """Also in its last step, to noise of zero or to that of timestep 0."""
    options = {"solver_order": 1, "algorithm_type": algorithm, "final_sigmas_type": end}
    run = replay(schedulers.LMLDPMSolverMultistepScheduler, rank=2, damping=1.0, **options)
    steps = computed(IdealDirection(5), run)["steps"]
    torch.testing.assert_close(steps["step"], steps["corrected"], rtol=0, atol=1e-5)


def test_the_step_of_a_solver_that_revises_it():
    """PNDM evaluates twice for its first step, which it takes along the mean of both."""
    run = replay(schedulers.LMLPNDMScheduler, rank=0, skip_prk_steps=True)
    steps = computed(IdealDirection(5), run)["steps"]
    assert steps["timestep"].tolist() == [999, 799, 599, 399, 199]
    assert steps["angle_step"][0] < 0.5 * steps["angle_prediction"][0]


def test_another_target_leaves_corrected_out():
    run = replay(rank=2, damping=1.0, target="direction")
    names = set(computed(IdealDirection(5), run))
    assert names == {"prediction", "step", "angle_prediction", "angle_step", "steps"}


def test_last_timestep_zero_has_no_step():
    times = computed(IdealDirection(5), replay(spacing="leading"))["steps"]["timestep"].tolist()
    assert times == [800, 600, 400, 200]


# --- the Hessian


def low_rank_problem(rank: int = 2) -> tuple[Gaussian, Tensor]:
    """A Gaussian of variance 1 but in `rank` directions, where it is smaller; and those."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64)).Q
    variances = torch.ones(12, dtype=torch.float64)
    variances[:rank] = 0.1
    return Gaussian(torch.zeros(3, 2, 2), variances, basis, scheduler=SCHEDULE), basis[:, :rank]


def one_step(model: Gaussian, anchors: Tensor, g: Tensor, corrected: Tensor, **options) -> Replay:
    """A run of one sample of which the last step has those anchors (D, r) and directions."""
    scheduler = schedulers.LMLDDIMScheduler(rank=anchors.shape[1], **options)
    shape = (1, *model.shape)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    times = [900.0, 700.0, 300.0][-anchors.shape[1] - 1 :]
    before = [u.view(shape) for u in anchors.T]
    damping = options.get("damping", 1.0)
    corrections = [Correction(u, u, tuple(before[:k]), damping) for k, u in enumerate(before)]
    corrections.append(Correction(g.view(shape), corrected.view(shape), tuple(before), damping))
    trajectory = Trajectory([(t, x) for t in times], corrections)
    return Replay(model, scheduler, times, 1, [trajectory])


def test_anchors_that_make_the_true_hessian():
    """U Uᵀ + lambda I is T itself, and with U and lambda twenty times as large after the fit."""
    model, directions = low_rank_problem()
    alpha, sigma = (v.item() for v in model.noise_levels(300))
    low, high = 1 / (alpha**2 + sigma**2), 1 / (0.1 * alpha**2 + sigma**2)
    U = directions * (high - low) ** 0.5
    g = torch.randn(12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for scale in (1.0, 20.0):
        options = {"damping_scale": "absolute", "damping": scale * low}
        run = one_step(model, scale**0.5 * U, g, g, **options)
        steps = computed(Hessian(1), run)["steps"]
        last = {name: values[-1].item() for name, values in steps.items()}
        assert last["timestep"] == 300
        for norm in ("spectral", "hilbert_schmidt"):
            assert last[norm] == pytest.approx(scale - 1, abs=1e-6)
            assert last[f"{norm}_scaled"] == pytest.approx(0, abs=1e-6)
            assert last[f"{norm}_identity"] > 0.1
        assert last["indefinite"] == 0


def test_the_angle_to_newton():
    """Zero for the exact damped Newton direction, with a relative damping or an absolute one."""
    model, directions = low_rank_problem()
    alpha, sigma = (v.item() for v in model.noise_levels(300))
    inverse = alpha**2 * model.covariance + sigma**2 * torch.eye(12, dtype=torch.float64)
    T = torch.linalg.inv(inverse)
    g = torch.randn(12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    lambda_n = 0.5 * T.trace() / 12  # all its eigenvalues are positive
    n = torch.linalg.solve(T + lambda_n * torch.eye(12, dtype=torch.float64), g)
    anchors = 3 * directions
    expected = np.degrees(np.arccos(cosine(g[None], n[None])))[0]
    for options in (
        {"damping_scale": "relative", "damping": 0.5},
        {"damping_scale": "absolute", "damping": 0.5 * 9},
    ):
        value = computed(Hessian(1), one_step(model, anchors, g, n, **options))["steps"]
        assert value["angle_corrected"][-1].item() == pytest.approx(0, abs=1e-5)
        assert value["angle_prediction"][-1].item() == pytest.approx(expected, rel=1e-6)
        assert expected > 3


@pytest.mark.parametrize("anchor", ["history", "ema"])
def test_every_quantity_by_numpy(anchor):
    """On a mixture, with the anchors that a run had; T by finite differences of the score."""
    model = MixtureOfGaussians.random(2, components=3, rank=2, scheduler=SCHEDULE)
    options = {"rank": 2} if anchor == "history" else {"rank": 1, "kappa": 0.4}
    run = replay(model=model, batches=(1,), anchor=anchor, damping=2.0, **options)
    steps = computed(Hessian(1), run)["steps"]
    (trajectory,) = run.batches
    g = [c.direction.flatten().numpy() for c in trajectory.corrections]
    seen = range(1, STEPS)
    assert steps["timestep"].tolist() == [run.timesteps[k] for k in seen]
    for row, k in enumerate(seen):
        t, x = trajectory.evaluations[k]
        h, eye = 1e-5, torch.eye(12, dtype=torch.float64).view(12, 3, 2, 2)
        T = -(model.score(x + h * eye, t) - model.score(x - h * eye, t)).flatten(1).numpy() / (
            2 * h
        )
        U = np.stack(g[max(0, k - 2) : k], 1)
        if anchor == "ema":
            U = (0.4 * g[k - 1] + 0.6 * g[k])[:, None]
        relative = 2.0
        H = U @ U.T + relative * np.mean(np.sum(U**2, 0)) * np.eye(12)
        fit = np.linalg.lstsq(H.reshape(-1, 1), T.reshape(-1), rcond=None)[0][0]
        expected = {}
        for name, matrix in {
            "": H,
            "_scaled": fit * H,
            "_identity": np.trace(T) / 12 * np.eye(12),
        }.items():
            expected[f"spectral{name}"] = np.linalg.norm(matrix - T, 2) / np.linalg.norm(T, 2)
            expected[f"hilbert_schmidt{name}"] = np.linalg.norm(matrix - T) / np.linalg.norm(T)
        damped = T + relative * np.abs(np.linalg.eigvalsh(T)).mean() * np.eye(12)
        n = torch.from_numpy(np.linalg.solve(damped, g[k]))[None]
        correction = trajectory.corrections[k]
        for name, direction in {
            "prediction": correction.direction,
            "corrected": correction.corrected,
        }.items():
            expected[f"angle_{name}"] = np.degrees(np.arccos(cosine(direction, n)))[0]
        expected["indefinite"] = float(np.linalg.eigvalsh(damped).min() < 0)
        assert set(expected) == set(Hessian.quantities)
        for name, value in expected.items():
            assert steps[name][row].item() == pytest.approx(value, rel=1e-3, abs=1e-3), name


# --- all of them

ALL = {"cosine": CorrectionCosine, "ideal": IdealDirection, "hessian": Hessian}


@pytest.mark.parametrize("metric", ALL.values(), ids=ALL)
def test_several_processes_give_the_numbers_of_one(metric):
    """Also when one of them has no batch at all."""
    run = replay(rank=1, damping=1.0)
    expected = computed(metric(5), run)
    merged = None
    for share in (run.batches[:1], [], run.batches[1:]):
        part = metric(5)
        part.update(Replay(run.network, run.scheduler, run.timesteps, 5, share))
        if merged is None:
            merged = part
        else:
            merged.merge_state(part)
    result = merged.compute()
    assert set(result) == set(expected) and set(result["steps"]) == set(expected["steps"])
    for name in set(expected) - {"steps"}:
        assert result[name].item() == pytest.approx(expected[name].item(), rel=1e-12)
    for name, values in expected["steps"].items():
        torch.testing.assert_close(result["steps"][name], values, equal_nan=True)


def test_what_cannot_be_looked_at(tiny_unet):
    run = replay(rank=1)
    network = Replay(tiny_unet(), run.scheduler, run.timesteps, 5, [])
    for name, metric in {"ideal_direction": IdealDirection, "hessian": Hessian}.items():
        with pytest.raises(UserError, match=rf"^metrics=\[{name}\]: needs a model whose score"):
            metric(1).update(network)
    large = Gaussian(torch.zeros(3, 19, 19), torch.ones(1083), torch.eye(1083))
    for message, replayed in {
        "at most 1024 dimensions; the model has 1083": Replay(large, run.scheduler, [], 1, []),
        "needs lml.rank above 0": replay(rank=0),
        r"lml\.target=prediction": replay(target="direction"),
    }.items():
        with pytest.raises(UserError, match=rf"^metrics=\[hessian\]: .*{message}"):
            Hessian(1).update(replayed)


@pytest.mark.parametrize("name", ["correction_cosine", "ideal_direction", "hessian"])
def test_the_script_writes_values_and_steps(script, tmp_path, name):
    """A few numbers as value, lists of one number a step beside it; a folder has no run."""
    assert build(OmegaConf.load(ROOT / f"configs/metrics/{name}.yaml"))[name].trajectories > 0
    arguments = ["model=mixture", "model.network.sample_size=4", "num_images=3", "batch_size=2"]
    arguments += ["nfe=5", "threads=1", "run_dir=run", f"metrics={name}", "solver=ddim"]
    outcome = script("sample", *arguments, "grid=trailing")
    assert (outcome.code, outcome.err) == (0, "")
    result = json.loads((tmp_path / "run/metrics.json").read_text())[name]
    assert all(isinstance(value, float) for value in result["value"].values())
    assert set(result["value"]) == set(class_by_name(name).parts)
    seen = 4 if name == "hessian" else 5  # no anchors at the first step
    assert {len(values) for values in result["steps"].values()} == {seen}
    first = (tmp_path / "run/metrics.json").read_bytes()
    assert b"NaN" not in first  # which is no JSON
    outcome = script("evaluate", "run_dir=run", f"metrics={name}", "threads=1")
    assert (outcome.code, outcome.err) == (0, "")
    again = json.loads((tmp_path / "run/metrics.json").read_text())[name]
    assert json.loads(first)[name]["value"] == again["value"]
    outcome = script("evaluate", "images=run/images", f"metrics={name}")
    assert outcome.code == 2 and "needs a run to make again; give run_dir=FOLDER" in outcome.err
