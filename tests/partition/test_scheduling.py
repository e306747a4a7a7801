"""Partitions of random graphs: each operator once, no cycles, and the smallest number of partitions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.export import ExportedProgram
from torch.fx import Graph, Node

from openneutron.ops import OPERATORS
from openneutron.ops.op_instance import OpInstance
from openneutron.partition.clusters import Cluster, Clusters
from openneutron.partition.scheduling import NO_COMPUTE, Partition, partitions_of
from openneutron.targets import TARGETS

QUANTIZE = torch.ops.quantized_decomposed.quantize_per_tensor.default
DEQUANTIZE = torch.ops.quantized_decomposed.dequantize_per_tensor.default
QPARAMS = (0.1, 0, -128, 127, torch.int8)
NPU = {
    "relu": torch.ops.aten.relu.default,
    "add": torch.ops.aten.add.Tensor,
    "move": torch.ops.aten.view.default,
    "join": torch.ops.aten.cat.default,
}
MOVES = ("move", "join")


@dataclass(frozen=True)
class Step:
    """One operator: its kind ("cpu" or a key of NPU), and the earlier values that it reads."""

    kind: str
    reads: tuple[int, ...]


@dataclass(frozen=True)
class Built:
    program: ExportedProgram
    clusters: tuple[Cluster, ...]
    steps: tuple[Step, ...]

    @property
    def found(self) -> Clusters:
        return Clusters(self.clusters, {})

    def split(self) -> tuple[tuple[Partition, ...], dict[Node, str]]:
        return partitions_of(self.program, self.found)


def build(steps: tuple[Step, ...]) -> Built:
    """Returns a program that returns all values. Value 0 is its input, value i + 1 the output of step i."""
    graph = Graph()
    values = [graph.call_function(QUANTIZE, (graph.placeholder("x"), *QPARAMS))]
    clusters = []
    for step in steps:
        operands = [graph.call_function(DEQUANTIZE, (values[index], *QPARAMS)) for index in step.reads]
        target = NPU.get(step.kind, torch.ops.aten.cat.default)
        args: Any = (operands,) if target is torch.ops.aten.cat.default else operands
        node = graph.call_function(target, (*args, *(([8],) if step.kind == "move" else ())))
        values.append(graph.call_function(QUANTIZE, (node, *QPARAMS)))
        if step.kind != "cpu":
            spec = OPERATORS[str(target)]
            clusters.append(Cluster(spec, OpInstance(node, TARGETS["imxrt700"]), None, tuple(operands), values[-1]))
    graph.output(tuple(values[1:]))
    names = ("inputs_to_parameters", "inputs_to_buffers", "inputs_to_lifted_tensor_constants", "buffers_to_mutate")
    signature = SimpleNamespace(**{name: {} for name in names})
    program = SimpleNamespace(graph=graph, graph_signature=signature, state_dict={}, constants={})
    return Built(cast(ExportedProgram, program), tuple(clusters), steps)


@st.composite
def random_steps(draw: st.DrawFn, kinds: tuple[str, ...] = ("cpu", "relu", "add")) -> tuple[Step, ...]:
    steps = []
    for index in range(draw(st.integers(1, 12))):
        kind = draw(st.sampled_from(kinds))
        count = {"relu": 1, "move": 1, "add": 2}.get(kind, draw(st.integers(1, 3)))
        # mostly late values, so that graphs are deep
        reads = tuple(max(0, index - draw(st.integers(0, 4))) for _ in range(count))
        steps.append(Step(kind, reads))
    return tuple(steps)


def partitions_that_must_be(steps: tuple[Step, ...]) -> int:
    """Returns the largest number of partitions that one path needs, over all paths.

    Two operators that compute cannot be in one convex partition if a path between them has an operator on the CPU.
    Operators that only move values can be in any partition.
    """

    def needs(index: int) -> Iterator[tuple[int, bool]]:
        """Returns, for each path to a value, the number of partitions, and whether an operator on the CPU follows the
        last.
        """
        if index == 0:
            yield 0, True
            return
        step = steps[index - 1]
        for source in sorted(set(step.reads)):
            for count, left in needs(source):
                if step.kind == "cpu":
                    yield count, True
                elif step.kind in MOVES:
                    yield count, left
                else:
                    yield count + left, False

    return max(count for index in range(len(steps) + 1) for count, _ in needs(index))


def waits_for_itself(built: Built, partitions: Sequence[Sequence[Cluster]]) -> bool:
    """Whether the graph has a cycle after each partition is contracted to one node."""
    owner = {
        node: number
        for number, clusters in enumerate(partitions)
        for cluster in clusters
        for node in (*cluster.operands, *cluster.operators, cluster.quantize)
    }
    points: dict[object, set[object]] = {}
    for node in built.program.graph.nodes:
        point = owner.get(node, node)
        reads = {owner.get(source, source) for source in node.all_input_nodes}
        points.setdefault(point, set()).update(reads - {point})
    while points:
        ready = [point for point, reads in points.items() if not reads & points.keys()]
        if not ready:
            return True
        for point in ready:
            del points[point]
    return False


def assert_no_partition_waits_for_itself(built: Built, partitions: tuple[Partition, ...]) -> None:
    assert not waits_for_itself(built, [partition.clusters for partition in partitions])


@settings(max_examples=300, deadline=None)
@given(random_steps())
def test_random_graphs(steps: tuple[Step, ...]) -> None:
    built = build(steps)
    partitions, reasons = built.split()
    assert reasons == {}
    placed = [cluster for partition in partitions for cluster in partition.clusters]
    assert len(placed) == len(set(placed))
    assert set(placed) == set(built.clusters)
    assert len(partitions) == partitions_that_must_be(steps)
    assert_no_partition_waits_for_itself(built, partitions)


@settings(max_examples=400, deadline=None)
@given(random_steps(kinds=("cpu", "relu", "add", "move", "join")))
def test_the_number_of_partitions_is_minimal_and_each_computes(steps: tuple[Step, ...]) -> None:
    built = build(steps)
    partitions, reasons = built.split()
    assert len(partitions) == partitions_that_must_be(steps)
    assert all(any(cluster.spec.is_compute for cluster in partition.clusters) for partition in partitions)
    placed = [cluster for partition in partitions for cluster in partition.clusters]
    left = set(built.clusters) - set(placed)
    assert len(placed) == len(set(placed))
    assert reasons == {cluster.node: NO_COMPUTE for cluster in left}
    assert not any(cluster.spec.is_compute for cluster in left)
    assert_no_partition_waits_for_itself(built, partitions)


@settings(max_examples=200, deadline=None)
@given(random_steps(kinds=("cpu", "relu", "move", "join")))
def test_moves_stay_on_the_cpu_only_to_prevent_cycles_of_partitions(
    steps: tuple[Step, ...],
) -> None:
    built = build(steps)
    partitions, reasons = built.split()
    for cluster in (cluster for cluster in built.clusters if cluster.node in reasons):
        for number in range(len(partitions)):
            grown = [
                (*partition.clusters, *([cluster] if index == number else []))
                for index, partition in enumerate(partitions)
            ]
            assert waits_for_itself(built, grown)


@settings(max_examples=100, deadline=None)
@given(random_steps())
def test_inputs_and_outputs(steps: tuple[Step, ...]) -> None:
    built = build(steps)
    for partition in built.split()[0]:
        computed = {cluster.quantize for cluster in partition.clusters}
        read = [operand.args[0] for cluster in partition.clusters for operand in cluster.operands]
        assert list(partition.inputs) == [value for value in dict.fromkeys(read) if value not in computed]
        assert list(partition.outputs) == [cluster.quantize for cluster in partition.clusters]  # all values are outputs


def test_a_value_that_only_the_partition_reads_is_not_an_output() -> None:
    built = build((Step("relu", (0,)), Step("relu", (1,))))
    graph = built.program.graph
    returned = next(node for node in graph.nodes if node.op == "output")
    returned.args = (returned.args[0][1:],)
    (partition,), _ = built.split()
    assert partition.outputs == (built.clusters[1].quantize,)


def test_parallel_branches_of_one_step_are_one_partition() -> None:
    steps = (Step("relu", (0,)), Step("cpu", (1,)), Step("cpu", (1,)), Step("relu", (2,)), Step("relu", (3,)))
    partitions, _ = build(steps).split()
    assert [len(partition.clusters) for partition in partitions] == [1, 2]


def test_a_move_that_the_cpu_needs_adds_no_partition() -> None:
    """If the move were on the NPU, an operator after it could not be in one partition with an operator next to it."""
    steps = (
        Step("relu", (0,)), Step("cpu", (1,)), Step("move", (2,)), Step("cpu", (3,)), Step("relu", (4,)),
        Step("relu", (2,)),
    )  # fmt: skip
    built = build(steps)
    partitions, reasons = built.split()
    assert [len(partition.clusters) for partition in partitions] == [1, 2]
    assert reasons == {built.clusters[1].node: NO_COMPUTE}


def test_a_move_waits_for_the_partition_that_reads_it() -> None:
    steps = (Step("move", (0,)), Step("relu", (0,)), Step("cpu", (2,)), Step("add", (1, 3)))
    partitions, reasons = build(steps).split()
    assert [[cluster.spec.name for cluster in partition.clusters] for partition in partitions] == [
        ["relu"], ["reshape", "add"]
    ]  # fmt: skip
    assert not reasons
