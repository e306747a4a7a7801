"""Observers with a reference to the observed node, so that errors of calibration name the node and its source line."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torchao.quantization.pt2e.observer import (
    MinMaxObserver,
    PerChannelMinMaxObserver,
    UniformQuantizationObserverBase,
)

from openneutron.core.fx import op_name, source_of
from openneutron.errors import CalibrationError, OptionError
from openneutron.quantizer.ranges import RULES, Codes, bounds_by_error, distribution, range_by, rule_named
from openneutron.quantizer.sample import SampleState, StreamSample, flattened

__all__ = [
    "SCALE_OF_ZERO_WEIGHTS",
    "DistributionObserver",
    "LatestPerChannelRangeObserver",
    "LatestRangeObserver",
    "Origin",
    "PerChannelRangeObserver",
    "PerChannelWeightObserver",
    "RangeObserver",
    "RecentRangeObserver",
    "VanishingValuesWarning",
    "WeightObserver",
]  # fmt: skip

# The averaging constant with which `RecentRangeObserver` shrinks its range for a batch with a smaller range.
SHRINKAGE = 0.01
# The scale of a weight that is zero everywhere. The scale of a bias is the input scale times the weight scale. If the
# weight had torchao's smallest scale, 1e-7, the codes of the bias would exceed int32.
SCALE_OF_ZERO_WEIGHTS = 2.0**-14


class VanishingValuesWarning(UserWarning):
    """Names a value that is too small in magnitude for the smallest scale."""


@dataclass(frozen=True)
class Origin:
    """The node that an observer observes."""

    node: str
    op: str
    source: str | None

    @classmethod
    def from_node(cls, node: Node) -> Origin:
        """Returns the origin of the output of `node`."""
        return cls(node.name, op_name(node), source_of(node))

    def error(self, message: str) -> CalibrationError:
        """Returns a `CalibrationError` with `message` about this node."""
        return CalibrationError(message, node=self.node, op=self.op, source=self.source)


_UNKNOWN = Origin("unknown", "unknown", None)


def _check_extremes(minimum: torch.Tensor, maximum: torch.Tensor, origin: Origin | None) -> None:
    origin = origin or _UNKNOWN
    if minimum.numel() == 0 or bool((minimum == float("inf")).any() and (maximum == float("-inf")).any()):
        raise _unreached_error(origin)
    if not bool(torch.isfinite(minimum).all() and torch.isfinite(maximum).all()):
        raise origin.error(
            f"NaN or infinite values were observed here (minimum {minimum.min().item()}, maximum "
            f"{maximum.max().item()}). Check the inputs and the model's weights for NaN and overflow."
        )


def _unreached_error(origin: Origin | None) -> CalibrationError:
    return (origin or _UNKNOWN).error(
        "Calibration or training never reached this value. Run the prepared model on representative inputs before "
        "convert_pt2e."
    )


def _set_scale_of_zeros(
    qparams: tuple[torch.Tensor, torch.Tensor], minimum: torch.Tensor, maximum: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns `qparams`, with scale 1 for values that are always zero: torchao's 1e-7 is too small for kernels."""
    scale, zero_point = qparams
    zeros = ((minimum == 0) & (maximum == 0)).to(scale.device)
    return torch.where(zeros, torch.ones_like(scale), scale), zero_point


def _warn_of_vanishing_values(observer: UniformQuantizationObserverBase, minimum: Any, maximum: Any) -> None:
    """Warns if the smallest scale, torchao's `eps`, maps all values to codes within 2 of the zero point."""
    largest, smallest_scale = max(abs(float(minimum)), abs(float(maximum))), float(observer.eps)
    if 0 < largest < 2 * smallest_scale:
        origin = observer.origin or _UNKNOWN
        at = f", at {origin.source}" if origin.source else ""
        warnings.warn(
            f"The values of {origin.node} ({origin.op}{at}) have magnitudes up to {largest:.1g} in calibration, but "
            f"the smallest scale is {smallest_scale:.1g}, so their int8 codes are within 2 of the zero point. Scale "
            "the model's data, or the weights of the layers before it.",
            VanishingValuesWarning,
            stacklevel=3,
        )


def _codes(observer: UniformQuantizationObserverBase) -> Codes:
    """Returns the codes of `observer`. For a symmetric scheme, they include torchao's constant zero point."""
    if observer.qscheme not in (torch.per_tensor_symmetric, torch.per_channel_symmetric):
        return Codes(observer.quant_min, observer.quant_max)
    one = torch.ones((), device=observer.eps.device)
    return Codes(observer.quant_min, observer.quant_max, int(observer._calculate_qparams(-one, one)[1]))


