"""The transposes that a partition is left with, and what the legacy generation makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch.export import ExportedProgram
from torch.fx import Node

from openneutron.ir.graph import Graph, Op
from openneutron.partition.clusters import Cluster, Clusters
from openneutron.partition.compile import PartitionGraphs, illegal_transposes
from openneutron.partition.dim_orders import assign_dim_orders
from openneutron.partition.scheduling import Partition, partitions_of
from openneutron.targets import Generation, NeutronTarget

__all__ = ["leave_transposes_to_the_cpu"]

Blame = Callable[[Partition, Graph, Op], Iterable[Cluster]]


def leave_transposes_to_the_cpu(program: ExportedProgram, found: Clusters, graphs: PartitionGraphs) -> Clusters:
    """For the legacy generation, `found` without what would put transposes into a partition that it does not have.

    Most transposes cancel or become the runtime's conversions of inputs and outputs, so this is known only once a
    partition is compiled. The operator that wants its values in that order goes first; where transposes still are
    left, so does the whole partition. Linear in operators for each partition that goes.
    """
    if graphs.options.generation is not Generation.LEGACY:
        return found
    target = graphs.options.target_spec.neutron_target
    blame: Blame = _who_asks
    while rejected := _rejected(program, found, graphs, blame):
        reasons = {cluster.node: _reason(op, target) for cluster, op in rejected.items()}
        kept = tuple(cluster for cluster in found.clusters if cluster not in rejected)
        found, blame = Clusters(kept, {**found.reasons, **reasons}), _everyone
    return found


def _rejected(program: ExportedProgram, found: Clusters, graphs: PartitionGraphs, blame: Blame) -> dict[Cluster, Op]:
    """The clusters to leave to the CPU, each with the first transpose that it is blamed for."""
    rejected: dict[Cluster, Op] = {}
    partitions, _ = partitions_of(program, found)
    orders = assign_dim_orders(program, partitions)
    for partition in partitions:
        graph = graphs.formatted(partition, orders.is_channels_last).graph
        for op in illegal_transposes(graph, partition.target):
            for cluster in blame(partition, graph, op):
                rejected.setdefault(cluster, op)
    return rejected


def _who_asks(partition: Partition, graph: Graph, op: Op) -> Iterable[Cluster]:
    """The operator that wants the values in order: the transpose's origin, or what yields the outputs it ends in."""
    by_name = {cluster.node.name: cluster for cluster in partition.clusters}
    if op.origin in by_name:
        return [by_name[op.origin]]
    reached = {id(op.output)}
    for reader in graph.ops:
        if not reached.isdisjoint(map(id, reader.inputs)):
            reached.add(id(reader.output))
    by_output: dict[Node, Cluster] = {cluster.quantize: cluster for cluster in partition.clusters}
    outputs = zip(partition.outputs, graph.outputs, strict=True)
    return [by_output[node] for node, tensor in outputs if id(tensor) in reached] or partition.clusters


def _everyone(partition: Partition, _: Graph, __: Op) -> Iterable[Cluster]:
    return partition.clusters


def _reason(op: Op, target: NeutronTarget) -> str:
    return (
        f"{target.name} would have to transpose {op.inputs[0].shape} by {op.attrs['perm']} for it. The legacy "
        "generation swaps two runs of dimensions, one of which holds a multiple of the MACs of a pipeline, and nothing "
        f"else. {target.granularity_note}"
    )
