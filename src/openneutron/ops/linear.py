"""Declarations and lowerings of matrix products with a constant weight."""

from __future__ import annotations

import math

from openneutron.ir.graph import Tensor
from openneutron.ir.kinds import FULLY_CONNECTED
from openneutron.ops.facts import Facts, LayerKind, if_all
from openneutron.ops.lowering import Lowering
from openneutron.ops.op_instance import OpInstance
from openneutron.ops.spec import OpSpec, constraint

__all__ = ["SPECS"]


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


def macs(instance: OpInstance) -> int:
    """Returns the multiply-accumulates: one for each feature of each output value."""
    features = next(name for name in ("input", "mat1", "self") if name in instance.args)
    return math.prod(instance.shape) * instance.shape_of(features)[-1]


def lower_linear(lowering: Lowering) -> Tensor:
    """Emits FULLY_CONNECTED over the last dimension."""
    weight = lowering.tensor("weight")
    return _fully_connected(lowering, lowering.tensor("input"), weight, "bias")


def _transposed_weight(lowering: Lowering) -> Tensor:
    """Returns the weight as [outputs, features], the order of TFLite."""
    return lowering.constant(lowering.data("mat2").transpose(1, 0), lowering.tensor("mat2").qparams)


def lower_addmm(lowering: Lowering) -> Tensor:
    """Emits FULLY_CONNECTED."""
    return _fully_connected(lowering, lowering.tensor("mat1"), _transposed_weight(lowering), "self")


def lower_mm(lowering: Lowering) -> Tensor:
    """Emits FULLY_CONNECTED."""
    return _fully_connected(lowering, lowering.tensor("self"), _transposed_weight(lowering), None)


def _fully_connected(lowering: Lowering, inputs: Tensor, weight: Tensor, bias: str | None) -> Tensor:
    outputs, features = weight.shape
    rows = inputs.size // features
    biases = lowering.bias(bias, outputs, inputs.qparams, weight.qparams)
    flat = lowering.reshape(inputs, (rows, features))
    product = lowering.emit(
        FULLY_CONNECTED,
        [flat, weight, biases],
        (rows, outputs),
        fused_activation_function=lowering.activation,
        weights_format="DEFAULT",
        keep_num_dims=False,
    )
    return lowering.reshape(product, lowering.shape)


SPECS = (
    OpSpec(
        name="linear",
        targets=("aten.linear.default",),
        inputs=("input",),
        weight="weight",
        bias="bias",
        fuses_activation=True,
        constraints=(has_a_matrix_as_weight, has_a_plain_bias),
        lower=lower_linear,
        macs=macs,
        facts=Facts(layer=LayerKind.LINEAR, is_continuous=True, channels_last=True),
        becomes="FULLY_CONNECTED",
    ),
    OpSpec(
        name="addmm",
        targets=("aten.addmm.default",),
        inputs=("mat1",),
        weight="mat2",
        bias="self",
        fuses_activation=True,
        constraints=(has_a_plain_bias, does_not_scale),
        lower=lower_addmm,
        macs=macs,
        facts=Facts(layer=LayerKind.PRODUCT, is_continuous=True, channels_last=True),
        becomes="FULLY_CONNECTED",
    ),
    OpSpec(
        name="mm",
        targets=("aten.mm.default",),
        inputs=("self",),
        weight="mat2",
        fuses_activation=True,
        lower=lower_mm,
        macs=macs,
        facts=Facts(layer=LayerKind.PRODUCT, channels_last=True, sign=if_all, is_continuous=True),
        becomes="FULLY_CONNECTED",
    ),
)
