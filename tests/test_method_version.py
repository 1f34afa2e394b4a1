"""What `METHOD_VERSION` stands for: the numbers of every LML scheduler, in tests/method.json.

`python tests/test_method_version.py` writes them anew.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from along import noise_from
from torch import Tensor

from lml import schedulers
from lml.correction import METHOD_VERSION
from lml.schedulers import released

PINS = Path(__file__).with_name("method.json")
STEPS = 5
MESSAGE = (
    "numbers changed: raise METHOD_VERSION in lml/correction.py and pin anew "
    "(python tests/test_method_version.py)"
)
OTHERS = [  # options that reach other parts of the formula
    {"damping": 0.5, "damping_scale": "absolute", "rank": 3},
    {"anchor": "ema", "kappa": 0.5, "rank": 1},
    {"norm_preserving": False, "rank": 1},
    {"freeze": 0.5, "rank": 1},
]
RELEASED = {"anchor": "ema", "kappa": 0.5, "rank": 1, "damping": 0.5, "damping_scale": "absolute"}


def cases() -> dict[str, tuple[type, dict]]:
    """Scheduler and options by a name: each class at its default and with every target, others."""
    found = []
    for cls in schedulers.LMLSchedulerMixin.__subclasses__():
        found.append((cls, {"rank": 2}))
        found += [(cls, {"rank": 2, "damping": 2.0, "target": target}) for target in cls.targets]
    found += [(schedulers.LMLDPMSolverMultistepScheduler, options) for options in OTHERS]
    for cls in (
        released.ReleasedDDIMScheduler,
        released.ReleasedDPMSolverMultistepScheduler,
        released.ReleasedFlowMatchEulerDiscreteScheduler,
    ):
        found += [(cls, {**RELEASED, "target": target}) for target in cls.targets]
    return {f"{cls.__name__} {json.dumps(options)}": (cls, options) for cls, options in found}


def numbers(cls: type, options: dict) -> list[float]:
    """A few elements of what five steps make of a fixed sample, and its norm, in float64."""
    scheduler = cls(**options)
    scheduler.set_timesteps(STEPS)
    ramp = torch.arange(2 * 3 * 4 * 4, dtype=torch.float64).reshape(2, 3, 4, 4)
    sample = 1.5 * torch.sin(1 + 1.7 * ramp) * float(getattr(scheduler, "init_noise_sigma", 1.0))
    for k, timestep in enumerate(scheduler.timesteps):
        prediction = network(scaled(scheduler, sample, timestep), timestep)
        added = noise_from(k, scheduler)
        sample = scheduler.step(prediction, timestep, sample, **added).prev_sample.double()
    return [*sample[:, 1, 2, 3].tolist(), sample.norm().item()]


def network(sample: Tensor, timestep: Tensor) -> Tensor:
    """Smooth, and not the same from step to step."""
    return torch.tanh(sample + 0.3 * torch.sin(sample.flip(-1) + float(timestep) / 200))


def scaled(scheduler, sample: Tensor, timestep: Tensor) -> Tensor:
    """What the network is given; flow matching has no scale_model_input."""
    return getattr(scheduler, "scale_model_input", lambda x, t: x)(sample, timestep)


def read() -> dict:
    return json.loads(PINS.read_text())


def test_the_numbers_are_those_of_this_version():
    assert read()["version"] == METHOD_VERSION, MESSAGE
    assert list(read()["numbers"]) == list(cases()), "other cases are pinned: pin anew"


@pytest.mark.parametrize("name", cases())
def test_the_method_makes_the_numbers_of_its_version(name):
    # some of diffusers' schedulers compute in float32, whatever they are given
    expected = pytest.approx(read()["numbers"][name], rel=2e-6, abs=2e-6)
    assert numbers(*cases()[name]) == expected, MESSAGE


@pytest.mark.parametrize(
    "name", [name for name, (_, options) in cases().items() if options != {"rank": 2}]
)
def test_a_change_of_the_method_would_be_seen(name):
    """Every case with a damping is far from its base solver."""
    cls, options = cases()[name]
    base = numbers(cls, {**options, "rank": 0})
    assert numbers(cls, options) != pytest.approx(base, rel=1e-3, abs=1e-3)


if __name__ == "__main__":
    found = {name: numbers(*case) for name, case in cases().items()}
    PINS.write_text(json.dumps({"version": METHOD_VERSION, "numbers": found}, indent=1) + "\n")
