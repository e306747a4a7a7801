"""Loads a `.pte` and runs it on the host.

This module needs torch and the extension modules of executorch and LiteRT. It imports neither `executorch.exir` nor
torchao. (`import torch` itself imports `torch.export`.)
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch

from openneutron.core.files import NO_PATH, bytes_of_file, reason_of
from openneutron.core.locks import ForkSafeLock, Order
from openneutron.errors import FormatError, HostError, InputError, OptionError, PayloadError
from openneutron.formats import pte
from openneutron.formats.delegate_outputs import check_delegate_outputs
from openneutron.formats.flatbuffer import Source
from openneutron.formats.method_memory import MeasuredPools, MethodMemory, memory_of
from openneutron.ir.scales import LARGEST_SCALE, LEAST_SCALE
from openneutron.model.arguments import (
    INPUT_NAMES,
    MISSING,
    Leaf,
    argument_names,
    check_names,
    leaves_at,
    leaves_from_text,
    named_paths,
    names_of_leaves,
    output_names,
    positions_of,
)
from openneutron.runtime.child import ChildSession
from openneutron.runtime.index_faults import index_fault
from openneutron.runtime.native import is_installed
from openneutron.runtime.session import METHOD, Session

__all__ = ["ConstantInfo", "HostProgram", "TensorInfo", "load"]

MOST_THREADS = 256
PTE_IDENTIFIER_AT = slice(4, 6)
PTE_IDENTIFIER = b"ET"  # then two digits: the version of the flatbuffer's schema


@dataclass(frozen=True)
class TensorInfo:
    """Shape, dtype and, for a quantized tensor, qparams of an input or output of a program."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    scale: float | None = None
    """Scale of a quantized tensor: value = scale x (integer - zero point). None for a tensor without qparams."""
    zero_point: int | None = None

    def quantize(self, values: torch.Tensor) -> torch.Tensor:
        """Quantizes float values to the program's integers. Raises InputError for a tensor without qparams."""
        scale, zero_point = self._qparams()
        limits = torch.iinfo(self.dtype)
        return (torch.round(values * (1 / scale)) + zero_point).clamp(limits.min, limits.max).to(self.dtype)

    def dequantize(self, values: torch.Tensor) -> torch.Tensor:
        """Dequantizes the program's integers to float values. Raises InputError for a tensor without qparams."""
        scale, zero_point = self._qparams()
        return (values.to(torch.float32) - zero_point) * scale

    def _qparams(self) -> tuple[float, int]:
        if self.scale is None or self.zero_point is None:
            raise InputError(
                f"this tensor of {self.dtype} is not quantized: it has no scale and zero point. Use its values as they "
                "are"
            )
        return self.scale, self.zero_point


@dataclass(frozen=True)
class ConstantInfo:
    """An input or output that is not a tensor: the number, bool, string or None that the model was exported with.

    The `.pte` stores None for a string.
    """

    value: int | float | bool | str | None


