"""Running graph modules node by node: once with every value kept, then again from where a value was changed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch.fx import GraphModule, Node, map_arg

from openneutron.core.constants import attribute
from openneutron.core.fx import placeholders
from openneutron.model.state import is_state_write, states_of

__all__ = ["evaluate", "record", "replay"]


def evaluate(module: GraphModule, node: Node, value_of: Callable[[Node], Any]) -> Any:
    """What `node` of `module` yields where the nodes that it reads yield `value_of`."""
    if is_state_write(node):
        return None  # the recorded states are not changed
    if node.op == "get_attr":
        return attribute(module, str(node.target))
    args, kwargs = map_arg(node.args, value_of), map_arg(node.kwargs, value_of)
    if node.op == "call_module":
        return module.get_submodule(str(node.target))(*args, **kwargs)
    if node.op == "output":
        return args[0]
    assert callable(node.target)
    return node.target(*args, **kwargs)


@torch.no_grad()
def record(
    module: GraphModule,
    inputs: Sequence[torch.Tensor],
    *,
    known: Mapping[Node, Any] = MappingProxyType({}),
    skipped: Collection[Node] = frozenset(),
) -> dict[Node, Any]:
    """The value of every node for one sample, given those that are `known`; `skipped` ones yield what they read.

    `inputs` are those of the module, then the values of its states (see `openneutron.model.state`).
    Linear in nodes; all values are in memory until the result is let go.
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
            values[node] = evaluate(module, node, values.__getitem__)
    return values


@torch.no_grad()
def replay(
    module: GraphModule,
    order: Mapping[Node, int],
    recorded: Mapping[Node, Any],
    changed: Mapping[Node, Any],
    identities: Mapping[Node, Node],
) -> Callable[[Node], Any]:
    """What each node yields where some yield what `changed` says, and not what they yielded when recorded.

    Only what depends on a changed node is computed again. `order` has the position of each node, `identities` nodes
    that yield what another one does. Linear in the nodes behind the first changed one.
    """
    values = dict(changed)

    def value_of(node: Node) -> Any:
        return values[node] if node in values else recorded[node]

    nodes = list(order)
    for node in nodes[min(order[node] for node in changed) :]:
        if node in values or not any(source in values for source in node.all_input_nodes):
            continue
        values[node] = value_of(identities[node]) if node in identities else evaluate(module, node, value_of)
    return value_of
