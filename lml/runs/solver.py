"""Makes the solver of a config, on the model's noise schedule."""

from __future__ import annotations

import bisect
import inspect
import math
import warnings
from collections.abc import Mapping
from typing import Any

from diffusers import SchedulerMixin
from hydra.utils import get_class
from omegaconf import OmegaConf
from torch import Tensor

from lml import configs, schema
from lml.damping import GRIDS
from lml.errors import UserError, first_line, nearest
from lml.pipelines import Model
from lml.pipelines.text import count_skipped
from lml.schedulers import aligned
from lml.schema import check_call

# Options of a scheduler that choose its grid of timesteps. The config group `grid` sets them.
GRID = ("timestep_spacing", *GRIDS)
ALIGNED = aligned.OPTION.name
OWN_GRID = "of_model"  # key of that group: whether to use the grid of the model's own scheduler
# Options of a scheduler that the model was trained with, so that every solver takes them.
NOISE_SCHEDULE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
    "use_flow_sigmas",
)


def make_scheduler(cfg: Mapping[str, Any], model: Model) -> SchedulerMixin:
    """The solver of config `cfg` on the model's noise schedule, with the grid and LML's options.

    From the model's own scheduler it takes the noise schedule and the options that are set in its
    file, as diffusers' `from_config` does. It takes the grid's options only with `grid=model`.
    UserError for an option that the solver doesn't have, or a value that it refuses.
    """
    name = cfg["solver"]["name"]
    cls = _find_class(cfg["solver"]["scheduler"]["_target_"], name, model)
    groups = {
        "solver.scheduler": _without(cfg["solver"]["scheduler"], "_target_"),
        "grid": _without(cfg["grid"], "name", OWN_GRID),
        "lml": _without(cfg["lml"], "name"),
    }
    schema.check(cfg["grid"], schema.Grid, "grid")
    known = set(inspect.signature(cls.__init__).parameters) - {"self"}
    if groups["grid"].get(ALIGNED, ()) is None:
        fitting = ", ".join(_models_with_aligned_timesteps())
        raise UserError(f"grid={cfg['grid'].get('name')}: not for {model.name}; for {fitting}")
    _check_options(groups, cls, known, cfg)
    _check_step(cfg["solver"].get("step") or {}, cls, name)
    own = _options_of(model, name, known, cfg["grid"].get(OWN_GRID, False))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # diffusers deprecates DPM-Solver
            return cls.from_config(own, **{k: v for g in groups.values() for k, v in g.items()})
    except Exception as error:  # a solver may raise anything for a wrong option
        reason = first_line(error)
        key = reason.split("=")[0]
        group = next((g for g, values in groups.items() if key in values), None)
        raise UserError(f"{group}.{reason}" if group else f"solver={name}: {reason}") from None


def _without(options: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key not in keys}


def _find_class(target: str, name: str, model: Model) -> type[SchedulerMixin]:
    """The class of the solver called `name`. UserError if it does not fit the model."""
    try:
        cls = get_class(target)
    except Exception as error:  # Hydra wraps whatever the import raised
        reason = first_line(error)
        raise UserError(f"solver.scheduler._target_={target}: {reason}") from None
    if not issubclass(cls, SchedulerMixin):
        raise UserError(f"solver.scheduler._target_={target}: expected a scheduler")
    if not any(issubclass(cls, c) for c in (type(model.scheduler), *model.scheduler.compatibles)):
        kind = type(model.scheduler).__name__
        raise UserError(f"solver={name}: not for {model.name}, whose noise schedule is a {kind}")
    return cls


def _check_options(
    groups: Mapping[str, Mapping[str, Any]], cls: type, known: set[str], cfg: Mapping[str, Any]
) -> None:
    """UserError for an option, listed by its group, that is not among the `known` ones of `cls`."""
    name = cfg["solver"]["name"]
    for group, values in groups.items():
        for key, value in values.items():
            if key in known:
                continue
            if key in GRID:
                fitting = ", ".join(_fitting_grids(known))
                raise UserError(
                    f"grid={cfg['grid'].get('name')}: {name} has no {key}; grids for it: {fitting}"
                )
            close = nearest(key, known)
            raise UserError(f"{group}.{key}={value}: {name} has no such option; nearest: {close}")
        check_call(cls, values, group)


