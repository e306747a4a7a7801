"""Declaration of convolutions over three dimensions, and their lowering to convolutions over two."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from openneutron.ir.graph import Array, Tensor
from openneutron.ir.kinds import PAD
from openneutron.ir.limits import MAX_DILATION, MAX_KERNEL, MAX_STRIDE, MAX_WEIGHTS_OF_ONE_OUTPUT
from openneutron.ir.windows import Window
from openneutron.ops.convolution import (
    CONVOLUTION_SPEC,
    Filters,
    convolution_windows,
    convolve,
    has_a_batch,
)
from openneutron.ops.lowering import Lowering
from openneutron.ops.op_instance import OpInstance
from openneutron.ops.rearranging import is_of_the_modern_generation
from openneutron.ops.slices_and_concats import concat, slice_dim
from openneutron.ops.spec import constraint
from openneutron.ops.windows import of_each_dim

__all__ = ["SPECS"]

RANK = 3


@constraint
def has_supported_volume_geometry(instance: OpInstance) -> bool:
    """Kernel is at most {MAX_KERNEL}, stride at most {MAX_STRIDE}, dilation at most {MAX_DILATION}, along each
    dimension.
    """
    return (
        max(instance.shape_of("weight")[2:]) <= MAX_KERNEL
        and max(of_each_dim(instance.args["stride"], RANK)) <= MAX_STRIDE
        and max(of_each_dim(instance.args["dilation"], RANK)) <= MAX_DILATION
    )


@constraint
def fits_volume_accumulation(instance: OpInstance) -> bool:
    """Kernel height x width x input channels times kernel depth, rounded up to a multiple of the MACs per pipeline, is
    at most {MAX_WEIGHTS_OF_ONE_OUTPUT}.
    """
    _, inputs, depth, *area = instance.shape_of("weight")
    return math.prod(area) * instance.target.align_channels(inputs * depth) <= MAX_WEIGHTS_OF_ONE_OUTPUT


def _is_trivial(window: Window) -> bool:
    """Whether each output along the dimension reads the one input at the same position."""
    return window.kernel == window.stride == 1 and window.has_valid_padding and window.size == window.outputs


def lower_volume_convolution(lowering: Lowering) -> Tensor:
    """Emits one CONV_2D or DEPTHWISE_CONV_2D.

    It convolves height and width. For each output frame, its input channels are the channels of all frames that the
    kernel reads. For a kernel of (k, 1, 1), it convolves depth instead, over an image [depth, height * width].
    """
    depth, vertical, horizontal = convolution_windows(lowering.instance)
    inputs, weight = lowering.tensor("input"), lowering.tensor("weight")
    bias = lowering.bias("bias", weight.shape[0], inputs.qparams, weight.qparams)

    def filters(oihw: Array) -> Filters:
        return Filters(oihw, weight.qparams, bias, lowering.args["groups"])

    data = lowering.data("weight")
    batch, channels, *_ = inputs.shape
    if _is_trivial(vertical) and _is_trivial(horizontal):
        area = vertical.size * horizontal.size
        image = lowering.channels_last(lowering.reshape(inputs, (batch, channels, depth.size, area)))
        across = Window(area, area, 1, 1, 1, 0)
        output = convolve(lowering, image, filters(data.reshape(*data.shape[:3], 1)), (depth, across))
        return lowering.reshape(lowering.channels_first(output), lowering.shape)
    frames = _frames_of_kernel_positions(lowering, inputs, depth)
    images, oihw = _move_taps_to_channels(lowering, frames, data)
    output = convolve(lowering, lowering.channels_last(images), filters(oihw), (vertical, horizontal))
    channels_first = lowering.channels_first(output)
    planes = lowering.reshape(channels_first, (batch, depth.outputs, *channels_first.shape[1:]))
    return lowering.transpose(planes, (0, 2, 1, 3, 4))


def _frames_of_kernel_positions(lowering: Lowering, inputs: Tensor, depth: Window) -> list[Tensor]:
    """Returns the frames that each kernel position along depth reads: [batch, outputs along depth, channels, h, w]."""
    moved = lowering.transpose(inputs, (0, 2, 1, 3, 4))
    starts = [tap * depth.dilation for tap in range(depth.kernel)]
    needed = starts[-1] + depth.outputs * depth.stride
    after = max(0, needed - depth.padding_before - depth.size)
    if depth.padding_before or after:
        paddings = ((0, 0), (depth.padding_before, after), (0, 0), (0, 0), (0, 0))
        shape = (moved.shape[0], depth.padding_before + depth.size + after, *moved.shape[2:])
        moved = lowering.emit(PAD, [moved], shape, moved.qparams, paddings=paddings)
    return [_select_every(lowering, moved, start, depth.outputs, depth.stride) for start in starts]


def _select_every(lowering: Lowering, frames: Tensor, start: int, count: int, step: int) -> Tensor:
    """Selects `count` indices of dimension 1, from `start` on, at distance `step`."""
    batch, _, *image = frames.shape
    run = slice_dim(lowering, frames, 1, start, count * step)
    if step == 1:
        return run
    split = lowering.reshape(run, (batch, count, step, *image))
    return lowering.reshape(slice_dim(lowering, split, 2, 0, 1), (batch, count, *image))


def _move_taps_to_channels(lowering: Lowering, frames: Sequence[Tensor], weight: Array) -> tuple[Tensor, Array]:
    """Returns images [batch * outputs along depth, channels, height, width], and their weights.

    Without groups, the channels are ordered by frame, then channel; with groups, by channel, then frame, so that the
    channels of a group stay together.
    """
    batch, count, channels, *image = frames[0].shape
    outputs, inputs, taps, *kernel = weight.shape
    shape = (batch * count, channels * taps, *image)
    if lowering.args["groups"] == 1:
        oihw = weight.transpose(0, 2, 1, 3, 4).reshape(outputs, taps * inputs, *kernel)
        return lowering.reshape(concat(lowering, frames, 2), shape), oihw
    flat = [lowering.reshape(frame, (batch * count, channels, 1, *image)) for frame in frames]
    return lowering.reshape(concat(lowering, flat, 2), shape), weight.reshape(outputs, inputs * taps, *kernel)


SPECS = (
    replace(
        CONVOLUTION_SPEC,
        name="convolution of volumes",
        targets=("aten.conv3d.default", "aten.conv3d.padding"),
        constraints=(
            has_a_batch,
            has_supported_volume_geometry,
            fits_volume_accumulation,
            is_of_the_modern_generation,
        ),
        lower=lower_volume_convolution,
        becomes="CONV_2D or DEPTHWISE_CONV_2D: over depth for a kernel of (k, 1, 1), else over height and width, with "
        "the frames that a kernel reads as channels (SLICE, CONCATENATION)",
        notes="ExecuTorch has no CPU kernel for it.",
    ),
)
