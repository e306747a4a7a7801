"""Convolutions over one and two dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from openneutron.ir.graph import Array, Kind, QParams, Tensor
from openneutron.ops.lowering import Lowering
from openneutron.ops.shapes import CONCATENATION, SLICE
from openneutron.ops.site import Site
from openneutron.ops.spec import OpSpec, constraint, legacy_constraint
from openneutron.ops.windows import Window, pad_spatial

__all__ = ["SPECS"]

CONV_2D = Kind("CONV_2D", "Conv2DOptions", version=3)
DEPTHWISE_CONV_2D = Kind("DEPTHWISE_CONV_2D", "DepthwiseConv2DOptions", version=3)

MAX_KERNEL = 4096
MAX_STRIDE = 4096
MAX_DILATION = 4096
MAX_WEIGHTS_OF_ONE_OUTPUT = 65535


def _spatial(site: Site, name: str) -> tuple[int, ...]:
    """A parameter per spatial dimension, as height and width; a 1-D convolution has height 1."""
    rank = len(site.shape_of("weight")) - 2
    values = tuple(site.args[name])
    values = values * rank if len(values) == 1 else values
    return values if rank == 2 else (1, *values)


def _kernel(site: Site) -> tuple[int, int]:
    height, width = (1, *site.shape_of("weight")[2:])[-2:]
    return height, width


def _padding_begin(site: Site) -> tuple[int, ...]:
    padding = site.args["padding"]
    if padding == "valid":
        return (0, 0)
    if padding == "same":  # torch puts the odd one behind
        pairs = zip(_kernel(site), _spatial(site, "dilation"), strict=True)
        return tuple(dilation * (kernel - 1) // 2 for kernel, dilation in pairs)
    rank = len(site.shape_of("weight")) - 2
    values = tuple(padding) * rank if len(padding) == 1 else tuple(padding)
    return values if rank == 2 else (0, *values)


def _is_depthwise(site: Site) -> bool:
    return site.args["groups"] > 1 and site.shape_of("weight")[1] == 1


@constraint
def has_supported_geometry(site: Site) -> bool:
    """Kernel is at most {MAX_KERNEL}, stride at most {MAX_STRIDE}, dilation at most {MAX_DILATION}."""
    return (
        max(_kernel(site)) <= MAX_KERNEL
        and max(_spatial(site, "stride")) <= MAX_STRIDE
        and max(_spatial(site, "dilation")) <= MAX_DILATION
    )


@constraint
def fits_accumulation(site: Site) -> bool:
    """Kernel height x width x input channels, rounded up to the MACs of a pipeline, is at most
    {MAX_WEIGHTS_OF_ONE_OUTPUT}.
    """
    granularity = site.target.channel_granularity
    channels = -(-site.shape_of("weight")[1] // granularity) * granularity
    return math.prod(_kernel(site)) * channels <= MAX_WEIGHTS_OF_ONE_OUTPUT


@constraint
def has_a_batch(site: Site) -> bool:
    """The input has a batch dimension."""
    return len(site.shape_of("input")) == len(site.shape_of("weight"))


@legacy_constraint
def has_batch_of_one(site: Site) -> bool:
    """The batch size is 1."""
    return site.shape[0] == 1


@legacy_constraint
def splits_into_whole_granules(site: Site) -> bool:
    """Groups, where there are some and not one per channel, have multiples of the MACs of a pipeline as channels."""
    if site.args["groups"] == 1 or _is_depthwise(site):
        return True
    outputs, inputs = site.shape_of("weight")[:2]
    granularity = site.target.channel_granularity
    return inputs % granularity == 0 and outputs // site.args["groups"] % granularity == 0


def macs(site: Site) -> int:
    """Each output value takes the kernel's area times the input channels of its group."""
    return math.prod(site.shape) * math.prod(site.shape_of("weight")[1:])


@dataclass(frozen=True)
class _Weights:
    """Filters with the dimensions [outputs, inputs, height, width], and a bias for each output."""

    oihw: Array
    qparams: QParams
    bias: Tensor


