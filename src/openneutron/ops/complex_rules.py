"""The rules that compute operators on complex numbers with operators on their real and imaginary parts.

`complex_rule` returns the rule for an ATen operator, and `passes/complex_to_real.py` applies it. An operator that only
moves values, or is a sum, is applied to both parts.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence

import torch
from torch.fx import Node, map_arg

from openneutron.core.boundary import error_at
from openneutron.core.fx import dtype_of, op_name
from openneutron.ops.complex_numbers import ComplexRewriting, Pair, Rule
from openneutron.ops.declared import facts_of
from openneutron.ops.fourier import FOURIER_RULES
from openneutron.ops.graph_builder import Operand, exp, unsqueeze

__all__ = ["complex_rule"]

aten = torch.ops.aten

Bilinear = Callable[[Operand | None, Operand | None], Operand | None]


def _of_last_dimension(writing: ComplexRewriting) -> Pair:
    """view_as_complex: the last dimension has the real and the imaginary part."""
    value = writing.args["self"]
    return Pair(*(writing.rewriting.call(aten.select.int, value, -1, index) for index in (0, 1)))


def _to_last_dimension(writing: ComplexRewriting) -> Node:
    parts = [unsqueeze(writing.rewriting, part, -1) for part in writing.parts(writing.args["self"])]
    return writing.rewriting.call(aten.cat.default, parts, -1)


def _polar(writing: ComplexRewriting) -> Pair:
    length, angle = writing.args["abs"], writing.args["angle"]
    return _turned(writing, length, angle)


def _exp(writing: ComplexRewriting) -> Pair:
    pair = writing.pair(writing.args["self"])
    length = exp(writing.rewriting, pair.real) if isinstance(pair.real, Node) else math.exp(pair.real)
    return _turned(writing, length, writing.node(pair.imag))


def _turned(writing: ComplexRewriting, length: Operand, angle: Node) -> Pair:
    turns = (writing.rewriting.call(turn, angle) for turn in (aten.cos.default, aten.sin.default))
    return Pair(*(writing.mul(length, turn) or 0.0 for turn in turns))


def _conjugate(writing: ComplexRewriting) -> Pair:
    pair = writing.pair(writing.args["self"])
    return Pair(pair.real, writing.sub(None, pair.imag))


def _length(writing: ComplexRewriting) -> Node:
    pair = writing.pair(writing.args["self"])
    if pair.imag is None:
        return writing.rewriting.call(aten.abs.default, writing.node(pair.real))
    return writing.rewriting.call(aten.sqrt.default, writing.node(_squared_length(writing, pair)))


def _squared_length(writing: ComplexRewriting, pair: Pair) -> Operand | None:
    return writing.add(writing.mul(pair.real, pair.real), writing.mul(pair.imag, pair.imag))


def _angle(writing: ComplexRewriting) -> Node:
    real, imag = writing.parts(writing.args["self"])
    return writing.rewriting.call(aten.atan2.default, imag, real)


def _sum(writing: ComplexRewriting) -> Pair:
    return _combined(writing, writing.add)


def _difference(writing: ComplexRewriting) -> Pair:
    return _combined(writing, writing.sub)


def _combined(writing: ComplexRewriting, combine: Callable[..., Operand | None]) -> Pair:
    first, second = (writing.pair(writing.args[name]) for name in ("self", "other"))
    alpha = float(writing.args["alpha"])
    if alpha != 1:
        second = Pair(writing.mul(second.real, alpha) or 0.0, writing.mul(second.imag, alpha))
    return Pair(combine(first.real, second.real) or 0.0, combine(first.imag, second.imag))


def _product(first: Pair, second: Pair, writing: ComplexRewriting, multiply: Bilinear) -> Pair:
    """(a + bi)(c + di) = (ac - bd) + (ad + bc)i, for any bilinear product."""
    real = writing.sub(multiply(first.real, second.real), multiply(first.imag, second.imag))
    imag = writing.add(multiply(first.real, second.imag), multiply(first.imag, second.real))
    return Pair(real or 0.0, imag)


def _elementwise_product(writing: ComplexRewriting) -> Pair:
    first, second = (writing.pair(writing.args[name]) for name in ("self", "other"))
    return _product(first, second, writing, writing.mul)


def _quotient(writing: ComplexRewriting) -> Pair:
    """a / b = a conj(b) / |b|^2."""
    dividend, divisor = (writing.pair(writing.args[name]) for name in ("self", "other"))
    if divisor.imag is not None:
        conjugate = Pair(divisor.real, writing.sub(None, divisor.imag))
        dividend = _product(dividend, conjugate, writing, writing.mul)
        divisor = Pair(_squared_length(writing, divisor) or 0.0)

    def divided(part: Operand | None) -> Operand | None:
        if part is None:
            return None
        return writing.rewriting.call(aten.div.Tensor, writing.node(part), divisor.real)

    return Pair(divided(dividend.real) or 0.0, divided(dividend.imag))


def _negative(writing: ComplexRewriting) -> Pair:
    pair = writing.pair(writing.args["self"])
    return Pair(writing.sub(None, pair.real) or 0.0, writing.sub(None, pair.imag))


def _matrix_product(*names: str) -> Rule:
    def rule(writing: ComplexRewriting) -> Pair:
        node = writing.rewriting.instance.node

        def multiply(first: Operand | None, second: Operand | None) -> Operand | None:
            if first is None or second is None:
                return None
            return writing.rewriting.call(node.target, first, second)  # type: ignore[arg-type]

        first, second = (writing.pair(writing.args[name]) for name in names)
        return _product(first, second, writing, multiply)

    return rule


def _einsum(writing: ComplexRewriting) -> Pair:
    equation, (first, *others) = writing.args["equation"], map(writing.pair, writing.args["tensors"])
    if not others:
        return _of_parts(writing)
    if len(others) > 1:
        message = "einsum of complex numbers takes two operands. Multiply them two at a time."
        raise error_at(writing.rewriting.instance.node, message)

    def multiply(first: Operand | None, second: Operand | None) -> Operand | None:
        if first is None or second is None:
            return None
        return writing.rewriting.call(aten.einsum.default, equation, [first, second])

    return _product(first, others[0], writing, multiply)


def _of_parts(writing: ComplexRewriting) -> Pair:
    """Applies an operator of real numbers to the real parts, and to the imaginary parts. Indices are not changed."""
    node = writing.rewriting.instance.node
    parts = {value: writing.parts(value) for value in node.all_input_nodes if _is_number(value)}
    options = {name: value for name, value in node.kwargs.items() if not _is_complex_dtype(value)}

    def applied(part: int) -> Node:
        args, kwargs = map_arg((node.args, options), lambda value: parts[value][part] if value in parts else value)
        return writing.rewriting.call(node.target, *args, **kwargs)  # type: ignore[arg-type]

    real = applied(0)
    has_imag = any(writing.pair(value).imag is not None for value in parts)
    if has_imag and writing.args.get("value"):
        raise error_at(node, "Filling complex numbers with a value other than 0 is not supported.")
    return Pair(real, applied(1) if has_imag else None)


def _is_complex_dtype(value: object) -> bool:
    return isinstance(value, torch.dtype) and value.is_complex


def _is_number(value: Node) -> bool:
    """Whether `value` holds numbers to compute with: complex or float ones, or a list of these."""
    dtype = dtype_of(value)
    return dtype is None or dtype.is_complex or dtype.is_floating_point


def _item(writing: ComplexRewriting) -> Pair:
    """Takes one output of an operator with several outputs."""
    parts, index = writing.rewriting.instance.node.args
    pair = writing.pair(parts)
    items = (None if part is None else writing.item(part, index) for part in (pair.real, pair.imag))  # type: ignore[arg-type]
    real, imag = items
    return Pair(real or 0.0, imag)


def _real(writing: ComplexRewriting) -> Node:
    return writing.parts(writing.args["self"])[0]


def _imag(writing: ComplexRewriting) -> Node:
    return writing.parts(writing.args["self"])[1]


def _same(writing: ComplexRewriting) -> Pair:
    return writing.pair(writing.args["self"])


def _complex(writing: ComplexRewriting) -> Pair:
    return Pair(writing.args["real"], writing.args["imag"])


def _conversion(writing: ComplexRewriting) -> Pair | Node:
    """A conversion to a real dtype drops the imaginary part, as torch does."""
    is_complex = writing.rewriting.instance.node.meta["val"].is_complex()
    return _same(writing) if is_complex else _real(writing)


def _rules(rule: Rule, names: str, overloads: Sequence[str] = ("default",)) -> dict[str, Rule]:
    return {f"aten.{name}.{overload}": rule for name in names.split() for overload in overloads}


_TENSORS = ("Tensor", "Scalar", "default")

_RULES: dict[str, Rule] = {
    **_rules(_of_last_dimension, "view_as_complex view_as_complex_copy"),
    **_rules(_to_last_dimension, "view_as_real view_as_real_copy"),
    **_rules(_complex, "complex"),
    **_rules(_polar, "polar"),
    **_rules(_real, "real"),
    **_rules(_imag, "imag"),
    **_rules(_length, "abs"),
    **_rules(_angle, "angle"),
    **_rules(_exp, "exp"),
    **_rules(_conjugate, "conj _conj conj_physical"),
    **_rules(_same, "resolve_conj resolve_neg"),
    **_rules(_conversion, "to _to_copy type_as", ("dtype", "dtype_layout", "device", "other", "default")),
    **_rules(_sum, "add", _TENSORS),
    **_rules(_difference, "sub", _TENSORS),
    **_rules(_elementwise_product, "mul multiply", _TENSORS),
    **_rules(_quotient, "div true_divide", _TENSORS),
    **_rules(_negative, "neg"),
    **_rules(_matrix_product("self", "other"), "matmul"),
    **_rules(_matrix_product("self", "mat2"), "mm bmm"),
    **_rules(_einsum, "einsum"),
    **_rules(_of_parts, "sum", ("default", "dim_IntList")),
    **_rules(_of_parts, "mean", ("default", "dim")),
    **_rules(_of_parts, "index_select gather pad constant_pad_nd zeros_like fft_fftshift fft_ifftshift"),
    **_rules(_of_parts, "index", ("Tensor",)),
    **_rules(_of_parts, "split split_with_sizes chunk unbind tensor_split", ("default", "Tensor", "int", "sections")),
    **FOURIER_RULES,
}


def complex_rule(node: Node) -> Rule | None:
    """Returns the rule for the operator of `node`; None if there is none."""
    if node.target is operator.getitem:
        return _item
    return _RULES.get(op_name(node), None if facts_of(node).movement is None else _of_parts)
