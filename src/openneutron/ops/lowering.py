"""`Lowering`, the argument of lowering functions: an operator instance, its operands, and the IR builder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch.fx import Node

from openneutron.core.fx import iterate_nodes
from openneutron.ir.graph import Array, Kind, Op, QParams, Tensor
from openneutron.ir.kinds import RESHAPE, TRANSPOSE
from openneutron.ops.op_instance import OpInstance

__all__ = ["INT8", "Lowering"]

INT8 = np.dtype(np.int8)
INT32 = np.dtype(np.int32)


@dataclass
class Lowering:
    """Lowers one operator instance to IR operators, which are appended to `ops`."""

    instance: OpInstance
    operands: dict[Node, Tensor]
    """The IR tensor of each dequantized operand."""
    output: QParams
    """The qparams of the instance's output."""
    activation: str
    """TFLite name of the fused activation, "NONE" without one."""
    ops: list[Op]

    @property
    def args(self) -> dict[str, Any]:
        """The arguments by the names of the operator's schema, including defaults."""
        return self.instance.args

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the output, in torch's dimension order."""
        return self.instance.shape

    def tensor(self, argument: str) -> Tensor:
        """Returns the IR tensor of the operand that is passed as `argument`."""
        return self.operands[self.args[argument]]

    def tensors(self, argument: str) -> list[Tensor]:
        """Returns the IR tensors of the list of operands that is passed as `argument`."""
        return [self.operands[node] for node in iterate_nodes(self.args[argument])]

    def data(self, argument: str) -> Array:
        """Returns the values of a constant operand."""
        data = self.tensor(argument).data
        if data is None:
            raise AssertionError(f"'{argument}' is computed, but the partitioner must only accept constants here")
        return data

    def constant(self, data: Array, qparams: QParams) -> Tensor:
        """Returns a constant tensor."""
        return Tensor(data.shape, data.dtype, qparams, np.asarray(data, order="C"))

    def number(self, code: int, qparams: QParams, shape: Sequence[int] | None = None) -> Tensor:
        """Returns an int8 constant with one element, `code`, to broadcast with a tensor of `shape`.

        The default `shape` is that of the output. The constant has shape (1,); for a `shape` of (), it has shape (),
        because the broadcast must not add a dimension.
        """
        return self.constant(np.full((1,) if (self.shape if shape is None else shape) else (), code, INT8), qparams)

    def bias(self, argument: str | None, channels: int, inputs: QParams, weight: QParams) -> Tensor:
        """Returns the int32 bias of `channels` values; zeros if the operator has no bias."""
        if argument is not None and self.args[argument] is not None:
            qparams = self.tensor(argument).qparams
            axis = None if qparams.axis is None else 0
            return self.constant(self.data(argument).reshape(channels), replace(qparams, axis=axis))
        scale = tuple(float(np.float32(inputs.scale[0]) * np.float32(scale)) for scale in weight.scale)
        axis = None if weight.axis is None else 0
        return self.constant(np.zeros(channels, INT32), QParams(scale, (0,) * len(scale), axis))

    def emit(
        self,
        kind: Kind,
        inputs: Sequence[Tensor],
        shape: Sequence[int],
        qparams: QParams | None = None,
        **attrs: object,
    ) -> Tensor:
        """Emits one operator with an int8 output and returns the output. Default `qparams` are `self.output`."""
        output = Tensor(tuple(shape), INT8, qparams or self.output)
        self.ops.append(Op(kind, tuple(inputs), output, attrs, self.instance.node.name))
        return output

    def transpose(self, tensor: Tensor, perm: Sequence[int]) -> Tensor:
        """Emits TRANSPOSE: dimension i of the result is dimension perm[i] of `tensor`."""
        if list(perm) == list(range(len(perm))):
            return tensor
        shape = tuple(tensor.shape[dim] for dim in perm)
        return self.emit(TRANSPOSE, [tensor], shape, tensor.qparams, perm=tuple(perm))

    def reshape(self, tensor: Tensor, shape: Sequence[int]) -> Tensor:
        """Emits RESHAPE; returns `tensor` itself if it has the shape."""
        if tensor.shape == tuple(shape):
            return tensor
        return self.emit(RESHAPE, [tensor], shape, tensor.qparams, new_shape=tuple(shape))

    def channels_last(self, tensor: Tensor) -> Tensor:
        """Transposes [N, C, H, W] to [N, H, W, C]."""
        return self.transpose(tensor, (0, 2, 3, 1))

    def channels_first(self, tensor: Tensor) -> Tensor:
        """Transposes [N, H, W, C] to [N, C, H, W]."""
        return self.transpose(tensor, (0, 3, 1, 2))
