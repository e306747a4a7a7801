"""From clusters to partitions: as few as possible, none of which waits for itself."""

from __future__ import annotations

from dataclasses import dataclass

from torch.export import ExportedProgram
from torch.fx import Node

from openneutron.fx import is_dequantize
from openneutron.partition.clusters import Cluster, Clusters, Constants
from openneutron.targets import NeutronTarget

__all__ = ["Partition", "partitions_of"]

NO_COMPUTE = (
    "Nothing is computed around it: a partition of operators that only move values would cost more than it saves."
)


@dataclass(frozen=True, eq=False)
class Partition:
    """Clusters that become one delegate.

    `inputs` are the int8 values it reads that it neither computes nor holds as constants, in order of first use;
    `outputs` are the quantize nodes that others read.
    """

    clusters: tuple[Cluster, ...]
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]

    @property
    def target(self) -> NeutronTarget:
        """What its operators were chosen for."""
        return self.clusters[0].site.target


def partitions_of(program: ExportedProgram, found: Clusters) -> tuple[tuple[Partition, ...], dict[Node, str]]:
    """The partitions, in an order in which each one's inputs are there, and reasons for clusters that are in none.

    The level of a value is the number of times its computation entered the NPU. All clusters of a level are one
    partition: a path that leaves a partition and comes back would have risen a level, so none waits for itself, and as
    each level needs a partition on the longest path through it, no smaller number would do. Linear in nodes and uses.
    """
    by_node = {operator: cluster for cluster in found.clusters for operator in cluster.operators}
    levels, constants = _levels(program, by_node), Constants(program)
    members: dict[int, list[Cluster]] = {}
    for cluster in found.clusters:
        members.setdefault(levels[cluster.node], []).append(cluster)
    partitions, reasons = [], {}
    for _, clusters in sorted(members.items()):
        if any(cluster.spec.is_compute for cluster in clusters):
            partitions.append(_partition(constants, tuple(clusters)))
        else:
            reasons.update({cluster.node: NO_COMPUTE for cluster in clusters})
    return tuple(partitions), reasons


def _levels(program: ExportedProgram, by_node: dict[Node, Cluster]) -> dict[Node, int]:
    levels: dict[Node, int] = {}
    on_npu: set[Node] = set()
    for node in program.graph.nodes:
        if node in by_node:
            cluster = by_node[node]
            operands = [_source(operand) for operand in cluster.operands]
            entered = [levels[source] + (source not in on_npu) for source in operands]
            levels[node] = max([1, *entered])
            on_npu.update((node, cluster.quantize))
            continue
        levels[node] = max((levels[source] for source in node.all_input_nodes), default=0)
    return levels


def _source(dequantize: Node) -> Node:
    source = dequantize.args[0]
    assert isinstance(source, Node)
    return source


def _partition(constants: Constants, clusters: tuple[Cluster, ...]) -> Partition:
    computed = {cluster.quantize for cluster in clusters}
    inside = {operator for cluster in clusters for operator in cluster.operators}
    sources = (_source(operand) for cluster in clusters for operand in cluster.operands)
    inputs = dict.fromkeys(source for source in sources if source not in computed and source not in constants)
    outputs = [cluster.quantize for cluster in clusters if _is_read_outside(cluster.quantize, inside)]
    return Partition(clusters, tuple(inputs), tuple(outputs))


def _is_read_outside(quantize: Node, inside: set[Node]) -> bool:
    return any(not is_dequantize(reader) or not inside.issuperset(reader.users) for reader in quantize.users)
