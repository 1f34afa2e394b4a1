"""Tables and figures of a study: `python scripts/tabulate.py experiment=NAME`."""

import sys
from pathlib import Path

from omegaconf import DictConfig

sys.path.insert(0, str(Path(__file__).parents[1]))  # a clone runs without being installed

from lml.cli import main


@main("tabulate")
def tabulate(cfg: DictConfig) -> None:
    from lml.report import tabulate as write

    write(cfg)


if __name__ == "__main__":
    tabulate()
