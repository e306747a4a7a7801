"""A network over volumes [N, C, D, H, W]."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["ResNet18OfVolumes"]


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    """A convolution of each frame."""
    padding = (0, kernel // 2, kernel // 2)
    conv = nn.Conv3d(inputs, outputs, (1, kernel, kernel), (1, stride, stride), padding, bias=False)
    return [conv, nn.BatchNorm3d(outputs)]


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*_conv(inputs, outputs, 3, stride), nn.ReLU(), *_conv(outputs, outputs, 3))
        self.shortcut = nn.Sequential(*(_conv(inputs, outputs, 1, stride) if inputs != outputs else []))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.layers(x) + self.shortcut(x))


class ResNet18OfVolumes(nn.Module):
    """ResNet-18 of 3-D layers with kernels (1, k, k), as in models of videos and of stacks of images."""

    def __init__(self, classes: int = 100) -> None:
        super().__init__()
        layers = [*_conv(3, 64, 7, 2), nn.ReLU(), nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1))]
        channels = 64
        for outputs, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
            layers += [_Block(channels, outputs, stride), _Block(outputs, outputs, 1)]
            channels = outputs
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool3d(1)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.flatten(self.pool(self.features(x)), 1))
        return logits
