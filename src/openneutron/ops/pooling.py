"""Pools and means."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch.fx import Node

from openneutron.fx import shape_of
from openneutron.ir.graph import Kind, Layout, Tensor
from openneutron.ops.lowering import INT8, Lowering
from openneutron.ops.site import Site
from openneutron.ops.spec import OpSpec, OutputRule, constraint, legacy_constraint
from openneutron.ops.windows import Window, pad_spatial
from openneutron.targets import Generation

__all__ = ["SPECS"]

AVERAGE_POOL_2D = Kind("AVERAGE_POOL_2D", "Pool2DOptions")
MAX_POOL_2D = Kind("MAX_POOL_2D", "Pool2DOptions")
SUM = Kind("SUM", "ReducerOptions", Layout.AXES, operands=("axes",), axes=("axes",))
MEAN = Kind("MEAN", "ReducerOptions", Layout.AXES, operands=("axes",), axes=("axes",))
IMAGE_MEAN = replace(MEAN, layout=Layout.FIXED)

# Small windows hit the halves often: with 2x2 every fourth average is one.
HALVES = (
    "An average halfway between two codes is rounded away from code zero by AVERAGE_POOL_2D, and to an even distance "
    "from the zero point by torch: one LSB apart there, exact everywhere else."
)

MAX_KERNEL = 4096
MAX_STRIDE = 4096


def _pair(value: Any) -> tuple[int, int]:
    values = (value, value) if isinstance(value, int) else tuple(value)
    height, width = values * 2 if len(values) == 1 else values
    return int(height), int(width)


def _kernel(site: Site) -> tuple[int, int]:
    if "output_size" in site.args:
        sizes = zip(site.shape_of("self")[-2:], site.shape[-2:], strict=True)
        height, width = (size // outputs for size, outputs in sizes)
        return height, width
    return _pair(site.args["kernel_size"])


def _stride(site: Site) -> tuple[int, int]:
    return _pair(site.args["stride"]) if site.args.get("stride") else _kernel(site)


def _padding(site: Site) -> tuple[int, int]:
    return _pair(site.args.get("padding", 0))


def _windows(site: Site, pool_shape: tuple[int, ...]) -> list[Window]:
    sizes = zip(pool_shape, site.shape[-2:], _kernel(site), _stride(site), _padding(site), strict=True)
    return [Window(size, outputs, kernel, stride, 1, begin) for size, outputs, kernel, stride, begin in sizes]


@constraint
def has_small_kernel(site: Site) -> bool:
    """Kernel is at most {MAX_KERNEL}, stride at most {MAX_STRIDE}."""
    return max(_kernel(site)) <= MAX_KERNEL and max(_stride(site)) <= MAX_STRIDE


@constraint
def has_small_stride(site: Site) -> bool:
    """Stride is at most {MAX_STRIDE}."""
    return max(_stride(site)) <= MAX_STRIDE


@constraint
def does_not_round_up(site: Site) -> bool:
    """ceil_mode is off."""
    return not site.args["ceil_mode"]


@constraint
def divides_by_the_window(site: Site) -> bool:
    """divisor_override is not given, and padding is counted where there is any (count_include_pad)."""
    return site.args["divisor_override"] is None and (site.args["count_include_pad"] or not any(_padding(site)))


@constraint
def has_equal_windows(site: Site) -> bool:
    """Input height and width are multiples of the output's."""
    sizes = zip(site.shape_of("self")[-2:], site.shape[-2:], strict=True)
    return all(size % outputs == 0 for size, outputs in sizes)


@constraint
def is_not_dilated(site: Site) -> bool:
    """The dilation is 1."""
    return max(_pair(site.args["dilation"])) == 1


@legacy_constraint
def has_whole_granules(site: Site) -> bool:
    """The channels are a multiple of the MACs of a pipeline."""
    return site.shape_of("self")[-3] % site.target.channel_granularity == 0


def _four_dimensional(lowering: Lowering) -> Tensor:
    inputs = lowering.tensor("self")
    return inputs if len(inputs.shape) == 4 else lowering.reshape(inputs, (1, *inputs.shape))


def _pool(lowering: Lowering, kind: Kind, padding_value: int | None) -> Tensor:
    inputs = _four_dimensional(lowering)
    windows = _windows(lowering.site, inputs.shape[2:])
    nhwc = lowering.channels_last(inputs)
    if padding_value is None:
        nhwc, padding = pad_spatial(lowering, nhwc, windows, allow_same=False)
    else:
        value = lowering.constant(np.array([padding_value], INT8), inputs.qparams)
        nhwc, padding = pad_spatial(lowering, nhwc, windows, value)
    vertical, horizontal = windows
    output = lowering.emit(
        kind,
        [nhwc],
        (nhwc.shape[0], vertical.outputs, horizontal.outputs, nhwc.shape[3]),
        padding=padding,
        stride_h=vertical.stride,
        stride_w=horizontal.stride,
        filter_height=vertical.kernel,
        filter_width=horizontal.kernel,
        fused_activation_function="NONE",
    )
    return lowering.reshape(lowering.channels_first(output), lowering.shape)


def lower_average_pool(lowering: Lowering) -> Tensor:
    """AVERAGE_POOL_2D; padding that counts is an explicit PAD, as TFLite's own is left out of the average."""
    return _pool(lowering, AVERAGE_POOL_2D, padding_value=None)


def lower_max_pool(lowering: Lowering) -> Tensor:
    """MAX_POOL_2D; padding that SAME cannot express is the lowest value, which no maximum picks."""
    return _pool(lowering, MAX_POOL_2D, padding_value=-128)


def _is_global(node: Node) -> bool:
    return shape_of(node)[-2:] == (1, 1)


