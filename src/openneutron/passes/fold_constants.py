"""What does not depend on the input is computed once."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from openneutron.fx import iterate_nodes
from openneutron.passes.constants import constant_of, insert_constant

__all__ = ["fold_constants"]


def fold_constants(module: GraphModule) -> bool:
    """Rule: an operator that reads only parameters, buffers and constants becomes a constant. Linear in nodes.

    Operators that write memory or draw random numbers stay.
    """
    values: dict[Node, torch.Tensor] = {}
    changed = False
    for node in list(module.graph.nodes):
        if (value := constant_of(module, node)) is not None:
            values[node] = value
        elif _is_foldable(node, values):
            with torch.no_grad():
                result = node.target(*torch.fx.map_arg(node.args, values.__getitem__), **node.kwargs)
            if isinstance(result, torch.Tensor):
                constant = insert_constant(module, node, result, "folded")
                values[constant] = result
                node.replace_all_uses_with(constant)
                module.graph.erase_node(node)
                changed = True
    return changed


def _is_foldable(node: Node, values: dict[Node, torch.Tensor]) -> bool:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    writes = node.target._schema.is_mutable and node.target is not torch.ops.aten.detach_.default
    if writes or torch.Tag.nondeterministic_seeded in node.target.tags:
        return False
    inputs = list(iterate_nodes(node.args))
    return bool(inputs) and not node.kwargs and all(node_input in values for node_input in inputs)
