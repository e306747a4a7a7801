"""Padding of operands to multiples of the MACs per pipeline, for limits of the legacy generation.

`OpSpec.pads` lists the dimensions of an operator's arguments that may be padded. The padding is the code of real zero,
at the end of a dimension, and a slice removes the additional elements from the output. `ir.absorption` later removes
padding and slices that neighboring operators can absorb.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from torch.fx import Graph, Node, map_arg

from openneutron.core.evaluation import infer_meta
from openneutron.core.fx import shape_of
from openneutron.ir.cost import cpu_cycles, cycles_of
from openneutron.ir.graph import Layout, Op, QParams, Tensor
from openneutron.ops.lowering import INT8, INT32, Lowering
from openneutron.ops.op_instance import OpInstance
from openneutron.ops.slices_and_concats import slice_tensor
from openneutron.ops.spec import OpSpec, PaddedDimensions
from openneutron.ops.windows import pad_at_end

__all__ = ["PaddedInstance", "pad_to_alignment"]


@dataclass(frozen=True, eq=False)
class PaddedInstance:
    """An operator instance on padded operands."""

    spec: OpSpec
    original: OpInstance
    instance: OpInstance
    """The same call on placeholders with the padded shapes."""
    padded_operands: Mapping[Node, Node]
    """The placeholder for each operand."""

    def lower(self, lowering: Lowering) -> Tensor:
        """Emits the padding, the operator and the slice of its output. `lowering` belongs to `original`."""
        operands = {
            stand_in: _pad_tensor(lowering, lowering.operands[operand], shape_of(stand_in))
            for operand, stand_in in self.padded_operands.items()
        }
        output = self.spec.lower(replace(lowering, instance=self.instance, operands=operands))
        return slice_tensor(lowering, output, (0,) * len(output.shape), lowering.shape)

    @cached_property
    def cycles(self) -> int:
        """The estimated cycles of the padded operator on the NPU. Transposes and reshapes are not counted, because the
        layout pass removes most of them.
        """
        ops: list[Op] = []
        weights = {self.spec.weight, self.spec.bias}
        constants = {self.original.args[name] for name in weights if name is not None}
        operands = {node: _cost_tensor(node, is_constant=node in constants) for node in self.padded_operands}
        self.lower(Lowering(self.original, operands, QParams.per_tensor(1.0, 0), "NONE", ops))
        return cycles_of((op for op in ops if op.kind.layout is not Layout.VIEW), self.instance.target)

    @cached_property
    def cpu_cycles(self) -> int:
        """The estimated cycles of the original on the CPU."""
        elements = sum(math.prod(shape_of(node)) for node in self.padded_operands) + math.prod(self.original.shape)
        return cpu_cycles(elements, self.spec.macs(self.original))


def pad_to_alignment(spec: OpSpec, instance: OpInstance) -> PaddedInstance | None:
    """Pads all dimensions of `OpSpec.pads` to multiples of the MACs per pipeline.

    Returns None if the operator has no such dimensions, or still breaks a limit.
    """
    dimensions = spec.padded_dimensions(instance)
    if not dimensions:
        return None
    padded_operands, call = _call_on_padded_operands(instance, dimensions)
    padded = PaddedInstance(spec, instance, replace(instance, node=call), padded_operands)
    return None if spec.rejections(padded.instance, instance.generation) else padded


def _call_on_padded_operands(instance: OpInstance, dimensions: PaddedDimensions) -> tuple[dict[Node, Node], Node]:
    """Adds the call to a new graph, on placeholders with the padded shapes. Returns the placeholders and the call."""
    node, graph = instance.node, Graph()
    padded = {instance.args[name]: dims for name, dims in dimensions.items() if isinstance(instance.args[name], Node)}
    for name, dims in dimensions.items():
        if isinstance(instance.args[name], (list, tuple)):
            padded.update(dict.fromkeys(instance.args[name], dims))
    padded_operands = {}
    for operand in node.all_input_nodes:
        padded_operands[operand] = graph.placeholder(operand.name)
        value = operand.meta["val"]
        shape = _aligned_shape(instance, value.shape, padded.get(operand, ()))
        padded_operands[operand].meta["val"] = value.new_empty(shape)
    call = graph.create_node(
        "call_function",
        node.target,
        map_arg(node.args, padded_operands.__getitem__),
        map_arg(node.kwargs, padded_operands.__getitem__),
        name=node.name,
    )
    call.meta = {**node.meta, "val": infer_meta(call)}
    return padded_operands, call


def _aligned_shape(instance: OpInstance, shape: Sequence[int], dims: Sequence[int]) -> tuple[int, ...]:
    rank = len(shape)
    padded = {dim % rank for dim in dims if -rank <= dim < rank}
    return tuple(instance.target.align_channels(size) if dim in padded else size for dim, size in enumerate(shape))


def _pad_tensor(lowering: Lowering, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Pads `tensor` to `shape` with real zero at the end of each dimension.

    Emits a PAD for an activation; returns a new constant for a constant.
    """
    if tensor.data is None or tensor.shape == shape:
        return pad_at_end(lowering, tensor, shape)
    paddings = tuple((0, size - old) for size, old in zip(shape, tensor.shape, strict=True))
    qparams, axis = tensor.qparams, tensor.qparams.axis
    if axis is not None:
        more = paddings[axis][1]
        qparams = QParams(
            qparams.scale + qparams.scale[-1:] * more, qparams.zero_point + qparams.zero_point[-1:] * more, axis
        )
    return lowering.constant(np.pad(tensor.data, paddings, constant_values=tensor.qparams.zero_point[0]), qparams)


def _cost_tensor(node: Node, *, is_constant: bool) -> Tensor:
    """Returns a tensor of the node's shape for the cost estimate."""
    shape = shape_of(node)
    dtype = INT32 if is_constant and len(shape) == 1 else INT8
    data = np.zeros(shape, dtype) if is_constant else None
    return Tensor(shape, dtype, QParams.per_tensor(1.0, 0), data)
