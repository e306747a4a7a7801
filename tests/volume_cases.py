"""Table of the operator tests: volumes [N, C, D, H, W]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from tests.case import Case, Rejected, Shape, of
from torch import nn

__all__ = ["CASES", "REJECTED"]

VOLUME: Shape = (2, 4, 5, 6, 5)


def _conv(label: str, *args: Any, target: str = "conv3d.default", shape: Shape = VOLUME, **options: Any) -> Case:
    return Case(f"aten.{target}", label, lambda: nn.Conv3d(shape[1], *args, **options), (shape,))


def _convolutions() -> list[Case]:
    per_channel = Case(
        "aten.conv3d.default", "per channel", lambda: nn.Sequential(nn.Conv3d(4, 6, 3), nn.ReLU()), (VOLUME,),
        options=(("weight_granularity", "per_channel"),),
    )  # fmt: skip
    without_batch = Case(
        "aten.conv3d.default", "without batch", lambda: nn.Conv3d(4, 6, 3), (VOLUME[1:],), decomposed=True
    )
    return [
        _conv("1,3,3", 6, (1, 3, 3), padding=(0, 1, 1)),
        _conv("3,1,1", 6, (3, 1, 1), padding=(1, 0, 0)),
        _conv("3,1,1 strided", 6, (3, 1, 1), stride=(2, 1, 1), padding=(1, 0, 0), dilation=(2, 1, 1)),
        _conv("1,1,1", 6, 1),
        _conv("1,1,1 strided", 8, 1, stride=2, bias=False),
        _conv("1,3,3 strided", 6, (1, 3, 3), stride=(2, 2, 1)),
        _conv("3,3,3", 6, 3, padding=1),
        _conv("3,3,3 strided", 6, 3, stride=2, padding=1),
        _conv("2,3,2 dilated", 6, (2, 3, 2), dilation=(3, 1, 2), padding=(2, 0, 1)),
        _conv("groups", 6, 3, groups=2, padding=1),
        _conv("depthwise", 4, 3, groups=4, padding=1),
        _conv("depthwise 1,3,3", 8, (1, 3, 3), groups=4),
        _conv("same", 6, (2, 3, 3), padding="same", target="conv3d.padding"),
        _conv("valid", 6, (2, 3, 3), padding="valid", target="conv3d.padding"),
        per_channel,
        without_batch,
    ]


def _transposed_convolutions() -> list[Case]:
    def case(label: str, *args: Any, shape: Shape = VOLUME, **options: Any) -> Case:
        make = lambda: nn.ConvTranspose3d(4, *args, **options)  # noqa: E731
        return Case("aten.conv_transpose3d.input", label, make, (shape,))

    small = (1, 4, 3, 4, 3)
    return [
        case("1,3,3", 6, (1, 3, 3), padding=(0, 1, 1)),
        case("upsampling", 3, 2, stride=2),
        case("3,3,3", 2, 3, padding=1),
        case("strided", 3, 3, stride=2, padding=1, output_padding=1, shape=small),
        case("output padding alone", 3, 2, stride=2, output_padding=(1, 0, 1), bias=False, shape=small),
        case("groups, dilated", 4, (2, 3, 2), stride=(3, 1, 2), dilation=(2, 1, 3), groups=2, shape=small),
        case("without batch", 3, 2, stride=2, shape=VOLUME[1:]),
    ]


def _pools() -> list[Case]:
    def pool(target: str, label: str, make: Callable[[], nn.Module], shape: Shape = VOLUME) -> Case:
        return Case(f"aten.{target}", label, make, (shape,))

    without_indices = of(lambda x: F.max_pool3d(x, 2, return_indices=True)[0])
    return [
        pool("max_pool3d.default", "1,3,3", lambda: nn.MaxPool3d((1, 3, 3), stride=(2, 1, 2))),
        pool("max_pool3d.default", "3,1,1", lambda: nn.MaxPool3d((3, 1, 1), padding=(1, 0, 0))),
        pool("max_pool3d.default", "padded", lambda: nn.MaxPool3d(3, 2, 1)),
        pool("max_pool3d.default", "dilated", lambda: nn.MaxPool3d(2, 1, dilation=2)),
        pool("max_pool3d.default", "without batch", lambda: nn.MaxPool3d(2, ceil_mode=True), VOLUME[1:]),
        pool("max_pool3d_with_indices.default", "values", without_indices),
        pool("avg_pool3d.default", "1,2,2", lambda: nn.AvgPool3d((1, 2, 2))),
        pool("avg_pool3d.default", "padded", lambda: nn.AvgPool3d(3, 2, 1)),
        pool("avg_pool3d.default", "without padding", lambda: nn.AvgPool3d(3, 2, 1, count_include_pad=False)),
        pool("avg_pool3d.default", "divisor", lambda: nn.AvgPool3d((2, 1, 1), divisor_override=3)),
        pool("adaptive_avg_pool3d.default", "one", lambda: nn.AdaptiveAvgPool3d(1)),
        pool("adaptive_avg_pool3d.default", "frames", lambda: nn.AdaptiveAvgPool3d((None, 3, 1))),
        pool("adaptive_max_pool3d.default", "one", lambda: nn.AdaptiveMaxPool3d(1)),
        pool("adaptive_max_pool3d.default", "uneven", lambda: nn.AdaptiveMaxPool3d((2, 3, 2))),
        pool("upsample_nearest3d.vec", "by 2", lambda: nn.Upsample(scale_factor=2)),
        pool("upsample_trilinear3d.vec", "image", lambda: nn.Upsample(scale_factor=(1, 2, 2), mode="trilinear")),
        pool("max_pool2d.default", "dilated", lambda: nn.MaxPool2d(3, dilation=2), (1, 8, 9, 10)),
        pool("max_pool2d.default", "dilated, strided", lambda: nn.MaxPool2d((2, 3), (1, 2), 1, (1, 3)), (2, 3, 9, 10)),
        pool("max_pool1d.default", "dilated", lambda: nn.MaxPool1d(2, dilation=3), (1, 8, 16)),
    ]


CASES = (*_convolutions(), *_transposed_convolutions(), *_pools())


LONG: Shape = (1, 1, 1, 1, 4100)

REJECTED = (
    Rejected("convolution of volumes", "has_supported_volume_geometry", "kernel",
             lambda: nn.Conv3d(1, 2, (1, 1, 4097)), (LONG,), lowers=False),
    Rejected("convolution of volumes", "fits_volume_accumulation", "",
             lambda: nn.Conv3d(8192, 2, (1, 3, 3)), ((1, 8192, 1, 3, 3),), lowers=False),
    Rejected("convolution of volumes", "is_of_the_modern_generation", "", lambda: nn.Conv3d(8, 8, 1),
             ((1, 8, 2, 2, 2),), lowers_for_legacy=False),
    Rejected("max_pool", "has_few_dilated_positions", "", lambda: nn.MaxPool2d((1, 17), dilation=2), ((1, 8, 3, 40),)),
    Rejected("max_pool", "is_not_dilated", "", lambda: nn.MaxPool2d(2, dilation=2), ((1, 8, 5, 6),)),
)  # fmt: skip
