"""Clean-up of a graph after the layout is settled."""

from __future__ import annotations

from dataclasses import replace

from openneutron.ir.graph import Graph, Op, Tensor
from openneutron.ir.views import RESHAPE

__all__ = ["copy_unwritten_outputs", "remove_dead_operators", "share_constants"]


def remove_dead_operators(graph: Graph) -> Graph:
    """Rule: an operator whose output nobody reads goes. Linear in operators."""
    needed = {id(tensor) for tensor in graph.outputs}
    kept: list[Op] = []
    for op in reversed(graph.ops):
        if id(op.output) in needed:
            needed.update(id(tensor) for tensor in op.inputs)
            kept.append(op)
    return Graph(graph.inputs, graph.outputs, tuple(reversed(kept)))


def share_constants(graph: Graph) -> Graph:
    """Rule: constants of equal bytes, shape, dtype and qparams are one tensor. Linear in their bytes."""
    unique: dict[object, Tensor] = {}

    def shared(tensor: Tensor) -> Tensor:
        if tensor.data is None:
            return tensor
        key = (tensor.data.tobytes(), tensor.shape, tensor.dtype, tensor.qparams)
        return unique.setdefault(key, tensor)

    ops = tuple(replace(op, inputs=tuple(map(shared, op.inputs))) for op in graph.ops)
    return Graph(graph.inputs, graph.outputs, ops)


def copy_unwritten_outputs(graph: Graph) -> Graph:
    """Rule: an output that is an input, a constant, or another output is a copy of it, as runtimes want it written."""
    taken = {id(tensor) for tensor in graph.inputs}
    outputs, copies = [], []
    for tensor in graph.outputs:
        written = tensor
        if tensor.data is not None or id(tensor) in taken:
            written = Tensor(tensor.shape, tensor.dtype, tensor.qparams)
            copies.append(Op(RESHAPE, (tensor,), written, {"new_shape": tensor.shape}, "output"))
        taken.add(id(written))
        outputs.append(written)
    return Graph(graph.inputs, tuple(outputs), (*graph.ops, *copies))
