"""Removes tensors without elements."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from openneutron.core.constants import insert_constant
from openneutron.core.fx import arguments, finish_rewrite, note_replaced, op_name
from openneutron.ops.declared import is_op
from openneutron.ops.graph_builder import replace_with_cat
from openneutron.passes.functionalize import writes_memory

__all__ = ["remove_empties"]


def remove_empties(module: GraphModule) -> bool:
    """Removes empty tensors. Rules, linear in nodes and uses:

    1. An operator that returns a tensor without elements becomes a constant. The readers of an input without elements
       read a constant instead.
    2. Inputs without elements are removed from a concatenation.
    """
    changed = False
    for node in list(module.graph.nodes):
        if _is_empty(node) and node.users and node.op in ("placeholder", "call_function") and not writes_memory(node):
            changed |= _replace_by_constant(module, node)
        elif is_op(node, "cat"):
            changed |= _drop_empty_operands(node)
    return finish_rewrite(module, changed=changed)


def _is_empty(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and any(isinstance(size, int) and size == 0 for size in value.shape)


def _replace_by_constant(module: GraphModule, node: Node) -> bool:
    value = node.meta["val"]
    readers = [user for user in node.users if user.op == "call_function"]
    has_fixed_sizes = all(isinstance(size, int) for size in value.shape)
    if not has_fixed_sizes or (node.op == "placeholder" and not readers):
        return False
    constant = insert_constant(module, node.next, torch.zeros(value.shape, dtype=value.dtype), "empty")
    chosen = set(readers) if node.op == "placeholder" else set(node.users)
    node.replace_all_uses_with(constant, delete_user_cb=chosen.__contains__)
    return True


def _drop_empty_operands(node: Node) -> bool:
    args = arguments(node)
    parts = [part for part in args["tensors"] if not _is_empty(part)]
    if len(parts) == len(args["tensors"]) or not parts:
        return False
    note_replaced(node, op_name(node))
    replace_with_cat(node, parts, args["dim"])
    return True
