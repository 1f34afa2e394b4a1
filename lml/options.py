"""The options of `lml.correction.LMLCorrection`: their ranges, and their values at each step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral

from torch import nn

from lml.damping import damping_of_steps, is_damping, is_real, one_for_each_step

DAMPING_SCALES = ("relative", "absolute")
ANCHORS = ("history", "ema")


class Options(nn.Module):
    """The options of `lml.correction.LMLCorrection`, which explains each of them.

    Raises:
        ValueError: an option is out of its range.
    """

    def __init__(
        self,
        rank: int = 2,
        damping: float | Sequence[float | None] | None = None,
        damping_scale: str = "relative",
        anchor: str = "history",
        kappa: float = 0.0,
        norm_preserving: bool = True,
        freeze: float = 0.0,
        length: float | Sequence[float] = 1.0,
    ):
        super().__init__()
        options = _checked(
            rank=rank,
            damping=damping,
            damping_scale=damping_scale,
            anchor=anchor,
            kappa=kappa,
            norm_preserving=norm_preserving,
            freeze=freeze,
            length=length,
        )
        for name, value in options.items():
            setattr(self, name, value)

    @property
    def is_relative(self) -> bool:
        """Whether lambda is in units of mean |u|^2. The default damping always is."""
        return self.damping is None or self.damping_scale == "relative"

    def extra_repr(self) -> str:
        scale = "relative" if self.is_relative else "absolute"
        return (
            f"rank={self.rank}, damping={self.damping} ({scale}), "
            f"anchor={self.anchor}, kappa={self.kappa}, "
            f"norm_preserving={self.norm_preserving}, freeze={self.freeze}, length={self.length}"
        )

    def dampings(
        self, timesteps: Sequence[float], num_train_timesteps: int, default: float
    ) -> tuple[float | None, ...]:
        """The damping of each step at `timesteps` in [0, T]; see `lml.damping.damping_of_steps`.

        `default` is used when the option is None; `num_train_timesteps` is T.
        """
        damping = default if self.damping is None else self.damping
        last = (1 - self.freeze) * num_train_timesteps if self.freeze else math.inf
        return damping_of_steps(damping, last, timesteps)

    def lengths(self, steps: int) -> tuple[float, ...]:
        """The length of each of `steps` steps. ValueError: the option is a list of another size."""
        return one_for_each_step("length", self.length, steps)


def _checked(**options: object) -> dict:
    """The options, checked. NumPy's numbers become int and float, so that they can be saved."""
    for name, (is_valid, allowed) in RULES.items():
        value = options[name]
        if name in LISTS and _is_list(value):
            entry, allowed = LISTS[name]
            options[name] = value = list(value)
            valid = bool(value) and all(map(entry, value))
        else:
            valid = is_valid(value)
        _check(name, value, valid, allowed)
    several = options["anchor"] == "history" or options["rank"] <= 1
    _check("rank", options["rank"], several, "0 or 1 with anchor=ema")
    plain = {name: _with_floats(value) for name, value in options.items()}
    return {**plain, "rank": int(options["rank"])}


def _check(name: str, value: object, valid: bool, allowed: str) -> None:
    if not valid:
        raise ValueError(f"{name}={value}: must be {allowed}")


def _is_list(value: object) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping))


def _is_rank(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and value >= 0


def _is_share(value: object) -> bool:
    return is_real(value) and 0 <= value <= 1


def _or_none(is_valid: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or is_valid(value)


def _with_floats(value: object) -> object:
    if isinstance(value, list):
        return [_with_floats(entry) for entry in value]
    return float(value) if is_real(value) else value


A_NUMBER = "a finite number > 0, or a list with one for each step"
RULES = {  # by name, in the order of checking: what is valid, in code and in words
    "rank": (_is_rank, "a whole number >= 0"),
    "damping": (_or_none(is_damping), A_NUMBER),
    "length": (is_damping, A_NUMBER),
    "damping_scale": (DAMPING_SCALES.__contains__, f"one of {', '.join(DAMPING_SCALES)}"),
    "anchor": (ANCHORS.__contains__, f"one of {', '.join(ANCHORS)}"),
    "kappa": (_is_share, "in [0, 1]"),
    "norm_preserving": (lambda value: isinstance(value, bool), "a boolean"),
    "freeze": (_is_share, "in [0, 1]"),
}
LISTS = {  # the same for each entry of a list
    "damping": (_or_none(is_damping), "a list of finite numbers > 0 and of None"),
    "length": (is_damping, "a list of finite numbers > 0"),
}
