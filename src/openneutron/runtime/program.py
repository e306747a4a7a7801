"""Load a `.pte` and run it on the host.

This needs torch and the extension modules of executorch and LiteRT, and imports neither `executorch.exir` nor torchao.
(`torch.export` ends up in `sys.modules` all the same: `import torch` itself brings it in.)
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from executorch.extension.pybindings import _C

from openneutron.errors import HostError, InputError
from openneutron.runtime import _host

__all__ = ["HostProgram", "TensorInfo", "load"]

METHOD = "forward"

PTE_IDENTIFIER_AT = slice(4, 6)
PTE_IDENTIFIER = b"ET"  # then two digits: the version of the flatbuffer's schema

DTYPES: dict[int, torch.dtype] = {
    0: torch.uint8,
    1: torch.int8,
    2: torch.int16,
    3: torch.int32,
    4: torch.int64,
    5: torch.float16,
    6: torch.float32,
    7: torch.float64,
    11: torch.bool,
    15: torch.bfloat16,
}
"""torch's dtype by ExecuTorch's ScalarType (runtime/core/portable_type/scalar_type.h)."""


@dataclass(frozen=True)
class TensorInfo:
    """What a program says of one of its inputs or outputs."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    scale: float | None = None
    """With `zero_point`, of a quantized tensor: value = scale x (integer - zero point). None where it has none."""
    zero_point: int | None = None

    def quantize(self, values: torch.Tensor) -> torch.Tensor:
        """Float values as the integers that the program takes. Raises InputError for a tensor without qparams."""
        scale, zero_point = self._qparams()
        limits = torch.iinfo(self.dtype)
        return (torch.round(values * (1 / scale)) + zero_point).clamp(limits.min, limits.max).to(self.dtype)

    def dequantize(self, values: torch.Tensor) -> torch.Tensor:
        """The program's integers as float values. Raises InputError for a tensor without qparams."""
        scale, zero_point = self._qparams()
        return (values.to(torch.float32) - zero_point) * scale

    def _qparams(self) -> tuple[float, int]:
        if self.scale is None or self.zero_point is None:
            raise InputError(f"a tensor of {self.dtype} without scale and zero point is not quantized")
        return self.scale, self.zero_point


class HostProgram:
    """A loaded `.pte`, its delegates run by LiteRT and everything else by ExecuTorch's CPU kernels.

    `inputs` and `outputs` describe the tensors of the method `forward`. Any thread may call `run()`; calls wait for
    each other, because the program has one set of buffers.
    """

    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]

    def __init__(self, data: bytes, name: str = "the program") -> None:
        """Load from the bytes of a `.pte`; `name` is what errors call it. Raises HostError where it cannot run here."""
        if data[PTE_IDENTIFIER_AT] != PTE_IDENTIFIER:
            raise HostError(f"{name} is no ExecuTorch program (.pte): its bytes 4 and 5 are not {PTE_IDENTIFIER!r}")
        self._name = name
        self._data = data  # the runtime reads constants from these bytes for as long as it lives
        self._lock = threading.Lock()
        _host.clear_error()
        try:
            program = _C._load_program_from_buffer(data, program_verification=_C.Verification.InternalConsistency)
            self._method = program.load_method(METHOD)
            meta = self._method.method_meta()
            constants = _Constants(program)
            self.inputs = tuple(
                _info(meta.input_tensor_meta(i), constants, f"input{i}") for i in range(meta.num_inputs())
            )
            self.outputs = tuple(
                _info(meta.output_tensor_meta(i), constants, f"output{i}") for i in range(meta.num_outputs())
            )
            # None where the order is the usual one, which run() is to find out without a look at the dimensions.
            self._dim_orders = tuple(
                None if order == tuple(range(len(order))) else order for order in _host.input_dim_orders(data, METHOD)
            )
        except (RuntimeError, ValueError, IndexError) as error:
            raise _failure(f"{name} cannot be loaded", error) from error

    @classmethod
    def from_bytes(cls, data: bytes) -> HostProgram:
        """Load from the bytes of a `.pte`. Raises HostError where they are none, or it cannot run on this machine."""
        return cls(data)

    @property
    def buffer(self) -> bytes:
        """The bytes of the `.pte`."""
        return self._data

    @property
    def input_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shape of each input."""
        return tuple(info.shape for info in self.inputs)

    @property
    def output_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shape of each output."""
        return tuple(info.shape for info in self.outputs)

    def run(self, *inputs: torch.Tensor | npt.NDArray[Any]) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Execute `forward`: one tensor where the program has one output, else a tuple of them.

        The outputs are the caller's: neither a later run nor the end of the program changes them.

        Raises InputError where an input is not of the program's shape and dtype, HostError where the program fails.
        """
        if len(inputs) != len(self.inputs):
            raise InputError(f"{self._name} takes {len(self.inputs)} inputs, got {len(inputs)}")
        tensors = [
            _in_order(_tensor(i, value, info), order)
            for i, (value, info, order) in enumerate(zip(inputs, self.inputs, self._dim_orders, strict=True))
        ]
        with self._lock:
            _host.clear_error()
            try:
                outputs = self._method.call(tensors, clone_outputs=True)
            except RuntimeError as error:
                raise _failure(f"{self._name} failed", error) from error
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


def load(path: str | os.PathLike[str]) -> HostProgram:
    """Load the `.pte` at `path`. Raises HostError where it cannot be read, is no `.pte`, or cannot run here."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise HostError(f"{os.fspath(path)} cannot be read: {error.strerror}") from error
    return HostProgram(data, os.fspath(path))


