"""Finds the input or state whose indices made a CPU kernel fail."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from openneutron.cpu.signatures import signature_of
from openneutron.formats.delegate_outputs import BACKEND
from openneutron.formats.kernel_calls import written_values
from openneutron.formats.payload import argument_count
from openneutron.formats.pte import DelegateCall, KernelCall, Method

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
# The index in the message of `embedding` or `index_select`. The other kernels of `_INDICES` report none.
_REPORTED = re.compile(r"(?:indices_ptr\[\d+\]|index\[\d+\] =) (-?\d+)")


@dataclass(frozen=True)
class _Indices:
    """Indices that a kernel reads: the number of the value that holds them, and the range of valid indices."""

    number: int
    least: int
    largest: int

    @property
    def range(self) -> str:
        return f"from {self.least} to {self.largest}"


@dataclass
class _Values:
    """Where the values of a method come from, at one step of its run.

    A kernel that only reshapes is not in the program: its output lies at the place of its operand.
    """

    method: Method
    origins: dict[int, int] = field(default_factory=dict)
    """For each value that exists: the value that it is a copy of, or itself."""
    read: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """For each value that a kernel has computed: the origins of what the kernel read."""
    last_at: dict[tuple[int, int], int] = field(default_factory=dict)
    """For each place in memory: the value that was written there last."""

    def write(self, number: int, origin: int) -> None:
        """Notes that a value is written now, with the values of `origin`."""
        self.origins[number] = origin
        if (place := self.method.slots[number].place) is not None:
            self.last_at[place] = number

    def origin(self, number: int) -> int | None:
        """Returns the input, state, constant or computed value that a value is a copy of; None if it is unknown."""
        place = self.method.slots[number].place
        if number not in self.origins and place is not None:
            number = self.last_at.get(place, number)
        return self.origins.get(number)

    def run_kernel(self, call: KernelCall) -> None:
        """Notes the values that a kernel writes. A state that it overwrites stays an origin."""
        slots = self.method.slots
        outputs = [one for one in written_values(self.method, call, signature_of) if not slots[one].is_state]
        if not outputs:
            return
        source = self.origin(call.arguments[0])
        if any(part in call.name for part in _KEEPS_VALUES) and source is not None and "int" in slots[source].dtype:
            for output in outputs:
                self.write(output, source)
            return
        operands = [number for number in call.numbers if number not in outputs or number in self.origins]
        origins = [self.origin(number) for number in operands]
        for output in outputs:
            self.read[output] = tuple(origin for origin in origins if origin is not None)
            self.write(output, output)

    def run_delegate(self, call: DelegateCall) -> None:
        """Notes the outputs of a delegate. For a backend whose payload is unknown, each new argument is an output."""
        inputs = argument_count(call.payload) if call.backend == BACKEND else 0
        for number in call.numbers[inputs:]:
            if inputs or number not in self.origins:
                self.write(number, number)

    def roots(self, number: int) -> list[int]:
        """Returns the inputs, states and constants that a value is computed from by CPU kernels."""
        found: dict[int, None] = {}
        waiting = [number]
        while waiting:
            one = waiting.pop()
            if one not in found:
                found[one] = None
                waiting += self.read.get(one, ())
        return [one for one in found if one not in self.read]


def index_fault(method: Method, failure: str, names: Sequence[str], inputs: Sequence[Any]) -> str:
    """Returns a sentence that names the value whose indices are out of range, and what to do; "" if none is found.

    `failure` names the kernel that failed, and the index if the kernel reports one. `names` and `inputs` are those of
    the method's inputs. Linear in the calls of the method, for each of its kernels that reads indices.
    """
    reported = _REPORTED.search(failure)
    at = {number: index for index, number in enumerate(method.input_numbers)}
    values = _Values(method)
    for number, slot in enumerate(method.slots):
        if number in at or slot.has_data:
            origin = values.origin(number)  # a state in another shape is another value with data, at the same place
            values.write(number, number if origin is None else origin)
    suspects = []
    for name, indices in _run(values):
        if name not in failure or (origin := values.origin(indices.number)) is None:
            continue
        if origin not in at:
            suspects.append((indices, values.roots(origin), origin in values.read))
            continue
        found = _outside(inputs[at[origin]], indices)
        wrong = found[:1] if reported is None else [index for index in found if index == int(reported[1])]
        if wrong:
            return f"Input '{names[at[origin]]}' holds the index {wrong[0]}. Give indices {indices.range}."
    for indices, roots, is_computed in suspects:
        if sources := _sources(method, roots, [(names[at[one]], inputs[at[one]]) for one in roots if one in at]):
            verb = "computes" if is_computed else "reads"
            return f"It {verb} its indices from {' and '.join(sources)}. {_cure(method, roots)} {indices.range}."
    return ""


def _sources(method: Method, roots: Iterable[int], inputs: Iterable[tuple[str, Any]]) -> list[str]:
    """Returns a description of each input of integers, with its range, and of each state of integers."""
    states = [method.slots[number] for number in roots]
    return [
        *(f"'{name}' ({_range(values)})" for name, values in inputs if _is_integer(values)),
        *(f"the state of shape {slot.sizes} and dtype {slot.dtype}" for slot in states
          if slot.is_state and "int" in slot.dtype),
    ]  # fmt: skip


def _cure(method: Method, roots: Iterable[int]) -> str:
    """Returns the beginning of the sentence that says what to do; the range of indices is its end."""
    if any(method.slots[number].is_state for number in roots):
        return "Call reset() to restore the state, and run the program only while the indices are"
    return "Give values for which they are"


def _run(values: _Values) -> Iterator[tuple[str, _Indices]]:
    """Follows the calls of the method, and returns the indices of each kernel call before `values` has its output."""
    for call in values.method.calls:
        if isinstance(call, KernelCall):
            for indices in _indices_of(values.method, call):
                yield call.name, indices
            values.run_kernel(call)
        else:
            values.run_delegate(call)


def _indices_of(method: Method, call: KernelCall) -> Iterator[_Indices]:
    """Returns the indices that a kernel call reads. A position that a damaged file lacks is left out."""
    slots, name, arguments = method.slots, call.name, call.arguments
    indexed = slots[arguments[0]].sizes if arguments else ()
    if name in _LISTS:
        for size, number in zip(indexed, slots[arguments[_LIST_AT]].members, strict=False):
            if number >= 0:
                yield _Indices(number, -size, size - 1)
    elif name in _INDICES and indexed:
        position, dim_at = _INDICES[name]
        dim = 0 if dim_at is None else int(slots[arguments[dim_at]].constant or 0)
        yield _Indices(arguments[position], 0, indexed[dim] - 1)


def _outside(values: Any, indices: _Indices) -> list[int]:
    """Returns those of `values` that are out of range."""
    if not _is_integer(values):
        return []
    wrong: list[int] = values[(values < indices.least) | (values > indices.largest)].tolist()
    return wrong


def _is_integer(values: Any) -> bool:
    return isinstance(values, torch.Tensor) and not values.is_floating_point() and values.dtype != torch.bool


def _range(values: torch.Tensor) -> str:
    return f"{int(values.min())} to {int(values.max())}" if values.numel() else "empty"
