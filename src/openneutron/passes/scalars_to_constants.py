"""Replaces numbers in arithmetic by constant tensors, which can have qparams."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from openneutron.core.constants import constant_of, insert_constant
from openneutron.core.fx import arguments, finish_rewrite, note_replaced, op_name
from openneutron.ops.declared import is_op, overload_of
from openneutron.passes.functionalize import writes_memory

__all__ = ["scalars_to_constants"]

_ARITHMETIC = ("add", "sub", "mul", "maximum", "minimum")


def scalars_to_constants(module: GraphModule) -> bool:
    """Replaces numbers. Rules for sums, differences, products, minima and maxima of float32, linear in nodes:

    1. A number as operand becomes a float32 constant.
    2. A constant of another dtype (integer, boolean, double) becomes a float32 constant.
    3. alpha is multiplied into a constant second operand.
    """
    changed = False
    for node in list(module.graph.nodes):
        name = next((name for name in _ARITHMETIC if is_op(node, name)), None)
        value = node.meta.get("val")
        if name and not writes_memory(node) and isinstance(value, torch.Tensor) and value.dtype == torch.float32:
            changed |= _replace_scalar(module, node, name)
    return finish_rewrite(module, changed=changed)


def _replace_scalar(module: GraphModule, node: Node, name: str) -> bool:
    args = arguments(node)
    alpha = args.get("alpha", 1)
    operands = [_constant_operand(module, node, args["self"], 1), _constant_operand(module, node, args["other"], alpha)]
    if operands == [args["self"], args["other"]]:
        return False
    takes_alpha = alpha != 1 and operands[1] is args["other"]
    target = overload_of(name)
    if node.target is not target:
        note_replaced(node, op_name(node))
    node.target = target
    node.args, node.kwargs = tuple(operands), {"alpha": alpha} if takes_alpha else {}
    return True


def _constant_operand(module: GraphModule, node: Node, operand: Node | float, alpha: float) -> Node:
    """Returns the constant that replaces `operand`, or `operand` itself if it is computed or is a constant that needs
    no change.
    """
    value = constant_of(module, operand) if isinstance(operand, Node) else torch.tensor(float(operand))
    if value is None:
        assert isinstance(operand, Node)
        return operand
    if isinstance(operand, Node) and value.dtype == torch.float32 and alpha == 1:
        return operand
    return insert_constant(module, node, value.float() * alpha, "number")
