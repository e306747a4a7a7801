"""Accumulates statistics of a layer's float and quantized outputs. Memory does not grow with the number of samples."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from openneutron.accuracy.quantized_layers import LayerQParams, QuantizedLayer, Weight
from openneutron.ops.masks import HIDDEN_SUM

__all__ = ["BINS", "WEAK_CODES", "Noise", "Statistics", "largest_codes", "weak_channels"]

BINS = 64
# A channel of a weight is weak if it uses fewer codes than this, which is less than 3 of 8 bits.
WEAK_CODES = 8


@dataclass
class Noise:
    """Energies of a signal and of its noise."""

    signal: float = 0.0
    noise: float = 0.0

    def add(self, reference: torch.Tensor, value: torch.Tensor) -> None:
        """Adds one sample. The noise is the difference of `value` and `reference`."""
        wanted = reference.double()
        self.signal += float(wanted.square().sum())
        self.noise += float((value.double() - wanted).square().sum())

    @property
    def sqnr_db(self) -> float:
        """10 log10(signal / noise) in dB; infinite without noise, minus infinity without signal."""
        if self.noise == 0.0:
            return math.inf
        return -math.inf if self.signal == 0.0 else 10 * math.log10(self.signal / self.noise)

    @property
    def ratio(self) -> float:
        """noise / signal; the noise itself if there is no signal."""
        return self.noise / (self.signal or 1.0)


@dataclass
class Statistics:
    """Statistics of one layer over the samples so far."""

    layer: QuantizedLayer
    output: Noise = field(default_factory=Noise)
    """Noise of its output in the quantized module, including that of all layers before it."""
    own: Noise = field(default_factory=Noise)
    """Noise of its output against the same layer in float on the same quantized inputs."""
    weights: Noise = field(default_factory=Noise)
    """Noise of its output with only weights and biases quantized, in the whole network."""
    activations: Noise = field(default_factory=Noise)
    """Noise of its output with only activations quantized, in the whole network."""
    low: float = math.inf
    high: float = -math.inf
    values: int = 0
    clipped: int = 0
    samples_of_a_channel: int = 0
    histogram: Histogram | None = None
    _channels: _Extremes | None = None
    _codes: _Extremes | None = None

    def add(self, wanted: torch.Tensor, alone: torch.Tensor, codes: torch.Tensor, value: torch.Tensor) -> None:
        """Adds one sample.

        `wanted` is the output in the float graph, `alone` is the output of this layer in float on quantized inputs,
        `codes` is the quantized output, and `value` is the dequantized output. All have the same shape. Values that
        the readers do not distinguish (`QuantizedLayer.needed`) count as equal.
        """
        masked = (wanted <= HIDDEN_SUM) & (codes == self.layer.qparams.low_code)
        if bool(masked.any()):  # the lowest code is exact for a masked value
            wanted, alone = value.where(masked, wanted), value.where(masked, alone)
        needed = self.layer.needed
        wanted_by_readers, value_to_readers, alone = (
            one.clamp(needed.low, needed.high) for one in (wanted, value, alone)
        )
        self.output.add(wanted_by_readers, value_to_readers)
        self.own.add(alone, value_to_readers)
        if not wanted.numel():
            return
        qparams = self.layer.qparams
        low, high = (float(extreme) for extreme in torch.aminmax(wanted))
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.values += wanted.numel()
        self.clipped += _count_clipped(wanted_by_readers, qparams)
        if self.histogram is None:
            self.histogram = Histogram.over(min(low, qparams.low), max(high, qparams.high))
        self.histogram.add(wanted, value)
        rows = _by_channel(wanted, self.layer.channel_axis)
        self._channels = _Extremes.extended(rows, self._channels)
        self._codes = _Extremes.extended(_by_channel(codes, self.layer.channel_axis), self._codes)
        self.samples_of_a_channel += rows.shape[1]

    def add_apart(self, wanted: torch.Tensor, weights: torch.Tensor, activations: torch.Tensor) -> None:
        """Adds one sample of the runs with only weights, and with only activations quantized, both dequantized."""
        hidden = wanted <= HIDDEN_SUM
        needed = self.layer.needed
        for noise, value in ((self.weights, weights), (self.activations, activations)):
            seen = wanted.where(hidden, value) if bool(hidden.any()) else value
            noise.add(*(one.clamp(needed.low, needed.high) for one in (wanted, seen)))

    @property
    def channels(self) -> int:
        """Number of channels of the output."""
        return 0 if self._channels is None else len(self._channels.low)

    @property
    def dead_channels(self) -> int:
        """Number of channels whose value was constant; 0 if each channel has had only one value so far."""
        if self._channels is None or self.samples_of_a_channel < 2:
            return 0
        return int(self._channels.constant.sum())

    @property
    def lost_channels(self) -> int:
        """Number of channels that vary in float but have a single code in int8."""
        if self._channels is None or self._codes is None or self.samples_of_a_channel < 2:
            return 0
        return int((self._codes.constant & ~self._channels.constant).sum())


@dataclass
class Histogram:
    """Counts of float and dequantized values in `BINS` bins from `low` to `high`.

    Values outside count in the end bins.
    """

    low: float
    high: float
    reference: torch.Tensor
    quantized: torch.Tensor

    @classmethod
    def over(cls, low: float, high: float) -> Histogram:
        """Returns an empty histogram. Widens a range of width 0."""
        return cls(low, high if high > low else low + 1.0, torch.zeros(BINS), torch.zeros(BINS))

    def add(self, wanted: torch.Tensor, value: torch.Tensor) -> None:
        """Adds the values of one sample."""
        self.reference += self._count_values(wanted)
        self.quantized += self._count_values(value)

    def _count_values(self, values: torch.Tensor) -> torch.Tensor:
        return torch.histc(values.float().clamp(self.low, self.high), BINS, self.low, self.high)


@dataclass(frozen=True)
class _Extremes:
    """The lowest and the highest value of each channel."""

    low: torch.Tensor
    high: torch.Tensor

    @classmethod
    def extended(cls, rows: torch.Tensor, before: _Extremes | None) -> _Extremes:
        """Returns the extremes of `rows` [channels, values] and of `before`."""
        low, high = rows.amin(1), rows.amax(1)  # torch.aminmax along a dimension is not vectorized
        return cls(low, high) if before is None else cls(torch.min(low, before.low), torch.max(high, before.high))

    @property
    def constant(self) -> torch.Tensor:
        return self.low == self.high


def _by_channel(values: torch.Tensor, axis: int) -> torch.Tensor:
    """Reshapes `values` to [channels, values]. A tensor of fewer than two dimensions becomes one channel."""
    if values.dim() < 2:
        return values.reshape(1, -1)
    return values.movedim(axis, 0).flatten(1)


def _count_clipped(values: torch.Tensor, qparams: LayerQParams) -> int:
    """Counts the values that are clipped: those more than half a step outside of the range."""
    half = qparams.scale / 2
    return int(((values < qparams.low - half) | (values > qparams.high + half)).sum())


def largest_codes(weight: Weight) -> torch.Tensor:
    """Returns the largest absolute code of each output channel [channels]."""
    return weight.codes.flatten(1).int().abs().amax(1)


def weak_channels(weight: Weight) -> int:
    """Counts the output channels with fewer than `WEAK_CODES` codes from minus to plus their largest absolute code.

    Does not count channels whose float weights are all 0.
    """
    is_used = weight.values.flatten(1).ne(0).any(1)
    return int(((2 * largest_codes(weight) + 1 < WEAK_CODES) & is_used).sum())
