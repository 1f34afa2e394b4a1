"""Measure what the project promises: `python scripts/benchmark.py [parts=[...]] [key=value ...]`.

Prints a Markdown table of ratios, each measured within one run, and writes JSON to `out=FILE`.
"""

import sys
from pathlib import Path

from omegaconf import DictConfig

sys.path.insert(0, str(Path(__file__).parents[1]))  # a clone runs without being installed

from lml.cli import main


@main("benchmark")
def script(cfg: DictConfig) -> None:
    from lml.benchmark import benchmark

    benchmark(cfg)


if __name__ == "__main__":
    script()
