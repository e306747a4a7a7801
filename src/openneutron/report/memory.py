"""What a partition needs in memory: its intermediate tensors in one arena, its weights as the NPU stores them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = ["Arena", "Lifetime", "lifetimes", "plan"]


@dataclass(frozen=True)
class Lifetime:
    """A tensor of `size` bytes that lives from the step that writes it to the last one that reads it, both included."""

    size: int
    first: int
    last: int


Value = TypeVar("Value", bound=Hashable)


@dataclass(frozen=True)
class Arena(Generic[Value]):
    """Where each tensor lies; `size` is what all of them need together, in bytes."""

    size: int
    offsets: Mapping[Value, int]
    live: tuple[int, ...]
    """Bytes of the tensors that are alive at each step."""

    @property
    def peak(self) -> int:
        """The most bytes alive at once: no plan needs less."""
        return max(self.live, default=0)


def lifetimes(
    steps: Sequence[tuple[Iterable[Value], Iterable[Value]]],
    sizes: Mapping[Value, int],
    outside: Iterable[Value],
) -> dict[Value, Lifetime]:
    """The lifetimes of what the steps write, each step given as what it reads and what it writes.

    `outside` are the values that somebody else has memory for: the inputs and outputs of the whole. Linear in uses.
    """
    excluded = set(outside)
    first: dict[Value, int] = {}
    last: dict[Value, int] = {}
    for step, (reads, writes) in enumerate(steps):
        for value in writes:
            if value not in excluded:
                first[value] = last[value] = step
        for value in reads:
            if value in first:
                last[value] = step
    return {value: Lifetime(sizes[value], first[value], last[value]) for value in first}


def plan(values: Mapping[Value, Lifetime], steps: int) -> Arena[Value]:
    """Place tensors that live at the same time side by side, the largest first, each at the lowest free offset.

    Linear in the pairs of tensors that are alive together, after sorting. (Greedy by size: Pisarchyk and Lee,
    "Efficient Memory Management for Deep Neural Net Inference", 2020.)
    """
    placed_at_step: list[list[Value]] = [[] for _ in range(steps)]
    offsets: dict[Value, int] = {}
    live = [0] * steps
    for value, life in sorted(values.items(), key=lambda item: (-item[1].size, item[1].first)):
        span = range(life.first, life.last + 1)
        beside = {other for step in span for other in placed_at_step[step]}
        taken = sorted((offsets[other], offsets[other] + values[other].size) for other in beside)
        offsets[value] = _lowest_gap(taken, life.size)
        for step in span:
            placed_at_step[step].append(value)
            live[step] += life.size
    size = max((offsets[value] + life.size for value, life in values.items()), default=0)
    return Arena(size, offsets, tuple(live))


def _lowest_gap(taken: Iterable[tuple[int, int]], size: int) -> int:
    """The lowest offset with `size` bytes between what is taken (sorted by start)."""
    end = 0
    for start, stop in taken:
        if start - end >= size:
            return end
        end = max(end, stop)
    return end
