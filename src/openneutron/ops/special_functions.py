"""Decompositions of functions of one or two values that the NPU lacks, other than activations, powers and roots."""

from __future__ import annotations

import math

import torch
from torch.fx import Node

from openneutron.ops.decomposition import Decomposition, Rewriting
from openneutron.ops.functions import ERROR_AT_ZERO
from openneutron.ops.graph_builder import Operand, add, convert, mul, rsub, sub

__all__ = ["DECOMPOSED"]

aten = torch.ops.aten
_LN2 = math.log(2)


def _to_radians(rewriting: Rewriting) -> Node:
    return mul(rewriting, rewriting.args["self"], math.pi / 180)


def _to_degrees(rewriting: Rewriting) -> Node:
    return mul(rewriting, rewriting.args["self"], 180 / math.pi)


def _erfc(rewriting: Rewriting) -> Node:
    return rsub(rewriting, rewriting.call(aten.erf.default, rewriting.args["self"]), 1.0)


def _fmax(rewriting: Rewriting) -> Node:
    return rewriting.call(aten.maximum.default, rewriting.args["self"], rewriting.args["other"])


def _fmin(rewriting: Rewriting) -> Node:
    return rewriting.call(aten.minimum.default, rewriting.args["self"], rewriting.args["other"])


def _hypot(rewriting: Rewriting) -> Node:
    squares = [mul(rewriting, rewriting.args[name], rewriting.args[name]) for name in ("self", "other")]
    return rewriting.call(aten.sqrt.default, add(rewriting, *squares))


def _log2_add_exp2(rewriting: Rewriting) -> Node:
    scaled = [mul(rewriting, rewriting.args[name], _LN2) for name in ("self", "other")]
    return mul(rewriting, rewriting.call(aten.logaddexp.default, *scaled), 1 / _LN2)


def _is_negative(rewriting: Rewriting, value: Node) -> Node:
    """Computes 1 for negative values, and 0 for others."""
    sign = rewriting.call(aten.sign.default, mul(rewriting, value, -1.0))
    return rewriting.call(aten.relu.default, sign)


def _copysign(rewriting: Rewriting) -> Node:
    magnitude, other = rewriting.call(aten.abs.default, rewriting.args["self"]), rewriting.args["other"]
    known = torch.tensor(float(other)) if not isinstance(other, Node) else rewriting.value_of("other")
    if known is not None:
        sign = torch.copysign(torch.ones_like(known), known)
        return mul(rewriting, magnitude, rewriting.constant(sign) if sign.dim() else float(sign))
    return mul(rewriting, magnitude, rsub(rewriting, mul(rewriting, _is_negative(rewriting, other), 2.0), 1.0))


def _heaviside(rewriting: Rewriting) -> Node:
    sign, at_zero = rewriting.call(aten.sign.default, rewriting.args["self"]), rewriting.args["values"]
    step = rewriting.call(aten.relu.default, sign)
    is_zero = rsub(rewriting, rewriting.call(aten.abs.default, sign), 1.0)
    return add(rewriting, step, mul(rewriting, is_zero, at_zero))


def _ldexp(rewriting: Rewriting) -> Node:
    exponent = rewriting.value_of("other")
    factor: Operand
    if exponent is not None:
        factor = rewriting.constant(torch.exp2(exponent.double()).float())
    else:
        computed: Node = rewriting.args["other"]
        if computed.meta["val"].dtype is not torch.float32:
            computed = convert(rewriting, computed, torch.float32)
        factor = rewriting.call(aten.exp2.default, computed)
    return mul(rewriting, rewriting.args["self"], factor)


def _angle(rewriting: Rewriting) -> Node:
    return mul(rewriting, _is_negative(rewriting, rewriting.args["self"]), math.pi)


def _dist(rewriting: Rewriting) -> Node:
    difference = sub(rewriting, rewriting.args["self"], rewriting.args["other"])
    return rewriting.call(aten.linalg_vector_norm.default, difference, rewriting.args["p"])


DECOMPOSED = (
    Decomposition(name="deg2rad", targets=("aten.deg2rad.default",), rewrite=_to_radians, becomes="mul"),
    Decomposition(name="rad2deg", targets=("aten.rad2deg.default",), rewrite=_to_degrees, becomes="mul"),
    Decomposition(
        name="erfc", targets=("aten.erfc.default",), rewrite=_erfc, becomes="erf on the CPU, and sub on the NPU"
    ),
    Decomposition(
        name="fmax", targets=("aten.fmax.default",), rewrite=_fmax, becomes="maximum",
        notes="The result for NaN is that of maximum. Quantized values are never NaN.",
    ),
    Decomposition(
        name="fmin", targets=("aten.fmin.default",), rewrite=_fmin, becomes="minimum",
        notes="The result for NaN is that of minimum. Quantized values are never NaN.",
    ),
    Decomposition(
        name="hypot", targets=("aten.hypot.default",), rewrite=_hypot, becomes="mul, mul, add, clamp, log, mul, exp",
        approximation=ERROR_AT_ZERO,
    ),
    Decomposition(
        name="logaddexp2", targets=("aten.logaddexp2.default",), rewrite=_log2_add_exp2,
        becomes="mul, mul, logaddexp, mul",
    ),
    Decomposition(
        name="copysign", targets=("aten.copysign.Tensor", "aten.copysign.Scalar"), rewrite=_copysign,
        becomes="abs, mul; also mul, sign, relu, mul and sub for a computed sign",
        notes="The sign of -0.0 counts as positive if it is computed. Quantized values have no -0.0.",
    ),
    Decomposition(
        name="heaviside", targets=("aten.heaviside.default",), rewrite=_heaviside,
        becomes="sign, relu, abs, sub, mul, add",
    ),
    Decomposition(
        name="ldexp", targets=("aten.ldexp.Tensor",), rewrite=_ldexp, becomes="mul; also mul and exp if the exponent "
        "is computed",
    ),
    Decomposition(name="angle", targets=("aten.angle.default",), rewrite=_angle, becomes="mul, sign, relu, mul"),
    Decomposition(
        name="dist", targets=("aten.dist.default",), rewrite=_dist, becomes="sub, and the operators of norm",
        approximation=ERROR_AT_ZERO,
    ),
)  # fmt: skip
