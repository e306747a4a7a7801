"""From clusters to partitions: as few as possible, none of which waits for itself."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

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
        return self.clusters[0].instance.target


class Side(enum.IntEnum):
    """What computes in a turn; in each level, the CPU comes first."""

    CPU = 0
    NPU = 1


class Turn(NamedTuple):
    """One turn of the CPU or the NPU. Turns compare in the order in which they run."""

    level: int
    side: Side

    def on(self, side: Side) -> Turn:
        """This turn if it is of `side`, else the next one that is."""
        return Turn(self.level + (side < self.side), side)


_FIRST = Turn(0, Side.CPU)


def partitions_of(program: ExportedProgram, found: Clusters) -> tuple[tuple[Partition, ...], dict[Node, str]]:
    """The partitions, in an order in which each one's inputs are there, and reasons for clusters that are in none.

    CPU and NPU take turns. An operator that computes runs in the first turn of its side in which its inputs are there,
    and all clusters of one turn of the NPU are a partition. A path that leaves a partition is in a later turn, so it
    never comes back, and no partition waits for itself. Each partition but the first exists because on some path a CPU
    operator stands between what computes in it and in the one before; no smaller number is possible. An operator that
    only moves values runs on the side where its latest input is. After the CPU, it joins the first partition that reads
    it, or the next one, if nothing on the CPU needs it before. So each partition computes something. Linear in nodes
    and uses.
    """
    by_node = {operator: cluster for cluster in found.clusters for operator in cluster.operators}
    turns = _earliest_turns(program, by_node)
    _let_moves_wait(program, by_node, turns)
    constants = Constants(program)
    members: dict[Turn, list[Cluster]] = {}
    reasons: dict[Node, str] = {}
    for cluster in found.clusters:
        turn = turns[cluster.node]
        if turn.side is Side.CPU:
            reasons[cluster.node] = NO_COMPUTE
        else:
            members.setdefault(turn, []).append(cluster)
    return tuple(_partition(constants, tuple(clusters)) for _, clusters in sorted(members.items())), reasons


def _earliest_turns(program: ExportedProgram, by_node: Mapping[Node, Cluster]) -> dict[Node, Turn]:
    """The turn in which each node's value is there; for what only moves values, on whatever side its inputs are."""
    turns: dict[Node, Turn] = {}
    for node in program.graph.nodes:
        if node in turns:
            continue
        cluster = by_node.get(node)
        if cluster is None:
            latest = max((turns[source] for source in node.all_input_nodes), default=_FIRST)
            turns[node] = latest.on(Side.CPU)
            continue
        latest = max((turns[_source(operand)] for operand in cluster.operands), default=_FIRST)
        turn = latest.on(Side.NPU) if cluster.spec.is_compute else latest
        turns.update(dict.fromkeys((*cluster.operators, cluster.quantize), turn))
    return turns


def _let_moves_wait(program: ExportedProgram, by_node: Mapping[Node, Cluster], turns: dict[Node, Turn]) -> None:
    """Hand what moves values behind the CPU to a partition, where whoever reads it can wait for that."""
    computing = {turns[cluster.node] for cluster in by_node.values() if cluster.spec.is_compute}
    due: dict[Node, Turn | None] = {}
    """The last turn in which a node's value may come for its readers; None if no reader needs it."""

    def due_for(reader: Node) -> Turn | None:
        cluster = by_node.get(reader)
        if cluster is not None and turns[reader].side is Side.NPU:
            return turns[reader]
        latest = due[reader if cluster is None else cluster.quantize]
        # A value passes through dequantize without the CPU where a partition reads it.
        return latest if latest is None or is_dequantize(reader) else Turn(latest.level, Side.CPU)

    for node in reversed(program.graph.nodes):
        due[node] = min(filter(None, map(due_for, node.users)), default=None)
        cluster = by_node.get(node)
        if cluster is None or node is not cluster.node or turns[node].side is Side.NPU:
            continue
        last, following = due[cluster.quantize], turns[node].on(Side.NPU)
        if last is not None and last.side is Side.NPU:
            turns[node] = turns[cluster.quantize] = last
        elif following in computing and (last is None or following < last):
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