class HostProgram:
    """A loaded `.pte`. LiteRT runs its delegates, and ExecuTorch's CPU kernels run the other operators.

    `inputs` and `outputs` describe the inputs and outputs of the method `forward`: a `TensorInfo` for a tensor, a
    `ConstantInfo` for any other value. Any thread may call `run()`. Calls run one after the other, because the program
    has one set of buffers. Without the native module, `run` and `reset` raise `NativeModuleError`.
    """

    inputs: tuple[Any, ...]
    has_state: bool
    """Whether the program keeps state from one run to the next."""
    outputs: tuple[Any, ...]

    def __init__(
        self,
        data: bytes,
        name: str = "the program",
        *,
        leaves: Sequence[Leaf] | None = None,
        loads: bool = True,
        isolated: bool = False,
        threads: int = 1,
    ) -> None:
        """Loads the bytes of a `.pte`. Error messages call the program `name`.

        Without `loads`, only its inputs and outputs are read, and it cannot run. `leaves` give the path of each input
        in the arguments of `forward`; by default, they are read from the `.pte`. See `load` for `isolated` and
        `threads`. Raises HostError if the program cannot run on this machine.
        """
        _check_identifier(name, data)
        self._name = name
        self._data = data
        self._lock = ForkSafeLock(Order.PROGRAM)
        source = Source(data, name)
        try:
            method = next((method for method in pte.read(source).methods if method.name == METHOD), None)
            if method is not None:
                check_delegate_outputs(method, name)
        except (FormatError, PayloadError) as error:
            raise HostError(f"{name} cannot be loaded: {error}") from error
        if method is None:
            raise HostError(f"{name} cannot be loaded: it has no method '{METHOD}'")
        self._session = (
            ChildSession(data, name, loads=loads, threads=threads)
            if isolated
            else Session(data, name, loads=loads, source=source, threads=threads)
        )
        try:
            constant = self._session.constant
            self._leaves = _leaves(constant, len(method.inputs)) if leaves is None else tuple(leaves)
            inputs = [_read_info(value, constant, f"input{i}") for i, value in enumerate(method.inputs)]
            self.outputs = tuple(_read_info(value, constant, f"output{i}") for i, value in enumerate(method.outputs))
        except ValueError as error:
            raise HostError(f"{name} cannot be loaded: {error}") from error
        self._outputs_tree = method.outputs_tree
        self.has_state = method.has_state
        self._names_are_known = self._leaves is not None
        self._leaves = self._leaves or _unnamed_leaves(method.inputs_tree, inputs)
        self._input_names = names_of_leaves(self._leaves or (), len(inputs))
        self.inputs = tuple(itertools.starmap(self._with_string_constant, enumerate(inputs)))
        # None stands for the default order, so that run() need not compare dimensions.
        orders = [value.dim_order for value in method.inputs]
        self._dim_orders = tuple(None if order == tuple(range(len(order))) else order for order in orders)

    @classmethod
    def from_bytes(cls, data: bytes) -> HostProgram:
        """Loads the bytes of a `.pte`. Raises HostError if they are not a `.pte` or cannot run on this machine."""
        return cls(data)

    @property
    def buffer(self) -> bytes:
        """The bytes of the `.pte`."""
        return self._data

    @property
    def is_isolated(self) -> bool:
        """Whether the program runs in a process of its own."""
        return isinstance(self._session, ChildSession)

    @property
    def leaves(self) -> tuple[Leaf, ...] | None:
        """The path of each input in the arguments of `forward`; None if unknown."""
        return self._leaves

    def input_names(self) -> list[str]:
        """Returns the name of each input, or "input0" for an input without a name."""
        return list(self._input_names)

    def output_names(self, unnamed: str = "output{}") -> tuple[str, ...]:
        """Returns the name of each output: its path in a dict or dataclass ("boxes"), else `unnamed` with its position.
        """
        return output_names(self._outputs_tree, len(self.outputs), unnamed)

    @property
    def input_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of the inputs that are tensors."""
        return tuple(info.shape for info in self.inputs if isinstance(info, TensorInfo))

    @property
    def output_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of the outputs that are tensors."""
        return tuple(info.shape for info in self.outputs if isinstance(info, TensorInfo))

    @functools.cached_property
    def memory(self) -> MethodMemory:
        """The memory of `forward` on the board and on this machine (see `MethodMemory`).

        The method is loaded and run once more, to count the memory of CPU kernels. Without the native module, this
        memory counts as 0 bytes.
        """
        return memory_of(self._data, METHOD, measured=self.measure() if is_installed() else None)

    def measure(self) -> MeasuredPools:
        """Loads `forward` once more, runs it on zeros, and returns the memory that the runtime allocates.

        Raises `HostError` if that fails, and `NativeModuleError` without the native module.
        """
        with self._lock:
            return self._session.measure()

    def reset(self) -> None:
        """Restores the initial state of the program.

        Raises HostError if the program cannot be loaded again.
        """
        with self._lock:
            self._session.start()

    def run(self, *inputs: Any, **named: Any) -> Any:
        """Runs `forward`. Returns its output, or a tuple of outputs if there are several: tensors, numbers and None.

        Inputs are torch tensors or numpy arrays, in the order of `inputs`. Constant inputs may be left out. A program
        whose `leaves` are known also takes the arguments of `forward`, by position and by name. `lower` writes them
        into the `.pte`. In a `.pte` of the documented flow, positional arguments have no names. Every input has the
        name of its position, too: "input0", unless an argument or a key is called so.

        State is kept from call to call; `reset` restores the initial state. The outputs are copies, which later runs do
        not change.

        Raises InputError if an input has another shape or dtype than the program's, and HostError if the program fails.
        """
        tensors = self._checked_inputs(inputs, named)
        try:
            with self._lock:
                outputs = self._session.call(tensors)
        except HostError as error:
            self._raise_with_index_fault(error, tensors)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _raise_with_index_fault(self, error: HostError, tensors: Sequence[Any]) -> NoReturn:
        """Raises the error of a run, with a sentence about the input or state whose indices made the run fail."""
        method = next(method for method in pte.read(self._data, self._name).methods if method.name == METHOD)
        if fault := index_fault(method, str(error), self.input_names(), tensors):
            raise type(error)(f"{error}. {fault}") from error
        raise error

    def seconds(self, inputs: Sequence[Any], named: Mapping[str, Any], repeat: int) -> list[float]:
        """Returns the seconds of each of `repeat` runs, after one run that does not count. Raises the errors of `run`.

        `inputs` and `named` are the arguments of `run` by position and by name.

        An isolated program measures in its process, so the time does not contain copies between the processes. The
        check of the inputs is not measured.
        """
        tensors = self._checked_inputs(inputs, named)
        try:
            with self._lock:
                return self._session.seconds(tensors, repeat)
        except HostError as error:
            self._raise_with_index_fault(error, tensors)

    def _checked_inputs(self, inputs: Sequence[Any], named: Mapping[str, Any]) -> list[Any]:
        values = self.values_of(*inputs, **named)
        return [
            _to_dim_order(_to_tensor(self._input_names[i], i, value, info), order)
            if isinstance(info, TensorInfo)
            else _checked_constant(self._input_names[i], value, info)
            for i, (value, info, order) in enumerate(zip(values, self.inputs, self._dim_orders, strict=True))
        ]

    def values_of(self, *inputs: Any, **named: Any) -> Sequence[Any]:
        """Returns the value of each input for arguments of `run`. Raises InputError if one is missing or not known."""
        is_flat = not named and len(inputs) == len(self.inputs) and not any(map(_is_nested, inputs))
        return inputs if is_flat else self._flatten_arguments(inputs, named)

    def _flatten_arguments(self, inputs: Sequence[Any], named: Mapping[str, Any]) -> list[Any]:
        """Returns a value for each input, from arguments of `forward` by position and by name, or from tensors only."""
        tensors = sum(isinstance(info, TensorInfo) for info in self.inputs)
        is_flat = not named and not any(map(_is_nested, inputs))
        if is_flat and len(inputs) == tensors:
            given = iter(inputs)
            return [next(given) if isinstance(info, TensorInfo) else info.value for info in self.inputs]
        if not self._names_are_known:
            self._check_without_names(inputs, named)
            if len(inputs) == len(self.inputs) and not named:
                return list(inputs)
        if (self._leaves is None and not named) or (is_flat and len(inputs) > len(self.inputs)):
            raise InputError(f"{self._name} takes {tensors} inputs, got {len(inputs)}; {self._describe_inputs()}")
        leaves = self._leaves or [Leaf((name,)) for name in self._input_names]
        paths = [leaf.path for leaf in leaves]
        check_names(paths, inputs, named, self._name)
        values = leaves_at(paths, inputs, named)
        given = zip(values, leaves, self.inputs, strict=True)
        return [self._constant(leaf, info) if value is MISSING else value for value, leaf, info in given]

    def _check_without_names(self, inputs: Sequence[Any], named: Mapping[str, Any]) -> None:
        """Raises `InputError` for arguments that need names or a structure, of which the `.pte` tells nothing."""
        paths = [leaf.path for leaf in self._leaves or ()] or [(name,) for name in self._input_names]
        if not {*argument_names(paths), *positions_of(paths, named)}.issuperset(named):
            raise InputError(
                f"{self._name} does not contain the names of its inputs: give them in the order of the "
                f"model's arguments, or by position (input0); {self._describe_inputs()}. lower() writes the names into "
                "the .pte"
            )
        if self._leaves is None and any(map(_is_nested, inputs)):
            raise InputError(
                f"{self._name} does not contain the structure of its inputs: give only the tensors, in order; "
                f"{self._describe_inputs()}. lower() writes the structure into the .pte"
            )

    def _constant(self, leaf: Leaf, info: TensorInfo | ConstantInfo) -> Any:
        """Returns the value of an input that was not given. Raises `InputError` for a tensor."""
        if isinstance(info, TensorInfo):
            raise InputError(f"{self._name} got no input '{leaf.name}'; {self._describe_inputs()}")
        return info.value

    def _describe_inputs(self) -> str:
        """Returns the names, dtypes and shapes of the inputs, as part of an error message."""
        words = (
            f"{name}: {info.dtype} {info.shape}" if isinstance(info, TensorInfo) else f"{name}: {info.value!r}"
            for name, info in zip(self.input_names(), self.inputs, strict=True)
        )
        return f"it takes ({', '.join(words)})"

    def _with_string_constant(self, index: int, info: TensorInfo | ConstantInfo) -> TensorInfo | ConstantInfo:
        """Returns `info`, or the string of a constant input, for which the `.pte` stores None."""
        leaf = None if self._leaves is None else self._leaves[index]
        return ConstantInfo(leaf.constant) if leaf is not None and isinstance(leaf.constant, str) else info


