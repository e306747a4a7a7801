"""A bounded sample of a stream of tensors. The sample does not depend on how the stream is split.

Values at evenly spread positions of each tensor are sampled. When the sample exceeds its capacity, half of the values
of every tensor are dropped. The kept values depend on the sizes of the tensors only, so merging the samples of
consecutive parts of a stream gives the sample of the whole, bit for bit. The extremes of each tensor are kept as well,
because a sample of one in a thousand values does not show the magnitude of the few values that clipping would affect.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

__all__ = [
    "CAPACITY",
    "VALUES_OF_A_TENSOR",
    "SampleState",
    "StreamSample",
    "count_of_tensors",
    "flattened",
    "positions",
]

VALUES_OF_A_TENSOR = 1024
# A batch counts as at most this many tensors.
MOST_ROWS = 32
CAPACITY = 65536
# Squared peaks are at least this share of the mean squared peak, so that nearly zero tensors do not dominate.
SMALLEST_PEAK = 1e-3
# The level at which one value of each tensor remains.
LAST_LEVEL = 10

_Count = TypeVar("_Count", int, Tensor)

GOLDEN_RATIO = (1 + math.sqrt(5)) / 2


def positions(size: int, count: int = VALUES_OF_A_TENSOR) -> Tensor:
    """Returns at most `count` positions in a tensor of `size` values. Any prefix of them is evenly spread.

    The positions are multiples of the golden ratio modulo 1 (a Kronecker sequence with the lowest known discrepancy).
    They do not follow the stride of a channel or line. For a tensor of at most `count` values, each position is
    returned once.
    """
    multiples = (torch.arange(1, min(size, count) + 1, dtype=torch.float64) * GOLDEN_RATIO).frac()
    if size <= count:
        return multiples.argsort().argsort()
    return (multiples * size).long()


def flattened(values: Tensor) -> Tensor:
    """Returns `values` flattened to [N] in memory order, which needs no copy if their memory has no gaps."""
    if not values.is_contiguous():
        strides = values.stride()
        values = values.permute(sorted(range(values.dim()), key=lambda dim: -strides[dim]))
    return values.reshape(-1)


def count_of_tensors(shape: Sequence[int]) -> int:
    """Returns how many tensors a tensor of this shape counts as.

    A tensor of rank 0 or 1 counts as one tensor. Any other tensor is a batch, and each sample in its first dimension
    counts as one tensor. If there are more than `MOST_ROWS` samples, several samples count as one tensor.
    """
    if len(shape) < 2:
        return 1
    return next(count for count in range(min(shape[0], MOST_ROWS), 0, -1) if shape[0] % count == 0)


@dataclass(frozen=True)
class SampleState:
    """The kept values of a stream.

    `values` [N] (float32) are in the order of the stream. `sizes` [tensors] (int64) and `extremes` [tensors, 2]
    (float32) belong to the tensors. At `level` L, the first 2^-L of the sampled values of each tensor are kept, rounded
    up.
    """

    values: Tensor
    sizes: Tensor
    extremes: Tensor
    level: int

    @property
    def counts(self) -> Tensor:
        """Returns the number of kept values of each tensor, [tensors]."""
        return _kept_count(self.sizes.clamp(max=VALUES_OF_A_TENSOR), self.level)

    def weighted(self, *, relative: bool = False) -> tuple[Tensor, Tensor]:
        """Returns values [N] and weights [N] (float32): how many values of the stream each value represents.

        If `relative`, the weights of a tensor are multiplied by its `inverse_squared_peaks`. If not all values of a
        tensor are kept, its extremes are added with the weight of one value each.
        """
        counts, factors = self.counts, self.inverse_squared_peaks() if relative else torch.ones(len(self.sizes))
        thinned = counts < self.sizes
        weights = (factors * self.sizes / counts).repeat_interleave(counts)
        return (
            torch.cat([self.values, self.extremes[thinned].flatten()]),
            torch.cat([weights, factors[thinned].repeat_interleave(2)]),
        )

    def inverse_squared_peaks(self) -> Tensor:
        """Returns 1 / peak^2 of each tensor, [tensors], where the peak is its largest magnitude. As weights, these
        numbers make squared errors relative to the peak.

        A squared peak counts as at least the mean squared peak times `SMALLEST_PEAK`.
        """
        peaks = self.extremes.abs().amax(1)
        if not peaks.any():
            return torch.ones_like(peaks)
        squares = (peaks / peaks.max()).square()
        return 1 / squares.clamp(min=SMALLEST_PEAK * float(squares.mean()))

    def at_level(self, level: int) -> SampleState:
        """Returns the same sample at a higher level."""
        counts = self.counts
        starts = counts.cumsum(0) - counts
        place = torch.arange(len(self.values)) - starts.repeat_interleave(counts)
        left = _kept_count(self.sizes.clamp(max=VALUES_OF_A_TENSOR), level).repeat_interleave(counts)
        return SampleState(self.values[place < left], self.sizes, self.extremes, level)

    def reduced_to(self, capacity: int) -> SampleState:
        """Returns the sample at the lowest level with at most `capacity` values, at most at `LAST_LEVEL`."""
        sizes = self.sizes.clamp(max=VALUES_OF_A_TENSOR)
        level = self.level
        while level < LAST_LEVEL and int(_kept_count(sizes, level).sum()) > capacity:
            level += 1
        return self if level == self.level else self.at_level(level)


class StreamSample:
    """Samples a stream of tensors. Keeps at most `capacity` values, but at least one for each tensor."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self.capacity = capacity
        self.tensors = 0
        self._taking: _SampledPositions | None = None
        self._set_state(SampleState(torch.empty(0), torch.empty(0, dtype=torch.int64), torch.empty(0, 2), level=0))

    def add(self, values: Tensor) -> None:
        """Adds the next tensor, which is not empty and counts as `count_of_tensors` tensors."""
        flat = flattened(values)
        taking = self._taking
        if taking is None or taking.shape != values.shape:
            taking = self._taking = _SampledPositions.from_values(values, self._level)
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
            self._set_state(self.state())

    @property
    def extremes(self) -> tuple[Tensor, Tensor]:
        """Returns the least and the largest value so far, float32 scalars, or inf and -inf before any."""
        extremes = self._all_extremes()
        if not len(extremes):
            return torch.tensor(torch.inf), torch.tensor(-torch.inf)
        return extremes[:, 0].amin(), extremes[:, 1].amax()

    def state(self) -> SampleState:
        """Returns the kept values, on the CPU."""
        old = self._old
        values = torch.cat([old.values, _concatenated(self._values)])
        sizes = torch.cat([old.sizes, torch.tensor(self._new_sizes, dtype=torch.int64)])
        return SampleState(values, sizes, self._all_extremes(), self._level).reduced_to(self.capacity)

    def _all_extremes(self) -> Tensor:
        """Returns the extremes of each tensor, [tensors, 2]."""
        return torch.cat([self._old.extremes, torch.stack((_concatenated(self._lows), _concatenated(self._highs)), 1)])

    def merge(self, later: SampleState) -> None:
        """Adds `later`, the sample of the next part of the stream."""
        own = self.state()
        level = max(own.level, later.level)
        own, later = own.at_level(level), later.at_level(level)
        values, sizes, extremes = (
            torch.cat((getattr(own, name), getattr(later, name))) for name in ("values", "sizes", "extremes")
        )
        self.tensors += len(later.sizes)
        self._set_state(SampleState(values, sizes, extremes, level).reduced_to(self.capacity))

    def _set_state(self, state: SampleState) -> None:
        """Replaces the kept values by `state`."""
        self._old, self._level, self._held = state, state.level, len(state.values)
        self._values: list[Tensor] = []
        self._lows: list[Tensor] = []
        self._highs: list[Tensor] = []
        self._new_sizes: list[int] = []
        self._taking = None


@dataclass(frozen=True)
class _SampledPositions:
    """The `positions` [count] of the sampled values in tensors of one `shape`. Each counts as `rows` tensors."""

    shape: torch.Size
    rows: int
    positions: Tensor
    count: int
    sizes: list[int]

    @classmethod
    def from_values(cls, values: Tensor, level: int) -> _SampledPositions:
        rows = count_of_tensors(values.shape)
        size = values.numel() // rows
        taken = positions(size)
        first = taken[: _kept_count(len(taken), level)]
        every = (torch.arange(rows)[:, None] * size + first).flatten().to(values.device)
        return cls(values.shape, rows, every, len(every), [size] * rows)


def _concatenated(parts: list[Tensor]) -> Tensor:
    """Returns all values of `parts` in one dimension, on the CPU, float32."""
    return torch.cat([torch.empty(0), *(part.reshape(-1).to("cpu", torch.float32) for part in parts)])


def _kept_count(taken: _Count, level: int) -> _Count:
    """Returns the number of kept values of a tensor at `level`, from the number of its sampled values, `taken`."""
    return -(-taken >> level)
