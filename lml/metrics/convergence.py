"""Distance to the fine-step solution from the same noise: a solver's own error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torchmetrics import Metric

from lml.errors import UserError


class Convergence(Metric):
    """RMSE and cosine similarity between images and a solver's fine-step solutions.

    Both are taken in pixel space on [-1, 1] after rounding to uint8: `rmse` over all pixels of all
    images, `cosine` as the mean over images. The rounding alone, of both sides, costs an RMSE of
    about 0.0032. `solver` and `nfe` say how the fine solution is made, `reference` is a folder that
    holds it already, with the same file names.
    """

    is_differentiable = False
    full_state_update = False

    def __init__(
        self,
        solver: str = "dpmsolverpp",
        nfe: int = 200,
        reference: str | Path | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.solver, self.nfe, self.reference = solver, nfe, reference
        fine = {"folder": str(reference)} if reference else {"solver": solver, "nfe": nfe}
        self.protocol = {"space": "pixels, uint8 scaled to [-1, 1]", "reference": fine}
        for name in ("squared_error", "cosine"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("pixels", "count"):
            self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")

    def reference_folder(self, reference_run: Callable[..., Path] | None) -> Path:
        """The folder of fine solutions; `reference_run(nfe=…, solver=…)` makes it if need be."""
        if self.reference is not None:
            return Path(self.reference)
        if reference_run is None:
            raise UserError(
                "metrics=[convergence]: needs a run to repeat with fine steps; for a plain folder "
                "of images give metrics.convergence.reference=FOLDER"
            )
        return reference_run(nfe=self.nfe, solver=self.solver)

    def update(self, images: Tensor, reference: Tensor) -> None:
        """Compare uint8 `images` (B, C, H, W) with uint8 `reference` of the same shape."""
        x, y = (v.flatten(1).double() / 127.5 - 1 for v in (images, reference))
        self.squared_error += (x - y).square().sum()
        self.cosine += torch.cosine_similarity(x, y).sum()
        self.pixels += x.numel()
        self.count += len(x)

    def compute(self) -> dict[str, Tensor]:
        """`rmse` in [0, 2] and `cosine` in [-1, 1]."""
        return {
            "rmse": (self.squared_error / self.pixels).sqrt(),
            "cosine": self.cosine / self.count,
        }
