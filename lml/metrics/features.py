"""The small CIFAR-10 classifier on whose features FD-CIFAR is computed."""

from __future__ import annotations

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn


class _Block(nn.Sequential):
    """Convolution, batch norm and ReLU; with `pool`, half the resolution."""

    def __init__(self, inputs: int, outputs: int, pool: bool = False):
        layers = [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)]
        super().__init__(*layers, nn.ReLU(), *([nn.MaxPool2d(2)] if pool else []))


class FeatureNetwork(ModelMixin, ConfigMixin):
    """A residual CIFAR-10 classifier; its call returns the features before the last layer.

    Call: uint8 images (B, 3, 32, 32) -> float32 features (B, `num_features`). This is what
    torchmetrics expects of a feature extractor. `head(features)` gives the class logits (B, 10).
    """

    @register_to_config
    def __init__(self, width: int = 64, num_features: int = 256, num_classes: int = 10):
        super().__init__()
        self.stem = nn.Sequential(_Block(3, width), _Block(width, 2 * width, pool=True))
        self.residual1 = nn.Sequential(_Block(2 * width, 2 * width), _Block(2 * width, 2 * width))
        self.middle = nn.Sequential(
            _Block(2 * width, 4 * width, pool=True), _Block(4 * width, num_features, pool=True)
        )
        self.residual2 = nn.Sequential(
            _Block(num_features, num_features), _Block(num_features, num_features)
        )
        self.head = nn.Linear(num_features, num_classes)
        self.num_features = num_features

    def forward(self, images: Tensor) -> Tensor:
        x = (images / 127.5 - 1).to(dtype=self.head.weight.dtype)
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        x = self.middle(x + self.residual1(x))
        x = x + self.residual2(x)
        return x.mean((2, 3)).float()
