"""The rules that compute operators on complex numbers with operators on their real and imaginary parts.

`complex_rule` returns the rule for an ATen operator, and `passes/complex_to_real.py` applies it. An operator that only
moves values, or is a sum, is applied to both parts.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node, map_arg

from openneutron.core.boundary import error_at
from openneutron.core.fx import dtype_of, iterate_nodes, op_name, shape_of
from openneutron.ops.complex_functions import FUNCTION_RULES
from openneutron.ops.complex_numbers import ComplexRewriting, Pair, Rule, product, rules, squared_length
from openneutron.ops.declared import facts_of
from openneutron.ops.fourier import COMPLEX_INSIDE, FOURIER_RULES
from openneutron.ops.graph_builder import Operand, convert, reshape, transpose, unsqueeze
from openneutron.ops.short_time import SHORT_TIME_RULES

__all__ = ["complex_rule", "computes_complex"]

aten = torch.ops.aten


def _of_last_dimension(writing: ComplexRewriting) -> Pair:
    """view_as_complex: the last dimension has the real and the imaginary part."""
    value = writing.args["self"]
    return Pair(*(writing.rewriting.call(aten.select.int, value, -1, index) for index in (0, 1)))


def _to_last_dimension(writing: ComplexRewriting) -> Node:
    parts = [unsqueeze(writing.rewriting, part, -1) for part in writing.parts(writing.args["self"])]
    return writing.rewriting.call(aten.cat.default, parts, -1)


def _in_another_dtype(writing: ComplexRewriting) -> Pair | Node:
    """view(dtype): complex numbers as twice as many real ones, or real numbers as half as many complex ones."""
    rewriting, value, shape = writing.rewriting, writing.args["self"], writing.rewriting.shape
    dtypes = {dtype_of(value), dtype_of(rewriting.instance.node)}
    if not dtypes <= {torch.float32, torch.complex64}:
        message = "Complex numbers can be viewed as float32 numbers only. Use torch.view_as_real and convert its dtype."
        raise error_at(rewriting.instance.node, message)
    if not rewriting.instance.node.meta["val"].is_complex():
        return reshape(rewriting, _to_last_dimension(writing), shape)
    if value in writing.pairs:
        return writing.pair(value)
    pairs = reshape(rewriting, value, (*shape, 2))
    return Pair(*(rewriting.call(aten.select.int, pairs, -1, index) for index in (0, 1)))


def _conjugate(writing: ComplexRewriting) -> Pair:
    pair = writing.pair(writing.args["self"])
    return Pair(pair.real, writing.sub(None, pair.imag))


def _length(writing: ComplexRewriting) -> Node:
    pair = writing.whole(writing.args["self"])
    if pair.imag is None:
        return writing.rewriting.call(aten.abs.default, writing.node(pair.real))
    return writing.rewriting.call(aten.sqrt.default, writing.node(squared_length(writing, pair)))


def _angle(writing: ComplexRewriting) -> Node:
    real, imag = writing.parts(writing.args["self"])
    return writing.rewriting.call(aten.atan2.default, imag, real)


def _sum(writing: ComplexRewriting) -> Pair:
    return _combined(writing, writing.add)


def _difference(writing: ComplexRewriting) -> Pair:
    return _combined(writing, writing.sub)


def _combined(writing: ComplexRewriting, combine: Callable[..., Operand | None]) -> Pair:
    first, second = (writing.pair(writing.args[name]) for name in ("self", "other"))
    second = product(second, writing.pair(writing.args["alpha"]), writing, writing.mul)
    return Pair(combine(first.real, second.real) or 0.0, combine(first.imag, second.imag))


def _elementwise_product(writing: ComplexRewriting) -> Pair:
    first, second = (writing.pair(writing.args[name]) for name in ("self", "other"))
    return product(first, second, writing, writing.mul)


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

        first, second = (writing.whole(writing.args[name]) for name in names)
        return product(first, second, writing, multiply)

    return rule


def _layer(writing: ComplexRewriting) -> Pair:
    """A linear or a convolution: a product with the weight, plus the bias."""
    node = writing.rewriting.instance.node
    named = writing.rewriting.args

    def multiply(first: Operand | None, second: Operand | None) -> Operand | None:
        if first is None or second is None:
            return None
        return writing.rewriting.call(node.target, first, second, None, *node.args[3:], **_without_bias(node))  # type: ignore[arg-type]

    found = product(writing.whole(named["input"]), writing.whole(named["weight"]), writing, multiply)
    if named["bias"] is None:
        return found
    bias = writing.whole(named["bias"])
    spatial = 0 if op_name(node) == "aten.linear.default" else len(shape_of(named["weight"])) - 2

    def shaped(part: Operand | None) -> Operand | None:
        return reshape(writing.rewriting, part, (-1, *(1,) * spatial)) if spatial and isinstance(part, Node) else part

    return Pair(writing.add(found.real, shaped(bias.real)) or 0.0, writing.add(found.imag, shaped(bias.imag)))


def _without_bias(node: Node) -> dict[str, Any]:
    return {name: value for name, value in node.kwargs.items() if name not in ("input", "weight", "bias")}


def _adjoint(writing: ComplexRewriting) -> Pair:
    """The conjugate of the transposed matrix."""
    real, imag = (transpose(writing.rewriting, part, -2, -1) for part in writing.parts(writing.args["self"]))
    return Pair(real, writing.sub(None, imag))


def _inner_product(writing: ComplexRewriting) -> Pair:
    """vdot: the sum of conj(self) * other."""
    first, second = (writing.pair(writing.args[name]) for name in ("self", "other"))
    products = product(Pair(first.real, writing.sub(None, first.imag)), second, writing, writing.mul)
    parts = (None if part is None else writing.rewriting.call(aten.sum.default, writing.node(part))
             for part in (products.real, products.imag))  # fmt: skip
    real, imag = parts
    return Pair(real or 0.0, imag)


def _einsum(writing: ComplexRewriting) -> Pair:
    equation, (first, *others) = writing.args["equation"], map(writing.whole, writing.args["tensors"])
    if not others:
        return _of_parts(writing)
    if len(others) > 1:
        message = "einsum of complex numbers takes two operands. Multiply them two at a time."
        raise error_at(writing.rewriting.instance.node, message)

    def multiply(first: Operand | None, second: Operand | None) -> Operand | None:
        if first is None or second is None:
            return None
        return writing.rewriting.call(aten.einsum.default, equation, [first, second])

    return product(first, others[0], writing, multiply)


def _of_parts(writing: ComplexRewriting) -> Pair:
    """Applies an operator of real numbers to the real parts, and to the imaginary parts. Indices are not changed."""
    node = writing.rewriting.instance.node
    operands = [value for name, value in writing.args.items() if name not in _INDICES]
    parts = {value: writing.parts(value) for value in iterate_nodes(operands) if dtype_of(value) is not None}
    factors = [value for name, value in writing.args.items() if name not in _FILLS and isinstance(value, complex)]
    if factors:
        message = f"The factor {factors[0]} of this operator is complex. Multiply the operand by it instead."
        raise error_at(node, message)
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    options = {name: value for name, value in node.kwargs.items() if not _is_complex_dtype(value)}

    def of(part: int, name: str, value: Any) -> Any:
        if name in _FILLS and isinstance(value, (int, float, complex)):
            return (complex(value).real, complex(value).imag)[part]
        return value if name in _INDICES else map_arg(value, lambda read: parts[read][part] if read in parts else read)

    def applied(part: int) -> Node:
        args = [of(part, name, value) for name, value in zip(names, node.args, strict=False)]
        kwargs = {name: of(part, name, value) for name, value in options.items()}
        return writing.rewriting.call(node.target, *args, **kwargs)  # type: ignore[arg-type]

    fills = [value for name, value in writing.args.items() if name in _FILLS and isinstance(value, complex)]
    has_imag = any(writing.pair(value).imag is not None for value in parts) or any(fill.imag for fill in fills)
    return Pair(applied(0), applied(1) if has_imag else None)


_FILLS = ("value", "fill_value")
"""Arguments that are written as values of the output."""

_INDICES = ("index", "indices", "mask", "repeats", "tensor_indices_or_sections")
"""Arguments that select values. All others are values."""


def _ones(writing: ComplexRewriting) -> Pair:
    """Ones have no imaginary part."""
    return Pair(_of_parts(writing).real)


def _where(writing: ComplexRewriting) -> Pair:
    pairs = [writing.pair(writing.args[name]) for name in ("self", "other")]

    def chosen(first: Operand | None, second: Operand | None) -> Node:
        values = (writing.node(first), writing.node(second))
        return writing.rewriting.call(aten.where.self, writing.args["condition"], *values)

    first, second = pairs
    is_real = first.imag is None and second.imag is None
    return Pair(chosen(first.real, second.real), None if is_real else chosen(first.imag, second.imag))


def _is_complex_dtype(value: object) -> bool:
    return isinstance(value, torch.dtype) and value.is_complex


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
    node = writing.rewriting.instance.node
    dtype = node.meta["val"].dtype
    if dtype.is_complex:
        return _same(writing)
    if dtype is torch.bool:
        raise error_at(node, "A conversion of complex numbers to bool is not supported. Compare abs() of them with 0.")
    real = _real(writing)
    return real if dtype_of(real) is dtype else convert(writing.rewriting, real, dtype)


_TENSORS = ("Tensor", "Scalar", "default")

_RULES: dict[str, Rule] = {
    **rules(_of_last_dimension, "view_as_complex view_as_complex_copy"),
    **rules(_to_last_dimension, "view_as_real view_as_real_copy"),
    **rules(_in_another_dtype, "view", ("dtype",)),
    **rules(_complex, "complex"),
    **rules(_real, "real"),
    **rules(_imag, "imag"),
    **rules(_length, "abs"),
    **rules(_angle, "angle"),
    **rules(_conjugate, "conj _conj conj_physical"),
    **rules(_same, "resolve_conj resolve_neg"),
    **rules(_conversion, "to _to_copy type_as", ("dtype", "dtype_layout", "device", "other", "default")),
    **rules(_sum, "add", _TENSORS),
    **rules(_difference, "sub", _TENSORS),
    **rules(_elementwise_product, "mul multiply", _TENSORS),
    **rules(_negative, "neg"),
    **rules(_matrix_product("self", "other"), "matmul"),
    **rules(_matrix_product("self", "mat2"), "mm bmm"),
    **rules(_einsum, "einsum"),
    **rules(_of_parts, "sum", ("default", "dim_IntList")),
    **rules(_of_parts, "mean", ("default", "dim")),
    **rules(_of_parts, "index_select gather pad constant_pad_nd zeros_like fft_fftshift fft_ifftshift"),
    **rules(_of_parts, "index", ("Tensor",)),
    **rules(_of_parts, "slice_scatter select_scatter diagonal cumsum index_put index_add index_copy"),
    **rules(_of_parts, "scatter", ("src", "value")),
    **rules(_of_parts, "masked_fill", ("Scalar", "Tensor")),
    **rules(_of_parts, "full_like empty_like new_zeros new_full new_empty"),
    **rules(_ones, "ones_like new_ones"),
    **rules(_where, "where", ("self", "ScalarSelf", "ScalarOther", "Scalar")),
    **rules(_layer, "linear conv1d conv2d conv3d"),
    **rules(_of_parts, "meshgrid broadcast_tensors", ("default", "indexing")),
    **rules(_inner_product, "vdot"),
    **rules(_adjoint, "adjoint mH matrix_H"),
    **rules(_of_parts, "split split_with_sizes chunk unbind tensor_split", ("default", "Tensor", "int", "sections")),
    **FUNCTION_RULES,
    **FOURIER_RULES,
    **SHORT_TIME_RULES,
}


def computes_complex(node: Node) -> bool:
    """Returns whether the operator computes with complex numbers between real inputs and a real output."""
    return op_name(node) in COMPLEX_INSIDE


def complex_rule(node: Node) -> Rule | None:
    """Returns the rule for the operator of `node`; None if there is none."""
    if node.target is operator.getitem:
        return _item
    return _RULES.get(op_name(node), None if facts_of(node).movement is None else _of_parts)
