"""A partition as one operator, so that ExecuTorch's passes walk over what is left and not over what is compiled.

The operator carries its compiled payload as a constant: nothing is kept outside the program.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, OutputSpec, TensorArgument
from torch.fx import Graph, GraphModule, Node

from openneutron.fx import output_node
from openneutron.partition.levels import Partition

__all__ = ["is_opaque", "is_searched", "partition_operator", "replace_partitions"]

Spec = TypeVar("Spec", InputSpec, OutputSpec)

_NAMESPACE = "openneutron"
_NAME = "partition"
# In the metadata of the output node, under the one key that ExecuTorch's passes hand on.
_SEARCHED = "openneutron.searched"


@functools.cache
def _library() -> torch.library.Library:
    library = torch.library.Library(_NAMESPACE, "DEF")
    library.define(f"{_NAME}(Tensor[] inputs, Tensor payload, str outputs) -> Tensor[]")
    library.impl(_NAME, _fake_outputs, "Meta")
    return library


def partition_operator() -> torch._ops.OpOverload:
    """partition(inputs, payload, outputs): int8 inputs, a uint8 payload, the outputs' sizes and strides as text."""
    _library()
    return getattr(torch.ops, _NAMESPACE).partition.default  # type: ignore[no-any-return]


def is_opaque(node: Node) -> bool:
    """Whether `node` is a partition, in the ATen or in the edge dialect."""
    return partition_operator() in (node.target, getattr(node.target, "_op", None))


def is_searched(program: ExportedProgram) -> bool:
    """Whether `replace_partitions` made this program, or one that it was decomposed from."""
    return _SEARCHED in output_node(program.graph).meta.get("custom", {})


def _fake_outputs(_: Sequence[torch.Tensor], payload: torch.Tensor, outputs: str) -> list[torch.Tensor]:
    described = _parse(outputs)
    return [torch.empty_strided(size, stride, dtype=torch.int8, device=payload.device) for size, stride in described]


def _describe(values: Sequence[torch.Tensor]) -> str:
    """Sizes and strides as text: "1,8:8,1;1,10:10,1"."""
    return ";".join(
        f"{','.join(map(str, value.shape))}:{','.join(map(str, value.stride()))}" for value in values
    )


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
    graph: Graph
    copies: dict[Node, Node] = field(default_factory=dict)

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
                self.copies[node] = self.graph.node_copy(node, self.copies.__getitem__)
            else:
                self._call(number)

    def _call(self, number: int) -> None:
        partition = self.partitions[number]
        inputs = [self._in_order(self.copies[node]) for node in partition.inputs]
        values = [_at_least_one_dimension(_in_order(node.meta["val"])) for node in partition.outputs]
        call = self.graph.call_function(
            partition_operator(), (inputs, self.payload_nodes[number], _describe(values))
        )
        call.meta = {"val": values, "stack_trace": partition.clusters[0].node.meta.get("stack_trace")}
        for index, (output, value) in enumerate(zip(partition.outputs, values, strict=True)):
            item = self.graph.call_function(operator.getitem, (call, index))
            item.meta = {**output.meta, "val": value}
            self.copies[output] = self._as_scalar(item) if output.meta["val"].dim() == 0 else item

    def _as_scalar(self, node: Node) -> Node:
        """Without its one dimension."""
        scalar = self.graph.call_function(torch.ops.aten.view.default, (node, []))
        scalar.meta = {**node.meta, "val": node.meta["val"].view([])}
        return scalar

    def _in_order(self, node: Node) -> Node:
        """`node` itself, or a copy of it in an order that a delegate takes."""
        value = node.meta["val"]
        ordered = _in_order(value)
        if ordered is value:
            return node
        copy = self.graph.call_function(
            torch.ops.aten.clone.default, (node,), {"memory_format": torch.contiguous_format}
        )
        copy.meta = {**node.meta, "val": ordered}
        return copy


def _in_order(value: torch.Tensor) -> torch.Tensor:
    """A fake tensor as a delegate takes and yields it: NCHW or NHWC, whatever strides a permute before it left."""
    if value.is_contiguous() or (value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last)):
        return value
    return value.contiguous()


def _at_least_one_dimension(value: torch.Tensor) -> torch.Tensor:
    """ExecuTorch's verifier takes the length of the first output, which a tensor without dimensions does not have."""
    return value if value.dim() else value.view(1)


def replace_partitions(
    program: ExportedProgram, partitions: Sequence[Partition], payloads: Sequence[bytes]
) -> ExportedProgram:
    """A copy of `program` in which each partition is one operator that holds its payload. Linear in nodes and bytes.

    Constants that only partitions read are gone from it. A program without partitions is copied as well: the copy says
    that it was searched.
    """
    tensors = {
        f"_openneutron_payload_{i}": torch.from_numpy(np.frombuffer(payload, np.uint8).copy())
        for i, payload in enumerate(payloads)
    }
    graph = Graph()
    payload_nodes = {}
    for number, (name, tensor) in enumerate(tensors.items()):
        payload_nodes[number] = graph.placeholder(name)
        fake_mode = partitions[number].outputs[0].meta["val"].fake_mode
        payload_nodes[number].meta["val"] = fake_mode.from_tensor(tensor, static_shapes=True)
    emission = _Emission(program, partitions, payload_nodes, graph)
    read = _read_outside(program, partitions)
    kept_inputs = [spec for spec in program.graph_signature.input_specs if _is_kept(spec, read)]
    names = {spec.arg.name for spec in kept_inputs}
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in names:
            emission.emit(node)
    for node in program.graph.nodes:
        if node.op == "output" or (node.op == "call_function" and node.is_impure()):
            emission.emit(node)
    returned = output_node(graph)
    returned.meta["custom"] = {**returned.meta.get("custom", {}), _SEARCHED: True}
    payload_specs = [
        InputSpec(InputKind.CONSTANT_TENSOR, TensorArgument(name=node.name), target=name)
        for node, name in zip(payload_nodes.values(), tensors, strict=True)
    ]
    renamed = {old.name: new.name for old, new in emission.copies.items()}
    signature = program.graph_signature
    return ExportedProgram(
        root=GraphModule(program.graph_module, graph),
        graph=graph,
        graph_signature=ExportGraphSignature(
            [*payload_specs, *(_renamed(spec, renamed) for spec in kept_inputs)],
            [_renamed(spec, renamed) for spec in signature.output_specs],
        ),
        state_dict=program.state_dict,
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        example_inputs=program.example_inputs,
        constants={**program.constants, **tensors},
        verifiers=program.verifiers,
    )


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


def _renamed(spec: Spec, names: dict[str, str]) -> Spec:
    """torch.fx gives a placeholder named like a builtin ('input') another name."""
    name = getattr(spec.arg, "name", None)
    return spec if name not in names else replace(spec, arg=replace(spec.arg, name=names[name]))
