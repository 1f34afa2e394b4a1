"""Metrics that look along a run's trajectories, made again from the same noise.

Each is updated with a `Replay` in place of images. Beside the means over samples and steps that
are its value it says the same numbers step by step: lists by name, and `timestep`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from diffusers import SchedulerMixin
from torch import Tensor
from torch.nn.functional import cosine_similarity
from torchmetrics import Metric

from lml.errors import UserError
from lml.exact import ExactModel
from lml.pipelines.trajectory import Replay, Trajectory

LARGEST = 1024  # dimensions for which `Hessian` makes explicit matrices


class AlongTrajectory(Metric):
    """Means over samples, for every step, of the `quantities` that a subclass looks at.

    Numbers that are NaN are left out of the means, and so is a step or a quantity that has none
    other.

    Args:
        count: of the run's first images; their trajectories are made again.
    """

    is_differentiable = False
    full_state_update = False
    higher_is_better = None  # of cosines it is, of other quantities not
    quantities: tuple[str, ...]

    def __init__(self, count: int, **kwargs):
        super().__init__(**kwargs)
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise UserError(f"count={count}: a whole number of at least 1")
        self.trajectories = count  # asks for a replay of as many
        for name in ("sums", "counts"):
            self.add_state(name, torch.zeros(0, 0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("timesteps", torch.zeros(0, dtype=torch.float64), dist_reduce_fx="max")
        self.protocol = {"trajectories": count}

    def check(self, replay: Replay) -> None:
        """Raise UserError when the run is not one that the metric has a meaning for."""

    def look(self, replay: Replay, trajectory: Trajectory) -> Iterator[tuple[int, Tensor]]:
        """For steps, counted from 0, the quantities of each sample, (quantities, B)."""
        raise NotImplementedError

    def update(self, replay: Replay) -> None:
        """Look along every trajectory of `replay`."""
        self.check(replay)
        self.timesteps = torch.tensor(replay.timesteps, dtype=torch.float64, device=self.device)
        shape = (len(replay.timesteps), len(self.quantities))
        self.sums = self.sums.new_zeros(shape)
        self.counts = self.counts.new_zeros(shape)
        for trajectory in replay.batches:
            for step, values in self.look(replay, trajectory):
                finite = values.isfinite()
                self.sums[step] += values.where(finite, 0).sum(1)
                self.counts[step] += finite.sum(1)

    def compute(self) -> dict:
        """The mean of each quantity, and under `steps` its means step by step."""
        means, value = self.sums / self.counts, {}
        seen = self.counts.any(1)
        steps = {"timestep": self.timesteps[seen]}
        for name, total, count, mean in zip(
            self.quantities, self.sums.T, self.counts.T, means.T, strict=True
        ):
            if count.any():
                value[name] = total.sum() / count.sum()
                steps[name] = mean[seen]
        return {**value, "steps": steps} if value else value


def _cosine(x: Tensor, y: Tensor) -> Tensor:
    """Of each sample, (B,) float64; NaN where one of them is."""
    return cosine_similarity(x.double().flatten(1), y.double().flatten(1), eps=1e-150)


class CorrectionCosine(AlongTrajectory):
    """The cosine between the direction g that LML was given and the g' that it returned.

    `cosine` is its mean, `min` its least over samples and steps, `non_finite` the number of
    samples of which an image has a NaN or an infinity. Of any model and any `target`; without LML
    there is `non_finite` alone.
    """

    quantities = ("cosine",)

    def __init__(self, count: int = 256, **kwargs):
        super().__init__(count, **kwargs)
        self.add_state("non_finite", torch.tensor(0), dist_reduce_fx="sum")
        infinity = torch.tensor(torch.inf, dtype=torch.float64)
        self.add_state("lowest", infinity, dist_reduce_fx="min")

    def look(self, replay: Replay, trajectory: Trajectory) -> Iterator[tuple[int, Tensor]]:
        self.non_finite += (~trajectory.images.isfinite().flatten(1).all(1)).sum()
        for step, correction in enumerate(trajectory.corrections):
            cosine = _cosine(correction.corrected, correction.direction)
            self.lowest = torch.minimum(self.lowest, cosine.nan_to_num(torch.inf).min())
            yield step, cosine[None]

    def compute(self) -> dict:
        """`cosine` and `min` in [-1, 1], and `non_finite`; step by step the cosine."""
        value = super().compute()
        lowest = {"min": self.lowest} if value else {}
        return {**value, **lowest, "non_finite": self.non_finite}


def _exact(replay: Replay, metric: str) -> ExactModel:
    """The run's model. UserError when its score is not known, or not that of a DDPM."""
    model = replay.network
    if not isinstance(model, ExactModel) or model.alphas_cumprod is None:
        raise UserError(
            f"metrics=[{metric}]: needs a model whose score is known, with a DDPM's noise "
            "schedule: model=gaussian, mixture or ideal_cifar10"
        )
    return model


