"""Finds recurrent groups: nodes of which one depends on another of its group, such as the steps of a loop."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

from torch.fx import Graph, Node

__all__ = ["recurrent_groups"]

Key = TypeVar("Key", bound=Hashable)


def recurrent_groups(graph: Graph, groups: Mapping[Key, Sequence[Node]]) -> set[Key]:
    """Returns the groups in which one node depends on another.

    The set of groups of several nodes on which a node depends is an integer with a bit for each group. One pass over
    the graph takes n * k / 64 steps for n nodes and k such groups. If a group is the layers with one weight, k is the
    number of modules that the model calls several times, usually below 64, so an integer is one machine word and the
    pass is linear.
    """
    several = [key for key, nodes in groups.items() if len(nodes) > 1]
    bits = {node: 1 << index for index, key in enumerate(several) for node in groups[key]}
    ancestors: dict[Node, int] = {}
    recurrent = 0
    for node in graph.nodes if bits else ():
        above, own = 0, bits.get(node, 0)
        for source in node.all_input_nodes:
            above |= ancestors[source]
        recurrent |= above & own
        ancestors[node] = above | own
    return {key for index, key in enumerate(several) if recurrent >> index & 1}
