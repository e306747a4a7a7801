"""What a lowering is given: the occurrence, its operands as IR tensors, and a pen to write operators with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
    """Lowers one occurrence; everything it emits goes behind the last of `ops`."""

    instance: OpInstance
    operands: dict[Node, Tensor]
    """The IR tensor of each dequantized operand."""
    output: QParams
    activation: str
    """TFLite name of the fused activation, "NONE" without one."""
    ops: list[Op]

    @property
    def args(self) -> dict[str, Any]:
        """Arguments by the names of the operator's schema."""
        return self.instance.args

    @property
    def shape(self) -> tuple[int, ...]:
        """The output's shape, in torch's dimension order."""
        return self.instance.shape

    def tensor(self, argument: str) -> Tensor:
        """The operand of an argument."""
        return self.operands[self.args[argument]]

    def tensors(self, argument: str) -> list[Tensor]:
        """The operands of an argument that is a list."""
        return [self.operands[node] for node in iterate_nodes(self.args[argument])]

    def data(self, argument: str) -> Array:
        """The values of a constant operand."""
        data = self.tensor(argument).data
        if data is None:
            raise AssertionError(f"'{argument}' is computed; the partitioner lets only constants through here")
        return data

    def constant(self, data: Array, qparams: QParams) -> Tensor:
        """A tensor of the file."""
        return Tensor(data.shape, data.dtype, qparams, np.asarray(data, order="C"))

    def number(self, code: int, qparams: QParams, shape: Sequence[int] | None = None) -> Tensor:
        """One int8 code of the file that broadcasts with `shape`, the output's unless given.

        It has no dimensions where `shape` has none: a broadcast with a tensor of shape (1,) would have one.
        """
        return self.constant(np.full((1,) if (self.shape if shape is None else shape) else (), code, INT8), qparams)

    def bias(self, argument: str | None, channels: int, inputs: QParams, weight: QParams) -> Tensor:
        """The int32 bias of `channels` values; zeros where the operator has none."""
        if argument is not None and self.args[argument] is not None:
            return self.constant(self.data(argument).reshape(channels), self.tensor(argument).qparams)
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
        """Write one operator with an int8 output; `qparams` are the output's of this occurrence unless given."""
        output = Tensor(tuple(shape), INT8, qparams or self.output)
        self.ops.append(Op(kind, tuple(inputs), output, attrs, self.instance.node.name))
        return output

    def transpose(self, tensor: Tensor, perm: Sequence[int]) -> Tensor:
        """Dimension i of the result is dimension perm[i] of `tensor`."""
        if list(perm) == list(range(len(perm))):
            return tensor
        shape = tuple(tensor.shape[dim] for dim in perm)
        return self.emit(TRANSPOSE, [tensor], shape, tensor.qparams, perm=tuple(perm))

    def reshape(self, tensor: Tensor, shape: Sequence[int]) -> Tensor:
        """The same values in another shape."""
        if tensor.shape == tuple(shape):
            return tensor
        return self.emit(RESHAPE, [tensor], shape, tensor.qparams, new_shape=tuple(shape))

    def channels_last(self, tensor: Tensor) -> Tensor:
        """[N, C, H, W] as [N, H, W, C]."""
        return self.transpose(tensor, (0, 2, 3, 1))

    def channels_first(self, tensor: Tensor) -> Tensor:
        """[N, H, W, C] as [N, C, H, W]."""
        return self.transpose(tensor, (0, 3, 1, 2))
