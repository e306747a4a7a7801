"""Operators that do nothing go."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from openneutron.fx import arguments, op_name, shape_of
from openneutron.passes.functionalize import writes_memory

__all__ = ["remove_identities"]

_DROPOUTS = {"aten.dropout.default", "aten.feature_dropout.default", "aten.alpha_dropout.default"}
_ALIASES = {"aten.alias.default", "aten.detach.default", "aten.detach_.default", "aten.lift_fresh_copy.default"}
_COPIES = {"aten.clone.default", "aten.contiguous.default"}
_EXPANSIONS = {"aten.expand.default", "aten.expand_as.default"}
_BROADCASTING = {
    f"aten.{name}"
    for name in ("add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor", "maximum.default", "minimum.default")
}
_KEEPS_FORMAT = {None, torch.contiguous_format, torch.preserve_format}


def remove_identities(module: GraphModule) -> bool:
    """Rules, linear in nodes:

    1. A dropout in eval mode goes.
    2. alias, detach and lift_fresh_copy go.
    3. clone and contiguous go where they keep the memory format and the graph has no in-place operator left, for
       which a copy would be a real one.
    4. expand and expand_as go where arithmetic reads them that broadcasts by itself.
    """
    in_place = any(writes_memory(node) for node in module.graph.nodes)
    changed = False
    for node in list(module.graph.nodes):
        name = op_name(node)
        if name in _EXPANSIONS:
            changed |= _read_unexpanded(node)
            continue
        removable = (
            (name in _DROPOUTS and not arguments(node)["train"])
            or name in _ALIASES
            or (name in _COPIES and not in_place and arguments(node)["memory_format"] in _KEEPS_FORMAT)
        )
        if removable and isinstance(source := node.args[0], Node):
            node.replace_all_uses_with(source)
            module.graph.erase_node(node)
            changed = True
    if changed:
        module.graph.eliminate_dead_code()
    return changed


def _read_unexpanded(expansion: Node) -> bool:
    """Rule 4."""
    source = expansion.args[0]
    assert isinstance(source, Node)
    changed = False
    for user in list(expansion.users):
        if op_name(user) not in _BROADCASTING:
            continue
        others = [shape_of(value) for value in user.all_input_nodes if value is not expansion]
        if torch.broadcast_shapes(shape_of(source), *others) == shape_of(user):
            user.replace_input_with(expansion, source)
            changed = True
    return changed
