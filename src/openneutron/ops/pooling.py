"""Declarations and lowerings of pools over one and two dimensions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
from torch.fx import Node

from openneutron.core.fx import arguments, op_name, shape_of
from openneutron.ir.graph import Kind, Tensor
from openneutron.ir.kinds import AVERAGE_POOL_2D, MAX_POOL_2D, MAXIMUM, MEAN
from openneutron.ir.limits import MAX_KERNEL, MAX_STRIDE
from openneutron.ir.windows import Window
from openneutron.ops.facts import Bounds, Facts, never_negative_if_first
from openneutron.ops.lowering import INT8, Lowering
from openneutron.ops.op_instance import OpInstance
from openneutron.ops.reductions import input_macs, mean_of_image
from openneutron.ops.slices_and_concats import slice_dim
from openneutron.ops.spec import Homogeneous, OpSpec, OutputRule, PaddedDimensions, constraint, legacy_constraint
from openneutron.ops.windows import has_aligned_channels, image_shape, pad_spatial, spatial, spatial_rank
from openneutron.targets import Generation

__all__ = [
    "SPECS", "adaptive_windows", "divides_as_tflite_does", "divisors", "has_even_windows", "has_small_kernel",
    "pool_windows",
]  # fmt: skip


# Ties are frequent for small windows: one of four averages of 2x2 windows is a tie.
HALVES = (
    "AVERAGE_POOL_2D rounds an average halfway between two codes away from code zero; torch rounds it to an even "
    "distance from the zero point. These averages may differ by one LSB; all others are exact."
)

Counts = npt.NDArray[np.int64]

MAX_DILATED_KERNEL = 16


def pool_windows(instance: OpInstance) -> tuple[Window, Window]:
    """Returns the windows along height and width. An adaptive pool must satisfy `has_even_windows`."""
    sizes, outputs = image_shape(instance, instance.shape_of("self"))[2:], image_shape(instance, instance.shape)[2:]
    dilation = spatial(instance, "dilation", 1) if "dilation" in instance.args else (1, 1)
    if "output_size" in instance.args:
        kernel, stride = zip(*map(_first_and_step, sizes, outputs), strict=True)
        padding = (0, 0)
    else:
        kernel = spatial(instance, "kernel_size", 1)
        stride = spatial(instance, "stride", 1) if instance.args["stride"] else kernel
        padding = spatial(instance, "padding", 0)
    vertical, horizontal = (
        Window(*window) for window in zip(sizes, outputs, kernel, stride, dilation, padding, strict=True)
    )
    return vertical, horizontal


def adaptive_windows(size: int, outputs: int) -> list[tuple[int, int]]:
    """Returns the start and end (exclusive) of each window of an adaptive pool."""
    return [(index * size // outputs, -(-(index + 1) * size // outputs)) for index in range(outputs)]


def _first_and_step(size: int, outputs: int) -> tuple[int, int]:
    """Returns the size of the first window of an adaptive pool, and the distance to the next window."""
    (_, kernel), *others = adaptive_windows(size, outputs)
    return kernel, max(1, others[0][0]) if others else kernel


@constraint
def has_even_windows(instance: OpInstance) -> bool:
    """All windows have one size and equal distances, along height and along width."""
    return all(
        adaptive_windows(window.size, window.outputs)
        == [(start, start + window.kernel) for start in range(0, window.outputs * window.stride, window.stride)]
        for window in pool_windows(instance)
    )


@constraint
def has_small_kernel(instance: OpInstance) -> bool:
    """Kernel is at most {MAX_KERNEL}, stride at most {MAX_STRIDE}."""
    return all(window.kernel <= MAX_KERNEL and window.stride <= MAX_STRIDE for window in pool_windows(instance))


@constraint
def has_small_stride(instance: OpInstance) -> bool:
    """Stride is at most {MAX_STRIDE}."""
    return all(window.stride <= MAX_STRIDE for window in pool_windows(instance))


def divisors(instance: OpInstance) -> Counts:
    """Returns the divisor of the sum of each window in torch's average pool, [height, width]."""
    override, windows = instance.args.get("divisor_override"), pool_windows(instance)
    if override is not None:
        return np.full([window.outputs for window in windows], override)
    count = _sizes_with_padding if instance.args["count_include_pad"] else _sizes_without_padding
    return _outer_product(count, windows)


