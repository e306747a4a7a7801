"""Runs graph modules node by node: records all values, and computes them again after a change of some values."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch.fx import GraphModule, Node, map_arg

from openneutron.core.constants import attribute
from openneutron.core.fx import evaluated, placeholders
from openneutron.model.state import is_state_write, states_of

__all__ = ["record", "replay", "run_node"]


def run_node(module: GraphModule, node: Node, value_of: Callable[[Node], Any]) -> Any:
    """Computes the value of `node` in `module`. `value_of` returns the values of its operands."""
    if is_state_write(node):
        return None  # leave the recorded states unchanged
    if node.op == "get_attr":
        return attribute(module, str(node.target))
    if node.op == "call_function":
        return evaluated(node, value_of)
    args, kwargs = map_arg(node.args, value_of), map_arg(node.kwargs, value_of)
    return args[0] if node.op == "output" else module.get_submodule(str(node.target))(*args, **kwargs)


@torch.no_grad()
def record(
    module: GraphModule,
    inputs: Sequence[torch.Tensor],
    *,
    known: Mapping[Node, Any] = MappingProxyType({}),
    skipped: Collection[Node] = frozenset(),
) -> dict[Node, Any]:
    """Computes the value of every node for one sample.

    `inputs` are the inputs of the module, followed by the values of its states (see `openneutron.model.state`). Nodes
    in `known` have the given values; nodes in `skipped` return their first operand. Linear in nodes. The result holds
    all values in memory.
    """
    values: dict[Node, Any] = dict(zip([*placeholders(module.graph), *states_of(module.graph)], inputs, strict=True))
    for node in module.graph.nodes:
        if node in values:
            continue
        if node in known:
            values[node] = known[node]
        elif node in skipped:
            values[node] = values[node.args[0]]
        else:
            values[node] = run_node(module, node, values.__getitem__)
    return values


@torch.no_grad()
def replay(
    module: GraphModule,
    order: Mapping[Node, int],
    recorded: Mapping[Node, Any],
    changed: Mapping[Node, Any],
    identities: Mapping[Node, Node],
) -> Callable[[Node], Any]:
    """Recomputes the graph with the values `changed`. Returns a function from a node to its new value.

    Computes only the nodes that depend on a changed node; others keep their `recorded` values. `order` has the position
    of each node, `identities` maps a node to another node with the same value. Linear in the nodes after the first
    changed one.
    """
    values = dict(changed)

    def value_of(node: Node) -> Any:
        return values[node] if node in values else recorded[node]

    nodes = list(order)
    for node in nodes[min(order[node] for node in changed) :]:
        if node in values or not any(source in values for source in node.all_input_nodes):
            continue
        values[node] = value_of(identities[node]) if node in identities else run_node(module, node, value_of)
    return value_of
