"""Finds the kernel that computes a value of a method."""

from __future__ import annotations

from collections.abc import Mapping

from openneutron.formats.pte import KernelCall, Method

__all__ = ["computing_call", "writers_of"]

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
