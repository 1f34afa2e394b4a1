"""Train the embedded denoiser or the feature network: `python scripts/train.py [train=features]`."""

import hydra
import torch
from omegaconf import DictConfig

from lml import training


@hydra.main(version_base=None, config_path="../configs", config_name="train")
def main(cfg: DictConfig) -> None:
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    {"denoiser": training.run_denoiser, "features": training.run_features}[cfg.task](cfg)


if __name__ == "__main__":
    main()
