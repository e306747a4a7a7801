"""Operators that do nothing go."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from openneutron.fx import arguments, op_name
from openneutron.passes.functionalize import writes_memory

__all__ = ["DROPOUTS", "remove_identities"]

DROPOUTS = frozenset(
    f"aten.{name}.default" for name in ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
)
_ALIASES = {"aten.alias.default", "aten.lift_fresh_copy.default"}
_DETACHES = {"aten.detach.default", "aten.detach_.default"}
_COPIES = {"aten.clone.default", "aten.contiguous.default"}
_KEEPS_FORMAT = {None, torch.contiguous_format, torch.preserve_format}


def remove_identities(module: GraphModule, *, training: bool = False) -> bool:
    """Rules, linear in nodes:

    1. A dropout in eval mode goes.
    2. alias, detach and lift_fresh_copy go; with `training`, detach stays, for it stops gradients.
    3. clone and contiguous go where they keep the memory format and the graph has no in-place operator left, for
       which a copy would be a real one.
    """
    in_place = any(writes_memory(node) for node in module.graph.nodes)
    changed = False
    for node in list(module.graph.nodes):
        name = op_name(node)
        removable = (
            (name in DROPOUTS and not arguments(node)["train"])
            or name in (_ALIASES if training else _ALIASES | _DETACHES)
            or (name in _COPIES and not in_place and arguments(node)["memory_format"] in _KEEPS_FORMAT)
        )
        if removable and isinstance(source := node.args[0], Node):
            node.replace_all_uses_with(source)
            module.graph.erase_node(node)
            changed = True
    return changed
