"""Tables, figures and the page of a study: `python scripts/tabulate.py experiment=NAME`."""

import sys
from pathlib import Path

from omegaconf import DictConfig

# A clone runs without being installed; and these scripts must not hide modules of the same name.
if (scripts := str(Path(__file__).parent)) in sys.path:
    sys.path.remove(scripts)
sys.path.insert(0, str(Path(__file__).parents[1]))

from lml.cli.main import main


@main("tabulate")
def tabulate(cfg: DictConfig) -> None:
    from lml.report import tabulate as write

    write(cfg)


if __name__ == "__main__":
    tabulate()
