"""Pipelines that were saved with a scheduler of ours, loaded where nothing has imported lml yet."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from diffusers import DDPMPipeline, SchedulerMixin

from lml import schedulers
from lml.data.assets import ROOT

OURS = [
    cls
    for name, cls in vars(schedulers).items()
    if name.startswith("LML") and issubclass(cls, SchedulerMixin)
]
LOAD = """
import json, sys, traceback
from diffusers import DiffusionPipeline

try:
    DiffusionPipeline.from_pretrained(sys.argv[1])
except Exception:
    refusal = traceback.format_exc()
import lml.schedulers

loaded = {}
for path in sys.argv[1:]:
    scheduler = DiffusionPipeline.from_pretrained(path).scheduler
    correction = scheduler.correction
    loaded[type(scheduler).__name__] = [correction.rank, correction.damping]
print(json.dumps([refusal, loaded]))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_unet) -> list[str]:
    """A pipeline on disk for every scheduler of ours."""
    paths = [str(tmp_path_factory.mktemp("saved") / cls.__name__) for cls in OURS]
    for cls, path in zip(OURS, paths, strict=True):
        DDPMPipeline(tiny_unet(), cls(rank=3, damping=4.0)).save_pretrained(path)
    return paths


def test_after_the_import_that_the_readme_asks_for_and_not_before(saved):
    """Without it diffusers says which import; should it one day need none, the sentence goes."""
    assert "`import lml.schedulers`" in (ROOT / "README.md").read_text()
    process = subprocess.run(
        [sys.executable, "-c", LOAD, *saved],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    refusal, loaded = json.loads(process.stdout)
    assert "lml.schedulers" in refusal.splitlines()[-1]
    assert loaded == {cls.__name__: [3, 4.0] for cls in OURS}
