"""Elementwise operators: products, differences, maxima and minima of two values, and functions of one value."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch.fx import Node

from openneutron.ir.graph import Kind, QParams, Tensor
from openneutron.ir.kinds import EXP, HARD_SWISH, LEAKY_RELU, LOG, MAXIMUM, MINIMUM, MUL, PRELU, RELU_N1_TO_1, RSQRT
from openneutron.ops.elementwise import (
    MAX_BROADCAST_RANK,
    broadcastable_operands,
    element_macs,
    expands_few_dimensions,
    has_nonzero_alpha,
    has_one_full_operand,
    has_rank_to_broadcast,
    lower_sub,
)
from openneutron.ops.facts import UNKNOWN, Facts, never_negative, never_negative_if_all, never_negative_if_any
from openneutron.ops.gated_products import needed_by_product
from openneutron.ops.intervals import NeededBySum, needed_by_hardswish, needed_by_identity, needed_by_neg
from openneutron.ops.lowering import Lowering
from openneutron.ops.op_instance import OpInstance
from openneutron.ops.spec import Homogeneous, OpSpec, OutputRule, PaddedDimensions, constraint, legacy_constraint

__all__ = ["SPECS"]


# These qparams hold -1, 0 and 1 exactly.
SIGN_QPARAMS = QParams.per_tensor(1 / 64, 0)


def _unary_lowering(kind: Kind) -> Callable[[Lowering], Tensor]:
    def lower(lowering: Lowering) -> Tensor:
        return lowering.emit(kind, [lowering.tensor("self")], lowering.shape)

    return lower


def _binary_lowering(kind: Kind) -> Callable[[Lowering], Tensor]:
    def lower(lowering: Lowering) -> Tensor:
        return lowering.emit(kind, broadcastable_operands(lowering), lowering.shape)

    return lower


def lower_mul(lowering: Lowering) -> Tensor:
    """Emits MUL, which broadcasts the smaller operand."""
    operands = broadcastable_operands(lowering)
    return lowering.emit(MUL, operands, lowering.shape, fused_activation_function=lowering.activation)


def lower_leaky_relu(lowering: Lowering) -> Tensor:
    """Emits LEAKY_RELU."""
    alpha = float(lowering.args["negative_slope"])
    return lowering.emit(LEAKY_RELU, [lowering.tensor("self")], lowering.shape, alpha=alpha)


@constraint
def has_rank_for_slopes(instance: OpInstance) -> bool:
    """The output has at most {MAX_BROADCAST_RANK} dimensions."""
    return len(instance.shape) <= MAX_BROADCAST_RANK


@legacy_constraint
def has_aligned_slopes(instance: OpInstance) -> bool:
    """The channels are a multiple of the MACs per pipeline."""
    return len(instance.shape) >= 2 and instance.shape[1] % instance.target.channel_granularity == 0


def _channels_and_slopes(instance: OpInstance) -> PaddedDimensions:
    return {"self": (1,), "weight": (0,)} if instance.shape_of("weight") != (1,) else {"self": (1,)}


def lower_prelu(lowering: Lowering) -> Tensor:
    """Emits PRELU, with one slope, or with one slope for each channel (dimension 1)."""
    inputs, slopes = lowering.tensor("self"), lowering.data("weight")
    shape = (slopes.size, *(1,) * (len(inputs.shape) - 2)) if inputs.shape else ()
    alpha = lowering.constant(slopes.reshape(shape), lowering.tensor("weight").qparams)
    return lowering.emit(PRELU, [inputs, alpha], lowering.shape)


def lower_neg(lowering: Lowering) -> Tensor:
    """Emits MUL by minus one."""
    minus_one = lowering.number(-1, QParams.per_tensor(1.0, 0))
    inputs = lowering.tensor("self")
    return lowering.emit(MUL, [inputs, minus_one], lowering.shape, fused_activation_function="NONE")


def lower_sign(lowering: Lowering) -> Tensor:
    """Emits MUL by the inverse of the input's scale, clamped to -1..1.

    The product is the distance from zero in int8 steps, so the clamp maps each value except zero to -1 or 1.
    """
    inputs = lowering.tensor("self")
    steps = lowering.number(1, QParams.per_tensor(1 / inputs.qparams.scale[0], 0))
    return lowering.emit(MUL, [inputs, steps], lowering.shape, fused_activation_function=RELU_N1_TO_1.name)


def _sign_of_product(node: Node, operands: Sequence[bool]) -> bool:
    return all(operands) or node.args[0] is node.args[1]


def _function_spec(name: str, kind: Kind, notes: str = "", facts: Facts = UNKNOWN) -> OpSpec:
    return OpSpec(
        name=name,
        targets=(f"aten.{name}.default", f"aten.{name}_.default"),
        edge_targets=(f"aten.{name}.default",),
        inputs=("self",),
        lower=_unary_lowering(kind),
        macs=element_macs,
        facts=facts,
        becomes=kind.name,
        notes=notes,
    )


SPECS = (
    OpSpec(
        name="mul",
        targets=("aten.mul.Tensor", "aten.mul_.Tensor", "aten.multiply.Tensor"),
        scalar_targets=("aten.mul.Scalar", "aten.multiply.Scalar"),
        edge_targets=("aten.mul.Tensor",),
        inputs=("self", "other"),
        fuses_activation=True,
        constraints=(expands_few_dimensions, has_rank_to_broadcast, has_one_full_operand),
        lower=lower_mul,
        macs=element_macs,
        facts=Facts(sign=_sign_of_product, needed_range=needed_by_product, is_continuous=True, computes_masks=True),
        becomes="MUL",
        notes="If the second operand is a number, it becomes a constant. A division by a constant becomes a mul.",
    ),
    OpSpec(
        name="sub",
        targets=("aten.sub.Tensor", "aten.sub_.Tensor", "aten.subtract.Tensor"),
        scalar_targets=("aten.sub.Scalar", "aten.subtract.Scalar"),
        edge_targets=("aten.sub.Tensor",),
        inputs=("self", "other"),
        fuses_activation=True,
        constraints=(has_nonzero_alpha, expands_few_dimensions, has_rank_to_broadcast, has_one_full_operand),
        lower=lower_sub,
        macs=element_macs,
        homogeneous=Homogeneous.ELEMENT,
        facts=Facts(needed_range=NeededBySum(-1), is_continuous=True, computes_masks=True),
        becomes="SUB; with alpha: MUL of the second operand, then SUB, or ADD for a negative alpha",
    ),
    OpSpec(
        name="maximum",
        targets=("aten.maximum.default", "aten.max.other"),
        edge_targets=("aten.maximum.default",),
        inputs=("self", "other"),
        output=OutputRule.SHARED,
        constraints=(expands_few_dimensions, has_rank_to_broadcast, has_one_full_operand),
        lower=_binary_lowering(MAXIMUM),
        macs=element_macs,
        homogeneous=Homogeneous.ELEMENT,
        facts=Facts(sign=never_negative_if_any, needed_range=needed_by_identity, computes_masks=True),
        becomes="MAXIMUM",
    ),
    OpSpec(
        name="minimum",
        targets=("aten.minimum.default", "aten.min.other"),
        edge_targets=("aten.minimum.default",),
        inputs=("self", "other"),
        output=OutputRule.SHARED,
        constraints=(expands_few_dimensions, has_rank_to_broadcast, has_one_full_operand),
        lower=_binary_lowering(MINIMUM),
        macs=element_macs,
        homogeneous=Homogeneous.ELEMENT,
        facts=Facts(sign=never_negative_if_all, needed_range=needed_by_identity, computes_masks=True),
        becomes="MINIMUM",
    ),
    OpSpec(
        name="leaky_relu",
        targets=("aten.leaky_relu.default", "aten.leaky_relu_.default"),
        edge_targets=("aten.leaky_relu.default",),
        inputs=("self",),
        lower=lower_leaky_relu,
        macs=element_macs,
        homogeneous=Homogeneous.ELEMENT,
        becomes="LEAKY_RELU",
    ),
    OpSpec(
        name="prelu",
        targets=("aten.prelu.default",),
        inputs=("self",),
        weight="weight",
        constraints=(has_rank_for_slopes, has_aligned_slopes),
        pads=_channels_and_slopes,
        lower=lower_prelu,
        macs=element_macs,
        homogeneous=Homogeneous.ELEMENT,
        becomes="PRELU",
    ),
    OpSpec(
        name="neg",
        targets=("aten.neg.default", "aten.neg_.default", "aten.negative.default"),
        edge_targets=("aten.neg.default",),
        inputs=("self",),
        lower=lower_neg,
        macs=element_macs,
        homogeneous=Homogeneous.ELEMENT,
        facts=Facts(needed_range=needed_by_neg, computes_masks=True),
        becomes="MUL by minus one",
        notes="LiteRT's NEG ignores zero points, so its results on the host would differ from those of the NPU.",
    ),
    OpSpec(
        name="sign",
        targets=("aten.sign.default", "aten.sgn.default", "aten.sign_.default", "aten.sgn_.default"),
        edge_targets=("aten.sign.default",),
        inputs=("self",),
        output=SIGN_QPARAMS,
        lower=lower_sign,
        macs=element_macs,
        becomes="MUL by the inverse of the input's scale, clamped to -1..1",
        notes="It is the sign of the quantized value, hence 0 for values that are less than half an int8 step from "
        "zero.",
    ),
    _function_spec("exp", EXP, facts=Facts(sign=never_negative)),
    _function_spec(
        "log",
        LOG,
        "log(0) is the lowest value of the output's range.",
        Facts(computes_masks=True, is_infinite_at_zero=True),
    ),
    _function_spec(
        "rsqrt",
        RSQRT,
        "rsqrt(0) is the highest value of the output's range.",
        Facts(sign=never_negative, is_infinite_at_zero=True),
    ),
    _function_spec("hardswish", HARD_SWISH, facts=Facts(needed_range=needed_by_hardswish, is_elementwise=True)),
)
