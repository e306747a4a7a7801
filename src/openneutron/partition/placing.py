"""What runs where, and why not on the NPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from executorch.exir.backend.compile_spec_schema import CompileSpec
from torch.export import ExportedProgram
from torch.fx import Node

from openneutron.compile_spec import CompileOptions
from openneutron.core.driver import Driver
from openneutron.core.fx import modules_of, op_name, source_of
from openneutron.ops import OPERATORS
from openneutron.partition.clusters import Constants, find_clusters
from openneutron.partition.compile import PartitionGraphs
from openneutron.partition.conversions import check_constants_are_quantized, check_quantize_is_an_operator
from openneutron.partition.qdq_propagation import Propagated, propagate_qdq
from openneutron.partition.scheduling import Partition, partitions_of
from openneutron.partition.states import states_in_int8
from openneutron.partition.transposes import leave_transposes_to_the_cpu

__all__ = ["Placed", "Placement", "place", "placement"]


@dataclass(frozen=True)
class Placement:
    """Where one operator of the quantized graph runs."""

    node: str
    """Name of its node."""
    op: str
    """Its name in the edge dialect."""
    where: str
    """"npu" or "cpu"."""
    partition: int | None
    """Which delegate it is in; None on the CPU."""
    reason: str | None
    """Why it is on the CPU; None on the NPU."""
    source: str | None
    """The user's "file:line", where known; in a plain `nn.Sequential`, no line of the user's calls it."""
    module: str | None
    """Name of the innermost module that calls it, as `layers` takes it ("" for the model itself), where known."""


@dataclass(frozen=True)
class Placed:
    """A program's partitions, and a row for each operator in graph order.

    `program` is what the partitions are of: the one that was asked about, without its float islands.
    """

    program: ExportedProgram
    partitions: tuple[Partition, ...]
    rows: tuple[Placement, ...]
    graphs: PartitionGraphs
    """The IR of the partitions, as far as the search for them built it."""


def placement(program: ExportedProgram, compile_spec: Sequence[CompileSpec] | CompileOptions) -> tuple[Placement, ...]:
    """Where each operator of a quantized, exported program runs: one row each, quantize and dequantize left out.

    `program` is what `torch.export.export` makes of the converted module. Raises `OptionError`.
    """
    options = compile_spec if isinstance(compile_spec, CompileOptions) else CompileOptions.from_specs(compile_spec)
    return place(program, replace(options, intermediates_dir=None)).rows


def place(program: ExportedProgram, options: CompileOptions) -> Placed:
    """Find the partitions of a program. Linear in its nodes.

    Raises `OptionError` for a model that was converted with options of `convert_pt2e` that leave nothing for the NPU.
    """
    check_quantize_is_an_operator(program.graph)
    check_constants_are_quantized(program)
    driver: Driver[Propagated] = Driver("place", _text, _lint, options.intermediates_dir)
    bridged = driver.run(
        "states_in_int8",
        "keep states as int8 codes where they are read and written with the same qparams",
        lambda given: Propagated(states_in_int8(given.program)),
        Propagated(program),
    )
    bridged = driver.run(
        "propagate_qdq",
        "quantize float operators that only move values",
        lambda given: propagate_qdq(given.program, options),
        bridged,
    )
    graphs = PartitionGraphs(Constants(bridged.program), options)
    found = leave_transposes_to_the_cpu(bridged.program, find_clusters(bridged.program, options), graphs)
    partitions, no_compute = partitions_of(bridged.program, found)
    program = driver.run(
        "remove_unused_bridges",
        "remove the quantization that propagate_qdq added around operators that stay on the CPU",
        lambda given: given.for_clusters(cluster for partition in partitions for cluster in partition.clusters),
        bridged,
    ).program
    driver.finish()
    reasons = {**found.reasons, **no_compute}
    index = {
        operator: number
        for number, partition in enumerate(partitions)
        for cluster in partition.clusters
        for operator in cluster.operators
    }
    fused = {cluster.activation: cluster.node for cluster in found.clusters if cluster.activation is not None}
    rows = [
        _row(node, index.get(node), reasons.get(fused.get(node, node)))
        for node in program.graph.nodes
        if node in index or node in reasons or node in fused
    ]
    return Placed(program, partitions, tuple(rows), graphs)


def _text(bridged: Propagated) -> str:
    return str(bridged.program.graph_module.print_readable(print_output=False))


def _lint(bridged: Propagated, _: str) -> None:
    bridged.program.graph.lint()


def _row(node: Node, partition: int | None, reason: str | None) -> Placement:
    spec = OPERATORS.get(op_name(node))
    name = spec.edge_name(node) if spec else op_name(node)
    where = "cpu" if partition is None else "npu"
    module = next((name for name, _ in reversed(modules_of(node))), None)
    return Placement(node.name, name, where, partition, reason, source_of(node), module)
