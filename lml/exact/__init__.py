"""Problems whose score is known in closed form, called like a `diffusers.UNet2DModel`."""

from lml.exact.base import ExactModel
from lml.exact.empirical import Empirical
from lml.exact.gaussian import Gaussian
from lml.exact.mixture import MixtureOfGaussians

__all__ = ["Empirical", "ExactModel", "Gaussian", "MixtureOfGaussians"]
