"""Tiny random pipelines on disk, as the config group `model` finds them."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_pipelines
import torch


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds every pipeline of `tiny_pipelines` by the name of its config.

    Beside them "celebahq_ldm" and "controlnet". Not to be written to.
    """
    root = tmp_path_factory.mktemp("pipelines")
    for name, build in tiny_pipelines.PIPELINES.items():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            build(root / "tokenizers" / name).save_pretrained(root / name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tiny_pipelines.latent(root / "celebahq_ldm")
        tiny_pipelines.controlnet().save_pretrained(root / "controlnet")
    return root


@pytest.fixture
def prompts(tmp_path: Path) -> list[str]:
    """Arguments that give a run three prompts."""
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\na dog\na bird\n")
    return ["prompts=text", f"prompts.file={file}"]
