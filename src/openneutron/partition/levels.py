"""From clusters to partitions: as few as possible, none of which waits for itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch.export import ExportedProgram
from torch.fx import Node

from openneutron.core.fx import is_dequantize
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
    def name(self) -> str:
        """The name of its first operator, which names it in dumps."""
        return self.clusters[0].node.name

    @property
    def target(self) -> NeutronTarget:
        """What its operators were chosen for."""
        return self.clusters[0].site.target


def partitions_of(program: ExportedProgram, found: Clusters) -> tuple[tuple[Partition, ...], dict[Node, str]]:
    """The partitions, in an order in which each one's inputs are there, and reasons for clusters that are in none.

    CPU and NPU take turns: those of the CPU are odd, those of the NPU even. What computes runs in the first turn of its
    side in which its inputs are there, and all of one even turn is a partition. A path through a partition never leaves
    it and comes back, as it would be later by then, so none waits for itself. Each partition but the first is there
    because on some path a CPU operator stands between what computes in it and in the one before, so no smaller number
    would do. What only moves values is on the side where its latest input is; behind the CPU, it joins the first
    partition that reads it, or the next one, if nothing on the CPU needs it before. So each partition computes
    something. Linear in nodes and uses.
    """
    by_node = {operator: cluster for cluster in found.clusters for operator in cluster.operators}
    turns = _earliest_turns(program, by_node)
    _let_moves_wait(program, by_node, turns)
    constants = Constants(program)
    members: dict[int, list[Cluster]] = {}
    reasons: dict[Node, str] = {}
    for cluster in found.clusters:
        if _is_odd(turns[cluster.node]):
            reasons[cluster.node] = NO_COMPUTE
        else:
            members.setdefault(turns[cluster.node], []).append(cluster)
    return tuple(_partition(constants, tuple(clusters)) for _, clusters in sorted(members.items())), reasons


def _is_odd(turn: float) -> bool:
    return turn % 2 == 1


def _earliest_turns(program: ExportedProgram, by_node: Mapping[Node, Cluster]) -> dict[Node, int]:
    """The turn in which each node's value is there; for what only moves values, on whatever side its inputs are."""
    turns: dict[Node, int] = {}
    for node in program.graph.nodes:
        if node in turns:
            continue
        cluster = by_node.get(node)
        if cluster is None:
            latest = max((turns[source] for source in node.all_input_nodes), default=1)
            turns[node] = latest + (not _is_odd(latest))
            continue
        latest = max((turns[_source(operand)] for operand in cluster.operands), default=1)
        turn = latest + _is_odd(latest) if cluster.spec.is_compute else latest
        turns.update(dict.fromkeys((*cluster.operators, cluster.quantize), turn))
    return turns


def _let_moves_wait(program: ExportedProgram, by_node: Mapping[Node, Cluster], turns: dict[Node, int]) -> None:
    """Hand what moves values behind the CPU to a partition, where whoever reads it can wait for that."""
    computing = {turns[cluster.node] for cluster in by_node.values() if cluster.spec.is_compute}
    due: dict[Node, float] = {}  # the last turn in which a node's value may come, as whoever reads it does

    def due_for(reader: Node) -> float:
        cluster = by_node.get(reader)
        if cluster is not None and not _is_odd(turns[reader]):
            return turns[reader]
        latest = due[reader] if cluster is None else due[cluster.quantize]
        # A value passes through dequantize without the CPU where a partition reads it.
        return latest if is_dequantize(reader) or _is_odd(latest) else latest - 1

    for node in reversed(program.graph.nodes):
        due[node] = min(map(due_for, node.users), default=math.inf)
        cluster = by_node.get(node)
        if cluster is None or node is not cluster.node or not _is_odd(turns[node]):
            continue
        last, following = due[cluster.quantize], turns[node] + 1
        if math.isfinite(last) and not _is_odd(last):
            turns[node] = turns[cluster.quantize] = int(last)
        elif following in computing and following < last:
            turns[node] = turns[cluster.quantize] = following


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
