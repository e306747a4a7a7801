"""Declarations and lowerings of matrix products with a constant weight."""

from __future__ import annotations

import math
from dataclasses import replace

from openneutron.ir.graph import Tensor
from openneutron.ir.kinds import CONV_2D, FULLY_CONNECTED, Layout
from openneutron.ir.limits import MAX_WEIGHTS_OF_ONE_OUTPUT
from openneutron.ops.facts import Facts, LayerKind, never_negative_if_all
from openneutron.ops.lowering import Lowering
from openneutron.ops.op_instance import OpInstance
from openneutron.ops.spec import OpSpec, constraint

__all__ = ["CONV_2D_OF_ROWS", "SPECS"]

# The convolution of a linear reads one position at a time, so its features may have any order, like a linear's.
CONV_2D_OF_ROWS = replace(CONV_2D, layout=Layout.FEATURES)


@constraint
def has_a_matrix_as_weight(instance: OpInstance) -> bool:
    """The weight has two dimensions."""
    return len(instance.shape_of("weight")) == 2


@constraint
def has_a_plain_bias(instance: OpInstance) -> bool:
    """The bias has one value per output: shape [outputs] or [1, outputs]."""
    bias = instance.args["bias" if "bias" in instance.args else "self"]
    outputs = instance.shape[-1]
    return bias is None or tuple(bias.meta["val"].shape) in ((outputs,), (1, outputs))


@constraint
def does_not_scale(instance: OpInstance) -> bool:
    """alpha and beta are 1."""
    return bool(instance.args["alpha"] == 1 and instance.args["beta"] == 1)


def _feature_count(instance: OpInstance) -> int:
    argument = next(name for name in ("input", "mat1", "self") if name in instance.args)
    return instance.shape_of(argument)[-1]


@constraint
def fits_a_convolution(instance: OpInstance) -> bool:
    """The features, rounded up to a multiple of the MACs per pipeline, are at most {MAX_WEIGHTS_OF_ONE_OUTPUT}."""
    return instance.target.align_channels(_feature_count(instance)) <= MAX_WEIGHTS_OF_ONE_OUTPUT


def macs(instance: OpInstance) -> int:
    """Returns the multiply-accumulates: one for each feature of each output value."""
    return math.prod(instance.shape) * _feature_count(instance)


def lower_linear(lowering: Lowering) -> Tensor:
    """Emits FULLY_CONNECTED or CONV_2D over the last dimension."""
    return _emit_product(lowering, lowering.tensor("input"), lowering.tensor("weight"), "bias")


def _transposed_weight(lowering: Lowering) -> Tensor:
    """Returns the weight as [outputs, features], the order of TFLite."""
    qparams = lowering.tensor("mat2").qparams
    axis = None if qparams.axis is None else 0
    return lowering.constant(lowering.data("mat2").transpose(1, 0), replace(qparams, axis=axis))


def lower_addmm(lowering: Lowering) -> Tensor:
    """Emits FULLY_CONNECTED or CONV_2D."""
    return _emit_product(lowering, lowering.tensor("mat1"), _transposed_weight(lowering), "self")


def lower_mm(lowering: Lowering) -> Tensor:
    """Emits FULLY_CONNECTED or CONV_2D."""
    return _emit_product(lowering, lowering.tensor("self"), _transposed_weight(lowering), None)


def _emit_product(lowering: Lowering, inputs: Tensor, weight: Tensor, bias: str | None) -> Tensor:
    """Emits the product of all rows of `inputs` with `weight` [outputs, features].

    The NPU's FULLY_CONNECTED has one weight scale. A weight with a scale for each output therefore becomes the filters
    of a CONV_2D of 1x1 on the image [1, rows, 1, features], which takes the same cycles.
    """
    outputs, features = weight.shape
    rows = inputs.size // features
    biases = lowering.bias(bias, outputs, inputs.qparams, weight.qparams)
    if weight.qparams.axis is None:
        product = lowering.emit(
            FULLY_CONNECTED,
            [lowering.reshape(inputs, (rows, features)), weight, biases],
            (rows, outputs),
            fused_activation_function=lowering.activation,
            weights_format="DEFAULT",
            keep_num_dims=False,
        )
    else:
        assert weight.data is not None
        filters = lowering.constant(weight.data.reshape(outputs, 1, 1, features), weight.qparams)
        product = lowering.emit(
            CONV_2D_OF_ROWS,
            [lowering.reshape(inputs, (1, rows, 1, features)), filters, biases],
            (1, rows, 1, outputs),
            padding="VALID",
            stride_h=1,
            stride_w=1,
            dilation_h_factor=1,
            dilation_w_factor=1,
            fused_activation_function=lowering.activation,
        )
    return lowering.reshape(product, lowering.shape)


BECOMES = "FULLY_CONNECTED; with a weight scale per channel, CONV_2D with a kernel of 1x1"

SPECS = (
    OpSpec(
        name="linear",
        targets=("aten.linear.default",),
        inputs=("input",),
        weight="weight",
        weight_axis=0,
        per_channel_constraints=(fits_a_convolution,),
        bias="bias",
        fuses_activation=True,
        constraints=(has_a_matrix_as_weight, has_a_plain_bias),
        lower=lower_linear,
        macs=macs,
        facts=Facts(layer=LayerKind.LINEAR, is_continuous=True, channels_last=True),
        becomes=BECOMES,
    ),
    OpSpec(
        name="addmm",
        targets=("aten.addmm.default",),
        inputs=("mat1",),
        weight="mat2",
        weight_axis=1,
        per_channel_constraints=(fits_a_convolution,),
        bias="self",
        fuses_activation=True,
        constraints=(has_a_plain_bias, does_not_scale),
        lower=lower_addmm,
        macs=macs,
        facts=Facts(layer=LayerKind.PRODUCT, is_continuous=True, channels_last=True),
        becomes=BECOMES,
    ),
    OpSpec(
        name="mm",
        targets=("aten.mm.default",),
        inputs=("self",),
        weight="mat2",
        weight_axis=1,
        per_channel_constraints=(fits_a_convolution,),
        fuses_activation=True,
        lower=lower_mm,
        macs=macs,
        facts=Facts(layer=LayerKind.PRODUCT, channels_last=True, sign=never_negative_if_all, is_continuous=True),
        becomes=BECOMES,
    ),
)
