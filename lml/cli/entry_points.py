"""The commands of an installed wheel: `lml-sample` is `python scripts/sample.py`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from lml.data.assets import ROOT


def run_script() -> None:
    """Run the script that the command is named after, with the same arguments."""
    name = Path(sys.argv[0]).stem.removeprefix("lml-")
    script = ROOT / "scripts" / f"{name}.py"
    os.execv(sys.executable, [sys.executable, str(script), *sys.argv[1:]])