def load(
    source: str | os.PathLike[str] | bytes | bytearray | memoryview, *, isolated: bool = False, threads: int = 1
) -> HostProgram:
    """Loads a `.pte` from its path or its bytes.

    The contents are checked before ExecuTorch's runtime and LiteRT get them. A delegate may contain only TFLite
    operators that OpenNeutron writes. The check does not cover the values that CPU kernels compute with, the arguments
    of kernels that are not ExecuTorch's own, and delegates of other backends. With `isolated`, the program runs in a
    process of its own, so a file that ends this process raises HostError. Use it for files of unknown origin. The start
    of the process takes a few seconds, and each run copies its inputs and outputs.

    LiteRT runs each delegate with `threads` threads (1 to `MOST_THREADS`). The outputs do not depend on that number.
    ExecuTorch's CPU kernels use ExecuTorch's own pool of threads.

    Raises HostError if the file cannot be read, is not a `.pte`, or cannot run on this machine, and OptionError for an
    invalid number of threads. Without the native module, the `inputs` and `outputs` of the result can be read, but
    `run` and `reset` raise `NativeModuleError`.
    """
    if isinstance(threads, bool) or not isinstance(threads, int) or threads not in range(1, MOST_THREADS + 1):
        raise OptionError(f"threads is a number from 1 to {MOST_THREADS}, not {threads!r}.")
    if isinstance(source, (bytes, bytearray, memoryview)):
        return HostProgram(bytes(source), isolated=isolated, threads=threads)
    if not isinstance(source, (str, os.PathLike)):
        raise HostError(f"load() takes the path or the bytes of a .pte, not a {type(source).__name__}")
    try:
        data = bytes_of_file(source, functools.partial(_check_identifier, os.fspath(source)))
    except OSError as error:
        raise HostError(f"{os.fspath(source)} cannot be read: {reason_of(error)}") from error
    except ValueError as error:
        raise HostError(f"{os.fspath(source)!r} cannot be read: {NO_PATH}") from error
    return HostProgram(data, os.fspath(source), isolated=isolated, threads=threads)