def _adaptive_output(node: Node) -> OutputRule:
    """Observed where one value per channel is left, else shared with the inputs."""
    return OutputRule.OBSERVED if _is_global(node) else OutputRule.SHARED


def lower_adaptive_average_pool(lowering: Lowering) -> Tensor:
    """MEAN over height and width where one value per channel is left, else AVERAGE_POOL_2D."""
    if not _is_global(lowering.site.node):
        return lower_average_pool(lowering)
    inputs = lowering.tensor("self")
    rank = len(inputs.shape)
    if lowering.site.generation is Generation.LEGACY:
        return _mean_of_image(lowering, (1, *inputs.shape)[-4:])
    return lowering.emit(MEAN, [inputs], lowering.shape, axes=(rank - 2, rank - 1), keep_dims=True)


@legacy_constraint
def averages_whole_granules(site: Site) -> bool:
    """Where it leaves one value per channel, the channels are a multiple of the MACs of a pipeline."""
    return not _is_global(site.node) or site.shape_of("self")[-3] % site.target.channel_granularity == 0


def _mean_axes(site: Site) -> tuple[int, ...]:
    rank = len(site.shape_of("self"))
    dims = site.args["dim"]
    return tuple(range(rank)) if not dims else tuple(sorted(dim % rank for dim in dims))


@legacy_constraint
def means_over_an_image(site: Site) -> bool:
    """It is over height and width of an image [N, C, H, W], or the length of [N, C, L]."""
    return (len(site.shape_of("self")), _mean_axes(site)) in ((4, (2, 3)), (3, (2,)))


@legacy_constraint
def means_whole_granules(site: Site) -> bool:
    """Dimension 1, the channels, is a multiple of the MACs of a pipeline."""
    return all(size % site.target.channel_granularity == 0 for size in site.shape_of("self")[1:2])


def _mean_of_image(lowering: Lowering, shape: Sequence[int]) -> Tensor:
    """The one MEAN of the legacy generation: of an image `shape` = [N, C, H, W] over height and width, which stay."""
    nhwc = lowering.channels_last(lowering.reshape(lowering.tensor("self"), shape))
    batch, _, _, channels = nhwc.shape
    mean = lowering.emit(IMAGE_MEAN, [nhwc], (batch, 1, 1, channels), axes=(1, 2), keep_dims=True)
    return lowering.reshape(lowering.channels_first(mean), lowering.shape)


@constraint
def keeps_a_dimension(site: Site) -> bool:
    """The output has a dimension left."""
    return len(site.shape) > 0


def lower_mean(lowering: Lowering) -> Tensor:
    """MEAN."""
    if lowering.site.generation is Generation.LEGACY:
        batch, channels, *sizes = lowering.tensor("self").shape
        return _mean_of_image(lowering, (batch, channels, *(1, *sizes)[-2:]))
    keep = bool(lowering.args["keepdim"])
    axes = _mean_axes(lowering.site)
    return lowering.emit(MEAN, [lowering.tensor("self")], lowering.shape, axes=axes, keep_dims=keep)


def lower_sum(lowering: Lowering) -> Tensor:
    """SUM."""
    keep = bool(lowering.args["keepdim"])
    axes = _mean_axes(lowering.site)
    return lowering.emit(SUM, [lowering.tensor("self")], lowering.shape, axes=axes, keep_dims=keep)


def window_macs(site: Site) -> int:
    """An addition for each element of each window, counted as one multiply-accumulate."""
    return math.prod(site.shape) * math.prod(_kernel(site))


def input_macs(site: Site) -> int:
    """An addition for each element, counted as one multiply-accumulate."""
    return math.prod(site.shape_of("self"))


SPECS = (
    OpSpec(
        name="avg_pool2d",
        targets=("aten.avg_pool2d.default",),
        inputs=("self",),
        output=OutputRule.SHARED,
        constraints=(has_small_kernel, does_not_round_up, divides_by_the_window),
        lower=lower_average_pool,
        macs=window_macs,
        becomes="AVERAGE_POOL_2D, with a PAD where it pads",
        notes=HALVES,
    ),
    OpSpec(
        name="adaptive_avg_pool2d",
        targets=("aten.adaptive_avg_pool2d.default",),
        edge_targets=("aten._adaptive_avg_pool2d.default",),
        inputs=("self",),
        output=_adaptive_output,
        constraints=(has_equal_windows, has_small_kernel, averages_whole_granules),
        pads={"self": (-3,)},
        lower=lower_adaptive_average_pool,
        macs=input_macs,
        becomes="MEAN where one value per channel is left, else AVERAGE_POOL_2D",
        notes=HALVES,
    ),
    OpSpec(
        name="max_pool2d",
        targets=("aten.max_pool2d.default",),
        edge_targets=("aten.max_pool2d_with_indices.default",),
        inputs=("self",),
        output=OutputRule.SHARED,
        constraints=(has_small_stride, is_not_dilated, does_not_round_up, has_whole_granules),
        pads={"self": (-3,)},
        lower=lower_max_pool,
        becomes="MAX_POOL_2D, with a PADV2 where padding SAME cannot express it",
    ),
    OpSpec(
        name="mean",
        targets=("aten.mean.dim",),
        inputs=("self",),
        constraints=(keeps_a_dimension, means_over_an_image, means_whole_granules),
        pads={"self": (1,)},
        lower=lower_mean,
        macs=input_macs,
        becomes="MEAN",
    ),
    OpSpec(
        name="sum",
        targets=("aten.sum.dim_IntList",),
        inputs=("self",),
        constraints=(keeps_a_dimension,),
        lower=lower_sum,
        macs=input_macs,
        becomes="SUM",
    ),
)
