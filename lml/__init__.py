"""Levenberg-Marquardt-Langevin sampling for diffusion models (arXiv 2505.24222)."""

from omegaconf import OmegaConf

__version__ = "0.1.0"

# ${squared:a,n} in a config is a n^2; what is no number is left for whoever asks for one to refuse.
OmegaConf.register_new_resolver(
    "squared", lambda a, n: a * n**2 if isinstance(n, int) else n, replace=True
)
