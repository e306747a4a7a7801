"""Operators of a TFLite file as the IR's, so that what is known of operators serves files of any origin."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from openneutron.ir.graph import Kind, Op, QParams, Tensor
from openneutron.tflite import Operator, Subgraph, TensorInfo

__all__ = ["as_ops", "npu_operators"]

_DTYPES = {"INT8": np.int8, "UINT8": np.uint8, "INT16": np.int16, "INT32": np.int32, "INT64": np.int64}
# At the ends of a model, the vendor's converter leaves these to the CPU.
_LEADING = {"QUANTIZE"}
_TRAILING = {"SOFTMAX", "DEQUANTIZE", "QUANTIZE"}


def npu_operators(graph: Subgraph) -> tuple[Operator, ...]:
    """The operators that the NPU would run: all int8 ones, but a QUANTIZE in front, and SOFTMAX and DEQUANTIZE behind.

    What the vendor's converter did to the files that are known both before and after it.
    """
    operators = list(graph.operators)
    while operators and operators[0].name in _LEADING:
        operators.pop(0)
    while operators and operators[-1].name in _TRAILING:
        operators.pop()
    return tuple(operator for operator in operators if _is_int8(operator))


def _is_int8(operator: Operator) -> bool:
    computed = [tensor for tensor in (*operator.inputs, *operator.outputs) if tensor and tensor.buffer is None]
    return not operator.is_custom and all(tensor.dtype == "INT8" for tensor in computed)


def as_ops(operators: Sequence[Operator]) -> tuple[Op, ...]:
    """The same operators in the IR, with shapes, dtypes and attributes; of several outputs, the first.

    Constants keep their shapes and types, not their values. Linear in operators.
    """
    known: dict[int, Tensor] = {}

    def tensor(info: TensorInfo) -> Tensor:
        if info.index not in known:
            known[info.index] = _tensor(info)
        return known[info.index]

    return tuple(
        Op(
            Kind(operator.name),
            tuple(tensor(info) for info in operator.inputs if info is not None),
            tensor(operator.outputs[0]),
            operator.attrs,
            operator.outputs[0].name,
        )
        for operator in operators
        if operator.outputs
    )


def _tensor(info: TensorInfo) -> Tensor:
    shape = tuple(max(1, size) for size in info.shape)
    dtype = np.dtype(_DTYPES.get(info.dtype, np.float32))
    # A zero that claims the shape without taking the memory.
    data = None if info.buffer is None else np.broadcast_to(np.zeros((), dtype), shape)
    return Tensor(shape, dtype, QParams.per_tensor(1.0, 0), data)
