"""Describes the inputs and outputs of a program for its firmware."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from openneutron.cpu.signatures import signature_of
from openneutron.formats import pte
from openneutron.formats.kernel_calls import DEQUANTIZE, computing_call, qparams_of_call, writers_of
from openneutron.runtime import HostProgram, TensorInfo

__all__ = ["Port", "bytes_of", "input_ports", "output_ports"]

_C_TYPES = {
    "uint8": "uint8_t", "int8": "int8_t", "int16": "int16_t", "int32": "int32_t", "int64": "int64_t",
    "float32": "float", "float64": "double", "bool": "bool",
}  # fmt: skip
_CODES = {name: code for code, name in pte.SCALAR_TYPES.items()}


@dataclass(frozen=True)
class Port:
    """An input or output of a program. One that is not a tensor has a `constant`, and None for `dtype`.

    `dim_order` lists the dimensions from the outermost to the innermost in memory. `scale` and `zero_point` are None
    for a tensor that is not quantized. `step` is the scale of the int8 tensor from which a float output is dequantized;
    None if it is unknown. `is_planned` says whether the runtime or the program provides its memory.
    """

    name: str
    dtype: str | None
    shape: tuple[int, ...] = ()
    dim_order: tuple[int, ...] = ()
    scale: float | None = None
    zero_point: int | None = None
    constant: int | float | bool | str | None = None
    step: float | None = None
    is_planned: bool = True

    @property
    def elements(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """The number of bytes; 0 if it is not a tensor."""
        return 0 if self.dtype is None else self.elements * pte.ITEM_BYTES.get(self.dtype, 1)

    @property
    def c_type(self) -> str:
        """The type of an element in C. For a dtype that C does not have, an integer type of the same size."""
        return _C_TYPES.get(self.dtype or "", "uint16_t")

    @property
    def code(self) -> int:
        """ExecuTorch's ScalarType; 0 if it is not a tensor."""
        return 0 if self.dtype is None else _CODES[self.dtype]

    @property
    def is_channels_last(self) -> bool:
        """Whether dimension 1 is the innermost in memory and has more than one element."""
        rank = len(self.shape)
        return rank > 2 and self.dim_order == (0, *range(2, rank), 1) and self.shape[1] > 1


def input_ports(program: HostProgram, method: pte.Method) -> tuple[Port, ...]:
    """Returns the inputs of a program. `method` is its method `forward`."""
    return _ports(program.inputs, method.inputs, method.input_numbers, program.input_names(), method)


def output_ports(program: HostProgram, method: pte.Method) -> tuple[Port, ...]:
    """Returns the outputs of a program. `method` is its method `forward`."""
    return _ports(program.outputs, method.outputs, method.output_numbers, program.output_names(), method)


def bytes_of(tensor: torch.Tensor, port: Port) -> bytes:
    """Returns the bytes of a tensor in the dim order of its port."""
    packed = tensor.detach().cpu().permute(port.dim_order).contiguous()
    return packed.reshape(-1).view(torch.uint8).numpy().tobytes() if packed.numel() else b""


def _ports(
    infos: Sequence[object],
    values: Sequence[pte.ProgramValue],
    numbers: Sequence[int],
    names: Sequence[str],
    method: pte.Method,
) -> tuple[Port, ...]:
    writers = writers_of(method, signature_of)

    def scale_of_dequantize(number: int) -> float | None:
        qparams = qparams_of_call(method, computing_call(writers, number), DEQUANTIZE)
        return None if qparams is None else qparams[0]

    return tuple(
        Port(
            name,
            value.dtype,
            info.shape,
            value.dim_order,
            info.scale,
            info.zero_point,
            step=scale_of_dequantize(number),
            is_planned=method.slots[number].is_planned or method.slots[number].has_data,
        )
        if isinstance(info, TensorInfo)
        else Port(name, None, constant=getattr(info, "value", None))
        for name, info, value, number in zip(names, infos, values, numbers, strict=True)
    )
