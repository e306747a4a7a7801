"""Checks the invariants of the IR after each pass."""

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
    """A pass returned an invalid graph. This is a defect of OpenNeutron, not of the user's model."""


def verify(graph: Graph, after: str) -> Graph:
    """Returns `graph` if it is valid, else raises `IRError` with the operator and the pass, `after`.

    Linear in operators. In a valid graph, each tensor is written once, before it is read; each tensor has qparams;
    constants have the shape and dtype of their tensor; the shapes of view, elementwise and axis operators agree with
    their attributes; LiteRT's kernels accept all scales.
    """
    written = {id(tensor) for tensor in graph.inputs}
    for op in graph.ops:
        for tensor in (*op.inputs, op.output):
            _raise_if_faulty(_tensor_fault(tensor), op, after)
        for tensor in op.inputs:
            _raise_if_faulty(
                "" if tensor.data is not None or id(tensor) in written else "reads a tensor that no operator wrote",
                op,
                after,
            )
        _raise_if_faulty("writes a tensor twice" if id(op.output) in written else "", op, after)
        _raise_if_faulty(_shape_fault(op), op, after)
        _raise_if_faulty(scale_fault(op), op, after)
        written.add(id(op.output))
    for tensor in graph.outputs:
        if id(tensor) not in written:
            raise IRError(f"after {after}: an output that no operator wrote")
    return graph


def _raise_if_faulty(fault: str, op: Op, after: str) -> None:
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
        valid = sorted(perm) == list(range(len(first))) and output == tuple(first[dim] for dim in perm)
    elif op.kind is RESHAPE:
        valid = math.prod(first) == math.prod(output) and op.attrs["new_shape"] == output
    elif op.kind.layout is Layout.ELEMENTWISE:
        valid = _broadcast_shape([tensor.shape for tensor in op.inputs]) == output
    elif op.kind.layout is Layout.AXES:
        axes = [axis for name in op.kind.axes for axis in np.atleast_1d(op.attrs[name])]
        valid = all(0 <= axis < len(first) for axis in axes)
        valid = valid and all(len(op.attrs[name]) == len(first) for name in op.kind.dimensions)
    else:
        valid = True
    inputs = [tensor.shape for tensor in op.inputs]
    return "" if valid else f"has output shape {output} for inputs {inputs} with {dict(op.attrs)}"


def _broadcast_shape(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...] | None:
    try:
        return np.broadcast_shapes(*shapes)
    except ValueError:
        return None
