"""Blocks of known networks with pools and resizes: one delegate, and transposes at its inputs and outputs only."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tests.case import Shape
from tests.graphs import kinds, partition_graphs
from tests.oracle import Function, agreement, everything_on_the_npu, lowered, quantized
from torch import nn

# Differences of one LSB add up in the convolutions that follow.
MAX_LSB = 3


def conv(inputs: int, outputs: int, kernel: int = 1, stride: int = 1) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


def googlenet() -> nn.Module:
    def block(a: nn.Module, b: nn.Module, c: nn.Module, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(x, 3, 2, ceil_mode=True)
        return torch.cat([a(x), b(x), c(F.max_pool2d(x, 3, 1, 1, ceil_mode=True))], 1)

    return Function(block, conv(8, 8), conv(8, 8, 3), conv(8, 4))


def squeezenet() -> nn.Module:
    def fire(squeeze: nn.Module, a: nn.Module, b: nn.Module, x: torch.Tensor) -> torch.Tensor:
        x = squeeze(F.max_pool2d(x, 3, 2, ceil_mode=True))
        return F.adaptive_avg_pool2d(torch.cat([a(x), b(x)], 1), (1, 1)).flatten(1)

    return Function(fire, conv(8, 4), conv(4, 8), conv(4, 8, 3))


def inception() -> nn.Module:
    def block(a: nn.Module, b: nn.Module, c: nn.Module, x: torch.Tensor) -> torch.Tensor:
        pooled = F.avg_pool2d(x, kernel_size=3, stride=1, padding=1)
        what_is_there = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        return torch.cat([a(x), b(pooled), c(what_is_there)], 1)

    return nn.Sequential(conv(8, 8), Function(block, conv(8, 8), conv(8, 4), conv(8, 4)), conv(16, 4))


def densenet() -> nn.Module:
    transition = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1, bias=False), nn.AvgPool2d(2, 2))
    return nn.Sequential(conv(8, 8, 3), nn.MaxPool2d(3, 2, 1), transition, conv(4, 4, 3))


def resnet_d() -> nn.Module:
    """The shortcut averages windows of ceil_mode."""
    pool = nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)
    return Function(lambda a, b, x: F.relu(a(x) + b(x)), conv(8, 8, 3, 2), nn.Sequential(pool, conv(8, 8)))


def autoencoder() -> nn.Module:
    def up(inputs: int, outputs: int) -> nn.Module:
        layer = nn.ConvTranspose2d(inputs, outputs, 3, 2, 1, 1, bias=False)
        return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU())

    return nn.Sequential(conv(8, 16, 3, 2), conv(16, 16, 3, 2), up(16, 8), nn.ConvTranspose2d(8, 3, 4, 2, 1))


def feature_pyramid() -> nn.Module:
    def merge(a: nn.Module, b: nn.Module, c: nn.Module, x: torch.Tensor) -> torch.Tensor:
        coarse = b(a(x))
        return c(a(x) + F.interpolate(coarse, scale_factor=2.0))  # type: ignore[no-any-return]

    return Function(merge, conv(8, 8, 3), conv(8, 8, 3, 2), conv(8, 4, 3))


def unet() -> nn.Module:
    def join(down: nn.Module, deep: nn.Module, last: nn.Module, x: torch.Tensor) -> torch.Tensor:
        wide = down(x)
        low = deep(F.max_pool2d(wide, 2))
        up = F.interpolate(low, scale_factor=2.0, mode="bilinear")
        return last(torch.cat([wide, up], 1))  # type: ignore[no-any-return]

    return Function(join, conv(8, 8, 3), conv(8, 8, 3), conv(16, 4, 3))


BLOCKS: dict[str, tuple[Callable[[], nn.Module], Shape]] = {
    "GoogLeNet": (googlenet, (1, 8, 14, 14)),
    "SqueezeNet": (squeezenet, (1, 8, 14, 14)),
    "Inception": (inception, (1, 8, 9, 9)),
    "DenseNet": (densenet, (1, 8, 16, 16)),
    "ResNet-D": (resnet_d, (1, 8, 9, 9)),
    "autoencoder": (autoencoder, (1, 8, 16, 16)),
    "feature pyramid": (feature_pyramid, (1, 8, 8, 8)),
    "U-Net": (unet, (1, 8, 8, 8)),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_block_is_one_delegate(name: str) -> None:
    build, shape = BLOCKS[name]
    torch.manual_seed(0)
    model = quantized(build(), (shape,))
    program = lowered(model)
    assert everything_on_the_npu(program), program.placement
    (graph,) = partition_graphs(model)
    assert kinds(graph).count("TRANSPOSE") <= 2
    assert agreement(program, model).worst <= MAX_LSB


def test_pools_that_no_resize_expresses_need_few_operators() -> None:
    """torch aligns corners with factors that the NPU lacks, so each axis takes a matrix product."""
    model = nn.Sequential(
        nn.Conv2d(8, 8, 1), nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True), nn.Conv2d(8, 8, 1)
    )
    (graph,) = partition_graphs(quantized(model, ((1, 8, 28, 28),)))
    assert kinds(graph).count("FULLY_CONNECTED") == 2
    assert kinds(graph).count("TRANSPOSE") == 2 + 3
