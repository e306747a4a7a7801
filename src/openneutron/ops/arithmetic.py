"""Products, differences and extremes of two values, and functions of one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from openneutron.ir.graph import Kind, Layout, QParams, Tensor
from openneutron.ops.elementwise import MAXIMUM, MINIMUM, MUL, element_macs, has_alpha_one, has_one_full_operand
from openneutron.ops.lowering import INT8, Lowering
from openneutron.ops.spec import OpSpec, OutputRule

__all__ = ["SPECS"]

EXP = Kind("EXP", "ExpOptions", Layout.ELEMENTWISE)
HARD_SWISH = Kind("HARD_SWISH", "HardSwishOptions", Layout.ELEMENTWISE, version=1)
LEAKY_RELU = Kind("LEAKY_RELU", "LeakyReluOptions", Layout.ELEMENTWISE)
LOG = Kind("LOG", None, Layout.ELEMENTWISE)
RSQRT = Kind("RSQRT", None, Layout.ELEMENTWISE)
SUB = Kind("SUB", "SubOptions", Layout.ELEMENTWISE)


def _unary(kind: Kind) -> Callable[[Lowering], Tensor]:
    def lower(lowering: Lowering) -> Tensor:
        return lowering.emit(kind, [lowering.tensor("self")], lowering.shape)

    return lower


def _binary(kind: Kind) -> Callable[[Lowering], Tensor]:
    def lower(lowering: Lowering) -> Tensor:
        return lowering.emit(kind, [lowering.tensor("self"), lowering.tensor("other")], lowering.shape)

    return lower


def _fusing(kind: Kind) -> Callable[[Lowering], Tensor]:
    def lower(lowering: Lowering) -> Tensor:
        operands = [lowering.tensor("self"), lowering.tensor("other")]
        return lowering.emit(kind, operands, lowering.shape, fused_activation_function=lowering.activation)

    return lower


def lower_leaky_relu(lowering: Lowering) -> Tensor:
    """LEAKY_RELU."""
    alpha = float(lowering.args["negative_slope"])
    return lowering.emit(LEAKY_RELU, [lowering.tensor("self")], lowering.shape, alpha=alpha)


def lower_neg(lowering: Lowering) -> Tensor:
    """MUL by minus one."""
    minus_one = lowering.constant(np.array([-1], INT8), QParams.per_tensor(1.0, 0))
    inputs = lowering.tensor("self")
    return lowering.emit(MUL, [inputs, minus_one], lowering.shape, fused_activation_function="NONE")


def _function(name: str, kind: Kind, *, in_place: bool = True) -> OpSpec:
    targets = (f"aten.{name}.default", *([f"aten.{name}_.default"] if in_place else []))
    return OpSpec(
        name=name,
        targets=targets,
        edge_targets=targets[:1],
        inputs=("self",),
        lower=_unary(kind),
        macs=element_macs,
        becomes=kind.name,
    )


SPECS = (
    OpSpec(
        name="mul",
        targets=("aten.mul.Tensor", "aten.mul_.Tensor"),
        edge_targets=("aten.mul.Tensor",),
        inputs=("self", "other"),
        fuses_activation=True,
        constraints=(has_one_full_operand,),
        lower=_fusing(MUL),
        macs=element_macs,
        becomes="MUL",
        notes="A number as second operand becomes a constant; a division by a constant becomes a multiplication.",
    ),
    OpSpec(
        name="sub",
        targets=("aten.sub.Tensor", "aten.sub_.Tensor"),
        edge_targets=("aten.sub.Tensor",),
        inputs=("self", "other"),
        fuses_activation=True,
        constraints=(has_alpha_one, has_one_full_operand),
        lower=_fusing(SUB),
        macs=element_macs,
        becomes="SUB",
    ),
    OpSpec(
        name="maximum",
        targets=("aten.maximum.default",),
        inputs=("self", "other"),
        output=OutputRule.SHARED,
        constraints=(has_one_full_operand,),
        lower=_binary(MAXIMUM),
        macs=element_macs,
        becomes="MAXIMUM",
    ),
    OpSpec(
        name="minimum",
        targets=("aten.minimum.default",),
        inputs=("self", "other"),
        output=OutputRule.SHARED,
        constraints=(has_one_full_operand,),
        lower=_binary(MINIMUM),
        macs=element_macs,
        becomes="MINIMUM",
    ),
    OpSpec(
        name="leaky_relu",
        targets=("aten.leaky_relu.default", "aten.leaky_relu_.default"),
        edge_targets=("aten.leaky_relu.default",),
        inputs=("self",),
        lower=lower_leaky_relu,
        macs=element_macs,
        becomes="LEAKY_RELU",
    ),
    OpSpec(
        name="neg",
        targets=("aten.neg.default", "aten.neg_.default"),
        edge_targets=("aten.neg.default",),
        inputs=("self",),
        lower=lower_neg,
        macs=element_macs,
        becomes="MUL by minus one",
        notes="LiteRT's NEG negates int8 codes without their zero points, so the host would disagree with the NPU.",
    ),
    _function("exp", EXP),
    _function("log", LOG),
    _function("rsqrt", RSQRT),
    _function("hardswish", HARD_SWISH),
)
