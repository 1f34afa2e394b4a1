"""Levenberg-Marquardt-Langevin sampling for diffusion models (arXiv 2505.24222)."""

__version__ = "0.1.0"
