"""Replaces each compiled partition by one operator, the delegate call.

ExecuTorch's passes then visit one node for each partition instead of all its operators. The compiled payload is a
constant of the program, so nothing is kept outside the program. For profiling, one trace operator without effect
follows the call for each operator of the model in the partition. ExecuTorch gives each trace a debug handle with the
user's source lines, and the NPU's kernels are mapped to these handles.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch._export.verifier import Verifier
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, OutputKind, TensorArgument
from torch.fx import Graph, Node

from openneutron.core.fx import is_dequantize, is_quantize, note, note_of, output_node
from openneutron.ops.graph_builder import clone
from openneutron.partition.dim_orders import DimOrders, is_nhwc, nchw_strides
from openneutron.partition.programs import with_graph
from openneutron.partition.scheduling import Partition
from openneutron.passes.functionalize import writes_memory

__all__ = [
    "Trace", "chain_end", "is_decomposed", "is_delegate_call", "is_partitioned", "is_trace", "output_indices",
    "partition_operator", "replace_partitions",
]  # fmt: skip

_NAMESPACE = "openneutron"
_NAME = "partition"
_TRACE = "trace"
# The operator returns an empty tensor before the outputs of the partition; nothing reads it. ExecuTorch's verifier
# iterates over the first dimension of the first tensor in a returned list. This takes seconds for thousands of rows,
# and fails for a tensor without dimensions.
_FIRST_OUTPUT = 1
# The keys of a node's metadata that hold the user's source lines and modules.
_SOURCE = ("stack_trace", "nn_module_stack")
# A note on the output node of a program whose partitions are delegate calls.
_PARTITIONED = "openneutron.searched"


@functools.cache
def _library() -> torch.library.Library:
    library = torch.library.Library(_NAMESPACE, "DEF")
    library.define(f"{_NAME}(Tensor[] inputs, Tensor payload, str outputs) -> Tensor[]")
    library.impl(_NAME, _fake_outputs, "Meta")
    library.define(f"{_TRACE}(Tensor value, str node, int[] kernels, int count) -> Tensor")
    library.impl(_TRACE, lambda value, *_: torch.empty_like(value), "Meta")
    return library


@dataclass(frozen=True)
class Trace:
    """An operator of the model in a partition, and the numbers of the kernels on the NPU that compute it.

    `count` is the number of kernels of the partition.
    """

    node: Node
    kernels: tuple[int, ...]
    count: int


def trace_operator() -> torch._ops.OpOverload:
    """Returns the operator trace(value, node, kernels, count), which returns the value.

    It records that the partition before it computes `node` with the kernels numbered `kernels`, of `count` in total.
    """
    _library()
    return getattr(torch.ops, _NAMESPACE).trace.default  # type: ignore[no-any-return]


def is_trace(node: Node) -> bool:
    """Whether `node` is a trace, in the ATen or in the edge dialect."""
    return trace_operator() in (node.target, getattr(node.target, "_op", None))


def chain_end(node: Node) -> Node:
    """Returns the last of the traces that follow `node`, or `node` if there are none."""
    while following := next(filter(is_trace, node.users), None):
        node = following
    return node


def partition_operator() -> torch._ops.OpOverload:
    """Returns the operator partition(inputs, payload, outputs), which is a delegate call.

    The inputs are int8 tensors, the payload is a uint8 tensor, and `outputs` is a text with the sizes and strides of
    the outputs. It returns an empty tensor and the int8 outputs of the partition.
    """
    _library()
    return getattr(torch.ops, _NAMESPACE).partition.default  # type: ignore[no-any-return]


def is_delegate_call(node: Node) -> bool:
    """Whether `node` is a delegate call, in the ATen or in the edge dialect."""
    return partition_operator() in (node.target, getattr(node.target, "_op", None))


def output_indices(call: Node) -> dict[Node, int]:
    """Maps the node of each output of a delegate call to the index of the output.

    The node is the last of the traces that follow the output, if there are any.
    """
    items = (user for user in call.users if user.target is operator.getitem)
    return {chain_end(item): cast(int, item.args[1]) - _FIRST_OUTPUT for item in items}


def is_partitioned(program: ExportedProgram) -> bool:
    """Whether the program is a result of `replace_partitions`, or was decomposed from one."""
    return bool(note_of(output_node(program.graph), _PARTITIONED))


def _fake_outputs(_: Sequence[torch.Tensor], payload: torch.Tensor, outputs: str) -> list[torch.Tensor]:
    described = _parse_layouts(outputs)
    values = [torch.empty_strided(size, stride, dtype=torch.int8, device=payload.device) for size, stride in described]
    return [_empty_like(payload), *values]


def _empty_like(like: torch.Tensor) -> torch.Tensor:
    return like.new_empty(0, dtype=torch.int8)


def _layouts_text(values: Sequence[torch.Tensor]) -> str:
    """Returns sizes and strides as text, such as "1,8:8,1;1,10:10,1"."""
    return ";".join(f"{','.join(map(str, value.shape))}:{','.join(map(str, value.stride()))}" for value in values)


def _parse_layouts(text: str) -> Iterator[tuple[list[int], list[int]]]:
    for output in text.split(";"):
        size, stride = ([int(number) for number in part.split(",") if number] for part in output.split(":"))
        yield size, stride


@dataclass
class _GraphEmitter:
    """Copies a graph in topological order, and replaces each partition by one delegate call."""

    program: ExportedProgram
    partitions: Sequence[Partition]
    payload_nodes: dict[int, Node]
    orders: DimOrders
    graph: Graph
    traces: Sequence[Sequence[Trace]] = ()
    copies: dict[Node, Node] = field(default_factory=dict)
    converted: dict[tuple[Node, torch.memory_format], Node] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.owner = {output: i for i, partition in enumerate(self.partitions) for output in partition.outputs}

    def emit(self, wanted: Node) -> None:
        """Copies `wanted` and all nodes that it depends on, each of them once."""
        pending = [wanted]
        while pending:
            node = pending[-1]
            if node in self.copies:
                pending.pop()
                continue
            number = self.owner.get(node)
            needs = node.all_input_nodes if number is None else self.partitions[number].inputs
            missing = [need for need in needs if need not in self.copies]
            if missing:
                pending.extend(reversed(missing))
            elif number is None:
                self.copies[node] = self._copy_node(node)
            else:
                self._emit_call(number)

    def emit_all(self, inputs: Set[str]) -> None:
        """Copies the placeholders in `inputs`, then all nodes that outputs and impure operators depend on."""
        for node in self.program.graph.nodes:
            if node.op == "placeholder" and node.name in inputs:
                self.emit(node)
        self._emit_writes()
        for node in self.program.graph.nodes:
            if node.op == "output" or (node.op == "call_function" and node.is_impure()):
                self.emit(node)

    def _emit_writes(self) -> None:
        """Copies the operators that store the next values of states, after all reads of the old values."""
        nodes = self.program.graph.nodes
        writes = [node for node in nodes if node.op == "call_function" and writes_memory(node)]
        for node in (*writes, *(node for node in nodes if writes and node.op == "output")):
            for need in node.all_input_nodes:
                self.emit(need)
        for write in writes:
            self.emit(write)

    def _copy_node(self, node: Node) -> Node:
        """Copies a node outside of all partitions, and converts its operands to the dim order that it requires."""
        operand = self.copies.__getitem__
        if node.op == "output":
            operand = self._returned_value
        elif node.op == "call_function" and not is_quantize(node) and not is_dequantize(node):
            operand = self._cpu_operand
        copy = self.graph.node_copy(node, operand)
        if "val" in node.meta:
            copy.meta["val"] = self.orders.values[node]
        if "memory_format" in copy.kwargs:
            copy.kwargs = {**copy.kwargs, "memory_format": torch.contiguous_format}
        return copy

    def _cpu_operand(self, node: Node) -> Node:
        copy = self.copies[node]
        value = copy.meta.get("val")
        is_ordered = not isinstance(value, torch.Tensor) or value.is_contiguous()
        return copy if is_ordered else self._convert_dim_order(copy, torch.contiguous_format)

    def _returned_value(self, node: Node) -> Node:
        """Returns an output of the program as NHWC if the converted module returned it as NHWC."""
        copy = self.copies[node]
        is_ordered = is_nhwc(copy.meta.get("val")) or not is_nhwc(node.meta.get("val"))
        return copy if is_ordered else self._convert_dim_order(copy, torch.channels_last)

    def _emit_call(self, number: int) -> None:
        partition = self.partitions[number]
        inputs = [self._delegate_operand(self.copies[node]) for node in partition.inputs]
        values = [self.orders.values[node] for node in partition.outputs]
        call = self.graph.call_function(
            partition_operator(), (inputs, self.payload_nodes[number], _layouts_text(values))
        )
        empty = _empty_like(self.payload_nodes[number].meta["val"])
        call.meta = {"val": [empty, *values], "stack_trace": partition.clusters[0].node.meta.get("stack_trace")}
        for index, (output, value) in enumerate(zip(partition.outputs, values, strict=True)):
            item = self.graph.call_function(operator.getitem, (call, _FIRST_OUTPUT + index))
            item.meta = {**output.meta, "val": value}
            if index == 0 and self.traces:
                item = self._insert_traces(item, self.traces[number])
            self.copies[output] = item

    def _insert_traces(self, value: Node, traces: Sequence[Trace]) -> Node:
        """Inserts `traces` after `value`; returns the last of them."""
        for trace in traces:
            arguments = (value, trace.node.name, list(trace.kernels), trace.count)
            meta: dict[str, Any] = {key: trace.node.meta[key] for key in _SOURCE if key in trace.node.meta}
            meta["val"] = torch.empty_like(value.meta["val"])
            value = self.graph.call_function(trace_operator(), arguments)
            value.meta = meta
        return value

    def _delegate_operand(self, node: Node) -> Node:
        value = node.meta["val"]
        is_ordered = value.is_contiguous() or is_nhwc(value)
        return node if is_ordered else self._convert_dim_order(node, torch.contiguous_format)

    def _convert_dim_order(self, node: Node, memory_format: torch.memory_format) -> Node:
        """Returns a copy of `node` in `memory_format`; all readers that require that format share the copy."""
        key = (node, memory_format)
        if key not in self.converted:
            copy = clone(self.graph, node, memory_format=memory_format)
            copy.meta = {**node.meta, "val": torch.empty_like(node.meta["val"], memory_format=memory_format)}
            self.converted[key] = copy
        return self.converted[key]


def replace_partitions(
    program: ExportedProgram,
    partitions: Sequence[Partition],
    payloads: Sequence[bytes],
    orders: DimOrders,
    traces: Sequence[Sequence[Trace]] = (),
) -> ExportedProgram:
    """Returns a copy of `program` in which each partition is a delegate call. Linear in nodes and bytes.

    `payloads` are the payloads of the partitions, `traces` their traces for profiling, if any. Values have the dim
    orders in `orders`; a copy is inserted if a reader requires another order. Constants that only partitions read are
    removed. A program without partitions is copied too, and `is_partitioned` is true for the copy.
    """
    graph = Graph()
    stored = _payload_constants(graph, partitions, payloads)
    payload_nodes = {number: node for number, (node, _) in enumerate(stored)}
    emission = _GraphEmitter(program, partitions, payload_nodes, orders, graph, traces)
    kept_inputs = _kept_inputs(program, partitions)
    emission.emit_all({spec.arg.name for spec in kept_inputs})
    note(output_node(graph), _PARTITIONED, True)
    payload_specs = [
        InputSpec(InputKind.CONSTANT_TENSOR, TensorArgument(name=node.name), target=_payload_name(number))
        for number, node in payload_nodes.items()
    ]
    tensors = {_payload_name(number): tensor for number, (_, tensor) in enumerate(stored)}
    return with_graph(
        program,
        graph,
        emission.copies,
        inputs=[*payload_specs, *kept_inputs],
        constants={**_nchw_constants(program.constants, kept_inputs), **tensors},
        state=_nchw_constants(program.state_dict, kept_inputs),
        kind=_PartitionedProgram,
    )


class _PartitionedProgram(ExportedProgram):
    """The result of `replace_partitions`. ExecuTorch decomposes it before it writes the edge dialect.

    torch decomposes a program by tracing it again, after it has searched all operators of all libraries for those that
    it may decompose. This takes as long as the compilation of a network. The usual program calls delegates and
    quantizes, and has nothing to decompose.
    """

    def run_decompositions(
        self,
        decomp_table: dict[torch._ops.OperatorBase, Callable[..., Any]] | None = None,
        decompose_custom_triton_ops: bool = False,
    ) -> ExportedProgram:
        """Returns the decomposed program: a copy if no operator can be decomposed. Linear in nodes."""
        if not is_decomposed(self):
            decomposed: ExportedProgram = super().run_decompositions(decomp_table, decompose_custom_triton_ops)
            return decomposed
        if self.verifiers == [Verifier]:
            return self
        graph, copies = Graph(), dict[Node, Node]()
        graph.output(graph.graph_copy(self.graph, copies)).meta = dict(output_node(self.graph).meta)
        return with_graph(self, graph, copies, verifiers=[Verifier], kind=_PartitionedProgram)


def is_decomposed(program: ExportedProgram) -> bool:
    """Whether a program is a result of `replace_partitions` that `run_decompositions` does not change.

    Such a program only calls delegates, quantizes and dequantizes, and returns the results.
    """
    if not isinstance(program, _PartitionedProgram):
        return False
    if any(spec.kind is not OutputKind.USER_OUTPUT for spec in program.graph_signature.output_specs):
        return False
    returned = output_node(program.graph).args[0]
    assert isinstance(returned, (tuple, list))
    computed = [value for value in returned if isinstance(value, Node) and value.op == "call_function"]
    if len(set(computed)) < len(returned):  # torch copies an input that is returned
        return False
    return all(map(_needs_no_decomposition, program.graph.nodes))


def _needs_no_decomposition(node: Node) -> bool:
    if node.op != "call_function" or node.target is operator.getitem:
        return node.op != "get_attr"
    return is_delegate_call(node) or is_trace(node) or is_quantize(node) or is_dequantize(node)


def _payload_name(number: int) -> str:
    return f"_openneutron_payload_{number}"


def _payload_constants(
    graph: Graph, partitions: Sequence[Partition], payloads: Sequence[bytes]
) -> list[tuple[Node, torch.Tensor]]:
    """Adds a placeholder for each payload to `graph`; returns the placeholders, and the bytes as uint8 tensors."""
    stored = []
    for number, (partition, payload) in enumerate(zip(partitions, payloads, strict=True)):
        tensor = torch.from_numpy(np.frombuffer(payload, np.uint8).copy())
        node = graph.placeholder(_payload_name(number))
        node.meta["val"] = partition.outputs[0].meta["val"].fake_mode.from_tensor(tensor, static_shapes=True)
        stored.append((node, tensor))
    return stored


def _kept_inputs(program: ExportedProgram, partitions: Sequence[Partition]) -> list[InputSpec]:
    """Returns the inputs of the program without the constants that only partitions read."""
    read = _read_outside(program, partitions)
    return [spec for spec in program.graph_signature.input_specs if _is_kept(spec, read)]


def _read_outside(program: ExportedProgram, partitions: Sequence[Partition]) -> set[str]:
    """Returns the names of the placeholders that nodes outside all partitions read, or that are partition inputs.

    Searches backwards from the graph outputs, impure nodes and partition inputs, and stops at partitions.
    """
    outputs = {output for partition in partitions for output in partition.outputs}
    pending = [node for node in program.graph.nodes if node.op == "output" or node.is_impure()]
    pending = [node for node in pending if node.op != "placeholder"]
    pending += [node for partition in partitions for node in partition.inputs]
    seen: set[Node] = set()
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            pending.extend([] if node in outputs else node.all_input_nodes)
    return {node.name for node in seen if node.op == "placeholder"}


def _is_kept(spec: InputSpec, read: set[str]) -> bool:
    return spec.kind is InputKind.USER_INPUT or getattr(spec.arg, "name", None) in read


def _nchw_constants(stored: Mapping[str, Any], inputs: Sequence[InputSpec]) -> dict[str, torch.Tensor]:
    """Converts the stored constants that are not NCHW to NCHW, for CPU operators. Returns only these, by name."""
    ordered = {}
    for name in (spec.target for spec in inputs if spec.target is not None):
        constant = stored.get(name)
        if isinstance(constant, torch.Tensor) and constant.stride() != nchw_strides(constant.shape):
            data = constant.detach().clone(memory_format=torch.contiguous_format)
            is_parameter = isinstance(constant, torch.nn.Parameter)
            ordered[name] = torch.nn.Parameter(data, constant.requires_grad) if is_parameter else data
    return ordered
