"""Runs graph modules node by node: records all values, and computes them again after a change of some values."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch.fx import GraphModule, Node

from openneutron.core.evaluation import GraphRun, run_node
from openneutron.core.fx import first_operand, is_state_write
from openneutron.model.state import sample_nodes

__all__ = ["record", "replay"]

Replaced = Mapping[Node, Callable[[Any], Any]]


class _Recording(GraphRun):
    """A run that keeps all values.

    Nodes in `skipped` return their first operand, and nodes in `replaced` return a function of it.
    """

    def __init__(
        self, module: GraphModule, given: Mapping[Node, Any], skipped: Collection[Node], replaced: Replaced
    ) -> None:
        super().__init__(module, given, keeps_values=True)
        self.skipped, self.replaced = skipped, replaced

    def compute(self, node: Node) -> Any:
        if node in self.replaced:
            return self.replaced[node](self.values[first_operand(node)])
        return self.values[first_operand(node)] if node in self.skipped else super().compute(node)


def record(
    module: GraphModule,
    inputs: Sequence[torch.Tensor],
    *,
    known: Mapping[Node, Any] = MappingProxyType({}),
    skipped: Collection[Node] = frozenset(),
    replaced: Replaced = MappingProxyType({}),
) -> dict[Node, Any]:
    """Computes the value of every node for one sample.

    `inputs` are the inputs of the module, followed by the values of its states (see `openneutron.model.state`). Nodes
    in `known` have the given values; nodes in `skipped` return their first operand, and nodes in `replaced` return a
    function of it. Linear in nodes. The result holds all values in memory.
    """
    given = dict(zip(sample_nodes(module.graph), inputs, strict=True))
    recording = _Recording(module, {**known, **given}, skipped, replaced)
    recording.run()
    return recording.values


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
    changed one; a `GraphRun` would visit the nodes before it too, for each layer that an analysis changes.
    """
    values = dict(changed)

    def value_of(node: Node) -> Any:
        return values[node] if node in values else recorded[node]

    nodes = list(order)
    for node in nodes[min(order[node] for node in changed) :]:
        if node in values or is_state_write(node) or not any(source in values for source in node.all_input_nodes):
            continue
        values[node] = value_of(identities[node]) if node in identities else run_node(module, node, value_of)
    return value_of
