"""A partition as one operator, so that ExecuTorch's passes walk over what is left and not over what is compiled.

The operator carries its compiled payload as a constant: nothing is kept outside the program. For profiling, an operator
without effect follows it for each operator of the model that it computes: ExecuTorch gives each a debug handle, with
the user's source lines, which the NPU's kernels can be mapped to.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.fx import Graph, Node

from openneutron.core.fx import is_dequantize, is_quantize, note, noted, output_node
from openneutron.ops.graph_builder import clone
from openneutron.partition.dim_orders import DimOrders, is_nhwc, nchw_strides
from openneutron.partition.programs import with_graph
from openneutron.partition.scheduling import Partition
from openneutron.passes.functionalize import writes_memory

__all__ = [
    "Trace", "chain_end", "is_delegate_call", "is_searched", "is_trace", "outputs_by_node", "partition_operator",
    "replace_partitions",
]  # fmt: skip

_NAMESPACE = "openneutron"
_NAME = "partition"
_TRACE = "trace"
# The operator returns an empty tensor in front of the partition's outputs, which nothing reads. ExecuTorch's verifier
# takes the first tensor of a returned list apart along its first dimension: that takes seconds for thousands of rows,
# and fails for a tensor without dimensions.
_FIRST_OUTPUT = 1
# Where a node's metadata have the user's code.
_SOURCE = ("stack_trace", "nn_module_stack")
# A note on the output node.
_SEARCHED = "openneutron.searched"


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
    """An operator of the model in a partition, and which of the `count` kernels on the NPU compute it, by number."""

    node: Node
    kernels: tuple[int, ...]
    count: int


def trace_operator() -> torch._ops.OpOverload:
    """trace(value, node, kernels, count): the value, behind a partition that computes the node with those kernels."""
    _library()
    return getattr(torch.ops, _NAMESPACE).trace.default  # type: ignore[no-any-return]


def is_trace(node: Node) -> bool:
    """Whether `node` stands for an operator in a partition, in the ATen or in the edge dialect."""
    return trace_operator() in (node.target, getattr(node.target, "_op", None))


def chain_end(node: Node) -> Node:
    """`node`, or the last of the traces that follow it."""
    while following := next(filter(is_trace, node.users), None):
        node = following
    return node


def partition_operator() -> torch._ops.OpOverload:
    """partition(inputs, payload, outputs): an empty tensor, and the outputs of a partition.

    It takes int8 inputs, a uint8 payload, and the outputs' sizes and strides as text.
    """
    _library()
    return getattr(torch.ops, _NAMESPACE).partition.default  # type: ignore[no-any-return]


def is_delegate_call(node: Node) -> bool:
    """Whether `node` is a partition, in the ATen or in the edge dialect."""
    return partition_operator() in (node.target, getattr(node.target, "_op", None))


def outputs_by_node(opaque: Node) -> dict[Node, int]:
    """The number of each output of a partition, by the node of the edge program that yields it."""
    items = (user for user in opaque.users if user.target is operator.getitem)
    return {chain_end(item): cast(int, item.args[1]) - _FIRST_OUTPUT for item in items}


def is_searched(program: ExportedProgram) -> bool:
    """Whether `replace_partitions` made this program, or one that it was decomposed from."""
    return bool(noted(output_node(program.graph), _SEARCHED))


def _fake_outputs(_: Sequence[torch.Tensor], payload: torch.Tensor, outputs: str) -> list[torch.Tensor]:
    described = _parse(outputs)
    values = [torch.empty_strided(size, stride, dtype=torch.int8, device=payload.device) for size, stride in described]
    return [_nothing(payload), *values]


def _nothing(like: torch.Tensor) -> torch.Tensor:
    return like.new_empty(0, dtype=torch.int8)


def _describe(values: Sequence[torch.Tensor]) -> str:
    """Sizes and strides as text: "1,8:8,1;1,10:10,1"."""
    return ";".join(f"{','.join(map(str, value.shape))}:{','.join(map(str, value.stride()))}" for value in values)


def _parse(text: str) -> Iterator[tuple[list[int], list[int]]]:
    for output in text.split(";"):
        size, stride = ([int(number) for number in part.split(",") if number] for part in output.split(":"))
        yield size, stride


@dataclass
class _Emission:
    """Copies a graph, each partition as one node, every node behind what it reads."""

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
        """Copy `wanted` and all it needs; each node once."""
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
                self.copies[node] = self._copy(node)
            else:
                self._call(number)

    def emit_all(self, inputs: Set[str]) -> None:
        """Copy the placeholders of these names, then all that the outputs and effects of the program need."""
        for node in self.program.graph.nodes:
            if node.op == "placeholder" and node.name in inputs:
                self.emit(node)
        self._emit_writes()
        for node in self.program.graph.nodes:
            if node.op == "output" or (node.op == "call_function" and node.is_impure()):
                self.emit(node)

    def _emit_writes(self) -> None:
        """Copy the operators that store next values of states, behind all reads of the old values."""
        nodes = self.program.graph.nodes
        writes = [node for node in nodes if node.op == "call_function" and writes_memory(node)]
        for node in (*writes, *(node for node in nodes if writes and node.op == "output")):
            for need in node.all_input_nodes:
                self.emit(need)
        for write in writes:
            self.emit(write)

    def _copy(self, node: Node) -> Node:
        """A node outside of all partitions, its operands in the order that it takes."""
        operand = self.copies.__getitem__
        if node.op == "output":
            operand = self._as_in_the_module
        elif node.op == "call_function" and not is_quantize(node) and not is_dequantize(node):
            operand = self._for_the_cpu
        copy = self.graph.node_copy(node, operand)
        if "val" in node.meta:
            copy.meta["val"] = self.orders.values[node]
        if "memory_format" in copy.kwargs:
            copy.kwargs = {**copy.kwargs, "memory_format": torch.contiguous_format}
        return copy

    def _for_the_cpu(self, node: Node) -> Node:
        copy = self.copies[node]
        value = copy.meta.get("val")
        is_ordered = not isinstance(value, torch.Tensor) or value.is_contiguous()
        return copy if is_ordered else self._converted(copy, torch.contiguous_format)

    def _as_in_the_module(self, node: Node) -> Node:
        """Channels last, where the converted module returned it so."""
        copy = self.copies[node]
        lies_so = is_nhwc(copy.meta.get("val")) or not is_nhwc(node.meta.get("val"))
        return copy if lies_so else self._converted(copy, torch.channels_last)

    def _call(self, number: int) -> None:
        partition = self.partitions[number]
        inputs = [self._for_a_delegate(self.copies[node]) for node in partition.inputs]
        values = [self.orders.values[node] for node in partition.outputs]
        call = self.graph.call_function(partition_operator(), (inputs, self.payload_nodes[number], _describe(values)))
        nothing = _nothing(self.payload_nodes[number].meta["val"])
        call.meta = {"val": [nothing, *values], "stack_trace": partition.clusters[0].node.meta.get("stack_trace")}
        for index, (output, value) in enumerate(zip(partition.outputs, values, strict=True)):
            item = self.graph.call_function(operator.getitem, (call, _FIRST_OUTPUT + index))
            item.meta = {**output.meta, "val": value}
            if index == 0 and self.traces:
                item = self._traced(item, self.traces[number])
            self.copies[output] = item

    def _traced(self, value: Node, traces: Sequence[Trace]) -> Node:
        """`value`, behind the operators that its partition computes."""
        for trace in traces:
            arguments = (value, trace.node.name, list(trace.kernels), trace.count)
            meta: dict[str, Any] = {key: trace.node.meta[key] for key in _SOURCE if key in trace.node.meta}
            meta["val"] = torch.empty_like(value.meta["val"])
            value = self.graph.call_function(trace_operator(), arguments)
            value.meta = meta
        return value

    def _for_a_delegate(self, node: Node) -> Node:
        value = node.meta["val"]
        is_ordered = value.is_contiguous() or is_nhwc(value)
        return node if is_ordered else self._converted(node, torch.contiguous_format)

    def _converted(self, node: Node, memory_format: torch.memory_format) -> Node:
        """A copy of `node` in another order, one for all who read it so."""
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
    """A copy of `program` in which each partition is one operator that holds its payload. Linear in nodes and bytes.

    Its values lie in memory as `orders` has it, converted where who reads them wants another order. Constants that
    only partitions read are gone from it. A program without partitions is copied as well: the copy says that it was
    searched. `traces`, where there are any, are those of each partition.
    """
    graph = Graph()
    stored = _payload_constants(graph, partitions, payloads)
    payload_nodes = {number: node for number, (node, _) in enumerate(stored)}
    emission = _Emission(program, partitions, payload_nodes, orders, graph, traces)
    kept_inputs = _kept_inputs(program, partitions)
    emission.emit_all({spec.arg.name for spec in kept_inputs})
    note(output_node(graph), _SEARCHED, True)
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
        constants={**_in_nchw(program.constants, kept_inputs), **tensors},
        state=_in_nchw(program.state_dict, kept_inputs),
    )


def _payload_name(number: int) -> str:
    return f"_openneutron_payload_{number}"


def _payload_constants(
    graph: Graph, partitions: Sequence[Partition], payloads: Sequence[bytes]
) -> list[tuple[Node, torch.Tensor]]:
    """The placeholder of each payload, written into `graph`, and its bytes as a uint8 tensor."""
    stored = []
    for number, (partition, payload) in enumerate(zip(partitions, payloads, strict=True)):
        tensor = torch.from_numpy(np.frombuffer(payload, np.uint8).copy())
        node = graph.placeholder(_payload_name(number))
        node.meta["val"] = partition.outputs[0].meta["val"].fake_mode.from_tensor(tensor, static_shapes=True)
        stored.append((node, tensor))
    return stored


def _kept_inputs(program: ExportedProgram, partitions: Sequence[Partition]) -> list[InputSpec]:
    """The inputs of the program without the constants that only partitions read."""
    read = _read_outside(program, partitions)
    return [spec for spec in program.graph_signature.input_specs if _is_kept(spec, read)]


def _read_outside(program: ExportedProgram, partitions: Sequence[Partition]) -> set[str]:
    """Names of the placeholders that something outside all partitions reads, or a partition as its input."""
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


def _in_nchw(stored: Mapping[str, Any], inputs: Sequence[InputSpec]) -> dict[str, torch.Tensor]:
    """Those of the stored constants of a program that lie in another order than CPU operators take, in that order."""
    ordered = {}
    for name in (spec.target for spec in inputs if spec.target is not None):
        constant = stored.get(name)
        if isinstance(constant, torch.Tensor) and constant.stride() != nchw_strides(constant.shape):
            data = constant.detach().clone(memory_format=torch.contiguous_format)
            is_parameter = isinstance(constant, torch.nn.Parameter)
            ordered[name] = torch.nn.Parameter(data, constant.requires_grad) if is_parameter else data
    return ordered
