"""Make images: `python scripts/sample.py [experiment=NAME] [group=option ...] [key=value ...]`.

Without arguments, it makes and scores 64 images of the embedded CIFAR-10 model, with LML, in 10
network evaluations each.
`--help` shows all groups and keys, `-m` sweeps over comma-separated values, and
`torchrun --nproc-per-node N scripts/sample.py ...` shares the work between N processes.
"""

import sys
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

# A clone runs without being installed; and these scripts must not hide modules of the same name.
if (scripts := str(Path(__file__).parent)) in sys.path:
    sys.path.remove(scripts)
sys.path.insert(0, str(Path(__file__).parents[1]))

from lml.cli.main import main


@main("sample", makes_runs=True)
def sample(cfg: DictConfig) -> float | None:
    # imported here: typing errors are found without loading torch
    from lml.runs.sample import run
    from lml.runs.sweep.objective import read_objective
    from lml.runs.tracking import Tracker

    with Tracker(cfg) as tracker:
        folder = run(cfg, tracker)
    # Only the cells of a search have an objective; a single run has none.
    is_cell = HydraConfig.get().mode == RunMode.MULTIRUN
    return read_objective(cfg, folder) if is_cell else None


if __name__ == "__main__":
    sample()
