"""Plans an arena for tensors, such as the intermediate tensors of a partition (the NPU's scratch)."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from openneutron.formats.tflite import Operator

__all__ = ["Arena", "Lifetime", "lifetimes", "plan", "scratch_arena", "scratch_lifetimes"]


@dataclass(frozen=True)
class Lifetime:
    """A tensor of `size` bytes. Step `first` writes it, and step `last` is the last that reads it."""

    size: int
    first: int
    last: int


Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Arena(Generic[Key]):
    """The offset of each tensor, and the `size` of the arena in bytes."""

    size: int
    offsets: Mapping[Key, int]
    live: tuple[int, ...]
    """Bytes of the tensors that are needed at each step."""

    @property
    def peak(self) -> int:
        """The maximum of `live` over the steps. No arena can be smaller."""
        return max(self.live, default=0)


def lifetimes(
    steps: Sequence[tuple[Iterable[Key], Iterable[Key]]],
    sizes: Mapping[Key, int],
    outside: Iterable[Key],
) -> dict[Key, Lifetime]:
    """Returns the lifetimes of the values that `steps` write. A step is a pair of the values it reads and writes.

    Skips the values in `outside`, such as inputs and outputs of the model, which have other memory. Linear in uses.
    """
    excluded = set(outside)
    first: dict[Key, int] = {}
    last: dict[Key, int] = {}
    for step, (reads, writes) in enumerate(steps):
        for value in writes:
            if value not in excluded:
                first[value] = last[value] = step
        for value in reads:
            if value in first:
                last[value] = step
    return {value: Lifetime(sizes[value], first[value], last[value]) for value in first}


def scratch_lifetimes(operators: Sequence[Operator]) -> dict[int, Lifetime]:
    """Returns the lifetimes of the intermediate tensors of operators in order of execution, by the tensor's index.

    A tensor that no operator reads is an output, which has other memory.
    """
    steps = [
        ([tensor.index for tensor in operator.inputs if tensor], [tensor.index for tensor in operator.outputs])
        for operator in operators
    ]
    sizes = {tensor.index: tensor.bytes for operator in operators for tensor in operator.outputs}
    read = {index for reads, _ in steps for index in reads}
    return lifetimes(steps, sizes, [index for index in sizes if index not in read])


def scratch_arena(operators: Sequence[Operator]) -> Arena[int]:
    """Plans the scratch of operators in order of execution.

    On the five known files of NXP's converter, its size equals the converter's number.
    """
    return plan(scratch_lifetimes(operators), len(operators))


def plan(values: Mapping[Key, Lifetime], steps: int) -> Arena[Key]:
    """Places tensors by descending size, each at the lowest offset without overlap with tensors of the same step.

    Linear in the pairs of tensors that are needed at the same step, after sorting. (Greedy by size: Pisarchyk and Lee,
    "Efficient Memory Management for Deep Neural Net Inference", 2020.)
    """
    placed_at_step: list[list[Key]] = [[] for _ in range(steps)]
    offsets: dict[Key, int] = {}
    live = [0] * steps
    for value, life in sorted(values.items(), key=lambda item: (-item[1].size, item[1].first)):
        span = range(life.first, life.last + 1)
        simultaneous = {other for step in span for other in placed_at_step[step]}
        taken = sorted((offsets[other], offsets[other] + values[other].size) for other in simultaneous)
        offsets[value] = _lowest_gap(taken, life.size)
        for step in span:
            placed_at_step[step].append(value)
            live[step] += life.size
    size = max((offsets[value] + life.size for value, life in values.items()), default=0)
    return Arena(size, offsets, tuple(live))


def _lowest_gap(taken: Iterable[tuple[int, int]], size: int) -> int:
    """Returns the lowest offset with `size` free bytes. `taken` has the occupied spans, sorted by start."""
    end = 0
    for start, stop in taken:
        if start - end >= size:
            return end
        end = max(end, stop)
    return end
