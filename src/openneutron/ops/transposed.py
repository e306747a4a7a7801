"""Declaration and lowering of transposed convolutions over one and two dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from openneutron.ir.cost import cycles_of
from openneutron.ir.graph import Array, QParams, Tensor
from openneutron.ir.kinds import SLICE, TRANSPOSE_CONV
from openneutron.ir.limits import MAX_KERNEL, MAX_STRIDE, MAX_WEIGHTS_OF_ONE_OUTPUT, supports_kernel
from openneutron.ir.windows import Window
from openneutron.ops.convolution import Filters, convolve, kernel_size
from openneutron.ops.facts import Facts, LayerKind
from openneutron.ops.lowering import Lowering
from openneutron.ops.op_instance import OpInstance
from openneutron.ops.spec import OpSpec, PaddedDimensions, constraint, legacy_constraint
from openneutron.ops.windows import image_shape, spatial, spatial_rank
from openneutron.targets import Generation

__all__ = ["SPECS", "TRANSPOSED_CONVOLUTIONS"]

aten = torch.ops.aten

TRANSPOSED_CONVOLUTIONS = {
    1: aten.conv_transpose1d.default,
    2: aten.conv_transpose2d.input,
    3: aten.conv_transpose3d.input,
}
"""ATen's transposed convolution by the number of spatial dimensions."""

# Version 4 of the operator has a fused activation.
ACTIVATED_TRANSPOSE_CONV = replace(TRANSPOSE_CONV, version=4)

MAX_STRIDE_OF_TRANSPOSE_CONV = 2


def _forward_windows(instance: OpInstance) -> tuple[Window, Window]:
    """Returns the windows of the forward convolution, whose input has the shape of this operator's output."""
    vertical, horizontal = (
        Window(*sizes)
        for sizes in zip(
            image_shape(instance, instance.shape)[2:],
            image_shape(instance, instance.shape_of("input"))[2:],
            kernel_size(instance),
            spatial(instance, "stride", 1),
            spatial(instance, "dilation", 1),
            spatial(instance, "padding", 0),
            strict=True,
        )
    )
    return vertical, horizontal


def _is_native(instance: OpInstance) -> bool:
    """Whether TRANSPOSE_CONV of the NPU supports these parameters."""
    return int(instance.args["groups"]) == 1 and all(
        window.dilation == 1 and window.stride <= min(MAX_STRIDE_OF_TRANSPOSE_CONV, window.kernel)
        for window in _forward_windows(instance)
    )


@constraint
def has_supported_geometry(instance: OpInstance) -> bool:
    """Kernel, including its dilation, is at most {MAX_KERNEL}, stride at most {MAX_STRIDE}."""
    return all(window.extent <= MAX_KERNEL and window.stride <= MAX_STRIDE for window in _forward_windows(instance))


