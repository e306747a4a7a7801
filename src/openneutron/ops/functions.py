"""Decompositions of powers, roots, quotients and logarithms that the NPU lacks."""

from __future__ import annotations

import math

import torch
from torch.fx import Node

from openneutron.core.fx import arguments, op_name
from openneutron.ops.declared import is_op
from openneutron.ops.decomposition import Decomposition, Rewriting
from openneutron.ops.facts import Facts
from openneutron.ops.graph_builder import add, exp, log, mul, rsqrt
from openneutron.ops.op_instance import OpInstance
from openneutron.ops.sign_analysis import is_never_negative
from openneutron.ops.spec import constraint

__all__ = ["DECOMPOSED", "is_quotient"]

aten = torch.ops.aten

# The largest error of value ** exponent at value 0, for exponents between 0 and 1. log(0) is minus infinity, so the
# value is clamped to a small positive number.
ERROR_AT_ZERO = 1e-4
# Slightly above the smallest normal float32, 1.2e-38.
SMALLEST = 1e-37
MAX_WHOLE_POWER = 16


def _power_by_exp(rewriting: Rewriting, value: Node, exponent: float) -> Node:
    """Computes `value` ** `exponent` as exp(exponent * log(value))."""
    if exponent > 0:
        least = max(SMALLEST, ERROR_AT_ZERO ** max(2.0, 1 / exponent))
        value = rewriting.call(aten.clamp_min.default, value, least)
    return exp(rewriting, mul(rewriting, log(rewriting, value), exponent))


def _sqrt(rewriting: Rewriting) -> Node:
    return _power_by_exp(rewriting, rewriting.args["self"], 0.5)


def _invert(rewriting: Rewriting, value: Node) -> Node:
    """Computes 1 / value for value >= 0, as rsqrt(value) ** 2. If `value` is exp(x), computes exp(-x)."""
    if op_name(value) == "aten.exp.default":
        return exp(rewriting, mul(rewriting, value.all_input_nodes[0], -1.0))
    root = rsqrt(rewriting, value)
    return mul(rewriting, root, root)


def _reciprocal(rewriting: Rewriting) -> Node:
    return _invert(rewriting, rewriting.args["self"])


def _square(rewriting: Rewriting) -> Node:
    return mul(rewriting, rewriting.args["self"], rewriting.args["self"])


def _integer_power(rewriting: Rewriting, value: Node, exponent: int) -> Node:
    """Computes `value` ** `exponent` by repeated squaring."""
    power = None
    while True:
        if exponent % 2:
            power = value if power is None else mul(rewriting, power, value)
        exponent //= 2
        if not exponent:
            break
        value = mul(rewriting, value, value)
    assert power is not None  # the last bit of a positive number is 1
    return power


def _is_integer(exponent: float) -> bool:
    return exponent == int(exponent) and 1 <= exponent <= MAX_WHOLE_POWER


def _constant_exponent(instance: OpInstance) -> float:
    """Returns the exponent; NaN if it is not one number."""
    number = instance.number("exponent")
    return math.nan if number is None else number


@constraint
def has_one_exponent(instance: OpInstance) -> bool:
    """The exponent is one finite constant number."""
    return math.isfinite(_constant_exponent(instance))


@constraint
def has_supported_exponent(instance: OpInstance) -> bool:
    """The exponent is 0.5, -0.5 or a whole number from 1 to {MAX_WHOLE_POWER}; or the exponent is not 0, and the base
    is never negative (an output of relu, abs, exp or a clamp from 0).
    """
    exponent = _constant_exponent(instance)
    if not math.isfinite(exponent):
        return True  # has_one_exponent rejects it
    if exponent in (0.5, -0.5) or _is_integer(exponent):
        return True
    return exponent != 0 and is_never_negative(instance, instance.args["self"])


def _power(rewriting: Rewriting) -> Node:
    value, exponent = rewriting.args["self"], _constant_exponent(rewriting.instance)
    if _is_integer(exponent):
        return _integer_power(rewriting, value, int(exponent))
    if exponent == -0.5:
        return rsqrt(rewriting, value)
    return _invert(rewriting, value) if exponent == -1 else _power_by_exp(rewriting, value, exponent)


@constraint
def has_positive_base(instance: OpInstance) -> bool:
    """The base is a positive number."""
    return bool(instance.args["self"] > 0)


def _exponential(rewriting: Rewriting) -> Node:
    base, exponent = rewriting.args["self"], rewriting.args["exponent"]
    return exp(rewriting, mul(rewriting, exponent, math.log(base)))


def _exp2(rewriting: Rewriting) -> Node:
    return exp(rewriting, mul(rewriting, rewriting.args["self"], math.log(2)))


def _expm1(rewriting: Rewriting) -> Node:
    return add(rewriting, exp(rewriting, rewriting.args["self"]), -1.0)


def _log1p(rewriting: Rewriting) -> Node:
    return log(rewriting, add(rewriting, rewriting.args["self"], 1.0))


def _log2(rewriting: Rewriting) -> Node:
    return mul(rewriting, log(rewriting, rewriting.args["self"]), 1 / math.log(2))


def _log10(rewriting: Rewriting) -> Node:
    return mul(rewriting, log(rewriting, rewriting.args["self"]), 1 / math.log(10))


@constraint
def has_an_epsilon(instance: OpInstance) -> bool:
    """The epsilon is above 2^-25 and below 0.5. Without it, or if 1 - epsilon rounds to 1, the function is infinite."""
    epsilon = instance.args["eps"]
    return isinstance(epsilon, (int, float)) and 2.0**-25 < epsilon < 0.5  # 1 - 2^-25 rounds to 1 in float32


