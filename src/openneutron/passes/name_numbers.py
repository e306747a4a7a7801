"""Numbers in arithmetic become constants, which have qparams as any other operand."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from openneutron.constants import constant_of, insert_constant
from openneutron.fx import arguments, note_replaced, op_name

__all__ = ["name_numbers"]

aten = torch.ops.aten
_SUMS = {
    "aten.add.Tensor": aten.add.Tensor,
    "aten.add.Scalar": aten.add.Tensor,
    "aten.sub.Tensor": aten.sub.Tensor,
    "aten.sub.Scalar": aten.sub.Tensor,
}
_PRODUCTS = {"aten.mul.Tensor", "aten.mul.Scalar"}
_QUOTIENTS = {"aten.div.Tensor", "aten.div.Scalar"}


def name_numbers(module: GraphModule) -> bool:
    """Rules for float32 values, linear in nodes:

    1. x + n, x - n and x * n with a number n take a constant instead; alpha goes into it.
    2. x / c with a number or a constant c becomes x * (1 / c).
    3. n - x (rsub) with a number n and alpha 1 becomes a subtraction from a constant.
    """
    changed = False
    for node in list(module.graph.nodes):
        value = node.meta.get("val")
        if node.op == "call_function" and isinstance(value, torch.Tensor) and value.dtype == torch.float32:
            changed |= _rewrite(module, node)
    if changed:
        module.graph.eliminate_dead_code()
        module.recompile()
    return changed


def _rewrite(module: GraphModule, node: Node) -> bool:
    name = op_name(node)
    if name not in _SUMS and name not in _PRODUCTS | _QUOTIENTS | {"aten.rsub.Scalar"}:
        return False
    args = arguments(node)
    source, other = args["self"], args["other"]
    if not _is_float(source):
        return False
    number = None if isinstance(other, Node) else torch.tensor(float(other))
    if name in _QUOTIENTS:
        divisor = constant_of(module, other) if number is None else number
        if divisor is None or not bool((divisor != 0).all()) or divisor.dtype != torch.float32:
            return False
        _replace(module, node, aten.mul.Tensor, source, 1 / divisor)
        return True
    if number is None:
        return False
    if name in _PRODUCTS:
        _replace(module, node, aten.mul.Tensor, source, number)
    elif name in _SUMS:
        _replace(module, node, _SUMS[name], source, number * float(args["alpha"]))
    elif args["alpha"] == 1:
        constant = insert_constant(module, node, number, "number")
        note_replaced(node, name)
        node.target, node.args, node.kwargs = aten.sub.Tensor, (constant, source), {}
    else:
        return False
    return True


def _replace(
    module: GraphModule, node: Node, target: torch._ops.OpOverload, source: Node, constant: torch.Tensor
) -> None:
    operand = insert_constant(module, node, constant, "number")
    if node.target is not target:
        note_replaced(node, op_name(node))
    node.target, node.args, node.kwargs = target, (source, operand), {}


def _is_float(value: object) -> bool:
    return isinstance(value, Node) and value.meta["val"].dtype == torch.float32
