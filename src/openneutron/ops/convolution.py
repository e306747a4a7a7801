"""Declaration and lowering of convolutions over one and two dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from openneutron.ir.cost import cycles_of
from openneutron.ir.graph import Array, Layout, Op, QParams, Tensor
from openneutron.ir.kinds import CONCATENATION, CONV_2D, DEPTHWISE_CONV_2D, SLICE
from openneutron.ir.limits import MAX_DILATION, MAX_KERNEL, MAX_STRIDE, MAX_WEIGHTS_OF_ONE_OUTPUT
from openneutron.ir.windows import Window
from openneutron.ops.decomposition import Decomposition, Rewriting
from openneutron.ops.facts import Facts, LayerKind
from openneutron.ops.graph_builder import permute
from openneutron.ops.lowering import Lowering
from openneutron.ops.op_instance import OpInstance
from openneutron.ops.spec import OpSpec, constraint, legacy_constraint
from openneutron.ops.windows import of_each_dim, pad_spatial
from openneutron.targets import Generation, NeutronTarget

__all__ = [
    "CONVOLUTIONS",
    "CONVOLUTION_SPEC",
    "DECOMPOSED",
    "SPECS",
    "Filters",
    "convolution_windows",
    "convolve",
    "kernel_size",
]

aten = torch.ops.aten

CONVOLUTIONS = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}
"""ATen's convolution by the number of spatial dimensions."""


# Slices of NHWC images have a fixed layout. Layout propagation then puts no transpose between slices and convolutions.
NHWC_SLICE = replace(SLICE, layout=Layout.FIXED)


def _height_and_width(instance: OpInstance, name: str) -> tuple[int, ...]:
    """Returns the argument `name` as (height, width); for a 1-D convolution, the height gets 1."""
    rank = len(instance.shape_of("weight")) - 2
    values = of_each_dim(instance.args[name], rank)
    return values if rank == 2 else (1, *values)


def kernel_size(instance: OpInstance) -> tuple[int, int]:
    """Returns the height and width of the kernel of a 1-D or 2-D convolution; the height is 1 for a 1-D one."""
    height, width = (1, *instance.shape_of("weight")[2:])[-2:]
    return height, width


def _is_depthwise(instance: OpInstance) -> bool:
    return instance.args["groups"] > 1 and instance.shape_of("weight")[1] == 1


@constraint
def has_supported_geometry(instance: OpInstance) -> bool:
    """Kernel is at most {MAX_KERNEL}, stride at most {MAX_STRIDE}, dilation at most {MAX_DILATION}."""
    return (
        max(kernel_size(instance)) <= MAX_KERNEL
        and max(_height_and_width(instance, "stride")) <= MAX_STRIDE
        and max(_height_and_width(instance, "dilation")) <= MAX_DILATION
    )


@constraint
def fits_accumulation(instance: OpInstance) -> bool:
    """Kernel height x width x input channels, rounded up to a multiple of the MACs per pipeline, is at most
    {MAX_WEIGHTS_OF_ONE_OUTPUT}.
    """
    channels = instance.target.align_channels(instance.shape_of("weight")[1])
    return math.prod(kernel_size(instance)) * channels <= MAX_WEIGHTS_OF_ONE_OUTPUT


@constraint
def has_a_batch(instance: OpInstance) -> bool:
    """The input has a batch dimension."""
    return len(instance.shape_of("input")) == len(instance.shape_of("weight"))


