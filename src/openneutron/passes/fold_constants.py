"""What does not depend on the input is computed once."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node, map_arg

from openneutron.constants import attribute, constant_of, insert_constant
from openneutron.fx import is_pure, op_name

__all__ = ["fold_constants"]


def fold_constants(module: GraphModule, *, training: bool = False) -> bool:
    """Rules, linear in nodes and uses:

    1. An operator that reads only parameters, buffers and constants, or nothing at all, becomes a constant.
    2. Of an operator with several outputs, each one that is read becomes a constant.

    Operators that write memory or draw random numbers stay, and with `training` those that read parameters or the
    statistics of a batch norm.
    """
    values: dict[Node, Any] = {}
    changed = False
    for node in list(module.graph.nodes):
        if (value := constant_of(module, node)) is not None:
            if not (training and _is_trained(module, node)):
                values[node] = value
        elif _is_foldable(node, values):
            with torch.no_grad():
                result = node.target(
                    *map_arg(node.args, values.__getitem__), **map_arg(node.kwargs, values.__getitem__)
                )
            values[node] = result
            if isinstance(result, torch.Tensor):
                constant = insert_constant(module, node, result, "folded")
                values[constant] = result
                node.replace_all_uses_with(constant)
                module.graph.erase_node(node)
                changed = True
    if changed:
        module.graph.eliminate_dead_code()
        module.recompile()
    return changed


def _is_trained(module: GraphModule, constant: Node) -> bool:
    """Whether training changes a constant."""
    is_statistic = any(op_name(user) == "aten.batch_norm.default" for user in constant.users)
    return is_statistic or bool(attribute(module, str(constant.target)).requires_grad)


def _is_foldable(node: Node, values: dict[Node, Any]) -> bool:
    if node.op != "call_function" or not all(source in values for source in node.all_input_nodes):
        return False
    return node.target is operator.getitem or is_pure(node)
