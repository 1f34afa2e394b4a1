"""Which way each metric is better, as its class says, without the import of its networks."""

from __future__ import annotations

HIGHER_IS_BETTER = (
    "inception_score",
    "clip_score",
    "image_reward",
    "precision_recall",
    "lpips_diversity",
    *(f"ideal_direction/{part}" for part in ("prediction", "corrected", "step")),
    "timing/images_per_second",
)


def higher_is_better(metric: str) -> bool:
    """Whether it is, of `metric` or `metric/part`."""
    return metric.startswith(HIGHER_IS_BETTER) or metric.endswith("cosine")
