"""Writes operators of torch that have several names under one name."""

from __future__ import annotations

from torch.fx import GraphModule

from openneutron.core.fx import finish_rewrite, note_replaced, op_name
from openneutron.ops.aliases import canonical_call

__all__ = ["write_canonical_operators"]


def write_canonical_operators(module: GraphModule) -> bool:
    """Rule, linear in nodes: a call of an alias of `ops.aliases` (greater) becomes a call of its operator (gt)."""
    changed = False
    for node in module.graph.nodes:
        call = canonical_call(node)
        if call is not None:
            note_replaced(node, op_name(node))
            node.target, node.args, node.kwargs = call
            changed = True
    return finish_rewrite(module, changed=changed)