@constraint
def fits_accumulation(instance: OpInstance) -> bool:
    """Kernel height x width (including dilation) x input channels of a group, rounded up to a multiple of the MACs per
    pipeline, is at most {MAX_WEIGHTS_OF_ONE_OUTPUT}.
    """
    channels = instance.target.align_channels(instance.shape_of("weight")[0] // int(instance.args["groups"]))
    return math.prod(window.extent for window in _forward_windows(instance)) * channels <= MAX_WEIGHTS_OF_ONE_OUTPUT


@legacy_constraint
def has_legacy_geometry(instance: OpInstance) -> bool:
    """Groups and dilation are 1, the kernel is 1 x k, the stride is at most {MAX_STRIDE_OF_TRANSPOSE_CONV} and at most
    the kernel, and the padding is TFLite's VALID or SAME.
    """
    windows = _forward_windows(instance)
    padding = all(window.has_valid_padding for window in windows) or all(window.has_same_padding for window in windows)
    return _is_native(instance) and windows[0].kernel == 1 and padding


@legacy_constraint
def has_aligned_filters(instance: OpInstance) -> bool:
    """Input and output channels are multiples of the MACs per pipeline."""
    return all(size % instance.target.channel_granularity == 0 for size in instance.shape_of("weight")[:2])


def _channel_dims(instance: OpInstance) -> PaddedDimensions:
    """Input and output channels, if there are no groups."""
    if instance.args["groups"] != 1:
        return {}
    return {"input": (-1 - spatial_rank(instance),), "weight": (0, 1), "bias": (0,)}


def macs(instance: OpInstance) -> int:
    """Returns the multiply-accumulates: kernel area times output channels of a group, for each input value."""
    return math.prod(instance.shape_of("input")) * math.prod(instance.shape_of("weight")[1:])


def lower_transposed_convolution(lowering: Lowering) -> Tensor:
    """Emits TRANSPOSE_CONV if the NPU supports the parameters, else one convolution that computes all phases.

    The legacy generation takes batches of 1 only, so the images of a batch are stacked vertically to one image.
    """
    instance, inputs, windows = lowering.instance, lowering.tensor("input"), _forward_windows(lowering.instance)
    nhwc = lowering.channels_last(lowering.reshape(inputs, image_shape(instance, inputs.shape)))
    batch, height, *row = nhwc.shape
    if instance.generation is Generation.LEGACY and batch > 1:
        windows = (windows[0].repeated(batch), windows[1])
        nhwc = lowering.reshape(nhwc, (1, batch * height, *row))
    filters = _forward_filters(lowering, inputs.qparams)
    output = (_transpose_convolve if _is_native(instance) else _convolve_phases)(lowering, nhwc, filters, windows)
    images = lowering.reshape(output, (batch, output.shape[0] * output.shape[1] // batch, *output.shape[2:]))
    return lowering.reshape(lowering.channels_first(images), lowering.shape)


def _forward_filters(lowering: Lowering, inputs: QParams) -> Filters:
    """Converts the weight from torch's [inputs, outputs of a group, height, width] to [outputs, inputs of a group,
    height, width].
    """
    groups, iohw, weight = lowering.args["groups"], lowering.data("weight"), lowering.tensor("weight").qparams
    iohw = iohw.reshape(*iohw.shape[:2], *kernel_size(lowering.instance))
    goihw = iohw.reshape(groups, -1, *iohw.shape[1:]).swapaxes(1, 2)
    oihw = goihw.reshape(-1, *goihw.shape[2:])
    if weight.axis is not None:
        weight = QParams(weight.scale * groups, weight.zero_point * groups, axis=0)
    return Filters(oihw, weight, lowering.bias("bias", oihw.shape[0], inputs, weight), groups)


def _transpose_convolve(lowering: Lowering, nhwc: Tensor, filters: Filters, windows: tuple[Window, Window]) -> Tensor:
    """Emits TRANSPOSE_CONV.

    If torch's padding is neither VALID nor SAME, emits the cheaper of two forms: a SLICE of the unpadded result, or
    padding SAME with zeros added to the kernel.
    """
    if all(window.has_valid_padding for window in windows):
        return _emit_and_crop(lowering, nhwc, filters, windows, "VALID")
    if all(window.has_same_padding for window in windows):
        return _emit_and_crop(lowering, nhwc, filters, windows, "SAME")
    cropped = replace(lowering, ops=[])
    plans = [(_emit_and_crop(cropped, nhwc, filters, windows, "VALID"), cropped.ops)]
    larger = _with_larger_kernel(lowering.instance, filters, windows)
    if larger is not None:
        padded = replace(lowering, ops=[])
        plans.append((_emit_and_crop(padded, nhwc, *larger, "SAME"), padded.ops))
    output, ops = min(plans, key=lambda plan: cycles_of(plan[1], lowering.instance.target))
    lowering.ops.extend(ops)
    return output


def _with_larger_kernel(
    instance: OpInstance, filters: Filters, windows: tuple[Window, Window]
) -> tuple[Filters, tuple[Window, Window]] | None:
    """Returns filters extended by zeros, and their windows, so that SAME equals torch's padding; None if impossible."""
    vertical, horizontal = (window.zeros_for_same() for window in windows)
    if vertical is None or horizontal is None:
        return None
    oihw = np.pad(filters.oihw, [(0, 0), (0, 0), vertical, horizontal])
    if not supports_kernel(oihw.shape[2:], oihw.shape[1], instance.target):
        return None
    rows, columns = (
        replace(window, kernel=window.kernel + sum(zeros), padding_before=window.padding_before + zeros[0])
        for window, zeros in zip(windows, (vertical, horizontal), strict=True)
    )
    return replace(filters, oihw=oihw), (rows, columns)


def _emit_and_crop(
    lowering: Lowering, nhwc: Tensor, filters: Filters, windows: tuple[Window, Window], padding: str
) -> Tensor:
    """Emits TRANSPOSE_CONV, and with padding VALID a SLICE if torch pads."""
    sizes = [window.size for window in windows]
    if padding == "VALID":
        sizes = [max(window.reach, window.padding_before + window.size) for window in windows]
    batch, channels = nhwc.shape[0], filters.oihw.shape[0]
    ohwi = lowering.constant(filters.oihw.transpose(0, 2, 3, 1), filters.qparams)
    shape = (batch, *sizes, channels)
    vertical, horizontal = windows
    output = lowering.emit(
        TRANSPOSE_CONV if lowering.activation == "NONE" else ACTIVATED_TRANSPOSE_CONV,
        [ohwi, nhwc, filters.bias],
        shape,
        output_shape=shape,
        padding=padding,
        stride_h=vertical.stride,
        stride_w=horizontal.stride,
        fused_activation_function=lowering.activation,
    )
    return _crop_image(lowering, output, [window.padding_before for window in windows], windows)


def _convolve_phases(lowering: Lowering, nhwc: Tensor, filters: Filters, windows: tuple[Window, Window]) -> Tensor:
    """Emits one convolution whose channels hold all phases of the output, and a TRANSPOSE that interleaves the phases.

    Phase r has the outputs at positions q * stride + r; there are stride height x stride width phases. Each such output
    is the sum over m of input[q - m] * kernel[m * stride + r]. So phase r is a convolution with every stride-th kernel
    tap, in reverse order.
    """
    first = [min(window.padding_before // window.stride, _taps_per_phase(window) - 1) for window in windows]
    last = [max((window.padding_before + window.size - 1) // window.stride, window.outputs - 1) for window in windows]
    rows, columns = (
        Window(window.outputs, end - start + 1, _taps_per_phase(window), 1, 1, _taps_per_phase(window) - 1 - start)
        for window, start, end in zip(windows, first, last, strict=True)
    )
    phases = convolve(lowering, nhwc, _phase_filters(lowering, filters, windows), (rows, columns))
    batch, height, width, _ = phases.shape
    vertical, horizontal = (window.stride for window in windows)
    groups, channels = filters.groups, filters.oihw.shape[0]
    split = lowering.reshape(phases, (batch * height, width, groups, vertical, horizontal, channels // groups))
    woven = lowering.transpose(split, (0, 3, 1, 4, 2, 5))
    image = lowering.reshape(woven, (batch, height * vertical, width * horizontal, channels))
    begin = [window.padding_before - start * window.stride for window, start in zip(windows, first, strict=True)]
    return _crop_image(lowering, image, begin, windows)


def _taps_per_phase(window: Window) -> int:
    """Returns the number of taps of a phase's kernel."""
    return -(-window.extent // window.stride)


def _phase_filters(lowering: Lowering, filters: Filters, windows: tuple[Window, Window]) -> Filters:
    """Returns the filters of all phases. Output channels are ordered by group, phase of height, phase of width, and
    channel of the group.
    """
    groups, (outputs, inputs) = filters.groups, filters.oihw.shape[:2]
    vertical, horizontal = windows
    taps = np.zeros((outputs, inputs, *(_taps_per_phase(window) * window.stride for window in windows)), np.int8)
    taps[:, :, : vertical.extent : vertical.dilation, : horizontal.extent : horizontal.dilation] = filters.oihw
    # Tap number t of the kernel is tap t // stride of phase t % stride.
    sizes = {
        "group": groups,
        "output": outputs // groups,
        "input": inputs,
        "row": _taps_per_phase(vertical),
        "row_phase": vertical.stride,
        "column": _taps_per_phase(horizontal),
        "column_phase": horizontal.stride,
    }
    axis = {name: number for number, name in enumerate(sizes)}
    split = np.flip(taps.reshape(tuple(sizes.values())), (axis["row"], axis["column"]))
    order = ("group", "row_phase", "column_phase", "output", "input", "row", "column")
    phases = split.transpose([axis[name] for name in order])
    channels = [sizes[name] for name in order[:4]]

    def repeat_for_phases(values: Array) -> Array:
        """Repeats values [outputs] for the output channels of all phases."""
        return np.broadcast_to(values.reshape(groups, 1, 1, outputs // groups), channels).ravel()

    def repeated(qparams: QParams) -> QParams:
        if qparams.axis is None:
            return qparams
        scales = repeat_for_phases(np.array(qparams.scale)).tolist()
        return QParams(tuple(scales), (0,) * len(scales), qparams.axis)

    bias = np.asarray(filters.bias.data)
    return Filters(
        phases.reshape(math.prod(channels), inputs, sizes["row"], sizes["column"]),
        repeated(filters.qparams),
        lowering.constant(repeat_for_phases(bias), repeated(filters.bias.qparams)),
        groups,
    )


def _crop_image(lowering: Lowering, image: Tensor, begin: Sequence[int], windows: tuple[Window, Window]) -> Tensor:
    """Crops `image` to the output's height and width by a SLICE; returns `image` itself if it has this size."""
    size = (image.shape[0], *(window.size for window in windows), image.shape[3])
    return image if image.shape == size else lowering.emit(SLICE, [image], size, begin=(0, *begin, 0), size=size)


SPECS = (
    OpSpec(
        name="transposed convolution",
        targets=("aten.conv_transpose1d.default", "aten.conv_transpose2d.input"),
        edge_targets=("aten.convolution.default",),
        inputs=("input",),
        weight="weight",
        weight_axis=1,
        bias="bias",
        fuses_activation=True,
        constraints=(has_supported_geometry, fits_accumulation, has_legacy_geometry, has_aligned_filters),
        pads=_channel_dims,
        lower=lower_transposed_convolution,
        macs=macs,
        facts=Facts(layer=LayerKind.TRANSPOSED, is_continuous=True),
        becomes=(
            "TRANSPOSE_CONV if groups and dilation are 1 and the stride is at most 2 and at most the kernel, with a "
            "SLICE or a larger kernel for padding that is neither VALID nor SAME; else CONV_2D or DEPTHWISE_CONV_2D "
            "for all phases, RESHAPE, TRANSPOSE, RESHAPE, SLICE"
        ),
        notes=(
            "With per-channel weights, the groups share their scales, because a dimension of the weight has only the "
            "output channels of one group. A depthwise transposed convolution therefore has one scale."
        ),
    ),
)
