"""Metrics of a run's trajectories, which are made again from the same noise.

Each is updated with a `Replay`, not with images. Its value holds means over samples and steps. Its
`steps` hold the same quantities step by step, as lists by name, and the list `timestep`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import ClassVar

import torch
from diffusers import SchedulerMixin
from torch import Tensor
from torch.nn.functional import cosine_similarity

from lml.errors import UserError
from lml.exact import ExactModel
from lml.metrics.base import RunMetric
from lml.pipelines.trajectory import Replay, Trajectory

LARGEST = 1024  # dimensions, up to which `Hessian` can make explicit matrices


class AlongTrajectory(RunMetric):
    """Means over samples, for every step, of the `quantities` that a subclass computes.

    Numbers that are not finite are left out of the means. A step or a quantity without any finite
    number is left out of the value.

    Args:
        count: how many of the run's first images have their trajectories made again.
    """

    quantities: tuple[str, ...]

    def __init__(self, count: int, **kwargs):
        super().__init__(**kwargs)
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise UserError(f"count={count}: expected a whole number of at least 1")
        self.trajectories = count
        for name in ("sums", "counts"):
            self.add_state(name, torch.zeros(0, 0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("timesteps", torch.zeros(0, dtype=torch.float64), dist_reduce_fx="max")
        self.protocol = {"trajectories": count}

    def check(self, replay: Replay) -> None:
        """Raise UserError if the metric has no meaning for this run."""

    def look(self, replay: Replay, trajectory: Trajectory) -> Iterator[tuple[int, Tensor]]:
        """Yield (step, quantities of each sample): step from 0, a tensor (quantities, B)."""
        raise NotImplementedError

    def update(self, replay: Replay) -> None:
        """Add every trajectory of `replay`."""
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
        """The mean of each quantity, and in `steps` its mean at each step."""
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
    """The cosine of each sample, (B,) float64; NaN if x or y has a NaN."""
    return cosine_similarity(x.double().flatten(1), y.double().flatten(1), eps=1e-150)


class CorrectionCosine(AlongTrajectory):
    """The cosine between the direction g that LML was given and the g' that it returned.

    `cosine` is the mean and `min` the minimum over samples and steps. `non_finite` is the number of
    samples whose image has a NaN or an infinity. The metric works with any model and any `target`.
    Without LML, `non_finite` is the only part.
    """

    higher_is_better: ClassVar = {"cosine": True, "min": False, "non_finite": False}
    parts = ("cosine", "min", "non_finite")
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
        """`cosine` and `min` in [-1, 1], and `non_finite`; in `steps` the cosine at each step."""
        value = super().compute()
        lowest = {"min": self.lowest} if value else {}
        return {**value, **lowest, "non_finite": self.non_finite}


def _exact(replay: Replay, metric: str) -> ExactModel:
    """The run's model. UserError unless its score is known and its noise schedule a DDPM's."""
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
    """The cosine and the angle between noise directions and the one that makes the step exact.

    Let x_t be the sample that the network is given, and x_s the exact solution of the
    probability-flow ODE from it at the next timestep (`ExactModel.flow`). DDIM's step is
    x_s = A x_t + B eps with A = alpha_s / alpha_t and B = sigma_s - A sigma_t. So the ideal average
    direction is (x_s - A x_t) / B: along it, DDIM lands on the exact solution. Three directions are
    compared with it:

    - `prediction`: g, the noise that the model predicts at x_t.
    - `corrected`: g', the direction that LML returns. If LML is off or does not correct this step,
      it is g. It is left out if LML's target is not the prediction, since g is then no noise.
    - `step`: the direction that the solver took, (x_s' - A x_t) / B, where x_s' is the next sample
      that the network is given, or the image at the end. It contains earlier predictions, too. For
      UniPC it also contains the change that the corrector makes to x_t.

    These are cosines, and near 1. `angle_prediction`, `angle_corrected` and `angle_step` are the
    same as angles in degrees.

    For the last step, the ideal direction is the one to timestep 0, even if the solver ends
    elsewhere. A last step that starts at timestep 0 is left out. If a solver evaluates the network
    twice at a timestep (PNDM, Heun), only the second evaluation counts: from its sample the solver
    goes on.

    Raises:
        UserError: the model's score is not known, or its noise schedule is not a DDPM's.
    """

    higher_is_better: ClassVar = {
        "prediction": True,
        "corrected": True,
        "step": True,
        "angle_prediction": False,
        "angle_corrected": False,
        "angle_step": False,
    }
    parts = quantities = tuple(higher_is_better)

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
    """The levels of the images at the end of a DDPM scheduler's grid."""
    if hasattr(scheduler, "sigmas"):
        ratio = float(scheduler.sigmas[-1])
        return 1 / math.hypot(1, ratio), ratio / math.hypot(1, ratio)
    square = float(scheduler.final_alpha_cumprod)
    return square**0.5, (1 - square) ** 0.5


class Hessian(AlongTrajectory):
    """How far LML's Hessian is from the true one, and its direction from Newton's.

    The true Hessian is T = -∇² log p_t at x_t, (D, D). LML's Hessian is H = U Uᵀ + lambda I, with
    the anchors of the same step. Its units differ from those of T: the anchors are predicted noise,
    of length about sqrt(D), but the gradient of -log p_t is noise / sigma. So H is larger than T by
    orders of magnitude. Therefore two more distances stand beside that of H. One is the distance of
    c H, with the c of least Hilbert-Schmidt distance. The other is that of the best multiple of the
    identity, which is a Hessian without any anchor:

    - `spectral`, `hilbert_schmidt`: ‖H - T‖ / ‖T‖.
    - `spectral_scaled`, `hilbert_schmidt_scaled`: ‖c H - T‖ / ‖T‖.
    - `spectral_identity`, `hilbert_schmidt_identity`: ‖c' I - T‖ / ‖T‖, with the c' of least
      Hilbert-Schmidt distance.

    The exact damped Newton direction is n = (T + lambda_N I)⁻¹ g. LML's relative damping is lambda
    divided by the mean |u_i|², the mean of the nonzero eigenvalues of U Uᵀ. So lambda_N is the same
    multiple, lambda / mean |u_i|², of the mean absolute eigenvalue of T:

    - `angle_corrected`, `angle_prediction`: the angles of g' and of g to n, in degrees. If that of
      g' is smaller, LML brings the direction nearer to Newton's.
    - `indefinite`: the share of samples for which T + lambda_N I has an eigenvalue below 0, so that
      n is no descent direction.

    Steps without an anchor, such as the first, are left out.

    Raises:
        UserError: the model's score is not known; it has more than 1,024 dimensions; LML is off;
            LML's target is not the prediction.
    """

    higher_is_better = False
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
    parts = quantities

    def __init__(self, count: int = 4, **kwargs):
        super().__init__(count, **kwargs)

    def check(self, replay: Replay) -> None:
        """UserError unless the model is exact and small, and LML's target is the prediction."""
        model = _exact(replay, "hessian")
        if (size := model.shape[0] * model.shape[1] * model.shape[2]) > LARGEST:
            raise UserError(
                f"metrics=[hessian]: at most {LARGEST} dimensions; the model has {size}"
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
    """The angle between vectors (..., D), in degrees (...); exact for small angles, too."""
    x, y = (v / torch.linalg.vector_norm(v, dim=-1, keepdim=True) for v in (x, y))
    norms = (torch.linalg.vector_norm(v, dim=-1) for v in (x - y, x + y))
    return torch.rad2deg(2 * torch.atan2(*norms))
