"""Computes the memory of a method on the board without the NPU's scratch and weights, and the savings of int8_io."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from openneutron.formats import pte
from openneutron.formats.arena import Lifetime, plan
from openneutron.formats.method_memory import POOL_ALIGNMENT, MethodMemory, method_memory

__all__ = ["RuntimeMemory", "runtime_memory"]

_QUANTIZES = "quantized_decomposed::quantize_per_tensor"
_DEQUANTIZES = "quantized_decomposed::dequantize_per_tensor"


@dataclass(frozen=True)
class RuntimeMemory:
    """Bytes that the runtime and the application allocate for a method on the board.

    They are computed from the program for a 32-bit processor (see `openneutron.formats.method_memory`). The NPU's
    scratch and the weights that it fetches are in the temporary allocator, too, but not part of these numbers.
    """

    planned_bytes: int = 0
    """Planned buffers, for inputs and outputs of the program, of CPU operators and of delegates."""
    given_bytes: int = 0
    """Memory that the application provides, for inputs and outputs that are not planned."""
    method_bytes: int = 0
    """The pool of the method allocator."""
    temporary_bytes: int = 0
    """The pool of the temporary allocator, without the NPU's scratch and weights."""
    int8_io_saves: int = 0
    """Planned bytes that `int8_io=True` would save."""
    pools: MethodMemory | None = None
    """The pools and their parts by name."""

    @property
    def total_bytes(self) -> int:
        """The sum of planned, given, method and temporary bytes."""
        return self.planned_bytes + self.given_bytes + self.method_bytes + self.temporary_bytes


def runtime_memory(method: pte.Method) -> RuntimeMemory:
    """Computes the memory of a method of a `.pte`. Linear in its values and calls, plus the time of `arena.plan`."""
    memory = method_memory(method)
    npu = max((one.scratch_bytes + (one.prefetch_bytes or 0) for one in memory.delegates), default=0)
    return RuntimeMemory(
        planned_bytes=memory.planned_bytes,
        given_bytes=sum(buffer.bytes for buffer in memory.given),
        method_bytes=memory.device.method.pool_bytes,
        temporary_bytes=max(0, memory.device.temporary.pool_bytes - npu),
        int8_io_saves=_saved_by_int8_io(method),
        pools=memory,
    )


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
        number: Lifetime(-(-method.slots[number].bytes // POOL_ALIGNMENT) * POOL_ALIGNMENT, first, last)
        for number, (first, last) in lives.items()
        if number not in skipped and method.slots[number].is_planned
    }
    return plan(planned, last_step + 1).size