def _noise_is_corrected(replay: Replay) -> bool:
    return replay.scheduler.config.get("target") == "prediction"


class IdealDirection(AlongTrajectory):
    """The cosine between noise directions and the one that would make the step exact; the angle.

    From the x_t that the network is given, let x_s be the exact solution of the probability-flow
    ODE at the next timestep (`ExactModel.flow`). DDIM's step is x_s = A x_t + B eps with
    A = alpha_s / alpha_t and B = sigma_s - A sigma_t, so (x_s - A x_t) / B is the ideal average
    direction: along it DDIM would land on the exact solution. Held against it are

    - `prediction`: g, the noise that the model predicts at x_t;
    - `corrected`: g', as LML returned it. g where LML is off or has not corrected; left out with
      another target than the prediction, of which g is no noise;
    - `step`: the direction in which the solver did go, (x_s' - A x_t) / B with the next x_s' that
      the network is given, and in the end the image; earlier predictions are in it, too. (Of UniPC
      also what its corrector changes of x_t.)

    All as cosines, which are near 1, and as angles in degrees: `angle_prediction` and so on.

    The ideal direction of the last step is the one to timestep 0, wherever the solver itself ends;
    the step is left out where it starts there. Where a
    solver evaluates the network twice at a timestep (PNDM, Heun), the second counts, at the sample
    from which it goes on.

    Raises:
        UserError: the model's score is not known, or its noise schedule is not a DDPM's.
    """

    quantities = (
        *("prediction", "corrected", "step"),
        *("angle_prediction", "angle_corrected", "angle_step"),
    )

    def __init__(self, count: int = 32, **kwargs):
        super().__init__(count, **kwargs)

    def check(self, replay: Replay) -> None:
        """UserError unless the model is exact."""
        _exact(replay, "ideal_direction")

    def look(self, replay: Replay, trajectory: Trajectory) -> Iterator[tuple[int, Tensor]]:
        model, path = replay.network, [(t, x.double()) for t, x in trajectory.evaluations]
        ends = [*path[1:], (0.0, None)]
        corrections = trajectory.corrections
        for step, ((t, x), (s, _)) in enumerate(zip(path, ends, strict=True)):
            if not s < t:
                continue
            start, end = _levels(model, t), _levels(model, s)
            ideal = _direction(x, start, model.flow(x, t, s), end)
            noise = (x - start[0] * model.posterior_mean(x, t)) / start[1]
            corrected = torch.full_like(x, torch.nan)
            if not corrections:
                corrected = noise
            elif _noise_is_corrected(replay):
                corrected = corrections[step].corrected.double()
            if following := [x_s for t_s, x_s in path[step + 1 :] if t_s == s]:
                gone = _direction(x, start, following[-1], end)
            else:
                last = _last_levels(replay.scheduler)
                gone = _direction(x, start, trajectory.images.double(), last)
            angles = torch.stack(
                [_angle(d.flatten(1), ideal.flatten(1)) for d in (noise, corrected, gone)]
            )
            yield step, torch.cat([torch.deg2rad(angles).cos(), angles])


Levels = tuple[float, float]  # alpha and sigma


def _direction(x: Tensor, levels: Levels, x_s: Tensor, levels_s: Levels) -> Tensor:
    """The noise along which DDIM's step from x lands on x_s."""
    A = levels_s[0] / levels[0]
    return (x_s - A * x) / (levels_s[1] - A * levels[1])


def _levels(model: ExactModel, t: float) -> Levels:
    alpha, sigma = model.noise_levels(t)
    return alpha.item(), sigma.item()


def _last_levels(scheduler: SchedulerMixin) -> Levels:
    """Those of the images that a scheduler of a DDPM ends with."""
    if hasattr(scheduler, "sigmas"):
        ratio = float(scheduler.sigmas[-1])
        return 1 / math.hypot(1, ratio), ratio / math.hypot(1, ratio)
    square = float(scheduler.final_alpha_cumprod)
    return square**0.5, (1 - square) ** 0.5