def convolution_windows(instance: OpInstance) -> tuple[Window, ...]:
    """Returns the windows along each spatial dimension of a convolution."""
    kernel = instance.shape_of("weight")[2:]
    rank = len(kernel)
    stride, dilation = (of_each_dim(instance.args[name], rank) for name in ("stride", "dilation"))
    padding = instance.args["padding"]
    if padding == "same":  # torch puts the odd element at the end
        before = tuple(step * (size - 1) // 2 for size, step in zip(kernel, dilation, strict=True))
    else:
        before = of_each_dim(0 if padding == "valid" else padding, rank)
    sizes, outputs = instance.shape_of("input")[-rank:], instance.shape[-rank:]
    return tuple(map(Window, sizes, outputs, kernel, stride, dilation, before))


def _spatial_windows(instance: OpInstance) -> tuple[Window, Window]:
    """Returns the windows along height and width. For a 1-D convolution, the height is 1."""
    height = Window(size=1, outputs=1, kernel=1, stride=1, dilation=1, padding_before=0)
    vertical, horizontal = (height, *convolution_windows(instance))[-2:]
    return vertical, horizontal


@legacy_constraint
def has_stackable_batch(instance: OpInstance) -> bool:
    """The batch size is 1, or the images of the batch can be stacked to one image: the kernel height is at most the
    vertical stride, the height is a multiple of the stride, and there is no vertical padding. Other batches cannot be
    split, because the legacy generation cannot concatenate batches.
    """
    return instance.shape[0] == 1 or _spatial_windows(instance)[0].is_tiling


def _possible_merges(oihw: Sequence[int], groups: int, target: NeutronTarget, generation: Generation) -> list[int]:
    """Returns the counts of groups that may be merged into one CONV_2D with block-diagonal filters.

    `oihw` is the shape of all filters. The legacy generation slices and concatenates multiples of the MACs per
    pipeline only.
    """
    outputs, inputs, *kernel = oihw
    area = math.prod(kernel)

    def is_legal(merged: int) -> bool:
        if area * target.align_channels(merged * inputs) > MAX_WEIGHTS_OF_ONE_OUTPUT:
            return False
        sizes = (groups * inputs, merged * outputs // groups)
        is_whole = all(size % target.channel_granularity == 0 for size in sizes)
        return generation is Generation.MODERN or merged == groups or is_whole

    return [merged for merged in range(1, groups + 1) if groups % merged == 0 and is_legal(merged)]


@legacy_constraint
def has_supported_groups(instance: OpInstance) -> bool:
    """There is one group, or one group per input channel, or groups can be merged: all of them into one convolution, or
    equal numbers of them into several. For several, the input channels of all groups together and the output channels
    of each convolution are multiples of the MACs per pipeline. A merged convolution has at most
    {MAX_WEIGHTS_OF_ONE_OUTPUT} weights per output.
    """
    groups, shape = instance.args["groups"], instance.shape_of("weight")
    return (
        groups == 1
        or _is_depthwise(instance)
        or bool(_possible_merges(shape, groups, instance.target, Generation.LEGACY))
    )


def macs(instance: OpInstance) -> int:
    """Returns the multiply-accumulates: kernel area times input channels of a group, for each output value."""
    return math.prod(instance.shape) * math.prod(instance.shape_of("weight")[1:])


@dataclass(frozen=True)
class Filters:
    """Constant weights [outputs, inputs of a group, height, width], and a bias for each output."""

    oihw: Array
    qparams: QParams
    bias: Tensor
    groups: int

    def part(self, part: int, parts: int) -> Filters:
        """Returns the filters and biases of part number `part` of `parts` equal parts of the outputs."""
        outputs = len(self.oihw) // parts
        rows = slice(part * outputs, (part + 1) * outputs)

        def rows_of(qparams: QParams) -> QParams:
            return qparams if qparams.axis is None else QParams(qparams.scale[rows], qparams.zero_point[rows], 0)

        biases = np.asarray(self.bias.data)[rows]
        bias = Tensor(biases.shape, self.bias.dtype, rows_of(self.bias.qparams), biases)
        return Filters(self.oihw[rows], rows_of(self.qparams), bias, self.groups // parts)


def lower_convolution(lowering: Lowering) -> Tensor:
    """Emits CONV_2D or DEPTHWISE_CONV_2D in NHWC; see `_convolve_groups` for other groups. 1-D inputs get height 1.

    The legacy generation takes batches of 1 only, so the images of a batch are stacked vertically to one image.
    """
    instance, inputs, weight = lowering.instance, lowering.tensor("input"), lowering.tensor("weight")
    oihw = lowering.data("weight").reshape(*weight.shape[:2], *kernel_size(instance))
    bias = lowering.bias("bias", oihw.shape[0], inputs.qparams, weight.qparams)
    filters = Filters(oihw, weight.qparams, bias, lowering.args["groups"])
    (vertical, horizontal), (batch, channels, *_) = _spatial_windows(instance), inputs.shape
    nhwc = lowering.channels_last(lowering.reshape(inputs, (batch, channels, vertical.size, horizontal.size)))
    if instance.generation is Generation.LEGACY and batch > 1:
        vertical = vertical.repeated(batch)
        nhwc = lowering.reshape(nhwc, (1, vertical.size, horizontal.size, channels))
    output = convolve(lowering, nhwc, filters, (vertical, horizontal))
    images = lowering.reshape(output, (batch, output.shape[0] * output.shape[1] // batch, *output.shape[2:]))
    return lowering.reshape(lowering.channels_first(images), lowering.shape)


def convolve(lowering: Lowering, nhwc: Tensor, filters: Filters, windows: tuple[Window, Window]) -> Tensor:
    """Emits a convolution of an NHWC image and returns its output [N, H, W, C]; see `_convolve_groups` for groups."""
    vertical, horizontal = windows
    nhwc, padding = pad_spatial(lowering, nhwc, windows)
    attrs: dict[str, Any] = {
        "padding": padding,
        "stride_h": vertical.stride,
        "stride_w": horizontal.stride,
        "dilation_h_factor": vertical.dilation,
        "dilation_w_factor": horizontal.dilation,
        "fused_activation_function": lowering.activation,
    }
    positions = (nhwc.shape[0], vertical.outputs, horizontal.outputs)
    oihw, weight, bias = filters.oihw, filters.qparams, filters.bias
    shape = (*positions, oihw.shape[0])
    if filters.groups == 1:
        ohwi = lowering.constant(oihw.transpose(0, 2, 3, 1), weight)
        return lowering.emit(CONV_2D, [nhwc, ohwi, bias], shape, **attrs)
    if oihw.shape[1] == 1:
        axis = None if weight.axis is None else 3
        ihwo = lowering.constant(oihw.transpose(1, 2, 3, 0), QParams(weight.scale, weight.zero_point, axis))
        multiplier = oihw.shape[0] // filters.groups
        return lowering.emit(DEPTHWISE_CONV_2D, [nhwc, ihwo, bias], shape, depth_multiplier=multiplier, **attrs)
    return _convolve_groups(lowering, nhwc, filters, positions, attrs)


def _convolve_groups(
    lowering: Lowering, nhwc: Tensor, filters: Filters, positions: Sequence[int], attrs: dict[str, Any]
) -> Tensor:
    """Emits SLICEs, CONV_2Ds and a CONCATENATION, with the number of groups per CONV_2D that costs the fewest cycles.

    One CONV_2D for all groups needs no SLICE and no CONCATENATION. In a CONV_2D of several groups, filters are zero for
    the inputs of other groups. This costs more products, but fills the pipelines better and takes fewer operators.
    """
    instance, groups, channels = lowering.instance, filters.groups, len(filters.oihw)

    def write(merged: int) -> tuple[Tensor, list[Op]]:
        trial = replace(lowering, ops=[])
        parts = groups // merged
        outputs = [
            trial.emit(
                CONV_2D,
                [_slice_channels(trial, nhwc, part, parts), *_merge_filters(trial, filters.part(part, parts))],
                (*positions, channels // parts),
                **attrs,
            )
            for part in range(parts)
        ]
        if parts == 1:
            return outputs[0], trial.ops
        shape = (*positions, channels)
        return trial.emit(CONCATENATION, outputs, shape, axis=3, fused_activation_function="NONE"), trial.ops

    written = (
        write(merged) for merged in _possible_merges(filters.oihw.shape, groups, instance.target, instance.generation)
    )
    output, ops = min(written, key=lambda plan: cycles_of(plan[1], instance.target))
    lowering.ops.extend(ops)
    return output


def _slice_channels(lowering: Lowering, nhwc: Tensor, part: int, parts: int) -> Tensor:
    """Returns the channels of part number `part` of `parts` equal parts."""
    if parts == 1:
        return nhwc
    size = (*nhwc.shape[:3], nhwc.shape[3] // parts)
    return lowering.emit(NHWC_SLICE, [nhwc], size, nhwc.qparams, begin=(0, 0, 0, part * size[3]), size=size)


def _merge_filters(lowering: Lowering, filters: Filters) -> tuple[Tensor, Tensor]:
    """Returns block-diagonal filters for the channels of all groups, and the biases."""
    (outputs, inputs, height, width), groups = filters.oihw.shape, filters.groups
    diagonal = np.zeros((groups, outputs // groups, height, width, groups, inputs), filters.oihw.dtype)
    blocks = filters.oihw.transpose(0, 2, 3, 1).reshape(groups, outputs // groups, height, width, inputs)
    for group in range(groups):
        diagonal[group, :, :, :, group] = blocks[group]
    data = diagonal.reshape(outputs, height, width, groups * inputs)
    return lowering.constant(data, filters.qparams), filters.bias


CONVOLUTION_SPEC = OpSpec(
    name="convolution",
    targets=(
        "aten.conv1d.default",
        "aten.conv1d.padding",
        "aten.conv2d.default",
        "aten.conv2d.padding",
    ),
    edge_targets=("aten.convolution.default",),
    inputs=("input",),
    weight="weight",
    weight_axis=0,
    bias="bias",
    fuses_activation=True,
    constraints=(
        has_a_batch,
        has_supported_geometry,
        fits_accumulation,
        has_stackable_batch,
        has_supported_groups,
    ),
    lower=lower_convolution,
    macs=macs,
    facts=Facts(layer=LayerKind.CONVOLUTION, is_continuous=True),
    becomes="CONV_2D or DEPTHWISE_CONV_2D; for other groups SLICE, CONV_2D and CONCATENATION, with as many groups "
    "in one CONV_2D as costs the fewest cycles",
)

SPECS = (CONVOLUTION_SPEC,)


def _conv_tbc(rewriting: Rewriting) -> Node:
    """Convolves [time, batch, channels] with a weight [kernel, inputs, outputs]."""
    args = rewriting.args
    channels_first = permute(rewriting, args["self"], (1, 2, 0))
    weight = permute(rewriting, args["weight"], (2, 1, 0))
    convolved = rewriting.call(aten.conv1d.default, channels_first, weight, args["bias"], [1], [args["pad"]])
    return permute(rewriting, convolved, (2, 0, 1))


DECOMPOSED = (
    Decomposition(
        name="conv_tbc",
        targets=("aten.conv_tbc.default",),
        rewrite=_conv_tbc,
        becomes="permute, conv1d, permute",
    ),
)