def _check_step(options: Mapping[str, Any], cls: type, name: str) -> None:
    """UserError for an option that a step of the solver does not take."""
    taken = inspect.signature(cls.step).parameters
    for key, value in options.items():
        if key not in taken:
            close = nearest(key, taken)
            raise UserError(
                f"solver.step.{key}={value}: {name} has no such option; nearest: {close}"
            )
    check_call(inspect.unwrap(cls.step), options, "solver.step")


def _options_of(model: Model, name: str, known: set[str], own_grid: bool) -> dict[str, Any]:
    """The options that the solver takes from the model's own scheduler; with `own_grid`, its grid.

    UserError if the solver lacks an option of the model's noise schedule.
    """
    own = model.scheduler.config
    for key in NOISE_SCHEDULE:
        if own.get(key) is True and key not in known:
            raise UserError(f"solver={name}: not for {model.name}, whose noise schedule has {key}")
    # Defaults of the model's scheduler class do not belong to the model. The noise schedule does:
    # without it, diffusers would use the other class's default, such as Heun's own betas.
    defaults = set(own.get("_use_default_values", ())) - set(NOISE_SCHEDULE)
    left = defaults if own_grid else defaults | set(GRID)
    options = {key: value for key, value in own.items() if key in known and key not in left}
    if model.has_latents and "clip_sample" in known:
        options.setdefault("clip_sample", False)  # DDIM's default clips pixels to [-1, 1]
    return options


def _fitting_grids(known: set[str]) -> list[str]:
    return [
        name
        for name in configs.names("grid")
        if set(configs.option("grid", name)) - {"name", OWN_GRID} <= known
    ]


def _models_with_aligned_timesteps() -> list[str]:
    return [name for name in configs.names("model") if configs.option("model", name).get(ALIGNED)]


def read_solver(name: str, key: str) -> dict[str, Any]:
    """The config group solver=`name`. UserError, beginning with `key`, if there is none."""
    if name not in (known := configs.names("solver")):
        raise UserError(f"{key}={schema.shown(name)}: unknown; nearest: {nearest(name, known)}")
    return OmegaConf.to_container(configs.option("solver", name))


def find_steps(
    scheduler: SchedulerMixin, nfe: int, solver: str, strength: float | None = None
) -> int:
    """The number of steps for which the scheduler called `solver` makes exactly `nfe` evaluations.

    With `strength`, img2img makes only that share of the steps. UserError, with the nearest
    possible numbers of evaluations, if there is no such number.
    """
    highest, reasons = scheduler.config.num_train_timesteps, []
    if nfe > highest:
        raise UserError(f"nfe={nfe}: at most {highest}, the number of the model's timesteps")

    def evaluations(steps: int) -> int:
        # With dynamic shifting, the pipeline passes mu, which depends on the image's size.
        mu = {"mu": 1.0} if scheduler.config.get("use_dynamic_shifting") else {}
        try:
            scheduler.set_timesteps(steps, **mu)
        except Exception as error:  # a solver may raise anything for such a grid
            reasons.append(first_line(error))
            return 0  # PNDM's Runge-Kutta steps need four
        return len(made_timesteps(scheduler, steps, strength))

    most = max(nfe, 4) if strength is None else min(math.ceil(max(nfe, 4) / strength), highest)
    steps = 1 + bisect.bisect_left(range(1, most + 1), nfe, key=evaluations)
    if strength is not None and steps > highest:
        raise UserError(
            f"nfe={nfe}: at most {evaluations(highest)}, of the model's {highest} timesteps with "
            f"model.strength={strength:g}"
        )
    above = evaluations(steps)
    if not above:
        raise UserError(f"nfe={nfe}: not for {solver} ({reasons[0]})")
    if above != nfe:
        below = evaluations(steps - 1) if steps > 1 else 0
        reachable = " or ".join(str(number) for number in (below, above) if number)
        raise UserError(f"nfe={nfe}: {solver} can make {reachable}")
    return steps


def made_timesteps(scheduler: SchedulerMixin, steps: int, strength: float | None) -> Tensor:
    """The timesteps of the network's evaluations; the scheduler's grid is one of `steps`."""
    return scheduler.timesteps[count_skipped(steps, strength) * scheduler.order :]


def check_start(model: Mapping[str, Any], what: str) -> None:
    """UserError if img2img begins at another noise level with each number of steps.

    Then the fine solution that `what` compares with solves another problem.
    """
    if (strength := model.get("strength")) is not None and strength < 1:
        raise UserError(
            f"model.strength={strength:g}: not with {what}, since each number of steps begins at "
            "another noise level"
        )
