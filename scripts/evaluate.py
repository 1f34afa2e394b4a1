"""Score images: `python scripts/evaluate.py run_dir=FOLDER` or `images=FOLDER`, `[metrics=...]`.

Prints the values and adds them to `out=FILE`: by default to metrics.json in the run's folder, or to
FOLDER.metrics.json beside a folder of images.
"""

import sys
from pathlib import Path

from omegaconf import DictConfig

# A clone runs without being installed; and these scripts must not hide modules of the same name.
if (scripts := str(Path(__file__).parent)) in sys.path:
    sys.path.remove(scripts)
sys.path.insert(0, str(Path(__file__).parents[1]))

from lml.cli.main import main


@main("evaluate")
def evaluate(cfg: DictConfig) -> None:
    from lml.runs.score import evaluate_folder
    from lml.runs.tracking import Tracker

    with Tracker(cfg) as tracker:
        evaluate_folder(cfg, tracker)


if __name__ == "__main__":
    evaluate()
