"""Functions of complex numbers: quotients, powers, roots, exponentials and logarithms.

Each of them is computed with functions of the real and the imaginary part.
"""

from __future__ import annotations

import math

import torch
from torch.fx import Node

from openneutron.core.boundary import error_at
from openneutron.ops.complex_numbers import ComplexRewriting, Pair, Rule, product, rules, squared_length
from openneutron.ops.graph_builder import Operand, exp, log, mul, relu, sub

__all__ = ["FUNCTION_RULES"]

aten = torch.ops.aten

_MAX_POWER = 8
"""The largest exponent that is written as products."""


def _polar(writing: ComplexRewriting) -> Pair:
    return _turned(writing, writing.args["abs"], writing.args["angle"])


def _exp(writing: ComplexRewriting) -> Pair:
    pair = writing.pair(writing.args["self"])
    length = exp(writing.rewriting, pair.real) if isinstance(pair.real, Node) else math.exp(pair.real)
    return _turned(writing, length, writing.node(pair.imag))


def _turned(writing: ComplexRewriting, length: Operand, angle: Node) -> Pair:
    turns = (writing.rewriting.call(turn, angle) for turn in (aten.cos.default, aten.sin.default))
    return Pair(*(writing.mul(length, turn) or 0.0 for turn in turns))


def _quotient(writing: ComplexRewriting) -> Pair:
    dividend, divisor = (writing.pair(writing.args[name]) for name in ("self", "other"))
    return _divided(writing, dividend, divisor)


def _divided(writing: ComplexRewriting, dividend: Pair, divisor: Pair) -> Pair:
    """a / b = a conj(b) / |b|^2."""
    if divisor.imag is not None:
        conjugate = Pair(divisor.real, writing.sub(None, divisor.imag))
        dividend = product(dividend, conjugate, writing, writing.mul)
        divisor = Pair(squared_length(writing, divisor) or 0.0)

    def quotient(part: Operand | None) -> Operand | None:
        if part is None:
            return None
        return writing.rewriting.call(aten.div.Tensor, writing.node(part), divisor.real)

    return Pair(quotient(dividend.real) or 0.0, quotient(dividend.imag))


def _reciprocal(writing: ComplexRewriting) -> Pair:
    return _divided(writing, Pair(1.0), writing.pair(writing.args["self"]))


def _reversed_difference(writing: ComplexRewriting) -> Pair:
    """other - alpha * self."""
    value, other = (writing.pair(writing.args[name]) for name in ("self", "other"))
    value = product(value, writing.pair(writing.args["alpha"]), writing, writing.mul)
    return Pair(writing.sub(other.real, value.real) or 0.0, writing.sub(other.imag, value.imag))


def _power(writing: ComplexRewriting) -> Pair:
    """A small whole exponent is written as products, 0.5 as a square root."""
    exponent = writing.args["exponent"]
    if isinstance(exponent, complex) and exponent.imag == 0:
        exponent = exponent.real
    if exponent == 0.5:
        return _square_root(writing)
    if exponent == 0:
        return Pair(1.0)
    if exponent not in range(-_MAX_POWER, _MAX_POWER + 1):
        message = f"Only powers -{_MAX_POWER} to {_MAX_POWER} and 0.5 of complex numbers are supported, not {exponent}."
        raise error_at(writing.rewriting.instance.node, f"{message} Write it with abs() and angle().")
    base = writing.pair(writing.args["self"])
    found = base
    for _ in range(abs(int(exponent)) - 1):
        found = product(found, base, writing, writing.mul)
    return found if exponent > 0 else _divided(writing, Pair(1.0), found)


def _square(writing: ComplexRewriting) -> Pair:
    base = writing.pair(writing.args["self"])
    return product(base, base, writing, writing.mul)


def _square_root(writing: ComplexRewriting) -> Pair:
    """sqrt(a + bi) = sqrt((|z| + a) / 2) + i s sqrt((|z| - a) / 2), where s is -1 for negative b, else 1."""
    real, imag = writing.parts(writing.args["self"])
    call = writing.rewriting.call
    length = _length(writing, real, imag)
    # rounding may make |z| less than |a|
    halves = [mul(writing.rewriting, relu(writing.rewriting, part), 0.5)
              for part in (call(aten.add.Tensor, length, real), sub(writing.rewriting, length, real))]  # fmt: skip
    real_root, imag_root = (call(aten.sqrt.default, half) for half in halves)
    negative = call(aten.lt.Scalar, imag, 0)
    return Pair(real_root, call(aten.where.self, negative, call(aten.neg.default, imag_root), imag_root))


def _logarithm(writing: ComplexRewriting) -> Pair:
    """log(z) = log |z| + i angle(z)."""
    real, imag = writing.parts(writing.args["self"])
    squared = squared_length(writing, Pair(real, imag))
    length = mul(writing.rewriting, log(writing.rewriting, writing.node(squared)), 0.5)
    return Pair(length, writing.rewriting.call(aten.atan2.default, imag, real))


def _norm(writing: ComplexRewriting) -> Node:
    """The norm of the absolute values."""
    node = writing.rewriting.instance.node
    length = _length(writing, *writing.parts(writing.args["self"]))
    return writing.rewriting.call(node.target, length, *node.args[1:], **node.kwargs)  # type: ignore[arg-type]


def _length(writing: ComplexRewriting, real: Node, imag: Node) -> Node:
    squared = writing.node(squared_length(writing, Pair(real, imag)))
    return writing.rewriting.call(aten.sqrt.default, squared)


FUNCTION_RULES: dict[str, Rule] = {
    **rules(_polar, "polar"),
    **rules(_exp, "exp"),
    **rules(_quotient, "div true_divide", ("Tensor", "Scalar", "default")),
    **rules(_reciprocal, "reciprocal"),
    **rules(_reversed_difference, "rsub", ("Tensor", "Scalar")),
    **rules(_power, "pow", ("Tensor_Scalar",)),
    **rules(_square, "square"),
    **rules(_square_root, "sqrt"),
    **rules(_logarithm, "log"),
    **rules(_norm, "linalg_vector_norm"),
}
"""Rules by the name of the operator."""
