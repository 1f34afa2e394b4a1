"""LML around a denoiser, for the samplers of k-diffusion, EDM and ComfyUI.

    denoiser = LMLDenoiser(denoiser, sampler="dpmpp_2m", steps=10)
    samples = sample_dpmpp_2m(denoiser, x, sigmas)

Such a sampler knows its network as D(x; sigma), the denoised x = x0 + sigma noise. The noise that D
implies, and D' with that noise corrected (`lml.correction`), are

    g = (x - D) / sigma        D' = x - sigma g' = D + sigma (g - g')

For flow matching, x = (1 - sigma) x0 + sigma noise, the same g is the velocity.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral

import torch
from torch import Tensor, nn

from lml.correction import LMLCorrection
from lml.damping import GRIDS, SOLVERS, default_damping, one_for_each_step
from lml.errors import UserError, nearest

# By the names that k-diffusion and ComfyUI give them: which of `lml.damping.SOLVERS` a sampler is,
# or None for one of first order.
SAMPLERS = {
    "euler": None,
    "ddim": None,
    "heun": "Heun",
    "dpmpp_2m": "multistep in x0",
    "uni_pc": "predictor-corrector",
    "uni_pc_bh2": "predictor-corrector",
    "lms": "Adams-Bashforth",
    "ipndm": "Adams-Bashforth",
    "deis": "Adams-Bashforth",
}
SAME = (
    1e-4  # noise levels that differ by less, relatively, are one: samplers go there by logarithms
)
SMALLEST = 1e-8  # the smallest sigma that g is divided by


class LMLDenoiser(nn.Module):
    """`denoiser` with LML, called as `denoiser` is: (x, sigma, ...) to the denoised x.

    What it does not have itself it takes from `denoiser`: `inner_model`, `sigma_min`,
    `round_sigma` and whatever else a sampler asks for.

    *Steps.* A step is a noise level. The first call of a trajectory is step 0. A call at a lower
    sigma is the next step. A call at the same sigma (Heun's method calls at the end of a step and
    again where the next one starts) is the same step once more: its anchors are those that the
    first call had, and its g takes the place of the first one's. So anchors are always directions
    of other, earlier steps, and a list of dampings has one for each noise level, which for Heun is
    one for each step of the sampler. A level inside a step (dpm_2, dpm_fast, dpmpp_2s) is a step
    of its own.

    *Trajectories.* A new one starts when sigma rises (for any sample: those of a batch go
    together), or when the shape or the device of `x` changes. What cannot be seen from that, a
    trajectory that was cut short and one after it that starts lower, needs `reset`. A sampler that
    raises sigma within a trajectory (churn, restarts) starts a new one each time: the call
    there is not corrected. Ancestral and SDE samplers draw new noise at each step, which no
    earlier step can predict: LML is meant for the others.

    *Damping.* The default depends on the sampler. It is `lml.damping.default_damping` for the kind
    of solver that `sampler` is, at so many `steps`, on a grid as Karras's, the most careful one.
    On a grid that is even in time a sixteenth of it will do. Without a `sampler` it is that of
    the kind which needs the most, by which LML changes next to nothing.

    Gradients flow through x and the denoised x, but not through anchors. In half precision the
    correction is computed in float32.

    Args:
        denoiser: a module or function of x (B, ...), sigma > 0, a number or a tensor () or (B,),
            and anything else, which is passed on. It returns a tensor (B, ...). At sigma = 0 its
            output is left as it is.
        rank: r >= 0, the number of anchors; 0 is `denoiser` itself, bit for bit.
        damping: lambda > 0 in units of mean |u|^2; or a list with one for each step, in which None
            leaves its step as it is; or None, for the default.
        sampler: a key of `SAMPLERS`, or None for any other; it only sets the default damping.
        steps: > 0, of a trajectory; needed for the default damping, except of samplers of first
            order.
        options: the other options of `lml.correction.LMLCorrection` (`norm_preserving`, `length`
            ...). But no `freeze`, which needs timesteps: None in the list of dampings does it.

    Raises:
        UserError: a sampler or number of steps that is not valid or is needed; in a call, a list
            of dampings or lengths that is too short for the trajectory.
        ValueError: an option is out of its range.
    """

    def __init__(
        self,
        denoiser: Callable[..., Tensor],
        rank: int = 2,
        damping: float | list[float | None] | None = None,
        *,
        sampler: str | None = None,
        steps: int | None = None,
        **options,
    ):
        super().__init__()
        if "freeze" in options:
            raise UserError(
                f"freeze={options['freeze']}: a denoiser knows no timesteps; "
                "give a list of dampings with None for the first steps"
            )
        self.correction = LMLCorrection(rank, damping, **options)
        if sampler is not None and sampler not in SAMPLERS:
            raise UserError(
                f"sampler={sampler}: one of {nearest(sampler, SAMPLERS)}, or None for any other"
            )
        is_number = isinstance(steps, Integral) and not isinstance(steps, bool)
        if steps is not None and not (is_number and steps > 0):
            raise UserError(f"steps={steps}: must be a whole number > 0")
        self._damping, self._length = self.correction.damping, self.correction.length
        if self._damping is None and rank > 0:
            self._damping = _default_damping(self.correction.rank, sampler, steps)
        if steps is not None:  # so that a list of another length is refused at once
            one_for_each_step("damping", self._damping, steps)
            one_for_each_step("length", self._length, steps)
        self.denoiser = denoiser
        self.reset()

    def reset(self) -> None:
        """Forget the trajectory: the next call starts a new one."""
        self.anchors: tuple[Tensor, ...] = ()  # of the next step
        self.step: int | None = None  # that the last call was of
        self._earlier: tuple[Tensor, ...] = ()  # anchors of this step
        self._sigma: Tensor | None = None  # of the last call
        self._like: tuple | None = None  # its shape and device

    def forward(self, x: Tensor, sigma: float | Tensor, *args, **extra) -> Tensor:
        """D' (B, ...), of the type of what the denoiser returns; see the class."""
        denoised = self.denoiser(x, sigma, *args, **extra)
        levels = sigma if isinstance(sigma, Tensor) else torch.tensor(sigma, dtype=torch.float64)
        if self.correction.rank == 0 or not self._advance(x, levels.detach().flatten().cpu()):
            return denoised

        dtype = torch.promote_types(torch.promote_types(x.dtype, denoised.dtype), torch.float32)
        levels = levels.to(dtype).to(x.device).reshape(-1, *[1] * (x.ndim - 1))
        g = (x.to(dtype) - denoised.to(dtype)) / levels.clamp(min=SMALLEST)
        damping = self._of_step("damping", self._damping)
        length = self._of_step("length", self._length)
        corrected, self.anchors = self.correction(g, self._earlier, damping, length)
        if corrected is g:
            return denoised
        # by its difference, so that what is not changed stays as it is to the last bit
        return (denoised + levels * (g - corrected)).to(denoised.dtype)

    def _advance(self, x: Tensor, sigma: Tensor) -> bool:
        """Find the step that a call is of, and its anchors. False at sigma = 0, which is none."""
        if not (sigma > 0).any():
            return False
        like, last = (x.shape, x.device), self._sigma
        if like != self._like or (sigma > last * (1 + SAME)).any():
            self.step, self._earlier = 0, ()
        elif (sigma < last * (1 - SAME)).any():
            self.step, self._earlier = self.step + 1, self.anchors
        self._sigma, self._like = sigma, like
        return True

    def _of_step(self, name: str, value):
        """The entry of this step in `value`, or the one value of all steps."""
        if not isinstance(value, list):
            return value
        if self.step >= len(value):
            raise UserError(
                f"{name}={value}: has {len(value)} entries, and the trajectory has more steps; "
                "give one for each noise level at which the sampler calls the denoiser"
            )
        return value[self.step]

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            # `denoiser` itself is not there yet while a copy is made
            if name == "denoiser" or name.startswith("__"):
                raise
            return getattr(self.denoiser, name)


def _default_damping(rank: int, sampler: str | None, steps: int | None) -> float:
    kind = max(SOLVERS, key=SOLVERS.get) if sampler is None else SAMPLERS[sampler]
    if kind is None:
        return default_damping(rank)
    if steps is None:
        raise UserError(
            "steps=None: the default damping needs the number of steps, unless sampler=euler or "
            "ddim; give steps=, or damping="
        )
    return default_damping(rank, steps, 2, kind, max(GRIDS, key=GRIDS.get))
