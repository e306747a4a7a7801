"""A bounded sample of a stream of tensors that is the same wherever the stream is cut.

Of each tensor, values at evenly spread positions are taken; when there are too many in all, half of those of every
tensor are kept. Which values are kept follows from the sizes of the tensors alone, so samples of consecutive parts of a
stream add up to that of the whole, to the bit. The extremes of each tensor are kept as well: how far the few values
reach that clipping would hit, a sample of one in a thousand does not know.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["CAPACITY", "VALUES_OF_A_TENSOR", "Sample", "SampleState", "flattened", "positions", "rows_in"]

VALUES_OF_A_TENSOR = 1024
# A batch counts as so many tensors at most.
MOST_ROWS = 32
CAPACITY = 65536
# Of the mean square of how far tensors reach: less is as good as silence, which must not decide.
SMALLEST_PEAK = 1e-3
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


def rows_in(shape: Sequence[int]) -> int:
    """How many tensors one of this shape counts as: one for each index of the first dimension, if there are others.

    So a batch is as good as its samples one by one. Where they are more than `MOST_ROWS`, several count as one.
    """
    if len(shape) < 2:
        return 1
    return next(count for count in range(min(shape[0], MOST_ROWS), 0, -1) if shape[0] % count == 0)


@dataclass(frozen=True)
class SampleState:
    """What is kept of a stream.

    `values` [N] in order, float32; the `sizes` [tensors] of the tensors, int64, and their `extremes` [tensors, 2],
    float32. At level L, the first 2^-L of what was taken of a tensor is left, rounded up.
    """

    values: Tensor
    sizes: Tensor
    extremes: Tensor
    level: int

    @property
    def counts(self) -> Tensor:
        """How many values of each tensor are left, [tensors]."""
        return _left(self.sizes.clamp(max=VALUES_OF_A_TENSOR), self.level)

    def weighted(self, *, relative: bool = False) -> tuple[Tensor, Tensor]:
        """Values [N] and how many of the stream each stands for, [N] float32; if `relative`, `votes_by_peak` as many.

        Where not all values of a tensor are left, its extremes count as one value each beside them.
        """
        counts, votes = self.counts, self.votes_by_peak() if relative else torch.ones(len(self.sizes))
        thinned = counts < self.sizes
        weights = (votes * self.sizes / counts).repeat_interleave(counts)
        return (
            torch.cat([self.values, self.extremes[thinned].flatten()]),
            torch.cat([weights, votes[thinned].repeat_interleave(2)]),
        )

    def votes_by_peak(self) -> Tensor:
        """[tensors]: the inverse square of how far each tensor reaches, by which their squared errors become relative.

        Those that reach less far than the mean square times `SMALLEST_PEAK` vote as if they reached that.
        """
        peaks = self.extremes.abs().amax(1)
        if not peaks.any():
            return torch.ones_like(peaks)
        squares = (peaks / peaks.max()).square()
        return 1 / squares.clamp(min=SMALLEST_PEAK * float(squares.mean()))

    def at(self, level: int) -> SampleState:
        """The same at a higher level."""
        counts = self.counts
        starts = counts.cumsum(0) - counts
        place = torch.arange(len(self.values)) - starts.repeat_interleave(counts)
        left = _left(self.sizes.clamp(max=VALUES_OF_A_TENSOR), level).repeat_interleave(counts)
        return SampleState(self.values[place < left], self.sizes, self.extremes, level)

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
        self.tensors = 0
        self._taking: _Taking | None = None
        self._hold(SampleState(torch.empty(0), torch.empty(0, dtype=torch.int64), torch.empty(0, 2), level=0))

    def add(self, values: Tensor) -> None:
        """Take in the next tensor, which is not empty, or as many as it counts as by `rows_in`."""
        flat = flattened(values)
        taking = self._taking
        if taking is None or taking.shape != values.shape:
            taking = self._taking = _Taking.of(values, self._level)
        if taking.rows == 1:
            lows, highs = torch.aminmax(flat)
        else:  # one by one: aminmax of a dimension takes four times as long
            table = flat.view(taking.rows, -1)
            lows, highs = table.amin(1), table.amax(1)
        self._values.append(flat.index_select(0, taking.positions))
        self._lows.append(lows)
        self._highs.append(highs)
        self._new_sizes += taking.sizes
        self.tensors += taking.rows
        self._held += taking.count
        if self._held > self.capacity and self._level < LAST_LEVEL:
            self._hold(self.state())

    @property
    def extremes(self) -> tuple[Tensor, Tensor]:
        """The least and the largest value so far, float32 without dimensions; infinite, as far apart, before any."""
        extremes = self._all_extremes()
        if not len(extremes):
            return torch.tensor(torch.inf), torch.tensor(-torch.inf)
        return extremes[:, 0].amin(), extremes[:, 1].amax()

    def state(self) -> SampleState:
        """What is kept, on the CPU."""
        old = self._old
        values = torch.cat([old.values, _joined(self._values)])
        sizes = torch.cat([old.sizes, torch.tensor(self._new_sizes, dtype=torch.int64)])
        return SampleState(values, sizes, self._all_extremes(), self._level).fitting(self.capacity)

    def _all_extremes(self) -> Tensor:
        """Of each tensor, [tensors, 2]."""
        return torch.cat([self._old.extremes, torch.stack((_joined(self._lows), _joined(self._highs)), 1)])

    def merge(self, later: SampleState) -> None:
        """Go on as if the tensors of `later` had come next."""
        own = self.state()
        level = max(own.level, later.level)
        own, later = own.at(level), later.at(level)
        values, sizes, extremes = (
            torch.cat((getattr(own, name), getattr(later, name))) for name in ("values", "sizes", "extremes")
        )
        self.tensors += len(later.sizes)
        self._hold(SampleState(values, sizes, extremes, level).fitting(self.capacity))

    def _hold(self, state: SampleState) -> None:
        """Go on from `state`, with nothing new yet."""
        self._old, self._level, self._held = state, state.level, len(state.values)
        self._values: list[Tensor] = []
        self._lows: list[Tensor] = []
        self._highs: list[Tensor] = []
        self._new_sizes: list[int] = []
        self._taking = None


@dataclass(frozen=True)
class _Taking:
    """What is taken of tensors of one `shape`: values at `positions` [count], for `rows` tensors of the same size."""

    shape: torch.Size
    rows: int
    positions: Tensor
    count: int
    sizes: list[int]

    @classmethod
    def of(cls, values: Tensor, level: int) -> _Taking:
        rows = rows_in(values.shape)
        size = values.numel() // rows
        taken = positions(size)
        first = taken[: _left(len(taken), level)]
        every = (torch.arange(rows)[:, None] * size + first).flatten().to(values.device)
        return cls(values.shape, rows, every, len(every), [size] * rows)


def _joined(parts: list[Tensor]) -> Tensor:
    """All values of `parts` in one dimension, on the CPU, float32."""
    return torch.cat([torch.empty(0), *(part.reshape(-1).to("cpu", torch.float32) for part in parts)])


def _left(taken: _Count, level: int) -> _Count:
    """How much of what was `taken` of a tensor is left at `level`, rounded up."""
    return -(-taken >> level)
