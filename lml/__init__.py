"""Levenberg-Marquardt-Langevin sampling for diffusion models (arXiv 2505.24222)."""

__version__ = "0.1.0"

__all__ = ["LMLDenoiser"]


def __getattr__(name: str):
    # on demand: `import lml` itself loads no torch
    if name == "LMLDenoiser":
        from lml.denoiser import LMLDenoiser

        return LMLDenoiser
    raise AttributeError(f"module 'lml' has no attribute '{name}'")
