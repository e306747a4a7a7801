"""Removes operators whose results are not used (dead code elimination)."""

from __future__ import annotations

import operator

import torch
from torch.fx import GraphModule, Node

from openneutron.core.fx import is_state, is_state_write
from openneutron.model.state import remove_state, store_of
from openneutron.ops.declared import is_op
from openneutron.passes.functionalize import writes_memory

__all__ = ["eliminate_dead_code"]


def eliminate_dead_code(module: GraphModule) -> bool:
    """Removes dead code. Rules, linear in nodes:

    1. Checks of a tensor's shape and dtype are removed: shapes and dtypes are fixed after the export.
    2. An ATen operator without readers is removed, unless it writes memory. Operators that lose their last reader in
       this way are removed too.
    3. The write of a state is removed if the state affects no output of this call or of a later call.
    """
    changed = _remove_dead_state_writes(module)
    for node in reversed(list(module.graph.nodes)):
        if not node.users and (is_op(node, "assertion") or _has_no_side_effect(node)):
            module.graph.erase_node(node)
            changed = True
    if changed:
        module.recompile()
    return changed


def _remove_dead_state_writes(module: GraphModule) -> bool:
    """Rule 3."""
    writes = [node for node in module.graph.nodes if is_state_write(node)]
    writes_of_store = {write.args[0]: write for write in writes}
    seen: set[Node] = set()
    pending = [node for node in module.graph.nodes if node.op == "output" or (node.is_impure() and node not in writes)]
    pending = [node for node in pending if node.op != "placeholder"]
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        pending += node.all_input_nodes
        if is_state(node) and (write := writes_of_store.get(store_of(node))) is not None:
            pending.append(write)
    dead = [write for write in writes if write not in seen]
    for write in dead:
        remove_state(module, write)
    return bool(dead)


def _has_no_side_effect(node: Node) -> bool:
    if node.op == "get_attr" or node.target is operator.getitem:
        return True
    is_aten = isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "aten"
    return is_aten and not writes_memory(node) and bool(node.target._schema.returns)  # type: ignore[union-attr]