def _check_identifier(name: str, data: bytes) -> None:
    """Raises `HostError` unless the first bytes of a file are those of a `.pte`."""
    if data[PTE_IDENTIFIER_AT] != PTE_IDENTIFIER:
        raise HostError(f"{name} is not an ExecuTorch program (.pte): bytes 4 and 5 are not {PTE_IDENTIFIER!r}")


def _is_nested(value: object) -> bool:
    return not isinstance(value, (torch.Tensor, np.ndarray, int, float, str, type(None)))


def _checked_constant(name: str, value: object, info: ConstantInfo) -> int | float | bool | None:
    """Returns the value to pass to the runtime for a constant input. Raises InputError if `value` is another one."""
    if isinstance(value, str) and info.value is None:
        raise InputError(
            f"input '{name}' is the text {value!r}, but this .pte was not written by lower(), so it stores no texts. "
            "Leave this input out. The program uses the text that the model was exported with"
        )
    if type(value) is not type(info.value) or value != info.value:
        raise InputError(
            f"input '{name}' is {value!r}, expected {info.value!r}: the program was exported with that value. Lower a "
            "program for each value, or export the model with a tensor input"
        )
    return None if isinstance(info.value, str) else info.value


def _leaves(constant: Callable[[str], Any], inputs: int) -> tuple[Leaf, ...] | None:
    """Returns the path of each input from the `.pte`; None for a `.pte` without paths."""
    text = constant(INPUT_NAMES)
    leaves = None if text is None else leaves_from_text(str(text))
    if leaves is not None and len(leaves) != inputs:
        raise ValueError(f"it has {inputs} inputs, but names for {len(leaves)}")
    return leaves


