"""Train what the repository ships: `python scripts/train.py [train=denoiser|features]`.

The same command goes on from its own checkpoint; a larger `budget.minutes` trains longer.
"""

import sys
from pathlib import Path

from omegaconf import DictConfig

sys.path.insert(0, str(Path(__file__).parents[1]))  # a clone runs without being installed

from lml.cli import main


@main("train")
def train(cfg: DictConfig) -> None:
    from lml import training

    {"denoiser": training.run_denoiser, "features": training.run_features}[cfg.task](cfg)


if __name__ == "__main__":
    train()