def _logit(rewriting: Rewriting) -> Node:
    """Computes log(share / (1 - share)) as the difference of the logarithms."""
    epsilon = rewriting.args["eps"]
    share = rewriting.call(aten.clamp.default, rewriting.args["self"], epsilon, 1 - epsilon)
    rest = rewriting.call(aten.sub.Tensor, rewriting.constant(torch.tensor(1.0)), share)
    return rewriting.call(aten.sub.Tensor, log(rewriting, share), log(rewriting, rest))


def is_quotient(node: Node) -> bool:
    """Whether `node` is a division that does not round the quotient."""
    return is_op(node, "div") and arguments(node).get("rounding_mode") is None


def _constant_divisor(instance: OpInstance) -> torch.Tensor | None:
    other = instance.args["other"]
    return instance.constant("other") if isinstance(other, Node) else torch.tensor(float(other))


@constraint
def has_no_zero_divisor(instance: OpInstance) -> bool:
    """The divisor, if it is a constant, has no zeros."""
    divisor = _constant_divisor(instance)
    return divisor is None or bool((divisor != 0).all())


@constraint
def has_no_negative_divisor(instance: OpInstance) -> bool:
    """The divisor, if it is computed, is never negative (an output of relu, abs, exp or a clamp from 0)."""
    return _constant_divisor(instance) is not None or is_never_negative(instance, instance.args["other"])


def _quotient(rewriting: Rewriting) -> Node:
    dividend, divisor = rewriting.args["self"], _constant_divisor(rewriting.instance)
    if divisor is None:
        return mul(rewriting, dividend, _invert(rewriting, rewriting.args["other"]))
    return mul(rewriting, dividend, rewriting.constant((1 / divisor.double()).float()))


@constraint
def inverts_no_negative(instance: OpInstance) -> bool:
    """The input is never negative (an output of relu, abs, exp or a clamp from 0)."""
    return is_never_negative(instance, instance.args["self"])


def _rsub(rewriting: Rewriting) -> Node:
    args = rewriting.args
    minuend = args["other"]
    minuend = minuend if isinstance(minuend, Node) else rewriting.constant(torch.tensor(float(minuend)))
    alpha = {} if args["alpha"] == 1 else {"alpha": args["alpha"]}
    return rewriting.call(aten.sub.Tensor, minuend, args["self"], **alpha)


_BY_LOGARITHM = (
    "Computed by the logarithm. The form x * rsqrt(x) needs the large values of rsqrt near zero in its int8 range, and "
    "is NaN at zero."
)

DECOMPOSED = (
    Decomposition(
        name="sqrt",
        targets=("aten.sqrt.default",),
        rewrite=_sqrt,
        becomes="clamp, log, mul, exp",
        approximation=ERROR_AT_ZERO,
        notes=_BY_LOGARITHM,
    ),
    Decomposition(
        name="pow",
        targets=("aten.pow.Tensor_Scalar", "aten.pow.Tensor_Tensor"),
        rewrite=_power,
        becomes="mul for a whole exponent; rsqrt for -0.5; rsqrt, mul for -1; else clamp, log, mul, exp",
        constraints=(has_one_exponent, has_supported_exponent),
        approximation=ERROR_AT_ZERO,
    ),
    Decomposition(
        name="pow of a number",
        targets=("aten.pow.Scalar",),
        rewrite=_exponential,
        becomes="mul, exp",
        constraints=(has_positive_base,),
    ),
    Decomposition(
        name="square",
        targets=("aten.square.default",),
        rewrite=_square,
        becomes="mul",
    ),
    Decomposition(
        name="reciprocal",
        targets=("aten.reciprocal.default",),
        rewrite=_reciprocal,
        becomes="rsqrt, mul",
        constraints=(inverts_no_negative,),
    ),
    Decomposition(
        name="div",
        targets=("aten.div.Tensor", "aten.div.Scalar", "aten.divide.Tensor", "aten.true_divide.Tensor"),
        rewrite=_quotient,
        facts=Facts(is_continuous=True, computes_masks=True),
        becomes="mul for a constant divisor; mul, exp, mul for an exponential (such as a power) as divisor; else "
        "rsqrt, mul, mul",
        constraints=(has_no_zero_divisor, has_no_negative_divisor),
        notes="A division by a square root becomes rsqrt, mul. The inverse of the divisor has one scale for all "
        "values, so quotients by large divisors are inexact if other divisors are close to zero.",
    ),
    Decomposition(
        name="rsub",
        targets=("aten.rsub.Tensor", "aten.rsub.Scalar"),
        rewrite=_rsub,
        facts=Facts(computes_masks=True),
        becomes="sub",
    ),
    Decomposition(name="exp2", targets=("aten.exp2.default",), rewrite=_exp2, becomes="mul, exp"),
    Decomposition(name="expm1", targets=("aten.expm1.default",), rewrite=_expm1, becomes="exp, add"),
    Decomposition(name="log1p", targets=("aten.log1p.default",), rewrite=_log1p, becomes="add, log"),
    Decomposition(name="log2", targets=("aten.log2.default",), rewrite=_log2, becomes="log, mul"),
    Decomposition(name="log10", targets=("aten.log10.default",), rewrite=_log10, becomes="log, mul"),
    Decomposition(
        name="logit",
        targets=("aten.logit.default",),
        rewrite=_logit,
        becomes="clamp, log, sub, log, sub",
        constraints=(has_an_epsilon,),
    ),
)
