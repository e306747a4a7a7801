"""Computes the memory that ExecuTorch's runtime allocates for a method, besides the NPU's scratch and weights.

1. Planned memory is read from the program.
2. The memory of loading a method is estimated from the sizes of ExecuTorch 1.5's classes on a 32-bit processor
   (runtime/core/evalue.h, portable_type/tensor_impl.h, executor/method.cpp).
3. Temporary memory consists of the buffers in which a delegate transposes inputs and outputs on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from openneutron.formats import pte
from openneutron.formats.arena import Lifetime, plan
from openneutron.formats.payload import PayloadHeader, parse

__all__ = ["RuntimeMemory", "runtime_memory"]

# Bytes on a 32-bit processor.
BYTES_OF_A_VALUE = 16
BYTES_OF_A_TENSOR = 32
BYTES_OF_A_STRIDE = 4
BYTES_OF_A_CALL = 16
BYTES_OF_AN_ARGUMENT = 4
BYTES_OF_A_DELEGATE = 256  # its handle, and the configuration and pointers that NXP's delegate keeps
ALIGNMENT = 16

_NHWC = (0, 2, 3, 1)
_QUANTIZES = "quantized_decomposed::quantize_per_tensor"
_DEQUANTIZES = "quantized_decomposed::dequantize_per_tensor"


@dataclass(frozen=True)
class RuntimeMemory:
    """Bytes that the runtime and the application allocate for a method."""

    planned_bytes: int = 0
    """Memory planned in the program, for inputs and outputs of the program, of CPU operators and of delegates."""
    given_bytes: int = 0
    """Memory that the application provides, for inputs and outputs that are not planned."""
    method_bytes: int = 0
    """Estimated memory that the runtime allocates when it loads the method."""
    temporary_bytes: int = 0
    """Estimated memory of the largest buffers in which a delegate transposes on the CPU."""
    int8_io_saves: int = 0
    """Planned bytes that `int8_io=True` would save."""

    @property
    def total_bytes(self) -> int:
        """The sum of planned, given, method and temporary bytes."""
        return self.planned_bytes + self.given_bytes + self.method_bytes + self.temporary_bytes


def runtime_memory(method: pte.Method) -> RuntimeMemory:
    """Computes the memory of a method of a `.pte`. Linear in its values and calls, plus the time of `memory.plan`."""
    ends = dict.fromkeys((*method.input_numbers, *method.output_numbers))
    given = sum(method.slots[number].bytes for number in ends if not method.slots[number].is_planned)
    temporary = max((_transposed_bytes(call) for call in method.delegates), default=0)
    return RuntimeMemory(
        planned_bytes=sum(method.planned_bytes),
        given_bytes=given,
        method_bytes=_method_bytes(method),
        temporary_bytes=temporary,
        int8_io_saves=_saved_by_int8_io(method),
    )


def _method_bytes(method: pte.Method) -> int:
    tensors = [slot.rank for slot in method.slots if slot.rank is not None]
    arguments = sum(len(call.numbers) for call in method.calls)
    return (
        BYTES_OF_A_VALUE * len(method.slots)
        + sum(BYTES_OF_A_TENSOR + BYTES_OF_A_STRIDE * rank for rank in tensors)
        + BYTES_OF_A_CALL * len(method.calls)
        + BYTES_OF_AN_ARGUMENT * arguments
        + BYTES_OF_A_DELEGATE * len(method.delegates)
    )


def _transposed_bytes(call: pte.DelegateCall) -> int:
    """Returns the bytes of the tensors that the device's runtime transposes for a call.

    These are images of several channels in NCHW.
    """
    if call.backend != "NeutronBackend":
        return 0
    header = parse(call.payload).header
    return sum(_value_bytes(value) for value in _transposed_values(call, header))


def _transposed_values(call: pte.DelegateCall, header: PayloadHeader) -> Iterator[pte.ProgramValue]:
    arguments = [*header.input_map, *(header.argument_count + index for index in header.output_map)]
    for flag, number in zip((*header.input_formats, *header.output_formats), arguments, strict=True):
        value = call.arguments[number] if number < len(call.arguments) else None
        if flag and value is not None and len(value.shape) == 4 and value.shape[1] > 1 and value.dim_order != _NHWC:
            yield value


def _value_bytes(value: pte.ProgramValue) -> int:
    elements = 1
    for size in value.shape:
        elements *= size
    return elements * pte.ITEM_BYTES.get(value.dtype, 1)


def _saved_by_int8_io(method: pte.Method) -> int:
    """Returns the bytes by which planned memory shrinks if int8_io removes its float tensors."""
    gone = _removable_float_values(method)
    return _plan_bytes(method, ()) - _plan_bytes(method, gone) if gone else 0


def _removable_float_values(method: pte.Method) -> set[int]:
    """Returns the float inputs that only quantize reads, and the unread float outputs that dequantize writes."""
    uses: dict[int, set[str]] = {}
    for call in method.calls:
        kind = call.name.split(".")[0] if isinstance(call, pte.KernelCall) else "delegate"
        for place, number in enumerate(dict.fromkeys(call.numbers)):
            reads = place == 0 and kind == _QUANTIZES
            writes = place > 0 and kind == _DEQUANTIZES
            uses.setdefault(number, set()).add("quantize" if reads else "dequantize" if writes else "other")
    inputs = {number for number in method.input_numbers if uses.get(number) == {"quantize"}}
    outputs = {number for number in method.output_numbers if uses.get(number) == {"dequantize"}}
    return {number for number in inputs | outputs if method.slots[number].dtype == "float32"}


def _plan_bytes(method: pte.Method, without: Iterable[int]) -> int:
    """Plans one arena for the planned tensors. Inputs are needed from the start, outputs until the end."""
    last_step = len(method.calls) + 1
    lives: dict[int, tuple[int, int]] = {}
    uses: Sequence[tuple[int, int]] = [
        *((number, 0) for number in method.input_numbers),
        *((number, step) for step, call in enumerate(method.calls, 1) for number in call.numbers),
        *((number, last_step) for number in method.output_numbers),
    ]
    for number, step in uses:
        lives[number] = (min(step, lives.get(number, (step, step))[0]), step)
    skipped = set(without)
    planned = {
        number: Lifetime(-(-method.slots[number].bytes // ALIGNMENT) * ALIGNMENT, first, last)
        for number, (first, last) in lives.items()
        if number not in skipped and method.slots[number].is_planned
    }
    return plan(planned, last_step + 1).size
