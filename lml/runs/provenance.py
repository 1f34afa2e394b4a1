"""Where a run comes from: its command line, versions and commit."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from lml import __version__
from lml.data.assets import ROOT

PACKAGES = ("torch", "diffusers", "torchmetrics", "torchvision", "numpy", "hydra-core")


def provenance() -> dict[str, Any]:
    """The command line, package versions and git commit of this run."""
    versions = {"python": platform.python_version(), "lml": __version__}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {"command": command_line(), "versions": versions, "git": _commit()}


def command_line() -> str:
    """The command line as it was typed."""
    return shlex.join(["python", *sys.argv])


def _commit() -> str | None:
    def git(*command: str) -> str:
        arguments = ["git", "-C", str(ROOT), *command]
        return subprocess.run(
            arguments, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != ROOT.resolve():
            return None  # somebody else's repository around an installed lml
        return git("rev-parse", "HEAD") + (" with changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None
