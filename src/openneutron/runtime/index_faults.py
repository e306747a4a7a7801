"""Finds the input of a program whose values made a CPU kernel fail that reads tensors at indices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from openneutron.formats.kernel_calls import writers_of
from openneutron.formats.pte import KernelCall, Method

__all__ = ["index_fault"]

# By kernel: the positions of its indices and of the number of the indexed dimension; None for the first dimension.
_INDICES: Mapping[str, tuple[int, int | None]] = {
    "aten::embedding.out": (1, None),
    "aten::gather.out": (2, 1),
    "aten::index_select.out": (2, 1),
    "aten::scatter.src_out": (2, 1),
    "aten::scatter.value_out": (2, 1),
    "aten::scatter_add.out": (2, 1),
}
# Kernels with a list of indices, one for each dimension. They count negative indices from the end.
_LISTS = ("aten::index.Tensor_out", "aten::index_put.out")
_LIST_AT = 1
# Parts of the names of kernels that keep all values.
_KEEPS_VALUES = ("clone", "view", "permute", "dim_order", "unsqueeze", "squeeze", "expand", "_to_copy")


@dataclass(frozen=True)
class _Indices:
    """Indices that a kernel reads: the kernel, the number of their value, and the range of valid indices."""

    kernel: str
    number: int
    least: int
    largest: int


def index_fault(method: Method, failure: str, names: Sequence[str], inputs: Sequence[Any]) -> str:
    """Returns a sentence that names the input whose indices are out of range, and what to give; "" if none is found.

    `failure` names the kernel that failed. `names` and `inputs` are those of the method's inputs. Linear in the
    calls of the method, for each of its kernels that reads indices.
    """
    writers = writers_of(method)
    at = {number: index for index, number in enumerate(method.input_numbers)}
    found = [indices for indices in _indices_of(method) if indices.kernel in failure]
    for indices in found:
        number = _without_moves(writers, indices.number)
        # ExecuTorch leaves out a kernel that only reshapes: its output lies in the memory of an input of the same size.
        sources = [at[number]] if number in at else [] if number in writers else range(len(inputs))
        for source in sources:
            if method.slots[method.input_numbers[source]].bytes != method.slots[number].bytes:
                continue
            if (wrong := _outside(inputs[source], indices)) is not None:
                return (
                    f"Input '{names[source]}' holds the index {wrong}. Give indices from {indices.least} to "
                    f"{indices.largest}."
                )
    for indices in found:
        sources = [at[number] for number in _sources(writers, indices.number) if number in at]
        integers = [source for source in sources if _is_integer(inputs[source])]
        if indices.number not in at and integers:
            ranges = " and ".join(f"'{names[source]}' ({_range(inputs[source])})" for source in integers)
            return (
                f"It computes its indices from {ranges}. Give values for which they are from {indices.least} to "
                f"{indices.largest}."
            )
    return ""


def _indices_of(method: Method) -> Iterator[_Indices]:
    """Returns the indices of all kernel calls. A position that a damaged file lacks is left out."""
    steps = [step for chain in method.chains for step in chain if step.kind in ("kernel", "delegate")]
    for call, step in zip(method.calls, steps, strict=False):
        if not isinstance(call, KernelCall):
            continue
        slots, arguments = method.slots, step.arguments
        indexed = slots[arguments[0]].sizes if arguments else ()
        if call.name in _LISTS:
            for size, number in zip(indexed, slots[arguments[_LIST_AT]].members, strict=False):
                if number >= 0:
                    yield _Indices(call.name, number, -size, size - 1)
        elif call.name in _INDICES and indexed:
            position, dim_at = _INDICES[call.name]
            dim = 0 if dim_at is None else int(slots[arguments[dim_at]].constant or 0)
            yield _Indices(call.name, arguments[position], 0, indexed[dim] - 1)


def _without_moves(writers: Mapping[int, KernelCall], number: int) -> int:
    """Returns the value that a value is a copy of, in another shape, dtype or order."""
    seen = set()
    while number in writers and number not in seen and any(part in writers[number].name for part in _KEEPS_VALUES):
        seen.add(number)
        number = writers[number].numbers[0]
    return number


def _sources(writers: Mapping[int, KernelCall], number: int) -> list[int]:
    """Returns the values that a value is computed from by CPU kernels."""
    found: dict[int, None] = {}
    waiting = [number]
    while waiting:
        one = waiting.pop()
        if one not in found:
            found[one] = None
            waiting += writers[one].numbers[:-1] if one in writers else ()
    return list(found)


def _outside(values: Any, indices: _Indices) -> int | None:
    """Returns the first of `values` that is out of range; None if there is none."""
    if not _is_integer(values):
        return None
    wrong = values[(values < indices.least) | (values > indices.largest)]
    return int(wrong.flatten()[0]) if wrong.numel() else None


def _is_integer(values: Any) -> bool:
    return isinstance(values, torch.Tensor) and not values.is_floating_point() and values.dtype != torch.bool


def _range(values: torch.Tensor) -> str:
    return f"{int(values.min())} to {int(values.max())}" if values.numel() else "empty"
