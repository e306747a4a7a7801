"""Rejects clusters whose transposes the legacy generation does not support."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch.export import ExportedProgram
from torch.fx import Node

from openneutron.ir.graph import Graph, Op
from openneutron.partition.clusters import Cluster, Clusters
from openneutron.partition.compile import PartitionGraphs, unsupported_transposes
from openneutron.partition.dim_orders import assign_dim_orders
from openneutron.partition.scheduling import Partition, partitions_of
from openneutron.targets import Generation, NeutronTarget

__all__ = ["reject_unsupported_transposes"]

Blame = Callable[[Partition, Graph, Op], Iterable[Cluster]]


def reject_unsupported_transposes(program: ExportedProgram, found: Clusters, graphs: PartitionGraphs) -> Clusters:
    """Removes clusters from `found` until the legacy generation supports all transposes of all partitions.

    Returns `found` unchanged for other generations. Most transposes cancel, or become conversions of inputs and
    outputs by the runtime, so the transposes of a partition are known only after its IR is optimized. The first round
    rejects the clusters that need the transposed order. If a partition still has unsupported transposes, later rounds
    reject all of its clusters. Linear in operators for each rejected partition.
    """
    if graphs.options.generation is not Generation.LEGACY:
        return found
    target = graphs.options.target_spec.neutron_target
    blame: Blame = _clusters_needing
    while rejected := _find_rejected(program, found, graphs, blame):
        reasons = {cluster.node: _rejection_reason(op, target) for cluster, op in rejected.items()}
        kept = tuple(cluster for cluster in found.clusters if cluster not in rejected)
        found, blame = Clusters(kept, {**found.reasons, **reasons}), _all_clusters
    return found


def _find_rejected(
    program: ExportedProgram, found: Clusters, graphs: PartitionGraphs, blame: Blame
) -> dict[Cluster, Op]:
    """Returns the clusters to reject, each with the first unsupported transpose that `blame` attributes to it."""
    rejected: dict[Cluster, Op] = {}
    partitions, _ = partitions_of(program, found)
    orders = assign_dim_orders(program, partitions)
    for partition in partitions:
        graph = graphs.formatted(partition, orders.is_channels_last).graph
        for op in unsupported_transposes(graph, partition.target):
            for cluster in blame(partition, graph, op):
                rejected.setdefault(cluster, op)
    return rejected


def _clusters_needing(partition: Partition, graph: Graph, op: Op) -> Iterable[Cluster]:
    """Returns the clusters that need the transpose `op`.

    This is the cluster that it was lowered from. If there is none, these are the clusters of the outputs that depend on
    it, or else all clusters of the partition.
    """
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


def _all_clusters(partition: Partition, _: Graph, __: Op) -> Iterable[Cluster]:
    return partition.clusters


def _rejection_reason(op: Op, target: NeutronTarget) -> str:
    return (
        f"{target.name} would have to transpose {op.inputs[0].shape} by {op.attrs['perm']} for it. The legacy "
        "generation only supports a swap of two adjacent blocks of dimensions, the size of one of which is a multiple "
        f"of the MACs per pipeline. {target.granularity_note}"
    )
