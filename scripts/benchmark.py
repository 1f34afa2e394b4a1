"""Measure speed and memory: `python scripts/benchmark.py [parts=[...]] [key=value ...]`.

Prints a Markdown table of ratios, each measured within one run, and writes JSON to `out=FILE`.
"""

import sys
from pathlib import Path

from omegaconf import DictConfig

# A clone runs without being installed; and these scripts must not hide modules of the same name.
if (scripts := str(Path(__file__).parent)) in sys.path:
    sys.path.remove(scripts)
sys.path.insert(0, str(Path(__file__).parents[1]))

from lml.cli.main import main


@main("benchmark")
def script(cfg: DictConfig) -> None:
    from lml.benchmark import benchmark

    benchmark(cfg)


if __name__ == "__main__":
    script()
