"""The correction inside diffusers' schedulers: `LML` before diffusers' own name.

    pipe.scheduler = LMLDPMSolverMultistepScheduler.from_config(pipe.scheduler.config, rank=2)

Each class adds to its diffusers parent the options of `lml.correction.LMLCorrection` and the option
`target`, which says what the direction g is:

- "prediction": the noise that the network predicts (after guidance), before the solver uses it.
  A prediction of v or x0 is converted to noise and back, so that the step does not depend on the
  parametrisation. (Anchors in v are worse: v turns along a trajectory even if the noise does not.)
  For flow matching, g is the velocity;
- "increment": the solver's whole step, x_s = A x_t + g with A the solver's own scalar;
- "direction": only the re-noising term, x_s = alpha_s x0 + sigma_s g with x0 uncorrected.

With `rank=0` a scheduler gives the same result as its parent, bit for bit.

Solvers whose steps may have any lengths have the option `aligned_timesteps`, a list: the grid for
as many steps, such as those of Align Your Steps. `lml.schedulers.aligned` interpolates it for other
numbers of steps.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from lml.correction import LMLCorrection
from lml.damping import GRIDS, default_damping
from lml.schedulers import aligned
from lml.schedulers.prediction import change_noise


def _parameters() -> list[inspect.Parameter]:
    options = dict(inspect.signature(LMLCorrection).parameters)
    options["target"] = inspect.Parameter(
        "target", inspect.Parameter.KEYWORD_ONLY, default="prediction"
    )
    return [option.replace(kind=inspect.Parameter.KEYWORD_ONLY) for option in options.values()]


PARAMETERS = _parameters()  # the keyword options that LML adds to a scheduler
OPTIONS = tuple(parameter.name for parameter in PARAMETERS)


def _like(parent: Callable, method: Callable) -> Callable:
    """`method` with the name and signature of `parent`, since pipelines inspect its options."""

    @functools.wraps(parent)
    def like(self, *args, **kwargs):
        return method(self, *args, **kwargs)

    return like


class LMLSchedulerMixin:
    """Adds the correction to a diffusers scheduler: `class X(LMLSchedulerMixin, Parent)`.

    The only state from one step to the next is `anchors` and `position`. A step replaces them and
    never changes them in place. So a copy of the scheduler, or of its `__dict__`, continues the
    trajectory on its own. A step at or before the last position begins a new trajectory. Gradients
    flow through a step as through the parent's, but not through the anchors.

    Raises (when the scheduler is made):
        ValueError: an option is out of its range, or the solver does not have this `target`.
    """

    targets: tuple[str, ...] = ("prediction",)
    correction_class: type[LMLCorrection] = LMLCorrection
    convergence_order: int | None = None  # None if the option `solver_order` says it
    damping_of = "plain"  # the solver's key in `lml.damping.SOLVERS`
    adds_noise = False  # True: adds noise at each step, whatever the arguments of `step` are
    may_diverge = False  # True: samples that are NaN or inf are a result and no error

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if LMLSchedulerMixin not in cls.__bases__:
            return
        parent = cls.__bases__[-1]
        # `order` in diffusers is the number of evaluations for a step: 1 for nearly all solvers.
        options = inspect.signature(parent).parameters
        if cls.convergence_order is None and "solver_order" not in options:
            raise TypeError(f"{cls.__name__}: needs a convergence_order, the solver's order")
        cls.step = _like(parent.step, LMLSchedulerMixin.step)
        cls.set_timesteps = _like(parent.set_timesteps, LMLSchedulerMixin.set_timesteps)

        # Without its decorator, so that the configuration is registered once, by this class.
        parent_init = inspect.unwrap(parent.__init__)

        def init(self, *args, **kwargs):
            options = {p.name: kwargs.pop(p.name, p.default) for p in PARAMETERS}
            self._check_target(options.pop("target"))
            self.correction = self.correction_class(**options)
            self.register_to_config(**{name: getattr(self.correction, name) for name in options})
            self._forget()
            self._aligned = None
            if not aligned.takes_grid(parent):
                parent_init(self, *args, **kwargs)
                return
            grid = kwargs.pop(aligned.OPTION.name, None)
            parent_init(self, *args, **kwargs)  # which may make a grid of all timesteps
            self._aligned = aligned.check_grid(grid, self.config.num_train_timesteps)
            self.register_to_config(**{aligned.OPTION.name: self._aligned})

        own = inspect.signature(parent_init)
        more = [*PARAMETERS, aligned.OPTION] if aligned.takes_grid(parent) else PARAMETERS
        init.__signature__ = own.replace(parameters=[*own.parameters.values(), *more])
        cls.__init__ = register_to_config(init)

    @classmethod
    def _get_compatibles(cls) -> list[type]:
        compatibles = super()._get_compatibles()
        siblings = LMLSchedulerMixin.__subclasses__()
        return compatibles + [c for c in siblings if c.__bases__[-1] in compatibles or c is cls]

    def _check_target(self, target: str) -> None:
        """ValueError unless this solver, as configured, has this `target`."""
        if target not in self.targets:
            raise ValueError(
                f"target={target}: {type(self).__name__} has {' and '.join(self.targets)}"
            )

    def set_timesteps(self, *args, **kwargs) -> None:
        """As the parent's. Also forgets all anchors.

        If the scheduler has `aligned_timesteps`, a number of steps gives timesteps from these.

        Raises:
            ValueError: there are too few timesteps for them.
        """
        if self._aligned:
            call = inspect.signature(super().set_timesteps).bind(*args, **kwargs)
            given = {key for key, value in call.arguments.items() if value is not None}
            if not given & {"timesteps", "sigmas"} and "num_inference_steps" in given:
                steps = call.arguments["num_inference_steps"]
                grid = aligned.interpolate(self._aligned, steps, self.alphas_cumprod)
                if not aligned.takes_timesteps(super()):
                    super().set_timesteps(*args, **kwargs)
                    self._replace_grid(grid)
                    return
                del call.arguments["num_inference_steps"]
                call.arguments["timesteps"] = grid
            args, kwargs = call.args, call.kwargs
        super().set_timesteps(*args, **kwargs)
        self._forget()

    def _replace_grid(self, timesteps: list[int]) -> None:
        """Put `timesteps` in place of the parent's own, of which there are as many."""
        others = {*GRIDS, "use_flow_sigmas"} - {aligned.OPTION.name}
        if wrong := sorted(key for key in others if self.config.get(key)):
            raise ValueError(f"{aligned.OPTION.name}: not with {wrong[0]}=True")
        levels = (1 / self.alphas_cumprod[timesteps] - 1).sqrt()
        self.sigmas = torch.cat([levels.to(self.sigmas), self.sigmas[-1:]])
        self.timesteps = self.timesteps.new_tensor(timesteps)
        self._forget()

    def _forget(self) -> None:
        self.anchors: tuple[Tensor, ...] = ()
        self.position: int | None = None  # the last step's index in the grid
        self._dampings: tuple[float | None, ...] | None = None
        self._lengths: tuple[float, ...] | None = None

    @property
    def default_damping(self) -> float:
        """The relative damping on this grid if the option `damping` is None."""
        grid = next(filter(self._own, GRIDS), None)
        steps, order = len(self.timesteps), self.convergence_order or self.config.solver_order
        return default_damping(self.correction.rank, steps, order, self.damping_of, grid)

    @property
    def dampings(self) -> tuple[float | None, ...]:
        """The damping of each step of this grid; None for a step without correction.

        Raises:
            ValueError: the option `damping` is a list of another length.
        """
        if self._dampings is None:
            self._dampings = self.correction.dampings(
                self._training_timesteps(), self.config.num_train_timesteps, self.default_damping
            )
        return self._dampings

    @property
    def lengths(self) -> tuple[float, ...]:
        """The factor on the length of g' at each step of this grid; 1 changes nothing.

        Raises:
            ValueError: the option `length` is a list of another length.
        """
        if self._lengths is None:
            self._lengths = self.correction.lengths(len(self.timesteps))
        return self._lengths

    def _training_timesteps(self) -> list[float]:
        """The timesteps of the grid, in [0, T]."""
        if self.timesteps is None:  # PNDM has none before
            raise ValueError("there is no grid yet; call set_timesteps first")
        return self.timesteps.tolist()

    def _own(self, option: str):
        # The configuration may also hold options of a scheduler that it was converted from.
        known = inspect.signature(type(self)).parameters
        return self.config.get(option) if option in known else None

    def step(self, model_output: Tensor, timestep, sample: Tensor, *args, **kwargs):
        """As the parent's, with a correction of the direction that `target` names."""
        if self.correction.rank == 0:
            return super().step(model_output, timestep, sample, *args, **kwargs)
        position = self._position(timestep)
        if self.position is not None and position <= self.position:
            self.anchors = ()  # they belong to another trajectory
        self.position = position
        if self.config.target == "prediction":
            prediction = self._correct_prediction(model_output, timestep, sample)
            return super().step(prediction, timestep, sample, *args, **kwargs)

        call = inspect.signature(super().step).bind(
            # in half precision, a step minus its largest part would be rounding noise
            model_output.to(torch.promote_types(model_output.dtype, torch.float32)),
            timestep,
            sample.to(torch.promote_types(sample.dtype, torch.float32)),
            *args,
            **kwargs,
        )
        return_dict = call.arguments.pop("return_dict", True)
        output, noise = self._solve(super().step, call.arguments)
        part, scale = self._split(output, timestep, call.arguments["sample"])
        if scale > 0:
            direction = self._correct((output.prev_sample - part) / scale)
            output.prev_sample = part + scale * direction
        output.prev_sample = output.prev_sample + noise
        for name, value in output.items():
            output[name] = value.to(model_output.dtype)
        return output if return_dict else output.to_tuple()

    def _correct_prediction(self, model_output: Tensor, timestep, sample: Tensor) -> Tensor:
        channels = sample.shape[1]
        if model_output.shape[1] == 2 * channels and "variance_type" in self.config:
            # the second half of the channels is a learned variance
            mean, variance = model_output.split(channels, dim=1)
            return torch.cat([self._correct_prediction(mean, timestep, sample), variance], dim=1)

        return change_noise(self, model_output, timestep, sample, self._correct)

    def _correct(self, direction: Tensor) -> Tensor:
        damping, length = self.dampings[self.position], self.lengths[self.position]
        corrected, self.anchors = self.correction(direction, self.anchors, damping, length)
        return corrected

    def _position(self, timestep) -> int:
        """This step's index in the grid."""
        if hasattr(self, "step_index"):
            if self.step_index is None:
                self._init_step_index(timestep)
            return self.step_index
        return int((self.timesteps - timestep).abs().argmin())

    def _solve(self, step: Callable, arguments: dict):
        """The parent's output without its added noise, and that noise."""
        return step(**arguments), 0.0

    def _split(self, output, timestep, sample: Tensor) -> tuple[Tensor, float | Tensor]:
        """(part, scale) of prev_sample = part + scale * g; called after the parent's step."""
        raise NotImplementedError