class RangeObserver(MinMaxObserver):
    """Observes the minimum and the maximum of all values, one pair for the tensor.

    `calculate_qparams` raises `CalibrationError` if it saw no values, or values that are not finite.
    """

    def __init__(self, *args: Any, origin: Origin | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.origin = origin

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Observes `values`, and returns them."""
        if values.numel():
            self._update_extremes(*torch.aminmax(flattened(values.detach()).to(self.min_val.dtype)))
        return values

    def _update_extremes(self, low: torch.Tensor, high: torch.Tensor) -> None:
        torch.minimum(self.min_val, low, out=self.min_val)
        torch.maximum(self.max_val, high, out=self.max_val)

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns scale (float32) and zero point (int64) of the observed range."""
        _check_extremes(self.min_val, self.max_val, self.origin)
        _warn_of_vanishing_values(self, self.min_val, self.max_val)
        return _set_scale_of_zeros(super().calculate_qparams(), self.min_val, self.max_val)

    def state(self) -> dict[str, torch.Tensor]:
        """Returns the minimum and the maximum, for the `merge` of another observer."""
        return {"minimum": self.min_val.cpu().clone(), "maximum": self.max_val.cpu().clone()}

    def merge(self, later: Mapping[str, torch.Tensor]) -> None:
        """Adds the `state` of another observer."""
        self._update_extremes(later["minimum"].to(self.min_val), later["maximum"].to(self.max_val))


class DistributionObserver(UniformQuantizationObserverBase):
    """Observes the extremes and a bounded sample of all values, and selects the range by one of `ranges.RULES`.

    `range_by` is "mse" (the least squared error), "relative" (the least squared error, where the squared errors of each
    tensor are divided by the square of its largest magnitude, so that a few large tensors do not dominate),
    "percentile" (from percentile 100 - `percentile` to percentile `percentile`), "kl" (the least divergence) or
    "minmax" (minimum and maximum). Raises `OptionError` for any other rule. Each index of the first dimension of the
    observed values counts as one tensor (see `count_of_tensors`). If `is_unbatched`, all values of a call count as one
    tensor.

    `calculate_qparams` raises `CalibrationError` if it saw no values, or values that are not finite.

    Merging the observers of consecutive parts of a stream gives the observer of the whole stream, bit for bit.
    """

    def __init__(
        self,
        *args: Any,
        origin: Origin | None = None,
        range_by: str = "mse",
        percentile: float = 99.99,
        is_unbatched: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if self.qscheme not in (torch.per_tensor_affine, torch.per_tensor_symmetric):
            raise OptionError(f"DistributionObserver finds one range for a tensor, which {self.qscheme} cannot use.")
        range_by = rule_named(range_by)
        if range_by not in RULES:
            raise OptionError(f"range_by is one of {', '.join(RULES)}, not {range_by!r}.")
        if not isinstance(percentile, (int, float)) or not 50 < percentile <= 100:
            raise OptionError(f"percentile is above 50 and at most 100, not {percentile!r}.")
        self.origin = origin
        self.range_by = range_by
        self.percentile = percentile
        self.is_unbatched = is_unbatched
        self.sample = StreamSample()
        self._found: tuple[int, tuple[torch.Tensor, torch.Tensor]] | None = None

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Observes `values`, and returns them."""
        if values.numel():
            self.sample.add(values.detach()[None] if self.is_unbatched else values.detach())
        return values

    @property
    def min_val(self) -> torch.Tensor:
        """Returns the least value seen, float32 on the CPU, or infinity before any."""
        return self.sample.extremes[0]

    @property
    def max_val(self) -> torch.Tensor:
        """Returns the largest value seen, float32 on the CPU, or minus infinity before any."""
        return self.sample.extremes[1]

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns scale (float32) and zero point (int64) of the selected range. Caches the search."""
        if self._found is None or self._found[0] != self.sample.tensors:
            _check_extremes(*self.sample.extremes, self.origin)
            _warn_of_vanishing_values(self, *self.sample.extremes)
            ends = torch.tensor(self._selected_range(*self._weighted_sample()), device=self.eps.device)
            qparams = _set_scale_of_zeros(self._calculate_qparams(*ends), *self.sample.extremes)
            self._found = self.sample.tensors, qparams
        return self._found[1]

    def qparams_within(self, low: float, high: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns scale and zero point of the range that is selected for the values clamped to `low`..`high`."""
        values, weights = self._weighted_sample()
        ends = self._selected_range(values.clamp(low, high), weights)
        scale, zero_point = self._calculate_qparams(*torch.tensor(ends, device=self.eps.device))
        return scale, zero_point

    def _weighted_sample(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.sample.state().weighted(relative=self.range_by == "relative")

    def _selected_range(self, values: torch.Tensor, weights: torch.Tensor) -> tuple[float, float]:
        return range_by(self.range_by, distribution(values, weights), _codes(self), self.percentile)

    def reset_min_max_vals(self) -> None:
        """Resets the sample and the extremes."""
        self.sample = StreamSample()
        self._found = None

    def state(self) -> dict[str, torch.Tensor]:
        """Returns the sample, for the `merge` of an observer that saw the previous part of the stream."""
        seen = self.sample.state()
        level = torch.tensor(seen.level)
        return {"values": seen.values, "sizes": seen.sizes, "extremes": seen.extremes, "level": level}

    def merge(self, later: Mapping[str, torch.Tensor]) -> None:
        """Adds the `state` of an observer that saw the next part of the stream."""
        self.sample.merge(SampleState(later["values"], later["sizes"], later["extremes"], int(later["level"])))

    def get_extra_state(self) -> dict[str, torch.Tensor]:
        """Returns the sample for `state_dict`. It is not a buffer, because its size changes."""
        return self.state()

    def set_extra_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restores the sample from `load_state_dict`."""
        self.reset_min_max_vals()
        self.merge(state)


class PerChannelRangeObserver(PerChannelMinMaxObserver):
    """Observes the minimum and the maximum of all values, one pair for each index of `ch_axis`."""

    def __init__(self, *args: Any, origin: Origin | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.origin = origin

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns scales (float32) and zero points (int64) of the observed ranges."""
        _check_extremes(self.min_val, self.max_val, self.origin)
        scale, zero_point = super().calculate_qparams()
        return scale, zero_point


class _Parameter:
    """The parameter that an observer saw last, and its cached `qparams`."""

    def __init__(self) -> None:
        self.seen: tuple[torch.Tensor, int] | None = None
        self.qparams: tuple[torch.Tensor, torch.Tensor] | None = None

    def see(self, values: torch.Tensor) -> None:
        """Records `values`. Clears the cache if they are another tensor, or were written to since the last call."""
        version = -1 if values.is_inference() else values._version
        if self.seen is None or self.seen[0] is not values or self.seen[1] != version:
            self.seen, self.qparams = (values, version), None


class _ParameterObserver(UniformQuantizationObserverBase):
    """Observes a parameter that does not change in calibration: symmetric ranges with the least squared error.

    The observer reads the whole parameter when `calculate_qparams` is called, and not in `forward`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.parameter = _Parameter()

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Records `values`, and returns them."""
        self.parameter.see(values)
        return values

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns scale (float32) and zero point (int64), one value or one per channel."""
        if self.parameter.qparams is None:
            bounds = self._symmetric_bounds()
            scale, zero_point = self._calculate_qparams(-bounds, bounds)
            self.parameter.qparams = torch.where(bounds == 0, SCALE_OF_ZERO_WEIGHTS, scale), zero_point
        return self.parameter.qparams

    def _symmetric_bounds(self) -> torch.Tensor:
        """Records the parameter's extremes, and returns the bounds of its symmetric ranges, in the same shape."""
        if self.parameter.seen is None or not self.parameter.seen[0].numel():
            raise _unreached_error(self.origin)
        rows = self._rows(self.parameter.seen[0].detach().float())
        self.min_val, self.max_val = rows.amin(-1), rows.amax(-1)  # torch.aminmax along a dimension is not vectorized
        _check_extremes(self.min_val, self.max_val, self.origin)
        return bounds_by_error(rows.view(-1, rows.shape[-1]), _codes(self)).view(self.min_val.shape)

    def _rows(self, values: torch.Tensor) -> torch.Tensor:
        """Returns `values` as [..., N], where each row gets its own range."""
        return values.flatten()


class WeightObserver(_ParameterObserver, RangeObserver):
    """Finds one range for a parameter."""


class PerChannelWeightObserver(_ParameterObserver, PerChannelRangeObserver):
    """Finds one range of a parameter for each index of `ch_axis`."""

    def _rows(self, values: torch.Tensor) -> torch.Tensor:
        return values.movedim(self.ch_axis, 0).flatten(1)


class RecentRangeObserver(RangeObserver):
    """Observes recent extremes, for training: follows a growing range at once, and a shrinking range slowly.

    Values that share qparams share one observer, which sees values with large and with small ranges in turn. A moving
    average of these ranges would clip the values with large ranges.
    """

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Observes one batch, and returns it."""
        if values.numel() == 0:
            return values
        low, high = torch.aminmax(values.detach().to(self.min_val.dtype))
        seen = bool(self.min_val <= self.max_val)
        self.min_val.copy_(torch.min(low, torch.lerp(self.min_val, low, SHRINKAGE)) if seen else low)
        self.max_val.copy_(torch.max(high, torch.lerp(self.max_val, high, SHRINKAGE)) if seen else high)
        return values


class LatestRangeObserver(RangeObserver):
    """Observes the extremes of the latest values only, for parameters that training changes."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Replaces the extremes by those of `values`, and returns `values`."""
        self.reset_min_max_vals()
        return super().forward(values)


class LatestPerChannelRangeObserver(PerChannelRangeObserver):
    """Observes the extremes of the latest values only, one pair for each index of `ch_axis`."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Replaces the extremes by those of `values`, and returns `values`."""
        self.reset_min_max_vals()
        return super().forward(values)  # type: ignore[no-any-return]
