"""Export images for other tools: `python scripts/export.py layout=NAME out=FOLDER ...`.

`layout=t2i_compbench run_dir=FOLDER`: a run, for T2I-CompBench's own evaluators.
`layout=coco_reference layout.images=val2014 run_dir=FOLDER`: the reference images for a run's
captions. Started again, the script makes only what is missing.
"""

import sys
from pathlib import Path

from omegaconf import DictConfig

# A clone runs without being installed; and these scripts must not hide modules of the same name.
if (scripts := str(Path(__file__).parent)) in sys.path:
    sys.path.remove(scripts)
sys.path.insert(0, str(Path(__file__).parents[1]))

from lml.cli.main import main


@main("export")
def script(cfg: DictConfig) -> None:
    from lml.export import export

    print(export(cfg))


if __name__ == "__main__":
    script()
