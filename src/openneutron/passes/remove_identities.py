"""Operators that do nothing go."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from openneutron.fx import arguments, op_name
from openneutron.passes.functionalize import writes_memory

__all__ = ["remove_identities"]

_DROPOUTS = {"aten.dropout.default", "aten.feature_dropout.default", "aten.alpha_dropout.default"}
_ALIASES = {"aten.alias.default", "aten.detach.default", "aten.detach_.default", "aten.lift_fresh_copy.default"}
_COPIES = {"aten.clone.default", "aten.contiguous.default"}
_KEEPS_FORMAT = {None, torch.contiguous_format, torch.preserve_format}


def remove_identities(module: GraphModule) -> bool:
    """Rules, linear in nodes:

    1. A dropout in eval mode goes.
    2. alias, detach and lift_fresh_copy go.
    3. clone and contiguous go where they keep the memory format and the graph has no in-place operator left, for
       which a copy would be a real one.
    """
    in_place = any(writes_memory(node) for node in module.graph.nodes)
    changed = False
    for node in list(module.graph.nodes):
        name = op_name(node)
        removable = (
            (name in _DROPOUTS and not arguments(node)["train"])
            or name in _ALIASES
            or (name in _COPIES and not in_place and arguments(node)["memory_format"] in _KEEPS_FORMAT)
        )
        if removable and isinstance(source := node.args[0], Node):
            node.replace_all_uses_with(source)
            module.graph.erase_node(node)
            changed = True
    return changed
