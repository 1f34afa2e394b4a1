"""Find the damping of each step: `python scripts/calibrate.py [solver=NAME] [grid=NAME] [nfe=N]`.

It is stored in outputs/calibrations, where `scripts/sample.py lml=calibrated` finds it. With `-m`
and several solvers and grids, the last lines say which is best for each number of evaluations.
"""

import sys
from pathlib import Path

from omegaconf import DictConfig

# A clone runs without being installed; and these scripts must not hide modules of the same name.
if (scripts := str(Path(__file__).parent)) in sys.path:
    sys.path.remove(scripts)
sys.path.insert(0, str(Path(__file__).parents[1]))

from lml.cli.main import main


@main("calibrate")
def calibrate(cfg: DictConfig) -> None:
    from lml.calibration import script

    script.tell(cfg, script.run(cfg))


if __name__ == "__main__":
    calibrate()
