"""Merges nodes that compute the same value (common subexpression elimination)."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch.fx import GraphModule, Node

from openneutron.core.fx import is_state_write
from openneutron.ops.decomposition import SHARED_QPARAMS
from openneutron.passes.functionalize import writes_memory

__all__ = ["call_key", "eliminate_common_subexpressions"]


def eliminate_common_subexpressions(module: GraphModule, keeps_float: Callable[[Node], bool] = lambda _: False) -> bool:
    """Rule, linear in nodes: calls of one ATen operator with equal arguments are merged into the first call.

    Calls are not merged if `keeps_float` is true for one of them only, or if decompositions request different qparams
    for them. Operators that draw random numbers are not merged. A graph with an in-place operator is not changed,
    because the write would reach all merged values.
    """
    if any(writes_memory(node) and not is_state_write(node) for node in module.graph.nodes):
        return False
    first: dict[object, Node] = {}
    changed = False
    for node in list(module.graph.nodes):
        if not _is_pure(node) or is_state_write(node):
            continue
        kept_apart = keeps_float(node), node.meta.get(SHARED_QPARAMS)
        same = first.setdefault((call_key(node), *kept_apart), node)
        if same is not node:
            node.replace_all_uses_with(same)
            module.graph.erase_node(node)
            changed = True
    if changed:
        module.recompile()
    return changed


def call_key(node: Node) -> object:
    """Returns a key that is equal for two calls of one operator with equal arguments only."""
    return node.target, _argument_key(node.args), _argument_key(node.kwargs)


def _is_pure(node: Node) -> bool:
    if node.target is operator.getitem:
        return True
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "aten":
        return False
    return torch.Tag.nondeterministic_seeded not in node.target.tags and bool(node.target._schema.returns)


def _argument_key(argument: object) -> object:
    """Returns a key that is equal for equal arguments only. 1, 1.0 and True have different keys."""
    if isinstance(argument, (list, tuple)):
        return tuple(map(_argument_key, argument))
    if isinstance(argument, dict):
        return tuple((name, _argument_key(value)) for name, value in sorted(argument.items()))
    return type(argument), argument
