"""How long a sweep takes before it makes anything: `python tests/count_planning.py [cells]`.

Milliseconds for each cell that is refused or finished, of a model that takes no time. Starting is
left out: it is the difference between a sweep of all cells and one of a quarter of them.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def sweep(folder: Path, *overrides: str) -> float:
    """Seconds of a sweep over `overrides`."""
    command = [sys.executable, str(ROOT / "scripts/sample.py"), "-m", "model=gaussian"]
    command += [
        "model.network.sample_size=4",
        "num_images=1",
        "batch_size=1",
        "metrics=none",
        "threads=1",
        "progress=false",
    ]
    start = time.perf_counter()
    subprocess.run([*command, *overrides], cwd=folder, capture_output=True, text=True)
    return time.perf_counter() - start


def main(cells: int) -> None:
    dampings = [str(1 + k / 8) for k in range(cells)]
    few, all_ = (f"lml.damping={','.join(dampings[:count])}" for count in (cells // 4, cells))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sweep(folder, "nfe=2", all_)  # makes them
        for kind, nfe in (("refused", 2000), ("finished", 2)):
            seconds = sweep(folder, f"nfe={nfe}", all_) - sweep(folder, f"nfe={nfe}", few)
            each = 1000 * seconds / (cells - cells // 4)
            print(f"{kind:9} {cells} cells: {each:6.1f} ms a cell", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
