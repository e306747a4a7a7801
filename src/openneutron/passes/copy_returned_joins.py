"""What is joined and returned is apart from what is joined and computed with: only the latter needs one scale."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from openneutron.constants import constant_value
from openneutron.fx import op_name
from openneutron.ops import OPERATORS

__all__ = ["copy_returned_joins"]


def copy_returned_joins(module: GraphModule) -> bool:
    """Rule: a concatenation that is returned, directly or moved, and computed with as well, is written once for each.

    The parts of the one that is returned can then keep qparams of their own. Where they turn out to be equal, both are
    one operator again (`ir.rewrites.share_results`). Linear in nodes and uses.
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
        elif ending and spec.name == "cat" and _parts(node) > 1:
            with module.graph.inserting_after(node):
                copy = module.graph.node_copy(node)
            for user in ending:
                user.replace_input_with(node, copy)
            changed = True
    if changed:
        module.recompile()
    return changed


def _parts(node: Node) -> int:
    return sum(constant_value(value) is None for value in node.all_input_nodes)
