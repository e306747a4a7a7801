"""Places each operator on the NPU or the CPU, and gives the reason for each operator on the CPU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from executorch.exir.backend.compile_spec_schema import CompileSpec
from torch.export import ExportedProgram
from torch.fx import Node

from openneutron.compile_spec import CompileOptions
from openneutron.core.driver import Driver
from openneutron.core.fx import modules_of, op_name, source_of
from openneutron.core.tables import ResultTable, ShownAsTable
from openneutron.ops import OPERATORS
from openneutron.partition.clusters import Constants, find_clusters
from openneutron.partition.compile import PartitionGraphs
from openneutron.partition.conversions import check_constants_are_quantized, check_quantize_is_an_operator
from openneutron.partition.qdq_propagation import Propagated, propagate_qdq
from openneutron.partition.scheduling import Partition, partitions_of
from openneutron.partition.states import states_in_int8
from openneutron.partition.transposes import reject_unsupported_transposes

__all__ = ["Placed", "Placement", "Placements", "count_delegates", "place", "placement", "summary_lines"]

MOST_SUMMARY_ROWS = 8


@dataclass(frozen=True)
class Placement(ShownAsTable):
    """Where one operator of the quantized graph runs."""

    node: str
    """The name of its node."""
    op: str
    """The name of the operator in the edge dialect."""
    where: str
    """"npu" or "cpu"."""
    partition: int | None
    """The number of its delegate, from 0; None on the CPU."""
    reason: str | None
    """The reason why it is on the CPU; None on the NPU."""
    source: str | None
    """The user's source line as "file:line"; None if unknown, as for modules that an `nn.Sequential` calls."""
    module: str | None
    """The name of the innermost module that calls it, in the form of the option `layers`; "" for the model itself.

    None if unknown.
    """

    def as_table(self) -> ResultTable:
        """Returns a table with this row."""
        return Placements((self,)).as_table()


class Placements(ShownAsTable, tuple[Placement, ...]):
    """The rows of a program in graph order. In notebooks and terminals, they show themselves as a table."""

    __slots__ = ()

    def as_table(self) -> ResultTable:
        """Returns the rows as a table, those on the CPU first."""
        on_cpu = sum(row.where == "cpu" for row in self)
        title = f"{len(self) - on_cpu} operators on the NPU, {on_cpu} on the CPU"
        headings = ("node", "operator", "runs on", "module", "source line", "reason")
        rows = (
            (row.node, row.op, _where_text(row), row.module or "", row.source or "", row.reason or "")
            for row in sorted(self, key=lambda row: row.where != "cpu")
        )
        return ResultTable(title, headings, tuple(rows))


def count_delegates(rows: Iterable[Placement]) -> int:
    """Returns the number of delegates that the rows name."""
    return len({row.partition for row in rows} - {None})


def summary_lines(rows: Sequence[Placement]) -> Iterator[str]:
    """Returns the number of operators on the NPU and on the CPU, and the reasons for at most `MOST_SUMMARY_ROWS`."""
    left = [row for row in rows if row.where == "cpu"]
    delegates = count_delegates(rows)
    parts = f"{delegates} delegate{'s' * (delegates != 1)}"
    yield f"  {len(rows) - len(left)} operators on the NPU in {parts}, {len(left)} on the CPU"
    for row in left[:MOST_SUMMARY_ROWS]:
        yield f"    {row.node} ({row.op}, {row.source or f'module {row.module!r}'}): {row.reason}"
    if len(left) > MOST_SUMMARY_ROWS:
        yield f"    and {len(left) - MOST_SUMMARY_ROWS} more; see placement"


def _where_text(row: Placement) -> str:
    return "CPU" if row.partition is None else f"NPU, delegate {row.partition}"


@dataclass(frozen=True)
class Placed:
    """The partitions of a program, and a row for each operator in graph order.

    `program` is the given program after `states_in_int8` and `propagate_qdq`; the partitions refer to its nodes.
    """

    program: ExportedProgram
    partitions: tuple[Partition, ...]
    rows: Placements
    graphs: PartitionGraphs
    """A cache of the IR of the partitions. It contains the IR that the search for partitions built."""


def placement(program: ExportedProgram, compile_spec: Sequence[CompileSpec] | CompileOptions) -> Placements:
    """Returns where each operator of a quantized, exported program runs, in graph order.

    `program` is the result of `torch.export.export` for the converted module; `compile_spec` comes from
    `generate_neutron_compile_spec`. The program is not changed. Each operator and each requantization has one row;
    other quantize and dequantize nodes have none. Raises `OptionError`.

        for row in placement(torch.export.export(converted, inputs), generate_neutron_compile_spec("imxrt700")):
            print(row.op, row.where, row.reason)
    """
    options = compile_spec if isinstance(compile_spec, CompileOptions) else CompileOptions.from_specs(compile_spec)
    return place(program, replace(options, intermediates_dir=None)).rows


def place(program: ExportedProgram, options: CompileOptions) -> Placed:
    """Finds the partitions of a program, which is not changed. Linear in its nodes.

    Raises `OptionError` for invalid options, and for a model that was converted with `fold_quantize=False` or
    `use_reference_representation=True`.
    """
    check_quantize_is_an_operator(program.graph)
    check_constants_are_quantized(program)
    driver: Driver[Propagated] = Driver("place", _program_text, _lint_program, options.intermediates_dir)
    propagated = driver.run(
        "states_in_int8",
        "keep states as int8 codes if they are read and written with the same qparams",
        lambda given: Propagated(states_in_int8(given.program)),
        Propagated(program),
    )
    propagated = driver.run(
        "propagate_qdq",
        "quantize float operators that only move values",
        lambda given: propagate_qdq(given.program, options),
        propagated,
    )
    graphs = PartitionGraphs(Constants(propagated.program), options)
    found = reject_unsupported_transposes(propagated.program, find_clusters(propagated.program, options), graphs)
    partitions, no_compute = partitions_of(propagated.program, found)
    program = driver.run(
        "remove_unused_qdq",
        "remove the quantization that propagate_qdq added around operators that stay on the CPU",
        lambda given: given.for_clusters(cluster for partition in partitions for cluster in partition.clusters),
        propagated,
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
        _placement_row(node, index.get(node), reasons.get(fused.get(node, node)))
        for node in program.graph.nodes
        if node in index or node in reasons or node in fused
    ]
    return Placed(program, partitions, Placements(rows), graphs)


def _program_text(propagated: Propagated) -> str:
    return str(propagated.program.graph_module.print_readable(print_output=False))


def _lint_program(propagated: Propagated, _: str) -> None:
    propagated.program.graph.lint()


def _placement_row(node: Node, partition: int | None, reason: str | None) -> Placement:
    spec = OPERATORS.get(op_name(node))
    name = spec.edge_name(node) if spec else op_name(node)
    where = "cpu" if partition is None else "npu"
    module = next((name for name, _ in reversed(modules_of(node))), None)
    return Placement(node.name, name, where, partition, reason, source_of(node), module)
