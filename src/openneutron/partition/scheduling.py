"""Schedules clusters into the minimal number of partitions, without cyclic dependencies between them."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch.export import ExportedProgram
from torch.fx import Node

from openneutron.core.fx import first_operand, is_dequantize
from openneutron.partition.clusters import Cluster, Clusters, Constants
from openneutron.targets import NeutronTarget

__all__ = ["Partition", "partitions_of"]

NO_COMPUTE = (
    "It only moves values, and no operator on the NPU that computes is adjacent: a partition would cost more than it "
    "saves."
)


@dataclass(frozen=True, eq=False)
class Partition:
    """Clusters that become one delegate.

    `inputs` are the int8 values that the clusters read from outside the partition, except constants, in the order of
    their first use. `outputs` are the quantize nodes that nodes outside the partition read.
    """

    clusters: tuple[Cluster, ...]
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]

    @property
    def name(self) -> str:
        """The name of its first operator. Dumps use it as the name of the partition."""
        return self.clusters[0].node.name

    @property
    def target(self) -> NeutronTarget:
        """The target that its operators were selected for."""
        return self.clusters[0].instance.target


class Processor(enum.IntEnum):
    """The processor of a step. In each round, the step of the CPU precedes that of the NPU."""

    CPU = 0
    NPU = 1


class Step(NamedTuple):
    """One step of the schedule, on one processor. Steps compare in the order in which they run."""

    round: int
    processor: Processor

    def next_on(self, processor: Processor) -> Step:
        """Returns this step if it runs on `processor`, else the next step that does."""
        return Step(self.round + (processor < self.processor), processor)


_FIRST = Step(0, Processor.CPU)


def partitions_of(program: ExportedProgram, found: Clusters) -> tuple[tuple[Partition, ...], dict[Node, str]]:
    """Returns the partitions in topological order, and a reason for each cluster that is in none of them.

    Linear in nodes and uses. The schedule alternates between steps of the CPU and of the NPU; all clusters of one step
    of the NPU form a partition. Rules:

    1. An operator that computes runs in the first step of its processor in which its inputs are available. A path that
       leaves a partition continues in a later step, so no partition depends on itself.
    2. The number of partitions is minimal: between the computing operators of two consecutive partitions, there is a
       path with a CPU operator.
    3. An operator that only moves values runs in the step of its latest input. If that is a step of the CPU, the
       operator joins the first partition that reads it, or else the next partition, unless a CPU operator needs its
       value earlier. Each partition therefore contains an operator that computes.
    """
    by_node = {operator: cluster for cluster in found.clusters for operator in cluster.operators}
    steps = _earliest_steps(program, by_node)
    _defer_moves(program, by_node, steps)
    constants = Constants(program)
    members: dict[Step, list[Cluster]] = {}
    reasons: dict[Node, str] = {}
    for cluster in found.clusters:
        step = steps[cluster.node]
        if step.processor is Processor.CPU:
            reasons[cluster.node] = NO_COMPUTE
        else:
            members.setdefault(step, []).append(cluster)
    return tuple(_make_partition(constants, tuple(clusters)) for _, clusters in sorted(members.items())), reasons


def _earliest_steps(program: ExportedProgram, by_node: Mapping[Node, Cluster]) -> dict[Node, Step]:
    """Returns the earliest step of each node. A cluster that only moves values gets the step of its latest input."""
    steps: dict[Node, Step] = {}
    for node in program.graph.nodes:
        if node in steps:
            continue
        cluster = by_node.get(node)
        if cluster is None:
            latest = max((steps[source] for source in node.all_input_nodes), default=_FIRST)
            steps[node] = latest.next_on(Processor.CPU)
            continue
        latest = max((steps[first_operand(operand)] for operand in cluster.operands), default=_FIRST)
        step = latest.next_on(Processor.NPU) if cluster.spec.is_compute else latest
        steps.update(dict.fromkeys((*cluster.operators, cluster.quantize), step))
    return steps


def _defer_moves(program: ExportedProgram, by_node: Mapping[Node, Cluster], steps: dict[Node, Step]) -> None:
    """Rule 3: defers moves that follow CPU operators to a step of the NPU, if their readers run late enough."""
    computing = {steps[cluster.node] for cluster in by_node.values() if cluster.spec.is_compute}
    due: dict[Node, Step | None] = {}
    """The last step in which a node may run without delaying a reader; None if no reader limits it."""

    def due_for(reader: Node) -> Step | None:
        cluster = by_node.get(reader)
        if cluster is not None and steps[reader].processor is Processor.NPU:
            return steps[reader]
        latest = due[reader if cluster is None else cluster.quantize]
        # A partition reads the int8 value before a dequantize, so the dequantize takes no step of the CPU.
        return latest if latest is None or is_dequantize(reader) else Step(latest.round, Processor.CPU)

    for node in reversed(program.graph.nodes):
        due[node] = min(filter(None, map(due_for, node.users)), default=None)
        cluster = by_node.get(node)
        if cluster is None or node is not cluster.node or steps[node].processor is Processor.NPU:
            continue
        last, following = due[cluster.quantize], steps[node].next_on(Processor.NPU)
        if last is not None and last.processor is Processor.NPU:
            steps[node] = steps[cluster.quantize] = last
        elif following in computing and (last is None or following < last):
            steps[node] = steps[cluster.quantize] = following


def _make_partition(constants: Constants, clusters: tuple[Cluster, ...]) -> Partition:
    computed = {cluster.quantize for cluster in clusters}
    inside = {operator for cluster in clusters for operator in cluster.operators}
    sources = (first_operand(operand) for cluster in clusters for operand in cluster.operands)
    inputs = dict.fromkeys(source for source in sources if source not in computed and source not in constants)
    outputs = [cluster.quantize for cluster in clusters if _is_read_outside(cluster.quantize, inside)]
    return Partition(clusters, tuple(inputs), tuple(outputs))


def _is_read_outside(quantize: Node, inside: set[Node]) -> bool:
    return any(not is_dequantize(reader) or not inside.issuperset(reader.users) for reader in quantize.users)
