"""Measure what the project promises: `python scripts/benchmark.py [parts=[...]] [key=value ...]`.

Prints a Markdown table of ratios, each measured within one run, and writes JSON to `out=FILE`.
"""

from omegaconf import DictConfig

from lml.cli import main


@main("benchmark")
def script(cfg: DictConfig) -> None:
    from lml.benchmark import benchmark

    benchmark(cfg)


if __name__ == "__main__":
    script()
