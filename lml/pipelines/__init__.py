"""Turns seeds (and prompts) into images. `find_model` makes a model of a config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lml.errors import UserError, nearest
from lml.pipelines import latent, pixel, text

Model = pixel.PixelModel | text.TextModel
Sampler = pixel.PixelSampler | text.TextSampler
KINDS = {
    "pixel": pixel.find_pixel_model,
    "latent": latent.find_latent_model,
    "text": text.find_text_model,
}


def find_model(config: Mapping[str, Any]) -> Model:
    """The model that a config of the group `model` describes. UserError if there is none."""
    kind = config.get("kind", "pixel")
    if kind not in KINDS:
        raise UserError(f"model.kind={kind}: unknown; nearest: {nearest(str(kind), KINDS)}")
    return KINDS[kind](config)
