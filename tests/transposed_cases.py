"""Table of the operator tests: transposed convolutions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from tests.case import Case, Rejected, Shape
from tests.oracle import Function
from torch import nn

__all__ = ["CASES", "REJECTED"]

PER_CHANNEL = (("weight_granularity", "per_channel"),)


def transposed(rank: int, *args: Any, **options: Any) -> Callable[[], nn.Module]:
    module = nn.ConvTranspose1d if rank == 1 else nn.ConvTranspose2d
    return lambda: module(*args, **options)


def image(label: str, shape: Shape, *args: Any, per_channel: bool = False, **options: Any) -> Case:
    model = transposed(2, *args, **options)
    return Case("aten.conv_transpose2d.input", label, model, (shape,), options=PER_CHANNEL if per_channel else ())


def line(label: str, shape: Shape, *args: Any, per_channel: bool = False, **options: Any) -> Case:
    model = transposed(1, *args, **options)
    return Case("aten.conv_transpose1d.default", label, model, (shape,), options=PER_CHANNEL if per_channel else ())


def then(label: str, function: Callable[[torch.Tensor], torch.Tensor], *args: Any, **options: Any) -> Case:
    def make() -> nn.Module:
        return Function(lambda layer, x: function(layer(x)), nn.ConvTranspose2d(*args, **options))

    return Case("aten.conv_transpose2d.input", f"then {label}", make, ((1, 4, 5, 6),), (0.0, 4.0))


def normalized(label: str, shape: Shape, *args: Any, **options: Any) -> Case:
    def make() -> nn.Module:
        layer = nn.ConvTranspose2d(*args, **options)
        norm = nn.BatchNorm2d(layer.out_channels)
        for values in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            assert values is not None
            nn.init.uniform_(values, 0.5, 2.0)
        return nn.Sequential(layer, norm, nn.ReLU())

    return Case("aten.conv_transpose2d.input", f"batch norm {label}", make, (shape,))


CASES = (
    image("2x2 stride 2", (1, 4, 5, 6), 4, 3, 2, stride=2),
    image("3x3", (1, 4, 5, 6), 4, 3, 3),
    image("3x3 padded", (2, 4, 5, 6), 4, 3, 3, padding=1),
    image("3x3 stride 2 SAME", (1, 4, 5, 6), 4, 3, 3, stride=2, padding=1),
    image("3x3 stride 2 twice the size", (1, 4, 5, 6), 4, 3, 3, stride=2, padding=1, output_padding=1),
    image("4x4 stride 2 SAME", (2, 4, 5, 6), 4, 3, 4, stride=2, padding=1),
    image("4x4 stride 2 no bias", (1, 4, 5, 6), 4, 3, 4, stride=2, padding=1, bias=False),
    image("5x5 stride 2", (1, 4, 5, 6), 4, 3, 5, stride=2, padding=2, output_padding=1),
    image("output padding alone", (1, 4, 5, 6), 4, 3, 3, stride=2, output_padding=1),
    image("unequal", (2, 3, 5, 7), 3, 5, (3, 4), stride=(1, 2), padding=(2, 0), output_padding=(0, 1)),
    image("1x1", (1, 4, 5, 6), 4, 3, 1),
    image("padding as large as the kernel", (1, 4, 6, 7), 4, 3, 2, stride=2, padding=2),
    image("rank 3", (4, 5, 6), 4, 3, 4, stride=2, padding=1),
    image("one pixel", (1, 4, 1, 1), 4, 3, 4),
    image("stride 3", (1, 4, 5, 6), 4, 3, 3, stride=3),
    image("stride 4 padded", (2, 4, 5, 6), 4, 3, 8, stride=4, padding=2),
    image("stride 4 output padding", (1, 4, 3, 4), 4, 3, 5, stride=4, padding=1, output_padding=3),
    image("stride 8", (1, 3, 3, 2), 3, 3, 16, stride=8, padding=4, bias=False),
    image("stride beyond the kernel", (1, 4, 5, 6), 4, 3, 1, stride=2, output_padding=1),
    image("dilated", (1, 4, 5, 6), 4, 3, 3, dilation=2),
    image("dilated stride 2", (2, 4, 5, 6), 4, 3, (2, 3), stride=2, dilation=(3, 1), padding=1, output_padding=(2, 1)),
    image("groups 2", (2, 4, 5, 6), 4, 6, 4, stride=2, padding=1, groups=2),
    image("groups 3 no bias", (1, 6, 5, 6), 6, 3, 3, groups=3, bias=False),
    image("depthwise", (1, 8, 5, 6), 8, 8, 4, stride=2, padding=1, groups=8),
    image("depthwise stride 3", (2, 4, 5, 6), 4, 4, 3, stride=3, groups=4),
    image("depthwise multiplier 2", (1, 4, 5, 6), 4, 8, 3, stride=2, padding=1, output_padding=1, groups=4),
    image("padding that crops all but the middle", (1, 4, 8, 8), 4, 3, 3, stride=(1, 3), padding=(4, 10)),
    image("per channel", (1, 4, 5, 6), 4, 3, 4, stride=2, padding=1, per_channel=True),
    image("per channel no bias", (1, 4, 5, 6), 4, 3, 3, stride=2, bias=False, per_channel=True),
    image("per channel stride 3", (1, 4, 5, 6), 4, 3, 5, stride=3, padding=1, per_channel=True),
    image("per channel groups 2", (1, 4, 5, 6), 4, 6, 4, stride=2, padding=1, groups=2, per_channel=True),
    image("per channel groups 2 no bias", (1, 4, 5, 6), 4, 6, 3, groups=2, bias=False, per_channel=True),
    image("per channel depthwise", (1, 4, 5, 6), 4, 4, 4, stride=2, padding=1, groups=4, per_channel=True),
    line("4 stride 2", (2, 4, 9), 4, 3, 4, stride=2, padding=1),
    line("3 stride 2 output padding", (1, 4, 9), 4, 3, 3, stride=2, padding=1, output_padding=1),
    line("rank 2", (4, 9), 4, 3, 3),
    line("stride 5", (1, 4, 9), 4, 3, 10, stride=5, padding=3, output_padding=1),
    line("groups 2 dilated", (2, 4, 9), 4, 6, 3, groups=2, dilation=3, padding=2),
    line("per channel", (1, 4, 9), 4, 3, 4, stride=2, padding=1, per_channel=True),
    then("relu", F.relu, 4, 3, 4, stride=2, padding=1),
    then("relu6", F.relu6, 4, 3, 3, stride=2, padding=1, output_padding=1),
    then("hardtanh -1..1", F.hardtanh, 4, 3, 2, stride=2),
    then("relu stride 3", F.relu, 4, 3, 3, stride=3),
    then("sigmoid", torch.sigmoid, 4, 3, 4, stride=2, padding=1),
    normalized("", (1, 4, 5, 6), 4, 6, 4, stride=2, padding=1),
    normalized("no bias", (1, 4, 5, 6), 4, 6, 3, bias=False),
    normalized("groups 2", (1, 4, 5, 6), 4, 6, 4, stride=2, groups=2),
    normalized("depthwise", (1, 4, 5, 6), 4, 4, 3, stride=2, groups=4),
)


def legacy(label: str, shape: Shape, *args: Any, **options: Any) -> Rejected:
    return Rejected("transposed convolution", "has_legacy_geometry", label, transposed(2, *args, **options), (shape,))


ROW = (1, 8, 4, 8)

REJECTED = (
    Rejected("transposed convolution", "has_supported_geometry", "stride",
             transposed(1, 1, 2, 1, stride=4097), ((1, 1, 2),)),
    Rejected("transposed convolution", "has_supported_geometry", "kernel", transposed(1, 1, 2, 4097), ((1, 1, 2),)),
    Rejected("transposed convolution", "fits_accumulation", "", transposed(2, 8192, 2, 3), ((1, 8192, 1, 1),)),
    Rejected("transposed convolution", "has_aligned_filters", "inputs", transposed(2, 4, 8, (1, 2), stride=(1, 2)),
             ((1, 4, 4, 8),), padded=True),
    Rejected("transposed convolution", "has_aligned_filters", "outputs", transposed(2, 8, 5, (1, 4), (1, 2), (0, 1)),
             (ROW,), padded=True),
    legacy("kernel", ROW, 8, 8, 2, stride=2),
    legacy("stride", ROW, 8, 8, (1, 4), stride=(1, 4)),
    legacy("groups", ROW, 8, 8, (1, 2), stride=(1, 2), groups=8),
    legacy("dilation", ROW, 8, 8, (1, 2), dilation=(1, 2)),
    legacy("padding", ROW, 8, 8, (1, 3), stride=(1, 2), padding=(0, 1), output_padding=(0, 1)),
)  # fmt: skip
