"""Folds arithmetic with constants into the weight and bias of the layer before it, or into other such arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from openneutron.core.constants import constant_of, insert_constant
from openneutron.core.fx import arguments, finish_rewrite, note_replaced, op_name, shape_of
from openneutron.ops import OPERATORS
from openneutron.ops.declared import facts_of, is_op, overload_of
from openneutron.ops.facts import LayerKind
from openneutron.ops.graph_builder import replace_with_linear
from openneutron.passes.fold_batch_norm import is_transposed, scale_for_weight

__all__ = ["fold_arithmetic"]


@dataclass(frozen=True)
class _Arithmetic:
    """sign * source + shift, or source * scale."""

    source: Node
    scale: torch.Tensor | None = None
    sign: int = 1
    shift: torch.Tensor | None = None


@dataclass(frozen=True)
class _Layer:
    """A convolution, linear or matrix product with constant weights. `weight` of a matrix product is its transposed
    matrix [outputs, inputs].
    """

    node: Node
    kind: LayerKind
    inputs: Node
    weight: torch.Tensor
    bias: torch.Tensor | None
    channel: int
    """The dimension of the output that holds the channels."""


def fold_arithmetic(module: GraphModule, keeps_float: Callable[[Node], bool] = lambda _: False) -> bool:
    """Folds arithmetic. Linear in nodes and weights. Results differ by float rounding only. For float32 constants:

    1. A sum or product with a constant is folded into the weight and bias of the layer before it. The constant has one
       value, or one per output channel. The layer has no other reader. It is a convolution, a transposed convolution, a
       linear, or an mm, matmul or addmm with a constant matrix, which becomes a linear. The layer gets new constants,
       so other readers of its old weight and bias are not affected.
    2. Two products with constants in a row, or two sums, are merged into one.
    3. x * 1 and x + 0 are removed.

    An operator is not folded if its constant broadcasts the other operand to a larger shape, or if `keeps_float` is
    true for it or for the operator before it. Constants are not merged if their result is larger than both.
    """
    changed = False
    for node in list(module.graph.nodes):
        if keeps_float(node):
            continue
        while node.users and (arithmetic := _match_arithmetic(module, node)):
            if keeps_float(arithmetic.source) or not _fold_node(module, node, arithmetic):
                break
            changed = True
    return finish_rewrite(module, changed=changed)


def _match_arithmetic(module: GraphModule, node: Node) -> _Arithmetic | None:
    if not is_op(node, "add", "sub", "mul"):
        return None
    args = arguments(node)
    left, right = (constant_of(module, args[operand]) for operand in ("self", "other"))
    constant, source = (right, args["self"]) if left is None else (left, args["other"])
    if constant is None or not isinstance(source, Node) or source.op == "get_attr":
        return None
    is_float = constant.dtype == torch.float32 and source.meta["val"].dtype == torch.float32
    if not is_float or shape_of(source) != shape_of(node):
        return None
    if is_op(node, "mul"):
        return _Arithmetic(source, scale=constant)
    factor = -1 if is_op(node, "sub") else 1
    if right is not None:
        return _Arithmetic(source, shift=factor * args["alpha"] * constant)
    return _Arithmetic(source, sign=factor, shift=constant) if args["alpha"] == 1 else None


def _fold_node(module: GraphModule, node: Node, arithmetic: _Arithmetic) -> bool:
    source = arithmetic.source
    if _is_identity(arithmetic):
        node.replace_all_uses_with(source)
        module.graph.erase_node(node)
        return True
    if len(source.users) != 1:
        return False
    layer = _match_layer(module, source)
    if layer is not None:
        return _fold_into_layer(module, node, arithmetic, layer)
    inner = _match_arithmetic(module, source)
    return inner is not None and _merge_arithmetic(module, node, inner, arithmetic)


def _is_identity(arithmetic: _Arithmetic) -> bool:
    if arithmetic.scale is not None:
        return bool((arithmetic.scale == 1).all())
    return arithmetic.sign == 1 and arithmetic.shift is not None and bool((arithmetic.shift == 0).all())


def _match_layer(module: GraphModule, node: Node) -> _Layer | None:
    kind, spec, args = facts_of(node).layer, OPERATORS.get(op_name(node)), arguments(node)
    if kind is None or spec is None or spec.weight is None or args.get("alpha", 1) != 1 or args.get("beta", 1) != 1:
        return None
    inputs, weight, bias = args[spec.inputs[0]], args[spec.weight], args[spec.bias] if spec.bias else None
    matrix, addend = constant_of(module, weight), constant_of(module, bias)
    if matrix is None or matrix.dim() < 2 or (bias is not None and addend is None):
        return None
    if kind.is_convolution:
        return _Layer(node, kind, inputs, matrix, addend, len(shape_of(node)) - matrix.dim() + 1)
    outputs = shape_of(node)[-1]
    if matrix.dim() != 2 or not isinstance(inputs, Node) or inputs.op == "get_attr":
        return None
    matrix = matrix if kind is LayerKind.LINEAR else matrix.transpose(0, 1)
    if addend is not None and addend.numel() != outputs:
        return None
    return _Layer(node, kind, inputs, matrix, None if addend is None else addend.flatten(), len(shape_of(node)) - 1)


def _per_channel_constant(constant: torch.Tensor, layer: _Layer) -> torch.Tensor | None:
    """Returns `constant` as a scalar or as [output channels], or None if it has several values in another dimension."""
    if constant.numel() == 1:
        return constant.reshape(())
    later_dims = len(shape_of(layer.node)) - 1 - layer.channel
    is_per_channel = constant.dim() > later_dims and constant.shape[-1 - later_dims] == constant.numel()
    return constant.flatten() if is_per_channel else None


def _fold_into_layer(module: GraphModule, node: Node, arithmetic: _Arithmetic, layer: _Layer) -> bool:
    """Rule 1."""
    weight, bias, channels = layer.weight, layer.bias, shape_of(layer.node)[layer.channel]
    if arithmetic.scale is not None:
        scale = _per_channel_constant(arithmetic.scale, layer)
        if scale is None:
            return False
        transposed = is_transposed(layer.node)
        weight = weight * (scale if scale.dim() == 0 else scale_for_weight(scale, weight, transposed=transposed))
        bias = None if bias is None else bias * scale
    else:
        assert arithmetic.shift is not None
        shift = _per_channel_constant(arithmetic.shift, layer)
        if shift is None:
            return False
        weight = weight * arithmetic.sign
        bias = (torch.zeros(channels) if bias is None else bias * arithmetic.sign) + shift
    old = layer.node
    constants = [insert_constant(module, old, weight, "weight")]
    constants += [] if bias is None else [insert_constant(module, old, bias, "bias")]
    if layer.kind.is_convolution:
        old.args = (layer.inputs, *constants, *([None] if bias is None else []), *old.args[3:])
        old.kwargs = {name: value for name, value in old.kwargs.items() if name not in ("weight", "bias")}
    else:
        if layer.kind is not LayerKind.LINEAR:
            note_replaced(old, op_name(old))
        replace_with_linear(old, layer.inputs, *constants)
    node.replace_all_uses_with(old)
    module.graph.erase_node(node)
    return True


def _merge_arithmetic(module: GraphModule, node: Node, inner: _Arithmetic, outer: _Arithmetic) -> bool:
    """Rule 2."""
    if inner.scale is not None and outer.scale is not None:
        merged, larger = inner.scale * outer.scale, max(inner.scale.numel(), outer.scale.numel())
    elif inner.shift is not None and outer.shift is not None:
        merged, larger = outer.sign * inner.shift + outer.shift, max(inner.shift.numel(), outer.shift.numel())
    else:
        return False
    if merged.numel() > larger:
        return False
    constant = insert_constant(module, node, merged, "merged")
    if inner.sign * outer.sign < 0:
        node.target, node.args = overload_of("sub"), (constant, inner.source)
    else:
        node.target = overload_of("add" if inner.scale is None else "mul")
        node.args = (inner.source, constant)
    node.kwargs = {}
    return True
