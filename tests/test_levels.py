"""Partitions of random graphs: nothing twice, nothing that waits for itself, and no more of them than must be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.export import ExportedProgram
from torch.fx import Graph, Node

from openneutron.ops import OPERATORS
from openneutron.ops.site import Site
from openneutron.partition.clusters import Cluster, Clusters
from openneutron.partition.levels import NO_COMPUTE, Partition, partitions_of
from openneutron.targets import TARGETS

QUANTIZE = torch.ops.quantized_decomposed.quantize_per_tensor.default
DEQUANTIZE = torch.ops.quantized_decomposed.dequantize_per_tensor.default
QPARAMS = (0.1, 0, -128, 127, torch.int8)
NPU = {"relu": torch.ops.aten.relu.default, "add": torch.ops.aten.add.Tensor, "move": torch.ops.aten.view.default}


@dataclass(frozen=True)
class Step:
    """One operator: what it is ("cpu" or a key of NPU), and which earlier values it reads."""

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
    """A program that returns every value; value 0 is its input, value i + 1 what step i yields."""
    graph = Graph()
    values = [graph.call_function(QUANTIZE, (graph.placeholder("x"), *QPARAMS))]
    clusters = []
    for step in steps:
        operands = [graph.call_function(DEQUANTIZE, (values[index], *QPARAMS)) for index in step.reads]
        if step.kind == "cpu":
            target, args = torch.ops.aten.cat.default, cast(Any, (operands,))
        else:
            target, args = NPU[step.kind], (*operands, *(([8],) if step.kind == "move" else ()))
        node = graph.call_function(target, args)
        values.append(graph.call_function(QUANTIZE, (node, *QPARAMS)))
        if step.kind != "cpu":
            spec = OPERATORS[str(target)]
            clusters.append(Cluster(spec, Site(node, TARGETS["imxrt700"]), None, tuple(operands), values[-1]))
    graph.output(tuple(values[1:]))
    signature = SimpleNamespace(inputs_to_parameters={}, inputs_to_buffers={}, inputs_to_lifted_tensor_constants={})
    program = SimpleNamespace(graph=graph, graph_signature=signature, state_dict={}, constants={})
    return Built(cast(ExportedProgram, program), tuple(clusters), steps)


@st.composite
def random_steps(draw: st.DrawFn, kinds: tuple[str, ...] = ("cpu", "relu", "add")) -> tuple[Step, ...]:
    steps = []
    for index in range(draw(st.integers(1, 12))):
        kind = draw(st.sampled_from(kinds))
        count = {"relu": 1, "move": 1, "add": 2}.get(kind, draw(st.integers(1, 3)))
        # mostly late values, so that graphs get deep
        reads = tuple(max(0, index - draw(st.integers(0, 4))) for _ in range(count))
        steps.append(Step(kind, reads))
    return tuple(steps)


def longest_alternation(steps: tuple[Step, ...]) -> int:
    """How often the path that does so most often goes from the CPU to the NPU, over all paths one by one."""

    def entries(index: int) -> Iterator[tuple[int, bool]]:
        """For each path that ends in a value: its entries so far, and whether it is on the NPU."""
        if index == 0:
            yield 0, False
            return
        step = steps[index - 1]
        for source in sorted(set(step.reads)):
            for count, on_npu in entries(source):
                yield (count, False) if step.kind == "cpu" else (count + (not on_npu), True)

    return max(count for index in range(len(steps) + 1) for count, _ in entries(index))


def assert_no_partition_waits_for_itself(built: Built, partitions: tuple[Partition, ...]) -> None:
    """Contract each partition to one point; what is left has an order."""
    owner = {
        node: number
        for number, partition in enumerate(partitions)
        for cluster in partition.clusters
        for node in (*cluster.operands, *cluster.operators, cluster.quantize)
    }
    points: dict[object, set[object]] = {}
    for node in built.program.graph.nodes:
        point = owner.get(node, node)
        reads = {owner.get(source, source) for source in node.all_input_nodes}
        points.setdefault(point, set()).update(reads - {point})
    while points:
        ready = [point for point, reads in points.items() if not reads & points.keys()]
        assert ready, "a partition reads what depends on its own output"
        for point in ready:
            del points[point]


@settings(max_examples=300, deadline=None)
@given(random_steps())
def test_random_graphs(steps: tuple[Step, ...]) -> None:
    built = build(steps)
    partitions, reasons = built.split()
    assert reasons == {}
    placed = [cluster for partition in partitions for cluster in partition.clusters]
    assert len(placed) == len(set(placed))
    assert set(placed) == set(built.clusters)
    assert len(partitions) == longest_alternation(steps)
    assert_no_partition_waits_for_itself(built, partitions)


@settings(max_examples=150, deadline=None)
@given(random_steps(kinds=("cpu", "relu", "move")))
def test_partitions_that_only_move_values_are_left_out_with_a_reason(steps: tuple[Step, ...]) -> None:
    built = build(steps)
    partitions, reasons = built.split()
    assert all(any(cluster.spec.is_compute for cluster in partition.clusters) for partition in partitions)
    placed = {cluster for partition in partitions for cluster in partition.clusters}
    left = set(built.clusters) - placed
    assert reasons == {cluster.node: NO_COMPUTE for cluster in left}
    assert not any(cluster.spec.is_compute for cluster in left)
    assert_no_partition_waits_for_itself(built, partitions)


@settings(max_examples=100, deadline=None)
@given(random_steps())
def test_inputs_and_outputs(steps: tuple[Step, ...]) -> None:
    built = build(steps)
    for partition in built.split()[0]:
        computed = {cluster.quantize for cluster in partition.clusters}
        read = [operand.args[0] for cluster in partition.clusters for operand in cluster.operands]
        assert list(partition.inputs) == [value for value in dict.fromkeys(read) if value not in computed]
        assert list(partition.outputs) == [cluster.quantize for cluster in partition.clusters]  # all are returned


def test_a_value_that_only_the_partition_reads_is_no_output() -> None:
    built = build((Step("relu", (0,)), Step("relu", (1,))))
    graph = built.program.graph
    returned = next(node for node in graph.nodes if node.op == "output")
    returned.args = (returned.args[0][1:],)
    (partition,), _ = built.split()
    assert partition.outputs == (built.clusters[1].quantize,)


def test_parallel_branches_of_one_level_are_one_partition() -> None:
    steps = (Step("relu", (0,)), Step("cpu", (1,)), Step("cpu", (1,)), Step("relu", (2,)), Step("relu", (3,)))
    partitions, _ = build(steps).split()
    assert [len(partition.clusters) for partition in partitions] == [1, 2]
