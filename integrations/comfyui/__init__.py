"""A ComfyUI node that patches a model with LML. README.md beside it says how to install it."""

from __future__ import annotations

import torch

from lml.denoiser import SAMPLERS, LMLDenoiser

ANY = "any other"


class LMLPatch:
    """A copy of the model whose denoised latents, after guidance, are corrected by LML."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    CATEGORY = "model_patches"

    @classmethod
    def INPUT_TYPES(cls) -> dict:  # noqa: N802  ComfyUI's name
        return {
            "required": {
                "model": ("MODEL",),
                "sampler": (
                    [ANY, *SAMPLERS],
                    {"tooltip": "The sampler that you use. It sets the default damping."},
                ),
                "rank": ("INT", {"default": 2, "min": 0, "max": 8, "tooltip": "0 is off."}),
                "damping": (
                    "FLOAT",
                    {
                        "default": 0.0,
                        "min": 0.0,
                        "max": 1e6,
                        "step": 0.5,
                        "tooltip": "The smaller, the more LML changes. 0: what suits the sampler.",
                    },
                ),
                "norm_preserving": ("BOOLEAN", {"default": True}),
            }
        }

    def patch(self, model, sampler: str, rank: int, damping: float, norm_preserving: bool) -> tuple:
        """(the patched copy,); `model` is ComfyUI's ModelPatcher, and stays as it is."""
        patched = model.clone()
        patched.set_model_sampler_post_cfg_function(
            _PostCfg(None if sampler == ANY else sampler, rank, damping or None, norm_preserving)
        )
        return (patched,)


class _PostCfg:
    """What ComfyUI calls after guidance, at each evaluation."""

    def __init__(self, sampler: str | None, rank: int, damping: float | None, normed: bool):
        self.options = dict(rank=rank, damping=damping, sampler=sampler, norm_preserving=normed)
        self.sigmas: torch.Tensor | None = None
        self.lml: LMLDenoiser | None = None

    def __call__(self, args: dict) -> torch.Tensor:
        # All of the run's noise levels. One patch serves many runs, of other lengths, too.
        sigmas = args["model_options"]["transformer_options"]["sample_sigmas"]
        sigmas = sigmas.detach().float().cpu()
        if self.sigmas is None or not torch.equal(sigmas, self.sigmas):
            steps = max(1, len(sigmas) - 1)  # the last one is where the run ends
            self.lml = LMLDenoiser(lambda x, sigma, denoised: denoised, steps=steps, **self.options)
            self.sigmas = sigmas
        return self.lml(args["input"], args["sigma"], denoised=args["denoised"])


NODE_CLASS_MAPPINGS = {"LMLPatch": LMLPatch}
NODE_DISPLAY_NAME_MAPPINGS = {"LMLPatch": "LML (Levenberg-Marquardt-Langevin)"}