class _Constants:
    """The methods of a program that return one number, as those do that ExecuTorch's I/O passes leave."""

    def __init__(self, program: Any) -> None:
        self._program = program
        self._names = {program.get_method_name(i) for i in range(program.num_methods())}

    def get(self, name: str) -> Any:
        """What the method `name` returns; None where there is none."""
        return self._program.load_method(name).call(())[0] if name in self._names else None


def _info(meta: Any, constants: _Constants, name: str) -> TensorInfo:
    dtype = meta.dtype()
    if dtype not in DTYPES:
        raise ValueError(f"a tensor has ExecuTorch's scalar type {dtype}, which the host does not know")
    qparams = constants.get(f"{name}_scale"), constants.get(f"{name}_zp")
    return TensorInfo(tuple(meta.sizes()), DTYPES[dtype], *qparams)


def _tensor(index: int, value: object, info: TensorInfo) -> torch.Tensor:
    """`value` as a tensor of `info`'s shape and dtype in the CPU's memory."""
    if isinstance(value, np.ndarray):
        try:
            value = torch.from_numpy(np.require(value, requirements=["C", "W"]))
        except TypeError as error:
            raise InputError(f"input {index}: {error}") from error
    if not isinstance(value, torch.Tensor):
        raise InputError(f"input {index} is a {type(value).__name__}, expected a torch tensor or a numpy array")
    if value.dtype != info.dtype:
        how = "" if info.scale is None else f" of scale {info.scale:.9g} and zero point {info.zero_point}"
        hint = f": give inputs[{index}].quantize(values)" if how and value.is_floating_point() else ""
        raise InputError(f"input {index} has dtype {value.dtype}, expected {info.dtype}{how}{hint}")
    if value.shape != info.shape:
        raise InputError(f"input {index} has shape {tuple(value.shape)}, expected {info.shape}")
    # After a run the caches are full of the network, and each call into torch takes ten times as long as it would else.
    return value.detach().cpu() if value.requires_grad or not value.is_cpu else value


def _in_order(tensor: torch.Tensor, dim_order: tuple[int, ...] | None) -> torch.Tensor:
    """`tensor` with its bytes in the order that the program takes: the runtime would not notice any other.

    No `dim_order` is the usual one: the last dimension lies closest together.
    """
    if dim_order is None:
        return tensor if tensor.is_contiguous() else tensor.contiguous()
    packed = tensor.permute(dim_order).contiguous()
    return packed.permute(tuple(dim_order.index(dim) for dim in range(tensor.dim())))


def _failure(what: str, error: Exception) -> HostError | KeyboardInterrupt:
    """What to raise for `error`: with the delegate's own words if it was the one that failed, else the runtime's.

    A Ctrl-C while a delegate runs reaches us as an error of the runtime, which knows no such thing.
    """
    return KeyboardInterrupt() if _host.interrupted() else HostError(f"{what}: {_host.last_error() or error}")
