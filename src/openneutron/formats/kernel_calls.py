"""Finds the kernel that computes a value of a method, the values that a kernel writes, and the qparams of a kernel."""

from __future__ import annotations

from collections.abc import Mapping

from openneutron.formats.delegate_outputs import BACKEND
from openneutron.formats.payload import argument_count
from openneutron.formats.pte import KernelCall, Method
from openneutron.formats.pte_check import Signatures

__all__ = ["DEQUANTIZE", "QUANTIZE", "computing_call", "qparams_of_call", "writers_of", "written_values"]

QUANTIZE, DEQUANTIZE = "quantize_per_tensor", "dequantize_per_tensor"
"""The names of the kernels that quantize and dequantize, without namespace and overload."""

_MOVES = ("clone", "copy", "view", "permute", "dim_order")
"""Parts of the names of kernels that only move values."""
_COPIES_ITS_SECOND = ("aten::copy.", "aten::copy_", "executorch_prim::et_copy_index")
"""Beginnings of the names of kernels that copy their second argument to their first one, or to the output."""


def written_values(method: Method, call: KernelCall, signatures: Signatures) -> tuple[int, ...]:
    """Returns the indices of the values that a kernel call writes, with the tensors of a list instead of the list.

    These are the arguments that the kernel's signature declares as written, and the results that follow the arguments
    of the signature. If the signature is unknown, or declares no argument as written, it is the last argument.
    """
    signature = signatures(call.name)
    numbers: list[int] = []
    if signature is not None:
        numbers += [number for at, number in enumerate(call.arguments) if at in signature.written]
        numbers += call.arguments[len(signature.kinds) :]
    members = [method.slots[number].members or (number,) for number in numbers or call.arguments[-1:]]
    return tuple(dict.fromkeys(number for group in members for number in group if number >= 0))


def writers_of(method: Method, signatures: Signatures) -> dict[int, KernelCall]:
    """Returns the kernel that writes each value last, by the value's index. Values of delegates are absent."""
    writers: dict[int, KernelCall] = {}
    for call in method.calls:
        if isinstance(call, KernelCall):
            writers.update(dict.fromkeys(written_values(method, call, signatures), call))
        elif call.backend == BACKEND:
            for number in call.numbers[argument_count(call.payload) :]:
                writers.pop(number, None)
    return writers


def computing_call(writers: Mapping[int, KernelCall], number: int) -> KernelCall | None:
    """Returns the kernel that computes a value, and skips kernels that only move it."""
    seen = set()
    call = writers.get(number)
    while call is not None and any(part in call.name for part in _MOVES) and number not in seen:
        seen.add(number)
        position = int(call.name.startswith(_COPIES_ITS_SECOND) and len(call.arguments) > 1)
        number = call.arguments[position]
        call = writers.get(number)
    return call


def qparams_of_call(method: Method, call: KernelCall | None, name: str) -> tuple[float, int] | None:
    """Returns scale and zero point of a call of the kernel `name`, `QUANTIZE` or `DEQUANTIZE`; None for others.

    Also returns None if they are not constants.
    """
    if call is None or call.name.partition("::")[2].partition(".")[0] != name:
        return None
    scale, zero = ([method.slots[number].constant for number in call.arguments[1:3]] + [None, None])[:2]
    if not isinstance(scale, float) or scale <= 0 or not isinstance(zero, int) or isinstance(zero, bool):
        return None
    return scale, zero
