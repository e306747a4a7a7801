"""Helpers to build IR graphs in tests, and the text form for golden tests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from openneutron.ir.graph import Graph, Kind, Op, QParams, Tensor
from openneutron.ir.kinds import ADD, MAX_POOL_2D, RELU, RESHAPE, TRANSPOSE
from openneutron.ir.text import dump
from openneutron.ir.verify import verify
from openneutron.ops.linear import CONV_2D_OF_ROWS

__all__ = [
    "FULLY",
    "INT8",
    "INT32",
    "NO_ACTIVATION",
    "TO_NCHW",
    "TO_NHWC",
    "Net",
    "Q",
    "Shape",
    "constant",
    "golden",
    "text",
]  # fmt: skip

Shape = tuple[int, ...]
INT8, INT32 = np.dtype(np.int8), np.dtype(np.int32)
Q = QParams.per_tensor(0.5, 0)
TO_NCHW, TO_NHWC = (0, 3, 1, 2), (0, 2, 3, 1)
NO_ACTIVATION = {"fused_activation_function": "NONE"}
FULLY = {**NO_ACTIVATION, "weights_format": "DEFAULT", "keep_num_dims": False}


@dataclass
class Net:
    """Builds a graph with one method call for each operator."""

    inputs: list[Tensor] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)

    def input(self, *shape: int) -> Tensor:
        self.inputs.append(Tensor(shape, INT8, Q))
        return self.inputs[-1]

    def op(self, kind: Kind, inputs: Sequence[Tensor], shape: Sequence[int], **attrs: Any) -> Tensor:
        self.ops.append(Op(kind, tuple(inputs), Tensor(tuple(shape), INT8, Q), attrs))
        return self.ops[-1].output

    def transpose(self, tensor: Tensor, *perm: int) -> Tensor:
        return self.op(TRANSPOSE, [tensor], [tensor.shape[dim] for dim in perm], perm=perm)

    def reshape(self, tensor: Tensor, *shape: int) -> Tensor:
        return self.op(RESHAPE, [tensor], shape, new_shape=shape)

    def relu(self, tensor: Tensor) -> Tensor:
        return self.op(RELU, [tensor], tensor.shape)

    def add(self, left: Tensor, right: Tensor) -> Tensor:
        return self.op(ADD, [left, right], np.broadcast_shapes(left.shape, right.shape), **NO_ACTIVATION)

    def pool(self, nhwc: Tensor) -> Tensor:
        window = {"stride_h": 1, "stride_w": 1, "filter_height": 1, "filter_width": 1}
        return self.op(MAX_POOL_2D, [nhwc], nhwc.shape, padding="VALID", **window, **NO_ACTIVATION)

    def convolved_rows(self, rows: Tensor, filters: Tensor, bias: Tensor) -> Tensor:
        """Adds the convolution of a linear with scales per channel. `rows` is [1, rows, 1, features]."""
        steps = {"stride_h": 1, "stride_w": 1, "dilation_h_factor": 1, "dilation_w_factor": 1}
        shape = (*rows.shape[:3], filters.shape[0])
        return self.op(CONV_2D_OF_ROWS, [rows, filters, bias], shape, padding="VALID", **steps, **NO_ACTIVATION)

    def returns(self, *outputs: Tensor) -> Graph:
        return verify(Graph(tuple(self.inputs), outputs, tuple(self.ops)), "the test")


def constant(*shape: int, start: int = 0) -> Tensor:
    data = np.arange(start, start + math.prod(shape), dtype=np.int8).reshape(shape)
    return Tensor(shape, INT8, Q, data)


def text(graph: Graph) -> str:
    """Returns the dump without parts that are equal in all of these tests."""
    return dump(graph).replace(" int8 q(0.5, 0)", "").strip()


def golden(value: str) -> str:
    return "\n".join(line.strip() for line in value.strip().splitlines())
