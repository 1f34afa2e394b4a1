"""The cells of a sweep, each an ordinary run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lml.correction import METHOD_VERSION
from lml.runs.plan import Plan
from lml.seals import canonical

MISSING, DONE, FAILED, REFUSED = "missing", "done", "failed", "refused"


@dataclass
class Cell:
    """One setting: its overrides, its config, and its `plan`, which is None if it is refused."""

    overrides: list[str]
    config: dict[str, Any]
    plan: Plan | None = None
    status: str = MISSING
    reason: str | None = None
    lacks_calibration: bool = False
    value: float | None = None  # the search's objective

    @property
    def name(self) -> str:
        """The name of the cell's sweep; "" if the config could not be composed."""
        return self.config.get("name", "")

    @property
    def key(self) -> tuple:
        """Cells with the same key are made once: the same run, folder and metrics."""
        if self.plan is None:
            return tuple(self.overrides)
        folder = self.plan.folder
        return str(folder.path), folder.hash, canonical(self.config["metrics"])

    @property
    def images_to_make(self) -> int:
        """The number of images that are not stored, by counting files."""
        images = () if self.config["overwrite"] else self.plan.folder.images.glob("*.png")
        stored = sum(1 for _ in images)
        return max(0, self.config["num_images"] - stored)

    def entry(self) -> dict[str, Any]:
        """The cell's entry in sweep.yaml."""
        config = self.config
        return {
            "overrides": [o for o in self.overrides if key_of(o) != "experiment"],
            "run": None if self.plan is None else self.plan.folder.path.name,
            "solver": config["solver"]["name"],
            "grid": config["grid"].get("name", "default"),
            "lml": {**config["lml"], "method_version": METHOD_VERSION},
            "nfe": config["nfe"],
            "seed": config["seed"],
            "num_images": config["num_images"],
            "model": config["model"]["name"],
            "dtype": config["dtype"],
            "status": self.status,
            "reason": self.reason,
        }

    def __str__(self) -> str:
        return " ".join(self.overrides)


def key_of(override: str) -> str:
    """The key that a command line override sets."""
    return override.partition("=")[0].lstrip("+~")


def split_lml(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """The overrides that are not LML's, and those of LML, without the search's seed and count."""
    lml = [o for o in overrides if key_of(o) == "lml" or key_of(o).startswith("lml.")]
    return [o for o in overrides if o not in lml and key_of(o) not in ("seed", "num_images")], lml
