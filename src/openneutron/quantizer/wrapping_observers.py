"""Observers that wrap another observer, and change the values that it gets or the qparams that it returns."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torchao.quantization.pt2e.observer import ObserverBase

from openneutron.ops.intervals import Interval
from openneutron.ops.masks import HIDDEN, saturates

__all__ = ["MaskedObserver", "NeededRangeObserver", "WrappingObserver", "extended_by_one_step", "within_reach"]

# The distance of hidden values below the lowest score. The softmax probability of a hidden value is at most
# exp(-MASKED_DISTANCE) times that of any score. A larger distance would cost resolution.
MASKED_DISTANCE = 8.0
# The distance by which a `NeededRangeObserver` extends an end of a needed interval, as a share of the end.
MARGIN_SHARE = 1 / 50
# The largest magnitude of a value in steps of its scale. The needed range is then at least one int8 step of the range
# of all values, so a finer scale would only resolve rounding errors, and the NPU's multipliers would not cover it.
MOST_STEPS = 2.0**15
# ExecuTorch's quantize rounds to int32, so that values of this many steps get a wrong code.
OVERFLOWING_STEPS = 2.0**31


class WrappingObserver(ObserverBase):
    """Wraps an `observer`, and passes values to it. Its state is that of `observer`, and whether it has seen values.

    The wrapped observer needs `forward` and `calculate_qparams` only, as observers of torchao and of users have.
    """

    def __init__(
        self, observer: Any, *, dtype: torch.dtype, quant_min: int, quant_max: int, qscheme: torch.qscheme, **more: Any
    ) -> None:
        super().__init__(dtype)
        self.quant_min, self.quant_max, self.qscheme = quant_min, quant_max, qscheme
        self.observer = observer(dtype=dtype, quant_min=quant_min, quant_max=quant_max, qscheme=qscheme, **more)
        self.register_buffer("has_observed", torch.tensor(False))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Observes `values`, and returns them."""
        self.observe(values)
        return values

    def observe(self, values: torch.Tensor) -> None:
        """Passes `values` to the wrapped observer."""
        self.observer(values)
        if values.numel():
            self.has_observed.fill_(True)

    @property
    def has_seen(self) -> bool:
        """Returns whether the wrapped observer got any value."""
        return bool(self.has_observed)

    @property
    def min_val(self) -> torch.Tensor:
        """Returns the least value that the wrapped observer saw, if that observer records it."""
        return self.observer.min_val  # type: ignore[no-any-return]

    @property
    def max_val(self) -> torch.Tensor:
        """Returns the largest value that the wrapped observer saw, if that observer records it."""
        return self.observer.max_val  # type: ignore[no-any-return]

    def state(self) -> dict[str, torch.Tensor]:
        """Returns the state of the wrapped observer, for `merge`. The wrapped observer must have a state."""
        return {**self.observer.state(), "has_observed": self.has_observed.cpu().clone()}

    def merge(self, later: Mapping[str, torch.Tensor]) -> None:
        """Adds the `state` of an observer that saw the next part of the stream."""
        self.observer.merge(later)
        self.has_observed |= later["has_observed"].to(self.has_observed.device)