def _unnamed_leaves(tree: str | None, inputs: Sequence[TensorInfo | ConstantInfo]) -> tuple[Leaf, ...] | None:
    """Returns the leaves at `named_paths`; None if that has no paths. The `.pte` stores None for a string argument."""
    paths = named_paths(tree, [isinstance(info, TensorInfo) for info in inputs])
    if paths is None:
        return None
    return tuple(
        Leaf(path) if isinstance(info, TensorInfo) else Leaf(path, False, info.value)
        for path, info in zip(paths, inputs, strict=True)
    )


def _read_info(value: pte.ProgramValue, constant: Callable[[str], Any], name: str) -> TensorInfo | ConstantInfo:
    if value.dtype == "none" or value.constant is not None:  # a tensor may be of dtype bool, too
        return ConstantInfo(value.constant)
    if value.dtype not in pte.SCALAR_TYPES.values():
        raise ValueError(f"{name} has ExecuTorch's dtype {value.dtype}, which the host does not support")
    dtype = getattr(torch, value.dtype)
    scale, zero_point = constant(f"{name}_scale"), constant(f"{name}_zp")
    if scale is not None or zero_point is not None:
        _check_qparams(dtype, scale, zero_point, name)
    return TensorInfo(value.shape, dtype, scale, zero_point)


def _check_qparams(dtype: torch.dtype, scale: object, zero_point: object, name: str) -> None:
    """Raises `ValueError` for qparams with which no integers can be quantized and dequantized."""
    if dtype.is_floating_point or dtype == torch.bool:
        raise ValueError(f"{name} has dtype {dtype}, but also a scale and a zero point. Lower the model again")
    if not isinstance(scale, float) or not LEAST_SCALE <= scale <= LARGEST_SCALE:
        raise ValueError(
            f"the scale of {name} is {scale!r}, expected a number from 2^-126 to 2^107. Lower the model again"
        )
    limits = torch.iinfo(dtype)
    if type(zero_point) is not int or not limits.min <= zero_point <= limits.max:
        raise ValueError(
            f"the zero point of {name} is {zero_point!r}, expected an integer from {limits.min} to {limits.max}. Lower "
            "the model again"
        )


def _to_tensor(name: str, index: int, value: object, info: TensorInfo) -> torch.Tensor:
    """Converts `value` to a tensor in the CPU's memory. The input has a `name`, and `index` in the program's inputs.

    Raises InputError for another shape or dtype than `info` has.
    """
    if isinstance(value, np.ndarray):
        try:
            value = torch.from_numpy(np.require(value, requirements=["C", "W"]))
        except TypeError as error:
            raise InputError(f"input '{name}': {error}") from error
    if not isinstance(value, torch.Tensor):
        raise InputError(f"input '{name}' is a {type(value).__name__}, expected a torch tensor or a numpy array")
    if value.dtype != info.dtype:
        how = "" if info.scale is None else f" of scale {info.scale:.9g} and zero point {info.zero_point}"
        hint = f": give inputs[{index}].quantize(values)" if how and value.is_floating_point() else ""
        raise InputError(f"input '{name}' has dtype {value.dtype}, expected {info.dtype}{how}{hint}")
    if value.shape != info.shape:
        raise InputError(f"input '{name}' has shape {tuple(value.shape)}, expected {info.shape}")
    # Calls into torch take ten times as long after a run, which evicts torch from the caches. So avoid them.
    return value.detach().cpu() if value.requires_grad or not value.is_cpu else value


def _to_dim_order(tensor: torch.Tensor, dim_order: tuple[int, ...] | None) -> torch.Tensor:
    """Returns `tensor` in the memory format of the program's input. The runtime does not check memory formats.

    `dim_order` lists the dimensions from the outermost to the innermost; None stands for the default order. A tensor
    without elements is contiguous for torch whatever its strides are; the runtime ends the process for most strides.
    """
    if dim_order is None and tensor.numel() and tensor.is_contiguous():
        return tensor
    if not tensor.numel():
        tensor = torch.empty(tensor.shape, dtype=tensor.dtype)
    if dim_order is None:
        return tensor.contiguous()
    packed = tensor.permute(dim_order).contiguous()
    return packed.permute(tuple(dim_order.index(dim) for dim in range(tensor.dim())))
