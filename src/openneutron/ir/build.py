"""From the operators of a partition to the IR, and through its passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np
from torch.fx import Node

from openneutron.ir.absorption import absorb_padding
from openneutron.ir.graph import Array, Graph, Op, QParams, Tensor
from openneutron.ir.layout import sink_views
from openneutron.ir.rewrites import (
    copy_unwritten_outputs,
    merge_slices,
    remove_dead_operators,
    share_constants,
    share_results,
)
from openneutron.ir.verify import verify
from openneutron.ir.views import RESHAPE, TRANSPOSE
from openneutron.targets import NeutronTarget

__all__ = ["Lowerable", "build", "optimize"]

INT8 = np.dtype(np.int8)
TO_CHANNELS_FIRST = (0, 3, 1, 2)
TO_CHANNELS_LAST = (0, 2, 3, 1)
SHARING = (remove_dead_operators, share_constants, share_results)


class Lowerable(Protocol):
    """A quantized operator that can write itself."""

    @property
    def operands(self) -> tuple[Node, ...]:
        """The dequantize nodes it reads."""

    @property
    def quantize(self) -> Node:
        """The node that yields its int8 output."""

    def lower(self, operands: dict[Node, Tensor], ops: list[Op]) -> Tensor:
        """Append its operators to `ops`; returns its output in torch's dimension order."""


def build(
    operators: Iterable[Lowerable],
    inputs: Mapping[Node, QParams],
    outputs: Sequence[Node],
    constant: Callable[[Node], Array | None],
    qparams_of: Callable[[Node], QParams],
    *,
    channels_last: Callable[[Node], bool],
) -> Graph:
    """The IR of `operators`, in their order, as it comes: each in torch's dimension order, views around what is NHWC.

    `inputs` are the int8 values it reads, `outputs` those it yields; either is NHWC in memory where `channels_last`
    says so, and has shape [1] where its node has no dimensions: LiteRT gives no access to a scalar's memory. `constant`
    gives the values of a constant node, `qparams_of` those of a dequantize node.
    """
    ops: list[Op] = []
    values: dict[Node, Tensor] = {}
    stored_inputs = []
    for node, qparams in inputs.items():
        shape = tuple(node.meta["val"].shape)
        if channels_last(node):
            stored = Tensor(tuple(shape[dim] for dim in TO_CHANNELS_LAST), INT8, qparams)
            values[node] = _transpose(ops, stored, TO_CHANNELS_FIRST, node.name)
        elif not shape:
            stored = Tensor((1,), INT8, qparams)
            values[node] = _reshape(ops, stored, (), node.name)
        else:
            stored = values[node] = Tensor(shape, INT8, qparams)
        stored_inputs.append(stored)
    for operator in operators:
        operands = {}
        for dequantize in operator.operands:
            source = dequantize.args[0]
            assert isinstance(source, Node)  # the clusters hold nothing else
            operands[dequantize] = values.get(source) or _constant(constant(source), qparams_of(dequantize))
        values[operator.quantize] = operator.lower(operands, ops)
    stored_outputs = []
    for node in outputs:
        stored = values[node]
        if channels_last(node):
            stored = _transpose(ops, stored, TO_CHANNELS_LAST, node.name)
        elif not stored.shape:
            stored = _reshape(ops, stored, (1,), node.name)
        stored_outputs.append(stored)
    return verify(Graph(tuple(stored_inputs), tuple(stored_outputs), tuple(ops)), "build")


def optimize(graph: Graph, target: NeutronTarget | None = None) -> Graph:
    """All passes in their order, the IR verified after each; those that weigh costs need a `target`.

    In all, no more is transposed than was asked for: where views would sink behind what makes values larger, and meet
    too few that they cancel with, all of them stay where they are. Linear in operators and in the bytes of constants.
    """
    graph = _passed(graph, merge_slices, *SHARING)
    graph = min(_passed(graph, sink_views, *SHARING), graph, key=_cost)
    if target is not None:
        graph = verify(absorb_padding(graph, target), "absorb_padding")
    return _passed(graph, merge_slices, *SHARING, copy_unwritten_outputs)


def _passed(graph: Graph, *passes: Callable[[Graph], Graph]) -> Graph:
    for transform in passes:
        graph = verify(transform(graph), transform.__name__)
    return graph


def _cost(graph: Graph) -> tuple[int, int]:
    """How many elements are transposed, and how many operators there are."""
    return sum(op.output.size for op in graph.ops if op.kind is TRANSPOSE), len(graph.ops)


def is_channels_last(node: Node) -> bool:
    """Whether the values of a rank-4 node lie in NHWC order, and not in NCHW order too."""
    import torch

    value = node.meta["val"]
    return (
        value.dim() == 4
        and value.is_contiguous(memory_format=torch.channels_last)
        and not value.is_contiguous(memory_format=torch.contiguous_format)
    )


def _transpose(ops: list[Op], tensor: Tensor, perm: tuple[int, ...], origin: str) -> Tensor:
    output = Tensor(tuple(tensor.shape[dim] for dim in perm), tensor.dtype, tensor.qparams)
    ops.append(Op(TRANSPOSE, (tensor,), output, {"perm": perm}, origin))
    return output


def _reshape(ops: list[Op], tensor: Tensor, shape: tuple[int, ...], origin: str) -> Tensor:
    output = Tensor(shape, tensor.dtype, tensor.qparams)
    ops.append(Op(RESHAPE, (tensor,), output, {"new_shape": shape}, origin))
    return output


def _constant(data: Array | None, qparams: QParams) -> Tensor:
    assert data is not None  # the clusters hold computed values of the partition, or constants
    return Tensor(data.shape, data.dtype, qparams, data)
