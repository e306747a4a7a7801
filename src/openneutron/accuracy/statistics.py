"""Sums over samples of what a layer yields in float and quantized: memory does not grow with the data."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from openneutron.accuracy.layers import QParams, QuantizedLayer, Weight
from openneutron.ops.masks import HIDDEN_SUM

__all__ = ["BINS", "WEAK_CODES", "Noise", "Statistics", "largest_codes", "weak_channels"]

BINS = 64
# A channel of a weight with fewer different codes than this is weak: 3 bits of the 8 that it could have.
WEAK_CODES = 8


@dataclass
class Noise:
    """Energy of a signal and of what is wrong with it."""

    signal: float = 0.0
    noise: float = 0.0

    def add(self, reference: torch.Tensor, value: torch.Tensor) -> None:
        """Take in one sample: `value` should be `reference`."""
        wanted = reference.double()
        self.signal += float(wanted.square().sum())
        self.noise += float((value.double() - wanted).square().sum())

    @property
    def sqnr_db(self) -> float:
        """10 log10(signal / noise) in dB; infinite without noise, minus infinity where there is nothing but noise."""
        if self.noise == 0.0:
            return math.inf
        return -math.inf if self.signal == 0.0 else 10 * math.log10(self.signal / self.noise)

    @property
    def ratio(self) -> float:
        """noise / signal, as a number; of no signal, the noise itself."""
        return self.noise / (self.signal or 1.0)


@dataclass
class Statistics:
    """What is known of one layer after some samples."""

    layer: QuantizedLayer
    output: Noise = field(default_factory=Noise)
    """Of its output in the quantized module: its own noise and that of all layers before."""
    own: Noise = field(default_factory=Noise)
    """Of its output beside that of the same layer in float on the same quantized inputs."""
    low: float = math.inf
    high: float = -math.inf
    values: int = 0
    clipped: int = 0
    samples_of_a_channel: int = 0
    histogram: Histogram | None = None
    _channels: _Extremes | None = None
    _codes: _Extremes | None = None

    def add(self, wanted: torch.Tensor, alone: torch.Tensor, codes: torch.Tensor, value: torch.Tensor) -> None:
        """Take in one sample.

        `wanted` is the output in the float graph, `alone` that of this layer in float on quantized inputs; `codes` is
        the quantized output and `value` the same dequantized. All have one shape.
        """
        masked = (wanted <= HIDDEN_SUM) & (codes == self.layer.qparams.low_code)
        if bool(masked.any()):  # the lowest code represents every value that a mask hides exactly
            wanted, alone = value.where(masked, wanted), value.where(masked, alone)
        self.output.add(wanted, value)
        self.own.add(alone, value)
        if not wanted.numel():
            return
        qparams = self.layer.qparams
        low, high = (float(extreme) for extreme in torch.aminmax(wanted))
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.values += wanted.numel()
        self.clipped += _count_clipped(wanted, qparams)
        if self.histogram is None:
            self.histogram = Histogram.over(min(low, qparams.low), max(high, qparams.high))
        self.histogram.add(wanted, value)
        rows = _by_channel(wanted, self.layer.channel_axis)
        self._channels = _Extremes.of(rows, self._channels)
        self._codes = _Extremes.of(_by_channel(codes, self.layer.channel_axis), self._codes)
        self.samples_of_a_channel += rows.shape[1]

    @property
    def channels(self) -> int:
        """How many channels its output has."""
        return 0 if self._channels is None else len(self._channels.low)

    @property
    def dead_channels(self) -> int:
        """Channels that had one and the same value throughout; 0 where no channel had more than one value."""
        if self._channels is None or self.samples_of_a_channel < 2:
            return 0
        return int(self._channels.constant.sum())

    @property
    def lost_channels(self) -> int:
        """Channels that are not dead, and of which int8 has left one code."""
        if self._channels is None or self._codes is None or self.samples_of_a_channel < 2:
            return 0
        return int((self._codes.constant & ~self._channels.constant).sum())


@dataclass
class Histogram:
    """Counts of the float and of the dequantized values in `BINS` bins from `low` to `high`, outer ones to the ends."""

    low: float
    high: float
    reference: torch.Tensor
    quantized: torch.Tensor

    @classmethod
    def over(cls, low: float, high: float) -> Histogram:
        """An empty one; a range of no width is widened."""
        return cls(low, high if high > low else low + 1.0, torch.zeros(BINS), torch.zeros(BINS))

    def add(self, wanted: torch.Tensor, value: torch.Tensor) -> None:
        """Count the values of one sample."""
        self.reference += self._counted(wanted)
        self.quantized += self._counted(value)

    def _counted(self, values: torch.Tensor) -> torch.Tensor:
        return torch.histc(values.float().clamp(self.low, self.high), BINS, self.low, self.high)


@dataclass(frozen=True)
class _Extremes:
    """The lowest and the highest value of each channel."""

    low: torch.Tensor
    high: torch.Tensor

    @classmethod
    def of(cls, rows: torch.Tensor, before: _Extremes | None) -> _Extremes:
        """Those of `rows` [channels, values] and of what came before."""
        low, high = torch.aminmax(rows, dim=1)
        return cls(low, high) if before is None else cls(torch.min(low, before.low), torch.max(high, before.high))

    @property
    def constant(self) -> torch.Tensor:
        return self.low == self.high


def _by_channel(values: torch.Tensor, axis: int) -> torch.Tensor:
    """As [channels, values]; what has no such dimension is one channel."""
    if values.dim() < 2:
        return values.reshape(1, -1)
    return values.movedim(axis, 0).flatten(1)


def _count_clipped(values: torch.Tensor, qparams: QParams) -> int:
    """How many values are clipped: farther beyond an end of the range than rounding takes them."""
    half = qparams.scale / 2
    return int(((values < qparams.low - half) | (values > qparams.high + half)).sum())


def largest_codes(weight: Weight) -> torch.Tensor:
    """The largest absolute code of each output channel [channels]."""
    return weight.codes.flatten(1).int().abs().amax(1)


def weak_channels(weight: Weight) -> int:
    """How many output channels have fewer than `WEAK_CODES` codes, from minus their largest to plus it.

    Channels whose float weights are all 0 lose nothing and do not count.
    """
    is_used = weight.values.flatten(1).ne(0).any(1)
    return int(((2 * largest_codes(weight) + 1 < WEAK_CODES) & is_used).sum())