class NeededRangeObserver(WrappingObserver):
    """Clamps values to the interval that their readers need, and passes them to the wrapped observer.

    Values that are not finite are not clamped, so that the wrapped observer can report them. The largest magnitude
    of the other values limits how small the scale becomes (`within_reach`). If `is_clamped`, the output of a clamp has
    these qparams, too, which a larger scale could not represent. `calculate_qparams` then raises the error that
    `error_of` makes of a message if a value would exceed int32 in steps of the scale.
    """

    def __init__(
        self,
        *args: Any,
        needed: Interval,
        error_of: Callable[[str], Exception],
        is_clamped: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.needed = extended_by_one_step(needed, self.quant_max - self.quant_min)
        self.error_of, self.is_clamped = error_of, is_clamped
        self.register_buffer("largest", torch.tensor(0.0))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Observes `values`, and returns them."""
        seen = values.detach()
        is_finite = seen.isfinite()
        self.observe(torch.where(is_finite, seen.clamp(self.needed.low, self.needed.high), seen))
        if seen.numel():
            largest = torch.where(is_finite, seen, 0.0).abs().amax().to(self.largest)
            self.largest.copy_(torch.maximum(self.largest, largest))
        return values

    def state(self) -> dict[str, torch.Tensor]:
        """Returns the observed statistics, for `merge`."""
        return {**super().state(), "largest": self.largest.cpu().clone()}

    def merge(self, later: Mapping[str, torch.Tensor]) -> None:
        """Adds the `state` of an observer that saw the next part of the stream."""
        super().merge(later)
        self.largest.copy_(torch.maximum(self.largest, later["largest"].to(self.largest)))

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns scale (float32) and zero point (int64)."""
        scale, zero_point = self.observer.calculate_qparams()
        largest = float(self.largest)
        if not self.is_clamped:
            return within_reach(scale, zero_point, largest, (self.quant_min, self.quant_max))
        if largest >= OVERFLOWING_STEPS * float(scale):
            raise self.error_of(
                f"Values up to {largest:.1g} were observed here before a clamp. In steps of {float(scale):.1g}, the "
                "scale of the clamp's output, they exceed int32. Scale the model's data, or the weights of the layers "
                "before it."
            )
        return scale, zero_point


def within_reach(
    scale: torch.Tensor, zero_point: torch.Tensor, largest: float, codes: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns qparams with which a value of magnitude `largest` is at most `MOST_STEPS` steps from zero.

    Qparams that already meet this are returned unchanged. Others get a larger scale, and a zero point that keeps codes
    on each side of zero that had any. The int8 errors of a value that large exceed the range that its readers need.
    """
    if largest <= MOST_STEPS * float(scale):
        return scale, zero_point
    lowest, highest = codes
    sides = zero_point > lowest, zero_point < highest
    middle = (lowest + highest + 1) // 2 if all(sides) else highest if sides[0] else lowest
    return torch.full_like(scale, largest / MOST_STEPS), torch.full_like(zero_point, middle)


def extended_by_one_step(needed: Interval, steps: int) -> Interval:
    """Returns the interval extended by one int8 step, so that its ends after rounding are not within the interval.

    If one end is infinite, the step is unknown, and the other end is extended by a share of its distance from zero.
    """
    width = needed.high - needed.low

    def margin(end: float) -> float:
        if end == 0 or math.isinf(end):
            return 0.0
        return width / steps if math.isfinite(width) else abs(end) * MARGIN_SHARE

    return Interval(needed.low - margin(needed.low), needed.high + margin(needed.high))


class MaskedObserver(WrappingObserver):
    """Observes the input or the output of a mask. The wrapped observer gets all values but mask values such as -inf.

    If the mask hides values from a softmax, the range reaches `MASKED_DISTANCE` below that of the wrapped observer, and
    hidden values get the lowest code. `hides` is True if the mask can hide values even if calibration shows none.

    In training, several values that share qparams are fake quantized one after another. The first fake quantization
    replaces hidden values by the value of the lowest code. With `is_fake_quantized`, values that have the lowest code
    are therefore excluded from the range.
    """

    def __init__(self, *args: Any, hides: bool = False, is_fake_quantized: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("hides", torch.tensor(hides))
        self.is_fake_quantized = is_fake_quantized

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Observes `values`, and returns them."""
        seen = values.detach()[~saturates(values)]
        if self.is_fake_quantized and bool(self.hides) and self.has_seen:
            seen = seen[~self._has_lowest_code(seen)]
        if seen.numel():
            self.observe(seen)
        self.hides |= (values == HIDDEN).any()
        return values

    def _has_lowest_code(self, values: torch.Tensor) -> torch.Tensor:
        """Returns a boolean mask of the `values` within half a step of the lowest code's value in the range so far."""
        scale, zero_point = self.qparams_with_hidden_code()
        return (values - (self.quant_min - zero_point) * scale).abs() <= scale / 2

    def state(self) -> dict[str, torch.Tensor]:
        """Returns the state of this and the wrapped observer, for `merge`. The wrapped observer must have a state."""
        return {**super().state(), "hides": self.hides.cpu().clone()}

    def merge(self, later: Mapping[str, torch.Tensor]) -> None:
        """Adds the `state` of an observer that saw the next part of the stream."""
        super().merge(later)
        self.hides |= later["hides"].to(self.hides.device)

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns scale (float32) and zero point (int64)."""
        return self.qparams_with_hidden_code() if self.hides else self.observer.calculate_qparams()

    def qparams_with_hidden_code(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns scale and zero point of the wrapped observer's range, extended by `MASKED_DISTANCE` below."""
        scale, zero_point = self.observer.calculate_qparams()
        codes = self.quant_max - self.quant_min
        wider = scale + MASKED_DISTANCE / codes
        below = torch.round(((zero_point - self.quant_min) * scale + MASKED_DISTANCE) / wider)
        return wider, (self.quant_min + below).clamp(self.quant_min, self.quant_max).to(zero_point.dtype)