class Hessian(AlongTrajectory):
    """How far LML's Hessian is from the true one, and its direction from Newton's.

    The true Hessian is T = -∇² log p_t at x_t, (D, D); LML's is H = U Uᵀ + lambda I with the
    anchors of that step. Its anchors are predictions of noise, of length about sqrt(D), where the
    gradient of -log p_t is noise / sigma: the units differ, and H is larger than T by orders. So
    besides the distance as it stands there is that of c H with the c that makes the Hilbert-Schmidt
    distance least, and, to hold it against, that of the best multiple of the identity:

    - `spectral`, `hilbert_schmidt`: ‖H - T‖ / ‖T‖;
    - `spectral_scaled`, `hilbert_schmidt_scaled`: ‖c H - T‖ / ‖T‖;
    - `spectral_identity`, `hilbert_schmidt_identity`: ‖c' I - T‖ / ‖T‖, with c' least in the same
      sense: what a Hessian without any anchor is worth.

    The exact damped Newton direction is n = (T + lambda_N I)⁻¹ g. LML's relative damping is lambda
    over the mean |u_i|², which is the mean of the nonzero eigenvalues of U Uᵀ; so lambda_N is
    the same multiple, lambda / mean |u_i|², of the mean of the absolute eigenvalues of T.

    - `angle_corrected`, `angle_prediction`: of g' and of g to n, in degrees; LML brings the
      direction nearer to Newton's where the first is the smaller;
    - `indefinite`: the share of samples of which T + lambda_N I has an eigenvalue below 0, so
      that n is no descent direction.

    Steps without an anchor, as the first, are left out.

    Raises:
        UserError: the model's score is not known or its dimensions exceed 1,024; LML is off, or
            corrects something else than the prediction.
    """

    quantities = (
        "spectral",
        "hilbert_schmidt",
        "spectral_scaled",
        "hilbert_schmidt_scaled",
        "spectral_identity",
        "hilbert_schmidt_identity",
        "angle_corrected",
        "angle_prediction",
        "indefinite",
    )

    def __init__(self, count: int = 4, **kwargs):
        super().__init__(count, **kwargs)

    def check(self, replay: Replay) -> None:
        """UserError unless the model is exact and small, and LML corrects its prediction."""
        model = _exact(replay, "hessian")
        if (size := model.shape[0] * model.shape[1] * model.shape[2]) > LARGEST:
            raise UserError(
                f"metrics=[hessian]: at most {LARGEST} dimensions, not the model's {size}"
            )
        if replay.scheduler.config.get("rank", 0) == 0 or not _noise_is_corrected(replay):
            raise UserError("metrics=[hessian]: needs lml.rank above 0 and lml.target=prediction")

    def look(self, replay: Replay, trajectory: Trajectory) -> Iterator[tuple[int, Tensor]]:
        options = replay.scheduler.correction
        path = zip(trajectory.evaluations, trajectory.corrections, strict=True)
        for step, ((t, x), correction) in enumerate(path):
            g = correction.direction.double().flatten(1)
            corrected = correction.corrected.double().flatten(1)
            if not correction.anchors or correction.damping is None:
                continue
            anchors = options.columns([u.double().flatten(1) for u in correction.anchors], g)
            samples = zip(x.double(), g, corrected, torch.stack(anchors, 2), strict=True)
            values = [
                _against_hessian(
                    replay.network, t, *sample, correction.damping, options.is_relative
                )
                for sample in samples
            ]
            yield step, torch.stack(values, 1)


def _against_hessian(
    model: ExactModel,
    t: float,
    x: Tensor,
    g: Tensor,
    corrected: Tensor,
    U: Tensor,
    damping: float,
    is_relative: bool,
) -> Tensor:
    """The quantities of `Hessian` for one sample: x (C, H, W), g and g' (D,), U (D, r)."""
    D = g.numel()
    identity = torch.eye(D, dtype=torch.float64, device=g.device)
    if not (x.isfinite().all() and corrected.isfinite().all()):
        return g.new_full((len(Hessian.quantities),), torch.nan)
    T = -model.hessian_vector(x.expand(D, *x.shape), t, identity.view(D, *x.shape)).flatten(1)
    eigenvalues, basis = torch.linalg.eigh((T + T.T) / 2)
    spectral, hilbert_schmidt = eigenvalues.abs().max(), torch.linalg.vector_norm(eigenvalues)

    mean_square = U.square().sum(0).mean()
    damping = damping * (mean_square if is_relative else 1.0)
    H = U @ U.T + damping * identity

    def distances(matrix: Tensor) -> list[Tensor]:
        return [
            torch.linalg.eigvalsh(matrix - T).abs().max() / spectral,
            torch.linalg.matrix_norm(matrix - T) / hilbert_schmidt,
        ]

    damped = eigenvalues + damping / mean_square * eigenvalues.abs().mean()
    n = basis @ (basis.T @ g / damped)
    c = (H * T).sum() / H.square().sum()
    return torch.stack(
        [
            *distances(H),
            *distances(c * H),
            (eigenvalues - eigenvalues.mean()).abs().max() / spectral,
            torch.linalg.vector_norm(eigenvalues - eigenvalues.mean()) / hilbert_schmidt,
            _angle(corrected, n),
            _angle(g, n),
            (damped < 0).any().double(),
        ]
    )


def _angle(x: Tensor, y: Tensor) -> Tensor:
    """Between vectors (..., D), in degrees (...); exact also for small ones."""
    x, y = (v / torch.linalg.vector_norm(v, dim=-1, keepdim=True) for v in (x, y))
    norms = (torch.linalg.vector_norm(v, dim=-1) for v in (x - y, x + y))
    return torch.rad2deg(2 * torch.atan2(*norms))
