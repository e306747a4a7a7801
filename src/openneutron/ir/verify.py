"""The executable specification of the IR, checked after each pass."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from openneutron.errors import OpenNeutronError
from openneutron.ir.graph import Graph, Layout, Op, Tensor
from openneutron.ir.kinds import RESHAPE, TRANSPOSE
from openneutron.ir.scales import scale_fault

__all__ = ["IRError", "verify"]


class IRError(OpenNeutronError):
    """A pass broke the IR: a defect of OpenNeutron, never of the user's model."""


def verify(graph: Graph, after: str) -> Graph:
    """Return `graph` if it is sound, else raise `IRError` naming the operator and the stage `after` which it broke.

    Linear in operators. Sound: each tensor is written once, before it is read; integers carry qparams; constants have
    their tensor's shape and dtype; view, elementwise and axis operators agree with their shapes; scales are in reach.
    """
    written = {id(tensor) for tensor in graph.inputs}
    for op in graph.ops:
        for tensor in (*op.inputs, op.output):
            _check(_tensor_fault(tensor), op, after)
        for tensor in op.inputs:
            _check("" if tensor.data is not None or id(tensor) in written else "reads what nothing wrote", op, after)
        _check("writes a tensor twice" if id(op.output) in written else "", op, after)
        _check(_shape_fault(op), op, after)
        _check(scale_fault(op), op, after)
        written.add(id(op.output))
    for tensor in graph.outputs:
        if id(tensor) not in written:
            raise IRError(f"after {after}: an output that nothing wrote")
    return graph


def _check(fault: str, op: Op, after: str) -> None:
    if fault:
        raise IRError(f"after {after}: {op.kind.name} {fault}", node=op.origin)


def _tensor_fault(tensor: Tensor) -> str:
    if any(size < 1 for size in tensor.shape):
        return f"has a tensor of shape {tensor.shape}"
    if not tensor.qparams.scale or len(tensor.qparams.scale) != len(tensor.qparams.zero_point):
        return "has a tensor without a zero point for each scale"
    if not all(math.isfinite(scale) and scale > 0 for scale in tensor.qparams.scale):
        return "has a scale that is not positive"
    if tensor.data is not None and (tensor.data.shape != tensor.shape or tensor.data.dtype != tensor.dtype):
        return "has a constant of another shape or dtype than its tensor"
    return ""


def _shape_fault(op: Op) -> str:
    first, output = op.inputs[0].shape, op.output.shape
    if op.kind is TRANSPOSE:
        perm = op.attrs["perm"]
        sound = sorted(perm) == list(range(len(first))) and output == tuple(first[dim] for dim in perm)
    elif op.kind is RESHAPE:
        sound = math.prod(first) == math.prod(output) and op.attrs["new_shape"] == output
    elif op.kind.layout is Layout.ELEMENTWISE:
        sound = _broadcast([tensor.shape for tensor in op.inputs]) == output
    elif op.kind.layout is Layout.AXES:
        axes = [axis for name in op.kind.axes for axis in np.atleast_1d(op.attrs[name])]
        sound = all(0 <= axis < len(first) for axis in axes)
        sound = sound and all(len(op.attrs[name]) == len(first) for name in op.kind.dimensions)
    else:
        sound = True
    return "" if sound else f"yields {output} from {[tensor.shape for tensor in op.inputs]} with {dict(op.attrs)}"


def _broadcast(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...] | None:
    try:
        return np.broadcast_shapes(*shapes)
    except ValueError:
        return None
