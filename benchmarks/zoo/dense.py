"""Networks whose outputs are images, maps of boxes, or masks."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

__all__ = ["ESPCN", "ConvAutoencoder", "UNet", "Yolo"]


def _double(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """A U-Net: three levels of max pools, three of transposed convolutions, with skip connections on each level."""

    def __init__(self, classes: int = 4, width: int = 16) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width, 8 * width]
        self.enter = _double(3, width)
        self.down = nn.ModuleList(nn.Sequential(nn.MaxPool2d(2), _double(*pair)) for pair in pairwise(widths))
        wide = widths[:0:-1]
        self.up = nn.ModuleList(nn.ConvTranspose2d(channels, channels // 2, 2, 2) for channels in wide)
        self.join = nn.ModuleList(_double(channels, channels // 2) for channels in wide)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        levels = [self.enter(x)]
        for down in self.down:
            levels.append(down(levels[-1]))
        x = levels.pop()
        for up, join in zip(self.up, self.join, strict=True):
            x = join(torch.cat([levels.pop(), up(x)], 1))
        mask: Tensor = self.head(x)
        return mask


def _conv_silu(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.SiLU())


class _CrossStage(nn.Module):
    """Splits the channels, runs one half through residual blocks, and concatenates the outputs of all blocks."""

    def __init__(self, inputs: int, outputs: int, blocks: int, *, adds: bool) -> None:
        super().__init__()
        half = outputs // 2
        self.enter = _conv_silu(inputs, outputs, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(_conv_silu(half, half, 3), _conv_silu(half, half, 3)) for _ in range(blocks)
        )
        self.leave = _conv_silu(half * (2 + blocks), outputs, 1)
        self.adds = adds

    def forward(self, x: Tensor) -> Tensor:
        kept = list(self.enter(x).chunk(2, 1))
        for block in self.blocks:
            y = block(kept[-1])
            kept.append(kept[-1] + y if self.adds else y)
        joined: Tensor = self.leave(torch.cat(kept, 1))
        return joined


class _PyramidPool(nn.Module):
    """Concatenates max pools of growing window size."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.enter = _conv_silu(channels, channels // 2, 1)
        self.pool = nn.MaxPool2d(5, 1, 2)
        self.leave = _conv_silu(2 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = [self.enter(x)]
        for _ in range(3):
            kept.append(self.pool(kept[-1]))
        joined: Tensor = self.leave(torch.cat(kept, 1))
        return joined


class Yolo(nn.Module):
    """A SiLU trunk with five strides, an upsampling and a downsampling pyramid, and heads at three scales."""

    def __init__(self, classes: int = 20, boxes: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(_conv_silu(3, 16, 3, 2), _conv_silu(16, 32, 3, 2), _CrossStage(32, 32, 1, adds=True))
        self.stage3 = nn.Sequential(_conv_silu(32, 64, 3, 2), _CrossStage(64, 64, 2, adds=True))
        self.stage4 = nn.Sequential(_conv_silu(64, 128, 3, 2), _CrossStage(128, 128, 2, adds=True))
        self.stage5 = nn.Sequential(_conv_silu(128, 256, 3, 2), _CrossStage(256, 256, 1, adds=True), _PyramidPool(256))
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.up4 = _CrossStage(256 + 128, 128, 1, adds=False)
        self.up3 = _CrossStage(128 + 64, 64, 1, adds=False)
        self.down4, self.join4 = _conv_silu(64, 64, 3, 2), _CrossStage(64 + 128, 128, 1, adds=False)
        self.down5, self.join5 = _conv_silu(128, 128, 3, 2), _CrossStage(128 + 256, 256, 1, adds=False)
        self.heads = nn.ModuleList(
            nn.Sequential(_conv_silu(channels, 64, 3), nn.Conv2d(64, 4 * boxes + classes, 1))
            for channels in (64, 128, 256)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        c3 = self.stage3(self.stem(x))
        c4 = self.stage4(c3)
        c5 = self.stage5(c4)
        p4 = self.up4(torch.cat([self.up(c5), c4], 1))
        p3 = self.up3(torch.cat([self.up(p4), c3], 1))
        p4 = self.join4(torch.cat([self.down4(p3), p4], 1))
        p5 = self.join5(torch.cat([self.down5(p4), c5], 1))
        return tuple(head(features) for head, features in zip(self.heads, (p3, p4, p5), strict=True))


class ConvAutoencoder(nn.Sequential):
    """Three strided convolutions, three transposed convolutions of kernel 3 with output padding, and a sigmoid."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for inputs, outputs in ((3, 16), (16, 32), (32, 64)):
            layers += [nn.Conv2d(inputs, outputs, 3, 2, 1), nn.ReLU()]
        for inputs, outputs in ((64, 32), (32, 16), (16, 3)):
            layers += [nn.ConvTranspose2d(inputs, outputs, 3, 2, 1, output_padding=1), nn.ReLU()]
        super().__init__(*layers[:-1], nn.Sigmoid())


class ESPCN(nn.Sequential):
    """Super-resolution of luminance by three (ESPCN): convolutions with tanh, then a pixel shuffle."""

    def __init__(self, scale: int = 3) -> None:
        super().__init__(
            nn.Conv2d(1, 64, 5, padding=2),
            nn.Tanh(),
            nn.Conv2d(64, 32, 3, padding=1),
            nn.Tanh(),
            nn.Conv2d(32, scale**2, 3, padding=1),
            nn.PixelShuffle(scale),
        )
