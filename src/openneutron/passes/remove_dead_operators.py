"""What nobody reads is not computed."""

from __future__ import annotations

import operator

import torch
from torch.fx import GraphModule, Node

from openneutron.fx import op_name
from openneutron.passes.functionalize import writes_memory

__all__ = ["remove_dead_operators"]


def remove_dead_operators(module: GraphModule) -> bool:
    """Rules, linear in nodes:

    1. A check of a tensor's shape and dtype goes: torch.export made it for tensors that are known by now.
    2. An ATen operator that writes no memory and that nobody reads goes, and so does what only such ones read.
    """
    changed = False
    for node in reversed(list(module.graph.nodes)):
        if not node.users and (op_name(node) == "aten._assert_tensor_metadata.default" or _only_computes(node)):
            module.graph.erase_node(node)
            changed = True
    if changed:
        module.recompile()
    return changed


def _only_computes(node: Node) -> bool:
    if node.op == "get_attr" or node.target is operator.getitem:
        return True
    is_aten = isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "aten"
    return is_aten and not writes_memory(node) and bool(node.target._schema.returns)  # type: ignore[union-attr]
