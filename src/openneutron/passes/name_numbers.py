"""Numbers in arithmetic become constants, which have qparams as any other operand."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from openneutron.core.constants import constant_of, insert_constant
from openneutron.core.fx import arguments, note_replaced, op_name

__all__ = ["name_numbers"]

aten = torch.ops.aten
_WITH_TENSORS = {
    "aten.add.Tensor": aten.add.Tensor,
    "aten.add.Scalar": aten.add.Tensor,
    "aten.sub.Tensor": aten.sub.Tensor,
    "aten.sub.Scalar": aten.sub.Tensor,
    "aten.mul.Tensor": aten.mul.Tensor,
    "aten.mul.Scalar": aten.mul.Tensor,
    "aten.maximum.default": aten.maximum.default,
    "aten.minimum.default": aten.minimum.default,
    "aten.max.other": aten.maximum.default,
    "aten.min.other": aten.minimum.default,
}


def name_numbers(module: GraphModule) -> bool:
    """Rules for sums, differences, products and extremes of float32, linear in nodes:

    1. A number as operand becomes a float32 constant.
    2. So does a constant of another dtype: integers, truth values, double.
    3. alpha goes into a constant second operand.
    """
    changed = False
    for node in list(module.graph.nodes):
        value = node.meta.get("val")
        if op_name(node) in _WITH_TENSORS and isinstance(value, torch.Tensor) and value.dtype == torch.float32:
            changed |= _rewrite(module, node)
    if changed:
        module.graph.eliminate_dead_code()
        module.recompile()
    return changed


def _rewrite(module: GraphModule, node: Node) -> bool:
    args = arguments(node)
    alpha = args.get("alpha", 1)
    operands = [_constant(module, node, args["self"], 1), _constant(module, node, args["other"], alpha)]
    if operands == [args["self"], args["other"]]:
        return False
    takes_alpha = alpha != 1 and operands[1] is args["other"]
    if node.target is not _WITH_TENSORS[op_name(node)]:
        note_replaced(node, op_name(node))
    node.target = _WITH_TENSORS[op_name(node)]
    node.args, node.kwargs = tuple(operands), {"alpha": alpha} if takes_alpha else {}
    return True


def _constant(module: GraphModule, node: Node, operand: Node | float, alpha: float) -> Node:
    """The constant that an operand becomes; a computed operand, or one that stays, is itself."""
    value = constant_of(module, operand) if isinstance(operand, Node) else torch.tensor(float(operand))
    if value is None:
        assert isinstance(operand, Node)
        return operand
    if isinstance(operand, Node) and value.dtype == torch.float32 and alpha == 1:
        return operand
    return insert_constant(module, node, value.float() * alpha, "number")
