"""A bounded sample of a stream of tensors that is the same wherever the stream is cut.

Of each tensor, values at evenly spread positions are taken; when there are too many in all, half of those of every
tensor are kept. Which values are kept follows from the sizes of the tensors alone, so samples of consecutive parts of a
stream add up to that of the whole, to the bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["CAPACITY", "VALUES_OF_A_TENSOR", "Sample", "SampleState", "flattened", "positions"]

VALUES_OF_A_TENSOR = 1024
CAPACITY = 65536
# The level at which one value of each tensor is left.
LAST_LEVEL = 10

_Count = TypeVar("_Count", int, Tensor)

GOLDEN_RATIO = (1 + math.sqrt(5)) / 2


def positions(size: int, count: int = VALUES_OF_A_TENSOR) -> Tensor:
    """Positions in a tensor of `size` values, at most `count`, of which any prefix is evenly spread.

    They are multiples of the golden ratio modulo 1 (a Kronecker sequence, of the least discrepancy that one has), which
    no stride of channels or lines meets. Of a small tensor, each position is there once.
    """
    multiples = (torch.arange(1, min(size, count) + 1, dtype=torch.float64) * GOLDEN_RATIO).frac()
    if size <= count:
        return multiples.argsort().argsort()
    return (multiples * size).long()


def flattened(values: Tensor) -> Tensor:
    """All of `values` in one dimension [N], in the order in which they lie in memory, so that nothing is copied."""
    if not values.is_contiguous():
        strides = values.stride()
        values = values.permute(sorted(range(values.dim()), key=lambda dim: -strides[dim]))
    return values.reshape(-1)


@dataclass(frozen=True)
class SampleState:
    """What is kept of a stream.

    `values` [N] in order, float32; the `sizes` [calls] of the tensors, int64. At level L, the first 2^-L of what was
    taken of a tensor is left, rounded up.
    """

    values: Tensor
    sizes: Tensor
    level: int

    @property
    def counts(self) -> Tensor:
        """How many values of each tensor are left, [calls]."""
        return _left(self.sizes.clamp(max=VALUES_OF_A_TENSOR), self.level)

    @property
    def weights(self) -> Tensor:
        """How many values of the stream each one stands for, [N], float32."""
        counts = self.counts
        return (self.sizes / counts).float().repeat_interleave(counts)

    def at(self, level: int) -> SampleState:
        """The same at a higher level."""
        counts = self.counts
        starts = counts.cumsum(0) - counts
        place = torch.arange(len(self.values)) - starts.repeat_interleave(counts)
        left = _left(self.sizes.clamp(max=VALUES_OF_A_TENSOR), level).repeat_interleave(counts)
        return SampleState(self.values[place < left], self.sizes, level)

    def fitting(self, capacity: int) -> SampleState:
        """The same at the lowest level at which it holds `capacity` values, or one of each tensor."""
        sizes = self.sizes.clamp(max=VALUES_OF_A_TENSOR)
        level = self.level
        while level < LAST_LEVEL and int(_left(sizes, level).sum()) > capacity:
            level += 1
        return self if level == self.level else self.at(level)


class Sample:
    """Takes in a stream of tensors. It holds `capacity` values, or one of each tensor where those are more."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self.capacity = capacity
        self.calls = 0
        self._level = 0
        self._held = 0
        self._values: list[Tensor] = []
        self._sizes: list[Tensor] = []
        self._size = -1
        self._positions = torch.empty(0, dtype=torch.int64)
        self._new_sizes: list[int] = []

    def add(self, values: Tensor) -> None:
        """Take in the next tensor, [N] and not empty."""
        size = values.shape[0]
        if size != self._size:
            taken = positions(size)
            self._size, self._positions = size, taken[: _left(len(taken), self._level)].to(values.device)
        self._values.append(values.index_select(0, self._positions))
        self._new_sizes.append(size)
        self.calls += 1
        self._held += len(self._positions)
        if self._held > self.capacity and self._level < LAST_LEVEL:
            self._hold(self.state())

    def state(self) -> SampleState:
        """What is kept, on the CPU."""
        values = [part.to("cpu", torch.float32) for part in self._values]
        sizes = [*self._sizes, torch.tensor(self._new_sizes, dtype=torch.int64)]
        state = SampleState(torch.cat([torch.empty(0), *values]), torch.cat(sizes), self._level)
        return state.fitting(self.capacity)

    def merge(self, later: SampleState) -> None:
        """Go on as if the tensors of `later` had come next."""
        own = self.state()
        level = max(own.level, later.level)
        parts = own.at(level), later.at(level)
        values, sizes = torch.cat([part.values for part in parts]), torch.cat([part.sizes for part in parts])
        self.calls += len(later.sizes)
        self._hold(SampleState(values, sizes, level).fitting(self.capacity))

    def _hold(self, state: SampleState) -> None:
        self._values, self._sizes, self._new_sizes = [state.values], [state.sizes], []
        self._level, self._held, self._size = state.level, len(state.values), -1


def _left(taken: _Count, level: int) -> _Count:
    """How much of what was `taken` of a tensor is left at `level`, rounded up."""
    return -(-taken >> level)
