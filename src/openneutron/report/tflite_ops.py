"""Converts operators of a TFLite file of any origin to IR operators, so that their cost can be estimated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from openneutron.errors import FormatError
from openneutron.formats.tflite import FileTensor, Operator, Subgraph
from openneutron.ir.graph import Op, QParams, Tensor
from openneutron.ir.kinds import KINDS, Work

__all__ = ["as_ops", "npu_operators"]

_DTYPES = {"INT8": np.int8, "UINT8": np.uint8, "INT16": np.int16, "INT32": np.int32, "INT64": np.int64}
# The vendor's converter leaves these operators to the CPU at the start and at the end of a model.
_LEADING = {"QUANTIZE"}
_TRAILING = {"SOFTMAX", "DEQUANTIZE", "QUANTIZE"}


def npu_operators(graph: Subgraph) -> tuple[Operator, ...]:
    """Returns the operators that the NPU would run.

    These are all int8 operators of a known kind, except QUANTIZE at the start, and SOFTMAX, DEQUANTIZE and QUANTIZE at
    the end. The rule agrees with all models whose files before and after the vendor's converter are known.
    """
    operators = list(graph.operators)
    while operators and operators[0].name in _LEADING:
        operators.pop(0)
    while operators and operators[-1].name in _TRAILING:
        operators.pop()
    return tuple(operator for operator in operators if _is_int8(operator))


def _is_int8(operator: Operator) -> bool:
    computed = [tensor for tensor in (*operator.inputs, *operator.outputs) if tensor and tensor.buffer is None]
    return not operator.is_custom and operator.name in KINDS and all(tensor.dtype == "INT8" for tensor in computed)


def as_ops(operators: Sequence[Operator]) -> tuple[Op, ...]:
    """Converts operators to the IR. Keeps shapes, dtypes and attributes, and of several outputs only the first.

    Constants keep their shapes and dtypes, but not their values. Linear in operators. Raises `FormatError` for an
    operator of an unknown kind, and for one that lacks inputs, outputs or attributes of its kind.
    """
    for operator in operators:
        if operator.name not in KINDS:
            raise FormatError(
                f"byte {operator.at} of the TFLite file: the cost of the operator {operator.name} is unknown"
            )
        if missing := _missing_parts(operator):
            raise FormatError(f"byte {operator.at} of the TFLite file: expected {missing} of {operator.name}")
    known: dict[int, Tensor] = {}

    def tensor(info: FileTensor) -> Tensor:
        if info.index not in known:
            known[info.index] = _ir_tensor(info)
        return known[info.index]

    return tuple(
        Op(
            KINDS[operator.name],
            tuple(tensor(info) for info in operator.inputs if info is not None),
            tensor(operator.outputs[0]),
            operator.attrs,
            operator.outputs[0].name,
        )
        for operator in operators
    )


@dataclass(frozen=True)
class _Need:
    """A requirement of a kind of operators, as text for messages and as a test."""

    what: str
    is_met: Callable[[Operator], bool]


def _given_inputs(operator: Operator) -> list[FileTensor]:
    return [tensor for tensor in operator.inputs if tensor is not None]


def _has_ends(operator: Operator) -> bool:
    return bool(_given_inputs(operator) and operator.outputs)


def _is_pool(operator: Operator) -> bool:
    ranks = (len(_given_inputs(operator)[0].shape), len(operator.outputs[0].shape))
    return {"filter_height", "filter_width"} <= set(operator.attrs) and ranks == (4, 4)


def _is_convolution(operator: Operator) -> bool:
    images = [tensor for tensor in _given_inputs(operator) if len(tensor.shape) == 4]
    if KINDS[operator.name].operands_at > 0 and (len(operator.inputs) < 2 or operator.inputs[1] not in images):
        return False  # only TRANSPOSE_CONV has its kernel at another position
    has_kernel, has_image = (any((tensor.buffer is None) is free for tensor in images) for free in (False, True))
    return has_kernel and has_image and len(operator.outputs[0].shape) == 4 and "stride_h" in operator.attrs


def _is_product(operator: Operator) -> bool:
    operands = _given_inputs(operator)[:2]
    return len(operands) == 2 and all(tensor.shape for tensor in (*operands, operator.outputs[0]))


_ENDS = _Need("an input and an output", _has_ends)
_NEEDS = {
    Work.WINDOWS: _Need("a window and images", _is_pool),
    **dict.fromkeys(
        (Work.CONVOLUTION, Work.DEPTHWISE, Work.TRANSPOSED_CONVOLUTION),
        _Need("an image, a constant kernel and strides", _is_convolution),
    ),
    Work.MATRIX_PRODUCT: _Need("two operands and a result of one dimension or more", _is_product),
}


def _missing_parts(operator: Operator) -> str | None:
    """Returns a description of the inputs, outputs or attributes that the operator lacks; None if it is complete."""
    needs = [_ENDS, *filter(None, [_NEEDS.get(KINDS[operator.name].work)])]
    return next((need.what for need in needs if not need.is_met(operator)), None)


def _ir_tensor(info: FileTensor) -> Tensor:
    shape = tuple(max(1, size) for size in info.shape)
    dtype = np.dtype(_DTYPES.get(info.dtype, np.float32))
    # Broadcasting a zero gives the shape without allocating memory.
    data = None if info.buffer is None else np.broadcast_to(np.zeros((), dtype), shape)
    return Tensor(shape, dtype, QParams.per_tensor(1.0, 0), data)
