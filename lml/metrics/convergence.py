"""Convergence: the distance to the fine-step solution from the same noise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from lml.errors import UserError
from lml.metrics.base import RunMetric

SPACES = ("", "latent_")  # pixels; latents, for latent models


class Convergence(RunMetric):
    """RMSE and cosine similarity between images and a solver's fine-step solutions.

    This is the error of the solver alone, apart from the network's. `rmse` is over all pixels of
    all images, `cosine` is the mean over images. Both are of uint8 images scaled to [-1, 1]: the
    rounding of both sides alone gives an RMSE of about 0.0032. Runs of latent models also get
    `latent_rmse` and `latent_cosine`, of the latents as the solver left them, in float32.

    Args:
        solver: the solver that makes the fine-step solution.
        nfe: its number of evaluations.
        reference: a folder that holds the fine-step solutions already, with the same file names.
    """

    higher_is_better: ClassVar = {
        "rmse": False,
        "cosine": True,
        "latent_rmse": False,
        "latent_cosine": True,
    }
    parts = ("rmse", "cosine")
    takes_latents = True

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
        for space in SPACES:
            for name in ("squared_error", "cosine"):
                zero = torch.zeros((), dtype=torch.float64)
                self.add_state(space + name, zero, dist_reduce_fx="sum")
            for name in ("numbers", "count"):
                self.add_state(space + name, torch.tensor(0), dist_reduce_fx="sum")

    def reference_folder(self, reference_run: Callable[..., Path] | None) -> Path:
        """The folder of fine-step solutions: `reference`, or else a run that repeats this one.

        UserError without both.
        """
        if self.reference is not None:
            return Path(self.reference)
        if reference_run is None:
            raise UserError(
                "metrics=[convergence]: needs a run to repeat with fine steps; for a plain folder "
                "of images give metrics.convergence.reference=FOLDER"
            )
        return reference_run(nfe=self.nfe, solver=self.solver)

    def update(
        self, images: Tensor, reference: Tensor, latents: tuple[Tensor, Tensor] | None = None
    ) -> None:
        """Compare uint8 `images` (B, C, H, W) with uint8 `reference` of the same shape.

        `latents` is the pair that the two were decoded from, each (B, ...).
        """
        pixels = (v.double() / 127.5 - 1 for v in (images, reference))
        for space, pair in zip(SPACES, (pixels, latents), strict=True):
            if pair is not None:
                x, y = (v.flatten(1).double() for v in pair)
                sums = {
                    "squared_error": (x - y).square().sum(),
                    "cosine": torch.cosine_similarity(x, y).sum(),
                    "numbers": x.numel(),
                    "count": len(x),
                }
                for name, value in sums.items():
                    setattr(self, space + name, getattr(self, space + name) + value)

    def compute(self) -> dict[str, Tensor]:
        """`rmse` in [0, 2] and `cosine` in [-1, 1]; the same of latents, if there are any."""
        values = {}
        for space in SPACES:
            error, cosine, numbers, count = (
                getattr(self, space + name)
                for name in ("squared_error", "cosine", "numbers", "count")
            )
            if count:
                values[f"{space}rmse"] = (error / numbers).sqrt()
                values[f"{space}cosine"] = cosine / count
        if self.latent_count:
            self.protocol["latents"] = "float32, as the solver left them"
        return values
