"""Calibration: finds the damping of each step for a model, a solver, a grid and a number of steps.

`calibrate_pipeline` is for a diffusers pipeline, `scripts/calibrate.py` for the models of
configs/model, and `calibrate` for anything that samples with a scheduler.
"""

from lml.calibration.pipeline import calibrate_pipeline
from lml.calibration.search import (
    Calibration,
    CalibrationError,
    Choice,
    Objective,
    Problem,
    calibrate,
)

__all__ = [
    "Calibration",
    "CalibrationError",
    "Choice",
    "Objective",
    "Problem",
    "calibrate",
    "calibrate_pipeline",
]
