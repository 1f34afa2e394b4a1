"""Train what the repository ships: `python scripts/train.py [train=denoiser|features]`.

The same command continues from its own checkpoint; a larger `budget.images` trains longer.
"""

import sys
from pathlib import Path

from omegaconf import DictConfig

# A clone runs without being installed; and these scripts must not hide modules of the same name.
if (scripts := str(Path(__file__).parent)) in sys.path:
    sys.path.remove(scripts)
sys.path.insert(0, str(Path(__file__).parents[1]))

from lml.cli.main import main


@main("train")
def train(cfg: DictConfig) -> None:
    from lml import training
    from lml.runs.records import check_output

    check_output(cfg.run_dir, "run_dir")
    {"denoiser": training.run_denoiser, "features": training.run_features}[cfg.task](cfg)


if __name__ == "__main__":
    train()
