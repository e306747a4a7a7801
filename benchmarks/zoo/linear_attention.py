"""An image classifier whose attention is linear in the number of pixels."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

__all__ = ["EfficientViT"]


def _conv(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


class _Residual(nn.Module):
    def __init__(self, main: nn.Module) -> None:
        super().__init__()
        self.main = main

    def forward(self, x: Tensor) -> Tensor:
        changed: Tensor = x + self.main(x)
        return changed


def _separable(inputs: int, outputs: int, stride: int = 1) -> nn.Module:
    """A depthwise and a pointwise convolution."""
    return nn.Sequential(*_conv(inputs, inputs, 3, stride, inputs), nn.Hardswish(), *_conv(inputs, outputs))


def _inverted(inputs: int, outputs: int, stride: int = 1) -> nn.Module:
    """An inverted bottleneck of four times the channels."""
    wide = 4 * inputs
    return nn.Sequential(
        *(*_conv(inputs, wide), nn.Hardswish()),
        *(*_conv(wide, wide, 3, stride, wide), nn.Hardswish()),
        *_conv(wide, outputs),
    )


class _LinearAttention(nn.Module):
    """Attention between pixels, and between neighbourhoods of 5x5 pixels, with ReLU instead of softmax.

    Queries, keys and values of a head have `dim` channels each. With ReLU, the product of keys and values can be
    computed first. A row of ones is appended to the values. The result in this row is the sum of the attention weights,
    by which the other rows are divided.
    """

    def __init__(self, channels: int, dim: int = 16) -> None:
        super().__init__()
        self.dim = dim
        three = 3 * channels
        self.qkv = nn.Conv2d(channels, three, 1, bias=False)
        self.neighbourhoods = nn.Sequential(
            nn.Conv2d(three, three, 5, padding=2, groups=three, bias=False),
            nn.Conv2d(three, three, 1, groups=three // dim, bias=False),
        )
        self.project = nn.Sequential(*_conv(2 * channels, channels))

    def attend(self, qkv: Tensor) -> Tensor:
        """Return the attention [N, C, H, W] of `qkv` [N, 3 C, H, W]. Computes in float32, also under autocast."""
        height, width = qkv.shape[-2:]
        with torch.autocast(qkv.device.type, enabled=False):
            heads = qkv.float().reshape(qkv.shape[0], -1, 3 * self.dim, height * width)
            query, key, value = torch.split(heads, self.dim, 2)
            value = nn.functional.pad(value, (0, 0, 0, 1), value=1.0)
            found = (value @ key.relu().transpose(-1, -2)) @ query.relu()
            attended: Tensor = found[:, :, :-1] / (found[:, :, -1:] + 1e-15)
            return attended.reshape(qkv.shape[0], -1, height, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)
        projected: Tensor = self.project(self.attend(torch.cat([qkv, self.neighbourhoods(qkv)], 1)))
        return projected


class EfficientViT(nn.Module):
    """EfficientViT (Cai et al. 2023) of the widths of B0, with a block of attention in each of the last two stages."""

    WIDTHS = (8, 16, 32, 64, 128)

    def __init__(self, classes: int = 100) -> None:
        super().__init__()
        widths = self.WIDTHS
        layers = [*_conv(3, widths[0], 3, 2), nn.Hardswish(), _Residual(_separable(widths[0], widths[0]))]
        for stage, (inputs, outputs) in enumerate(pairwise(widths)):
            layers.append(_inverted(inputs, outputs, 2))
            if stage >= 2:
                layers.append(_Residual(_LinearAttention(outputs)))
            layers.append(_Residual(_inverted(outputs, outputs)))
        self.features = nn.Sequential(*layers, *_conv(widths[-1], 512), nn.Hardswish())
        self.head = nn.Sequential(nn.Linear(512, 512), nn.LayerNorm(512), nn.Hardswish(), nn.Linear(512, classes))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(x).mean((2, 3)))
        return logits
