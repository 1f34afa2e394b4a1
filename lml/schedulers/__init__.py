"""Diffusers' schedulers with LML inside: `LML` before diffusers' own name.

pipe.scheduler = LMLDPMSolverMultistepScheduler.from_config(pipe.scheduler.config, rank=2)
"""

# diffusers looks up the loader of a pipeline's scheduler by this name in this module.
from diffusers import SchedulerMixin as SchedulerMixin

from lml.schedulers.mixin import OPTIONS, PARAMETERS, LMLSchedulerMixin
from lml.schedulers.solvers import *  # noqa: F403  every solver, without a list of names

__all__ = [
    "OPTIONS",
    "PARAMETERS",
    "LMLSchedulerMixin",
    *(solver.__name__ for solver in LMLSchedulerMixin.__subclasses__()),
]

# Saved pipelines and pickles name a class by its module. It must be the public one, whatever file
# the class is in.
for _name in __all__:
    if isinstance(_member := globals()[_name], type):
        _member.__module__ = __name__
