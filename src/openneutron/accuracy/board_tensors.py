"""Describes the inputs and outputs of a program in a board's memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from openneutron.accuracy.board_dump import BoardTensor
from openneutron.cpu.signatures import signature_of
from openneutron.errors import InputError
from openneutron.formats import pte
from openneutron.formats.kernel_calls import DEQUANTIZE, QUANTIZE, computing_call, qparams_of_call, writers_of
from openneutron.formats.pte import KernelCall, Method, ProgramValue
from openneutron.runtime.program import ConstantInfo, HostProgram, TensorInfo

__all__ = ["board_inputs", "board_outputs"]


def board_inputs(host: HostProgram) -> tuple[BoardTensor, ...]:
    """Returns the inputs that are tensors. Raises `InputError` for a dtype that numpy does not have."""
    method = _method_of(host)
    readers = {call.arguments[0]: call for call in _kernels(method) if qparams_of_call(method, call, QUANTIZE)}
    found = zip(host.inputs, method.inputs, method.input_numbers, host.input_names(), strict=True)
    return tuple(
        _board_tensor(position, name, info, value, qparams_of_call(method, readers.get(number), QUANTIZE))
        for position, (info, value, number, name) in enumerate(found)
        if isinstance(info, TensorInfo)
    )


def board_outputs(host: HostProgram) -> tuple[BoardTensor, ...]:
    """Returns the outputs that are tensors. Raises `InputError` for a dtype that numpy does not have.

    A float output has the scale and the zero point of the dequantize kernel that writes it, if there is one.
    """
    method = _method_of(host)
    writers = writers_of(method, signature_of)
    found = zip(host.outputs, method.outputs, method.output_numbers, host.output_names(), strict=True)
    return tuple(
        _board_tensor(position, name, info, value, qparams_of_call(method, computing_call(writers, number), DEQUANTIZE))
        for position, (info, value, number, name) in enumerate(found)
        if not isinstance(info, ConstantInfo)
    )


def _method_of(host: HostProgram) -> Method:
    return next(method for method in pte.read(host.buffer).methods if method.name == "forward")


def _kernels(method: Method) -> Iterator[KernelCall]:
    yield from (call for call in method.calls if isinstance(call, KernelCall))


def _board_tensor(
    position: int, name: str, info: TensorInfo, value: ProgramValue, qparams: tuple[float, int] | None
) -> BoardTensor:
    scale, zero = (info.scale, info.zero_point) if info.scale is not None else qparams or (None, 0)
    dims: Sequence[int] = value.dim_order or range(len(info.shape))
    return BoardTensor(info.shape, _numpy_dtype(info.dtype), tuple(dims), scale, zero or 0, position, name)


def _numpy_dtype(dtype: torch.dtype) -> np.dtype[np.generic]:
    if dtype == torch.bool:
        return np.dtype(np.uint8)
    try:
        return torch.empty(0, dtype=dtype).numpy().dtype
    except TypeError as error:
        raise InputError(
            f"The program has an input or output of {dtype}, which cannot be compared with a dump. Lower the model "
            "with int8 or float32 inputs and outputs."
        ) from error
