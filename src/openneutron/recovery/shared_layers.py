"""Finds the layers of a converted module that read one weight, and plans where their inputs are measured.

The steps of an unrolled recurrent network, the branches of a siamese network and tied layers share their weights. The
codes of a shared weight are chosen for the inputs of all of its layers. They are needed by the first of these layers,
whose outputs are inputs of the later ones. The layerwise run therefore looks ahead: from the first layer, it runs to
the last one with the unchanged weight, and then continues from the first one with the new codes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch.fx import Graph, GraphModule, Node

from openneutron.core.fx import arguments, first_operand
from openneutron.core.recurrence import recurrent_groups
from openneutron.ops.declared import layer_kind
from openneutron.recovery.weighted_layers import WeightedLayer, layers_of

__all__ = ["SharedLayer", "is_recurrent", "layers_by_weight", "look_aheads"]

# Limit of the nodes that all look-aheads run, as a multiple of the nodes of the graph.
LOOK_AHEADS = 4
# Limit in bytes of the second moments that one look-ahead measures. A single layer may exceed it.
MEMORY = 1 << 30


@dataclass(frozen=True)
class SharedLayer:
    """The `uses` of one weight: the layers that read it, in order of execution.

    `is_adjustable` is True if only these layers read the weight, with equal kinds, groups and qparams. `is_recurrent`
    is True if the input of one of them depends on the output of another.
    """

    uses: tuple[WeightedLayer, ...]
    is_adjustable: bool
    is_recurrent: bool

    @property
    def first(self) -> WeightedLayer:
        """The layer that runs first."""
        return self.uses[0]

    @property
    def moment_bytes(self) -> int:
        """The size of the second moments of the inputs in bytes, in double.

        These are two matrices per group, for the samples that fit the weights and for those that are held out.
        """
        return 32 * self.first.groups * self.first.codes[0].numel() ** 2


def layers_by_weight(module: GraphModule) -> tuple[list[WeightedLayer], list[SharedLayer]]:
    """Returns the layers whose constants no other operator reads, and those that share a weight.

    Both are in order of execution. Excludes layers whose bias a layer with another weight also reads. Linear in nodes.
    """
    readers = _readers_of_constants(module)
    uses: dict[str, list[WeightedLayer]] = {}
    for layer in layers_of(module):
        uses.setdefault(_constant_name(layer.weight), []).append(layer)
    nodes_of_weights = {weight: [layer.node for layer in layers] for weight, layers in uses.items()}
    recurrent = recurrent_groups(module.graph, nodes_of_weights)
    alone, shared = [], []
    for weight, layers in uses.items():
        nodes = {layer.node for layer in layers}
        biases = {_constant_name(layer.bias) for layer in layers if layer.bias is not None}
        if not all(readers[bias] <= nodes for bias in biases):
            continue
        is_only_reader = readers[weight] <= nodes
        if is_only_reader and len(layers) == 1:
            alone.append(layers[0])
        else:
            is_adjustable = is_only_reader and len(set(map(_layer_form, layers))) == 1
            shared.append(SharedLayer(tuple(layers), is_adjustable, weight in recurrent))
    return alone, shared


def _readers_of_constants(module: GraphModule) -> dict[str, set[Node]]:
    """Returns the operators that read each constant, by its name, directly or dequantized."""
    found: dict[str, set[Node]] = {}
    for source in module.graph.nodes:
        if source.op == "get_attr":
            readers = found.setdefault(str(source.target), set())
            for user in source.users:
                dequantizes = layer_kind(user) is None and bool(user.args) and user.args[0] is source
                readers.update(user.users if dequantizes else [user])
    return found


def is_recurrent(graph: Graph) -> bool:
    """Returns whether layers of a float graph read one weight, and one of them depends on another. Linear in nodes."""
    uses: dict[str, list[Node]] = {}
    for node in graph.nodes:
        weight = arguments(node)["weight"] if layer_kind(node) is not None else None
        if isinstance(weight, Node) and weight.op == "get_attr":
            uses.setdefault(str(weight.target), []).append(node)
    return bool(recurrent_groups(graph, uses))


def _constant_name(dequantize: Node) -> str:
    return str(first_operand(dequantize).target)


def _layer_form(layer: WeightedLayer) -> object:
    """Returns the kind and groups of the layer, and the dequantization of its weight."""
    return layer_kind(layer.node), layer.groups, tuple(layer.weight.args[1:]), layer.weight.target


def look_aheads(shared: Sequence[SharedLayer], order: Mapping[Node, int]) -> dict[Node, list[SharedLayer]]:
    """Maps the first node of each look-ahead to the layers that the look-ahead measures.

    `order` has the position of each node.
    """
    spans = [(order[layer.first.node], order[layer.uses[-1].node]) for layer in shared]
    batches = plan_look_aheads(spans, [layer.moment_bytes for layer in shared])
    return {shared[batch[0]].first.node: [shared[index] for index in batch] for batch in batches}


def plan_look_aheads(spans: Sequence[tuple[int, int]], sizes: Sequence[int]) -> list[list[int]]:
    """Plans look-aheads: returns batches of indices of `spans`, which are sorted by their first nodes.

    A look-ahead runs from the first to the last node of its batch, and measures moments of `sizes` bytes. Small batches
    are more accurate, because each batch is measured after the weights of earlier batches were rounded. Batches of
    overlapping spans are doubled until the look-aheads together run at most `LOOK_AHEADS` times the nodes of the spans.
    A batch that would exceed `MEMORY` is split, even if the look-aheads then run more nodes. n log n in spans.
    """
    batches: list[list[int]] = []
    for overlapping in _group_overlapping(spans):
        most, length = 1, _covered_nodes(spans, overlapping)
        found = list(_split_into_batches(overlapping, sizes, most))
        while most < len(overlapping) and sum(_covered_nodes(spans, batch) for batch in found) > LOOK_AHEADS * length:
            most *= 2
            found = list(_split_into_batches(overlapping, sizes, most))
        batches += found
    return batches


def _covered_nodes(spans: Sequence[tuple[int, int]], indices: Sequence[int]) -> int:
    return 1 + max(spans[index][1] for index in indices) - spans[indices[0]][0]


def _group_overlapping(spans: Sequence[tuple[int, int]]) -> Iterator[list[int]]:
    """Groups the indices of sorted spans: spans that overlap are in one group."""
    found: list[int] = []
    end = -1
    for index, (first, last) in enumerate(spans):
        if found and first > end:
            yield found
            found = []
        found.append(index)
        end = max(end, last)
    if found:
        yield found


def _split_into_batches(indices: Sequence[int], sizes: Sequence[int], most: int) -> Iterator[list[int]]:
    """Splits `indices` into batches of at most `most`, whose sizes do not exceed `MEMORY` in total."""
    batch: list[int] = []
    size = 0
    for index in indices:
        if batch and (len(batch) == most or size + sizes[index] > MEMORY):
            yield batch
            batch, size = [], 0
        batch.append(index)
        size += sizes[index]
    if batch:
        yield batch