def lower_convolution(lowering: Lowering) -> Tensor:
    """CONV_2D or DEPTHWISE_CONV_2D in NHWC, one per group where the groups are neither; a 1-D one has height 1."""
    site, inputs, weight = lowering.site, lowering.tensor("input"), lowering.tensor("weight")
    batch, *_, width = inputs.shape
    is_1d = len(inputs.shape) == 3
    if is_1d:
        inputs = lowering.reshape(inputs, (batch, inputs.shape[1], 1, width))
    oihw = lowering.data("weight").reshape(*weight.shape[:2], *_kernel(site))
    bias = lowering.bias("bias", oihw.shape[0], inputs.qparams, weight.qparams)
    out_height, out_width = (1, *lowering.shape[2:])[-2:]
    windows = [
        Window(*sizes)
        for sizes in zip(inputs.shape[2:], (out_height, out_width), _kernel(site), _spatial(site, "stride"),
                         _spatial(site, "dilation"), _padding_begin(site), strict=True)
    ]  # fmt: skip
    nhwc, padding = pad_spatial(lowering, lowering.channels_last(inputs), windows)
    weights = _Weights(oihw, weight.qparams, bias)
    output = _convolve(lowering, nhwc, weights, windows, padding)
    return lowering.reshape(lowering.channels_first(output), lowering.shape)


def _convolve(
    lowering: Lowering, nhwc: Tensor, weights: _Weights, windows: Sequence[Window], padding: str
) -> Tensor:
    oihw, weight, bias = weights.oihw, weights.qparams, weights.bias
    groups, channels = lowering.args["groups"], oihw.shape[0]
    shape = (nhwc.shape[0], *(window.outputs for window in windows), channels)
    vertical, horizontal = windows
    attrs: dict[str, Any] = {
        "padding": padding,
        "stride_h": vertical.stride,
        "stride_w": horizontal.stride,
        "dilation_h_factor": vertical.dilation,
        "dilation_w_factor": horizontal.dilation,
        "fused_activation_function": lowering.activation,
    }
    if _is_depthwise(lowering.site):
        axis = None if weight.axis is None else 3
        filters = lowering.constant(oihw.transpose(1, 2, 3, 0), QParams(weight.scale, weight.zero_point, axis))
        return lowering.emit(
            DEPTHWISE_CONV_2D, [nhwc, filters, bias], shape, depth_multiplier=channels // groups, **attrs
        )
    ohwi = oihw.transpose(0, 2, 3, 1)
    if groups == 1:
        return lowering.emit(CONV_2D, [nhwc, lowering.constant(ohwi, weight), bias], shape, **attrs)
    outputs = []
    for group in range(groups):
        rows = slice(group * channels // groups, (group + 1) * channels // groups)
        outputs.append(
            lowering.emit(
                CONV_2D,
                [_channels(lowering, nhwc, group, groups), *_rows(lowering, ohwi, weight, bias, rows)],
                (*shape[:3], channels // groups),
                **attrs,
            )
        )
    return lowering.emit(CONCATENATION, outputs, shape, axis=3, fused_activation_function="NONE")


def _channels(lowering: Lowering, nhwc: Tensor, group: int, groups: int) -> Tensor:
    size = (*nhwc.shape[:3], nhwc.shape[3] // groups)
    return lowering.emit(SLICE, [nhwc], size, nhwc.qparams, begin=(0, 0, 0, group * size[3]), size=size)


def _rows(lowering: Lowering, ohwi: Array, weight: QParams, bias: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """The filters and biases of one group."""

    def part(qparams: QParams) -> QParams:
        return qparams if qparams.axis is None else QParams(qparams.scale[rows], qparams.zero_point[rows], qparams.axis)

    biases = np.asarray(bias.data)[rows]
    return lowering.constant(ohwi[rows], part(weight)), lowering.constant(biases, part(bias.qparams))


SPECS = (
    OpSpec(
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
        weight_per_channel=True,
        bias="bias",
        fuses_activation=True,
        constraints=(
            has_a_batch,
            has_supported_geometry,
            fits_accumulation,
            has_batch_of_one,
            splits_into_whole_granules,
        ),
        lower=lower_convolution,
        macs=macs,
        becomes="CONV_2D or DEPTHWISE_CONV_2D; other groups: SLICE, a CONV_2D each, CONCATENATION",
    ),
)