def _outer_product(count: Callable[[Window], Counts], windows: tuple[Window, Window]) -> Counts:
    vertical, horizontal = map(count, windows)
    return np.outer(vertical, horizontal)


def _sizes_with_padding(window: Window) -> Counts:
    """Returns the number of elements of each window with padding. In ceil_mode, windows may also exceed the padding."""
    start = np.arange(window.outputs) * window.stride - window.padding_before
    return np.minimum(start + window.kernel, window.size + window.padding_before) - start


def _sizes_without_padding(window: Window) -> Counts:
    """Returns the number of elements of each window that are not padding."""
    start = np.arange(window.outputs) * window.stride - window.padding_before
    return np.minimum(start + window.kernel, window.size) - np.maximum(start, 0)


def _divides_by_the_window(instance: OpInstance) -> bool:
    return bool((divisors(instance) == math.prod(window.kernel for window in pool_windows(instance))).all())


@constraint
def divides_as_tflite_does(instance: OpInstance) -> bool:
    """Each sum is divided by the number of elements of its window; or, if the padding is TFLite's SAME, by the number
    of elements that are not padding.
    """
    if _divides_by_the_window(instance):
        return True
    windows = pool_windows(instance)
    return all(window.has_same_padding for window in windows) and np.array_equal(
        divisors(instance), _outer_product(_sizes_without_padding, windows)
    )


@legacy_constraint
def is_not_dilated(instance: OpInstance) -> bool:
    """The dilation is 1."""
    return max(spatial(instance, "dilation", 1)) == 1


@constraint
def has_few_dilated_positions(instance: OpInstance) -> bool:
    """The dilation is 1, or the kernel is at most {MAX_DILATED_KERNEL} along each dimension."""
    return is_not_dilated.holds(instance) or all(
        window.kernel <= MAX_DILATED_KERNEL for window in pool_windows(instance)
    )


def _emit_pool(
    lowering: Lowering, kind: Kind, nhwc: Tensor, padding: str, windows: Sequence[Window] | None = None
) -> Tensor:
    vertical, horizontal = windows or pool_windows(lowering.instance)
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


def _nhwc_input(lowering: Lowering) -> Tensor:
    inputs = lowering.tensor("self")
    return lowering.channels_last(lowering.reshape(inputs, image_shape(lowering.instance, inputs.shape)))


def lower_average_pool(lowering: Lowering) -> Tensor:
    """Emits AVERAGE_POOL_2D, and a PAD if torch counts padding, because AVERAGE_POOL_2D does not count its padding."""
    nhwc, padding = _nhwc_input(lowering), "SAME"
    if "output_size" in lowering.args or _divides_by_the_window(lowering.instance):
        nhwc, padding = pad_spatial(lowering, nhwc, pool_windows(lowering.instance), allow_same=False)
    return _emit_pool(lowering, AVERAGE_POOL_2D, nhwc, padding)


def lower_max_pool(lowering: Lowering) -> Tensor:
    """Emits MAX_POOL_2D, and a PADV2 with the lowest code for padding that SAME cannot express."""
    nhwc, windows = _nhwc_input(lowering), pool_windows(lowering.instance)
    lowest = lowering.constant(np.array([-128], INT8), nhwc.qparams)
    if is_not_dilated.holds(lowering.instance):
        return _emit_pool(lowering, MAX_POOL_2D, *pad_spatial(lowering, nhwc, windows, lowest))
    padded, _ = pad_spatial(lowering, nhwc, windows, lowest, allow_same=False)
    return _dilated_max_pool(lowering, padded, windows)


def _dilated_max_pool(lowering: Lowering, nhwc: Tensor, windows: tuple[Window, Window]) -> Tensor:
    """Emits one SLICE for each kernel position and their MAXIMUM, along height, then along width.

    A MAX_POOL_2D of 1x1 windows applies the strides.
    """
    for axis, window in enumerate(windows, 1):
        count = (window.outputs - 1) * window.stride + 1
        first, *others = [slice_dim(lowering, nhwc, axis, tap * window.dilation, count) for tap in range(window.kernel)]
        for other in others:
            first = lowering.emit(MAXIMUM, [first, other], first.shape, first.qparams)
        nhwc = first
    vertical, horizontal = windows
    points = [replace(window, kernel=1) for window in windows]
    if (vertical.stride, horizontal.stride) == (1, 1):
        return lowering.reshape(lowering.channels_first(nhwc), lowering.shape)
    return _emit_pool(lowering, MAX_POOL_2D, nhwc, "VALID", points)


