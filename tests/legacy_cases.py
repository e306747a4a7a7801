"""Table of the operator tests: operators that the legacy generation supports, directly or padded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from tests.case import Case, Rejected, Shape, of
from tests.oracle import Function
from torch import nn

__all__ = ["LEGACY_CASES", "REJECTED"]

IMAGE = (1, 8, 6, 6)


def moved(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], nn.Module]:
    """Returns a case of an operator that only moves values, after one that computes on each generation."""
    return of(lambda x: function(x + x))


def cat(dim: int) -> Callable[[], nn.Module]:
    return of(lambda x, y: torch.cat([x, y + y], dim).abs())


def permute(*dims: int) -> Callable[[], nn.Module]:
    return moved(lambda x: x.permute(dims))


def conv(*args: Any, **options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Conv2d(*args, **options)


def chain(*layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*layers)


REJECTED = (
    Rejected("convolution", "has_stackable_batch", "", conv(3, 5, 3), ((2, 3, 7, 7),)),
    Rejected("convolution", "has_stackable_batch", "odd height", conv(3, 5, 1, 2), ((2, 3, 7, 8),)),
    Rejected("convolution", "has_supported_groups", "", conv(8192, 2, 3, groups=2), ((1, 8192, 3, 3),)),
    Rejected("adaptive_avg_pool", "averages_aligned_channels", "", lambda: nn.AdaptiveAvgPool2d(1), ((1, 12, 6, 6),),
             padded=True),
    Rejected("adaptive_avg_pool", "averages_aligned_channels", "rank 3", lambda: nn.AdaptiveAvgPool2d(1),
             ((12, 6, 6),), padded=True),
    Rejected("max_pool", "has_aligned_channels", "", lambda: nn.MaxPool2d(2), ((1, 12, 6, 6),), padded=True),
    Rejected("max_pool", "has_aligned_channels", "rank 3", lambda: nn.MaxPool2d(3, 2, 1), ((5, 8, 8),), padded=True),
    Rejected("mean", "means_over_an_image", "rank 3", of(lambda x: x.mean((1, 2), True)), ((6, 8, 6),)),
    Rejected("mean", "means_over_an_image", "width", of(lambda x: x.mean(3, True)), (IMAGE,)),
    Rejected("mean", "means_aligned_channels", "", of(lambda x: x.mean((2, 3), True)), ((1, 12, 6, 6),), padded=True),
    Rejected("mean", "means_aligned_channels", "no keepdim", of(lambda x: x.mean((2, 3))), ((2, 3, 6, 6),),
             padded=True),
    Rejected("hardtanh", "is_a_relu", "", lambda: nn.Hardtanh(-2.0, 3.0), (IMAGE,)),
    Rejected("softmax", "has_legacy_softmax_size", "alignment", of(lambda x: x.softmax(1)), ((2, 10),)),
    Rejected("softmax", "has_legacy_softmax_size", "rank 1", of(lambda x: x.softmax(0)), ((16,),)),
    Rejected("permute", "swaps_two_blocks", "height and width", permute(0, 1, 3, 2), (IMAGE,)),
    Rejected("permute", "swaps_two_blocks", "batch", permute(0, 3, 1, 2), ((2, 8, 8, 8),)),
    Rejected("permute", "swaps_aligned_dimensions", "", permute(1, 0), ((4, 5),)),
    Rejected("permute", "swaps_aligned_dimensions", "image", permute(0, 3, 1, 2), ((1, 2, 2, 3),)),
    Rejected("cat", "does_not_concatenate_batches", "", cat(0), (IMAGE, IMAGE)),
    Rejected("cat", "concatenates_aligned_channels", "", cat(1), (IMAGE, (1, 4, 6, 6))),
    Rejected("cat", "concatenates_aligned_channels", "width", cat(3), ((1, 4, 6, 6), (1, 4, 6, 3)), padded=True),
)  # fmt: skip


def _case(target: str, label: str, model: Callable[[], nn.Module], *shapes: Shape) -> Case:
    return Case(f"aten.{target}", label, model, shapes)


def _convolutions() -> list[Case]:
    def case(label: str, shape: Shape, *args: Any, **options: Any) -> Case:
        layer = nn.Conv1d if len(shape) == 3 else nn.Conv2d
        return _case(f"conv{len(shape) - 2}d.default", label, lambda: layer(*args, **options), shape)

    return [
        case("3x3", (1, 3, 9, 9), 3, 5, 3, padding=1),
        case("depthwise", (1, 6, 9, 9), 6, 6, 3, padding=1, groups=6),
        case("stacked 1x1", (3, 6, 5, 4), 6, 7, 1),
        case("stacked 1x3 padded", (2, 6, 5, 7), 6, 7, (1, 3), padding=(0, 1)),
        case("stacked patches", (2, 3, 8, 8), 3, 10, 4, 4),
        case("stacked 2x2 stride 2", (2, 3, 6, 5), 3, 4, 2, (2, 1)),
        case("stacked depthwise", (2, 8, 4, 7), 8, 8, (1, 5), padding=(0, 2), groups=8),
        case("stacked groups", (2, 8, 4, 4), 8, 8, 1, groups=2),
        case("aligned groups", (1, 32, 20, 20), 32, 32, 3, groups=4),
        case("unaligned groups", (1, 12, 9, 9), 12, 9, 3, groups=3),
        case("unaligned groups no bias", (1, 12, 16), 12, 6, 1, groups=3, bias=False),
    ]


def _pools() -> list[Case]:
    return [
        _case("max_pool2d.default", "12 channels", chain(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.MaxPool2d(2),
                                                         nn.Conv2d(12, 5, 1)), (1, 3, 10, 10)),
        _case("max_pool2d.default", "twice", chain(nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1)), (1, 5, 16, 12)),
        _case("max_pool2d.default", "fork", of(lambda x: F.relu(F.max_pool2d(x, 2)) + F.max_pool2d(x, 2)),
              (2, 5, 8, 6)),
        _case("mean.dim", "of 1-D", chain(nn.Conv1d(8, 12, 3), Function(lambda x: x.mean(2)), nn.Linear(12, 5)),
              (1, 8, 18)),
        _case("mean.dim", "classifier", chain(nn.Conv2d(3, 12, 3), Function(lambda x: x.mean((2, 3))),
                                              nn.Linear(12, 5)), (1, 3, 9, 9)),
        _case("adaptive_avg_pool2d.default", "classifier", chain(
            nn.Conv2d(3, 12, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)), (1, 3, 9, 9)),
        _case("adaptive_avg_pool2d.default", "squeeze and excite", lambda: SqueezeExcite(12), (1, 12, 9, 9)),
        _case("adaptive_avg_pool2d.default", "two by two", chain(nn.AdaptiveAvgPool2d(2)), (1, 5, 6, 6)),
    ]  # fmt: skip


def _moves() -> list[Case]:
    crop = of(lambda x: F.relu(F.pad(x, (-1, 2, 1, -2), value=0.5)))
    return [
        _case("slice.Tensor", "5 of 12", moved(lambda x: x[:, 4:9]), (1, 12, 6, 6)),
        _case("slice.Tensor", "from the end", moved(lambda x: x[:, :, -5:-1]), (1, 12, 6, 6)),
        _case("slice.Tensor", "batch", moved(lambda x: x[1:]), (3, 4, 5)),
        _case("slice.Tensor", "two dimensions", moved(lambda x: x[:, :, 1:5, 2:]), (2, 4, 6, 7)),
        _case(
            "slice.Tensor",
            "before a convolution",
            lambda: Function(lambda layer, x: layer((x + x)[:, :10]), nn.Conv2d(10, 4, 1)),
            (1, 12, 6, 6),
        ),
        _case("pad.default", "cropped", crop, (2, 3, 5, 6)),
        _case("permute.default", "to NHWC", permute(0, 2, 3, 1), (1, 8, 3, 3)),
        _case("permute.default", "matrix", permute(1, 0), (8, 5)),
        _case("permute.default", "rotation", permute(2, 0, 1), (2, 3, 8)),
        _case("cat.default", "channels", cat(1), IMAGE, (1, 16, 6, 6)),
        _case("cat.default", "of one", moved(lambda x: torch.cat([x], 0)), (1, 3, 4, 5)),
        _case("cat.default", "height", cat(2), (1, 5, 4, 6), (1, 5, 3, 6)),
        _case("cat.default", "rank 2", cat(1), (3, 8), (3, 16)),
        _case("flatten.using_ints", "of a convolution", chain(nn.Conv2d(3, 8, 3), nn.Flatten()), (1, 3, 6, 6)),
        _case("softmax.int", "16 channels", of(lambda x: x.softmax(1)), (1, 16, 3, 4)),
    ]


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.narrow, self.widen = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = F.adaptive_avg_pool2d(x, 1)
        return x * torch.sigmoid(self.widen(F.relu(self.narrow(mean))))


def _upsampling() -> list[Case]:
    def transposed(*args: Any, **options: Any) -> Callable[[], nn.Module]:
        return lambda: nn.ConvTranspose2d(*args, **options)

    nearest, bilinear = (nn.Upsample(scale_factor=2.0, mode=mode) for mode in ("nearest", "bilinear"))
    return [
        _case("conv_transpose2d.input", "row", transposed(8, 8, (1, 2), (1, 2)), (1, 8, 4, 5)),
        _case("conv_transpose2d.input", "rows of two images", transposed(8, 16, (1, 4), (1, 2), (0, 1)), (2, 8, 4, 8)),
        _case("conv_transpose2d.input", "5 of 3", transposed(3, 5, (1, 3), (1, 2), (0, 1)), (1, 3, 4, 5)),
        _case("conv_transpose1d.default", "5 of 8", lambda: nn.ConvTranspose1d(8, 5, 4, 2, 1), (1, 8, 8)),
        _case("upsample_nearest2d.vec", "12 channels", chain(nn.Conv2d(3, 12, 3), nearest, nn.Conv2d(12, 5, 3)),
              (1, 3, 6, 6)),
        # A pool comes after the resize. A convolution would add single steps of ties to a difference of two steps.
        _case("upsample_bilinear2d.vec", "12 channels", chain(nn.Conv2d(3, 12, 3), bilinear, nn.MaxPool2d(2)),
              (1, 3, 6, 6)),
    ]  # fmt: skip


LEGACY_CASES: tuple[Case, ...] = (*_convolutions(), *_pools(), *_moves(), *_upsampling())
