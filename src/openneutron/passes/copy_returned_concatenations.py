"""Duplicates each concatenation that is both an output of the model and an operand of a computation.

The computation needs one scale for all inputs of the concatenation. The output of the model does not.
"""

from __future__ import annotations

from torch.fx import GraphModule, Node

from openneutron.core.constants import constant_value
from openneutron.core.fx import op_name
from openneutron.ops import OPERATORS

__all__ = ["copy_returned_concatenations"]


def copy_returned_concatenations(module: GraphModule) -> bool:
    """Rule: a concatenation is duplicated if the model returns it, directly or after operators that only move values,
    and other operators compute with it.

    The copy that the model returns can then have inputs with different qparams. If calibration finds equal qparams,
    `ir.rewrites.eliminate_common_subexpressions` merges both copies again. Linear in nodes and uses.
    """
    ends: set[Node] = set()
    changed = False
    for node in reversed(module.graph.nodes):
        spec = OPERATORS.get(op_name(node))
        if node.op == "output":
            ends.add(node)
        if spec is None or not spec.moves_values or not node.users:
            continue
        ending = [user for user in node.users if user in ends]
        if len(ending) == len(node.users):
            ends.add(node)
        elif ending and spec.name == "cat" and _operand_count(node) > 1:
            with module.graph.inserting_after(node):
                copy = module.graph.node_copy(node)
            for user in ending:
                user.replace_input_with(node, copy)
            changed = True
    if changed:
        module.recompile()
    return changed


def _operand_count(node: Node) -> int:
    return sum(constant_value(value) is None for value in node.all_input_nodes)
