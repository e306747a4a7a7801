"""Finds the kernel that computes a value of a method, and the qparams of a kernel."""

from __future__ import annotations

from collections.abc import Mapping

from openneutron.formats.pte import KernelCall, Method

__all__ = ["DEQUANTIZE", "QUANTIZE", "computing_call", "qparams_of", "writers_of"]

QUANTIZE, DEQUANTIZE = "quantize_per_tensor", "dequantize_per_tensor"
"""The names of the kernels that quantize and dequantize, without namespace and overload."""

_MOVES = ("clone", "copy", "view", "permute", "dim_order")
"""Parts of the names of kernels that only move values."""


def writers_of(method: Method) -> dict[int, KernelCall]:
    """Returns the kernel that writes each value, by the value's index."""
    return {call.numbers[-1]: call for call in method.calls if isinstance(call, KernelCall) and call.numbers}


def computing_call(writers: Mapping[int, KernelCall], number: int) -> KernelCall | None:
    """Returns the kernel that computes a value, and skips kernels that only move it."""
    seen = set()
    call = writers.get(number)
    while call is not None and any(part in call.name for part in _MOVES) and number not in seen:
        seen.add(number)
        number = call.numbers[0]
        call = writers.get(number)
    return call


def qparams_of(method: Method, call: KernelCall | None, name: str) -> tuple[float, int] | None:
    """Returns scale and zero point of a call of the kernel `name`, `QUANTIZE` or `DEQUANTIZE`; None for others."""
    if call is None or call.name.partition("::")[2].partition(".")[0] != name:
        return None
    constants = [method.slots[number].constant for number in call.numbers]
    scale = next((value for value in constants if isinstance(value, float)), None)
    if scale is None or scale <= 0:
        return None
    after = constants[constants.index(scale) + 1 :]
    zero = next((value for value in after if isinstance(value, int) and not isinstance(value, bool)), 0)
    return scale, zero