def _is_global(node: Node) -> bool:
    """Whether the output of an adaptive pool has one value per channel."""
    return all(size == 1 for size in shape_of(node)[-1 if "1d" in op_name(node) else -2 :])


def _adaptive_output(node: Node) -> OutputRule:
    """Observed if the output has one value per channel, else the scale and zero point of the inputs."""
    return OutputRule.OBSERVED if _is_global(node) else OutputRule.SHARED


def lower_adaptive_average_pool(lowering: Lowering) -> Tensor:
    """Emits MEAN over height and width if the output has one value per channel, else AVERAGE_POOL_2D."""
    if not _is_global(lowering.instance.node):
        return lower_average_pool(lowering)
    inputs = lowering.tensor("self")
    if lowering.instance.generation is Generation.LEGACY:
        return mean_of_image(lowering, image_shape(lowering.instance, inputs.shape))
    rank = len(inputs.shape)
    axes = tuple(range(rank - spatial_rank(lowering.instance), rank))
    return lowering.emit(MEAN, [inputs], lowering.shape, axes=axes, keep_dims=True)


@legacy_constraint
def averages_aligned_channels(instance: OpInstance) -> bool:
    """The output has more than one value per channel, or the channels are a multiple of the MACs per pipeline."""
    return not _is_global(instance.node) or has_aligned_channels.holds(instance)


def _channel_dims(instance: OpInstance) -> PaddedDimensions:
    """Channels."""
    return {"self": (-1 - spatial_rank(instance),)}


def window_macs(instance: OpInstance) -> int:
    """Returns the number of elements in all windows: one addition per element counts as a multiply-accumulate."""
    return math.prod(instance.shape) * math.prod(window.kernel for window in pool_windows(instance))


def _bounds_of_average(node: Node) -> Bounds | None:
    """Returns the range of an average in which padding counts as zero; None for a `divisor_override`."""
    return Bounds.WITHIN_OR_ZERO if arguments(node).get("divisor_override") is None else None


SPECS = (
    OpSpec(
        name="avg_pool",
        targets=("aten.avg_pool1d.default", "aten.avg_pool2d.default"),
        edge_targets=("aten.avg_pool2d.default",),
        inputs=("self",),
        output=OutputRule.SHARED,
        constraints=(has_small_kernel, divides_as_tflite_does),
        lower=lower_average_pool,
        macs=window_macs,
        homogeneous=Homogeneous.CHANNEL,
        facts=Facts(sign=never_negative_if_first, bounds=_bounds_of_average),
        becomes="AVERAGE_POOL_2D, with a PAD if padding counts",
        notes=HALVES,
    ),
    OpSpec(
        name="adaptive_avg_pool",
        targets=("aten.adaptive_avg_pool1d.default", "aten.adaptive_avg_pool2d.default"),
        edge_targets=("aten._adaptive_avg_pool2d.default",),
        inputs=("self",),
        output=_adaptive_output,
        constraints=(has_even_windows, has_small_kernel, averages_aligned_channels),
        pads=_channel_dims,
        lower=lower_adaptive_average_pool,
        macs=input_macs,
        homogeneous=Homogeneous.CHANNEL,
        facts=Facts(sign=never_negative_if_first, bounds=Bounds.WITHIN),
        becomes="MEAN if the output has one value per channel, else AVERAGE_POOL_2D",
        notes=HALVES,
    ),
    OpSpec(
        name="max_pool",
        targets=("aten.max_pool1d.default", "aten.max_pool2d.default"),
        edge_targets=("aten.max_pool2d_with_indices.default",),
        inputs=("self",),
        output=OutputRule.SHARED,
        constraints=(has_small_stride, has_few_dilated_positions, is_not_dilated, has_aligned_channels),
        pads=_channel_dims,
        lower=lower_max_pool,
        homogeneous=Homogeneous.CHANNEL,
        facts=Facts(sign=never_negative_if_first, bounds=Bounds.WITHIN),
        becomes="MAX_POOL_2D, with a PADV2 for padding that SAME cannot express; with dilation SLICE and MAXIMUM for "
        "each position along height, then along width",
        keeps_values=lambda _: True,
    ),
)
