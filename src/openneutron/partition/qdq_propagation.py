"""Q/DQ propagation: inserts quantize and dequantize around float operators that do not change values.

Some quantizers do not quantize operators that only move values, such as a reshape between two quantized operators. Such
an operator commutes with quantization, so a quantize after it may move before it, and a dequantize before it may move
after it. The results are bitwise equal, and the operator can run on the NPU.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, Node

from openneutron.compile_spec import CompileOptions
from openneutron.core.fx import (
    first_operand,
    is_dequantize,
    is_operator,
    is_quantize,
    iterate_nodes,
    op_name,
    output_node,
)
from openneutron.ops import OPERATORS, is_op
from openneutron.ops.op_instance import OpInstance
from openneutron.partition.clusters import Cluster, Constants, is_int8
from openneutron.partition.programs import with_graph
from openneutron.quantizer.quantizable import quantizable_reason

__all__ = ["Propagated", "propagate_qdq"]

QUANTIZE = torch.ops.quantized_decomposed.quantize_per_tensor.default
DEQUANTIZE = torch.ops.quantized_decomposed.dequantize_per_tensor.default

# Scale, zero point, quant_min, quant_max and dtype: the arguments of quantize and dequantize after the value.
QArgs = tuple[Any, ...]


@dataclass(frozen=True)
class Propagated:
    """A program after Q/DQ propagation. `inserted` are the dequantize nodes that the propagation inserted."""

    program: ExportedProgram
    inserted: tuple[Node, ...] = ()

    def for_clusters(self, clusters: Iterable[Cluster]) -> Propagated:
        """Removes the inserted nodes that no cluster in `clusters` uses, in place. Otherwise, the CPU would run them.

        Returns the changed program with an empty `inserted`, or `self` if all inserted nodes are used.
        """
        on_npu = {node for cluster in clusters for node in (*cluster.operands, cluster.quantize)}
        unused = [node for node in self.inserted if node not in on_npu and node.args[0] not in on_npu]
        if not unused:
            return self
        graph = self.program.graph
        for dequantize in unused:
            quantize = first_operand(dequantize)
            dequantize.replace_all_uses_with(quantize.args[0])  # type: ignore[arg-type]
            graph.erase_node(dequantize)
            if not quantize.users:
                graph.erase_node(quantize)
        return Propagated(with_graph(self.program, graph, {}))


def propagate_qdq(program: ExportedProgram, options: CompileOptions) -> Propagated:
    """Applies these rules to a copy of `program`. Linear in nodes and uses.

    1. If all inputs of an operator that does not change values are dequantized with the same qparams, its output is
       quantized and dequantized with these qparams.
    2. Otherwise, if all readers of such an operator quantize its output with the same qparams, its inputs are quantized
       and dequantized with these qparams.
    3. torch.export's assertions about shape and dtype are removed. Otherwise, they would be float readers of quantized
       values.
    """
    search = _PropagationSearch(program, options)
    search.run()
    checks = [node for node in program.graph.nodes if _is_check(node)]
    if not (search.inputs or search.outputs or checks):
        return Propagated(program)
    graph = Graph()
    copies: dict[Node, Node] = {}
    output, old_output = graph.output(graph.graph_copy(program.graph, copies)), output_node(program.graph)
    output.meta = dict(old_output.meta)
    copies[old_output] = output
    for check in checks:
        graph.erase_node(copies.pop(check))
    written: dict[Node, Node] = {}
    for value, (qargs, readers) in search.outputs.items():
        written[copies[value]] = _insert_qdq(copies[value], qargs, [copies[reader] for reader in readers])
    inputs = [
        _insert_qdq(written.get(copies[value], copies[value]), qargs, [copies[reader] for reader in readers])
        for (value, qargs), readers in search.inputs.items()
    ]
    return Propagated(with_graph(program, graph, copies), (*written.values(), *inputs))


def _is_check(node: Node) -> bool:
    return is_op(node, "assertion")


def _quantizes(reader: Node, qargs: QArgs) -> bool:
    return is_quantize(reader) and reader.args[1:] == qargs


def _insert_qdq(value: Node, qargs: QArgs, readers: Iterable[Node]) -> Node:
    """Inserts quantize and dequantize between `value` and `readers`; returns the dequantize."""
    quantize = next((user for user in value.users if _quantizes(user, qargs)), None)
    if quantize is None:
        with value.graph.inserting_after(value):
            quantize = _insert_call(value.graph, QUANTIZE, value, qargs)
    else:
        value.append(quantize)  # before all readers
    with value.graph.inserting_after(quantize):
        dequantize = _insert_call(value.graph, DEQUANTIZE, quantize, qargs)
    for reader in readers:
        reader.replace_input_with(value, dequantize)
    return dequantize


def _insert_call(graph: Graph, target: torch._ops.OpOverload, value: Node, qargs: QArgs) -> Node:
    call = graph.call_function(target, (value, *qargs))
    call.meta = {key: value.meta[key] for key in ("stack_trace", "nn_module_stack") if key in value.meta}
    call.meta["val"] = target(value.meta["val"], *qargs)
    return call


class _PropagationSearch:
    """Finds the values to quantize, each with its qparams and the readers of the quantized value."""

    def __init__(self, program: ExportedProgram, options: CompileOptions) -> None:
        self.constants = Constants(program)
        self.target = options.target_spec
        self.moves = [node for node in program.graph.nodes if self._commutes(node)]
        self.qargs: dict[Node, QArgs] = {}
        self.outputs: dict[Node, tuple[QArgs, list[Node]]] = {}
        """The outputs that rule 1 quantizes."""
        self.inputs: dict[tuple[Node, QArgs], list[Node]] = {}
        """The inputs that rule 2 quantizes."""

    def run(self) -> None:
        for node in self.moves:
            self._quantize_output(node)
        for node in reversed(self.moves):
            if node not in self.qargs:
                self._quantize_inputs(node)

    def _commutes(self, node: Node) -> bool:
        spec = OPERATORS.get(op_name(node)) if is_operator(node) and not is_quantize(node) else None
        return (
            spec is not None
            and spec.commutes_with_quantization(OpInstance(node, self.target.neutron_target))
            and quantizable_reason(node, self.target, self.constants.tensor) is None
        )

    def _quantize_output(self, node: Node) -> None:
        given = [self._producer_qparams(value) for value in self._tensor_operands(node)]
        qargs = given[0]
        if qargs is None or any(other != qargs for other in given):
            return
        self.qargs[node] = qargs
        readers = [reader for reader in node.users if not _is_check(reader) and not _quantizes(reader, qargs)]
        if readers:
            self.outputs[node] = qargs, readers

    def _quantize_inputs(self, node: Node) -> None:
        wanted = [self._consumer_qparams(reader) for reader in node.users if not _is_check(reader)]
        qargs = wanted[0] if wanted else None
        if qargs is None or any(other != qargs for other in wanted):
            return
        self.qargs[node] = qargs
        for value in self._tensor_operands(node):
            if not is_dequantize(value) or value.args[1:] != qargs:
                self.inputs.setdefault((value, qargs), []).append(node)

    def _tensor_operands(self, node: Node) -> list[Node]:
        args = OpInstance(node, self.target.neutron_target).args
        return list(dict.fromkeys(iterate_nodes([args[name] for name in OPERATORS[op_name(node)].inputs])))

    def _consumer_qparams(self, reader: Node) -> QArgs | None:
        """Returns the qparams with which `reader` quantizes its input; None if it reads float.

        They are the arguments of an int8 quantize, or the qparams that a rule assigned to an operator.
        """
        return reader.args[1:] if is_quantize(reader) and is_int8(reader) else self.qargs.get(reader)

    def _producer_qparams(self, value: Node) -> QArgs | None:
        """Returns the qparams of `value`; None for a float value and for a constant.

        They are the arguments of an int8 dequantize, or the qparams that a rule assigned to an operator.
        """
        if is_dequantize(value) and is_int8(value) and value.args[0] not in self.constants:
            return value.args[1:]
        return self.qargs.get(value)
