"""What is computed twice is computed once."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from openneutron.passes.functionalize import writes_memory

__all__ = ["share_operators"]


def share_operators(module: GraphModule) -> bool:
    """Rule: of operators that compute the same of the same, the first one stays. Linear in nodes and arguments.

    Those that draw random numbers stay, and all where one writes memory.
    """
    if any(writes_memory(node) for node in module.graph.nodes):
        return False
    first: dict[Hashable, Node] = {}
    changed = False
    for node in list(module.graph.nodes):
        key = _key(node)
        kept = node if key is None else first.setdefault(key, node)
        if kept is not node:
            node.replace_all_uses_with(kept)
            module.graph.erase_node(node)
            changed = True
    if changed:
        module.recompile()
    return changed


def _key(node: Node) -> Hashable | None:
    """Equal for nodes that compute the same; None for a node that may not be shared."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    if torch.Tag.nondeterministic_seeded in node.target.tags:
        return None
    return node.target, _frozen(node.args), _frozen(node.kwargs)


def _frozen(value: Any) -> Hashable:
    """A hashable copy of an argument; 1, 1.0 and True differ."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_frozen, value))
    if isinstance(value, dict):
        return tuple((name, _frozen(item)) for name, item in sorted(value.items()))
    return type(value), value
