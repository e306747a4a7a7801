"""Observers that know whose values they see, so that bad calibration is reported where it happened."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torchao.quantization.pt2e.observer import MinMaxObserver, ObserverBase, PerChannelMinMaxObserver

from openneutron.errors import CalibrationError
from openneutron.fx import op_name, source_of
from openneutron.ops.masks import HIDDEN, saturates

__all__ = [
    "LatestPerChannelRangeObserver", "LatestRangeObserver", "MaskedObserver", "Origin", "PerChannelRangeObserver",
    "RangeObserver", "RecentRangeObserver",
]  # fmt: skip

# How much of the way to the range of a batch that is smaller a recent range goes.
SHRINKAGE = 0.01
# How far below the lowest score a softmax sees nothing: e to the minus of this is what is left of a hidden value beside
# that score, and less beside any other. More would cost resolution.
MASKED_DISTANCE = 8.0


@dataclass(frozen=True)
class Origin:
    """The node whose values an observer sees."""

    node: str
    op: str
    source: str | None

    @classmethod
    def of(cls, node: Node) -> Origin:
        """The origin of what `node` yields."""
        return cls(node.name, op_name(node), source_of(node))

    def error(self, message: str) -> CalibrationError:
        """`message` about this node."""
        return CalibrationError(message, node=self.node, op=self.op, source=self.source)


def _check(minimum: torch.Tensor, maximum: torch.Tensor, origin: Origin | None) -> None:
    origin = origin or Origin("unknown", "unknown", None)
    if minimum.numel() == 0 or bool((minimum == float("inf")).any() and (maximum == float("-inf")).any()):
        raise origin.error(
            "Calibration or training never reached this value. Run the prepared model on representative inputs before "
            "convert_pt2e."
        )
    if not bool(torch.isfinite(minimum).all() and torch.isfinite(maximum).all()):
        raise origin.error(
            f"NaN or infinite values came by here (minimum {minimum.min().item()}, maximum {maximum.max().item()}). "
            "Check the inputs and the model's weights for NaN and overflow."
        )


class RangeObserver(MinMaxObserver):
    """The extremes of all values seen, one pair for the tensor.

    `calculate_qparams` raises `CalibrationError` if it saw nothing, or something that is not finite.
    """

    def __init__(self, *args: Any, origin: Origin | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.origin = origin

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale (float32) and zero point (int64) of the range seen."""
        _check(self.min_val, self.max_val, self.origin)
        scale, zero_point = super().calculate_qparams()
        return scale, zero_point


class MaskedObserver(ObserverBase):
    """Sees a value before and after a mask, and hands all of it that stands for a number to another observer.

    Where the mask hides something from a softmax, the range reaches `MASKED_DISTANCE` below that observer's, and what
    is hidden has the lowest code.
    """

    def __init__(
        self, observer: Any, *, dtype: torch.dtype, quant_min: int, quant_max: int, qscheme: torch.qscheme, **more: Any
    ) -> None:
        super().__init__(dtype)
        self.quant_min, self.quant_max, self.qscheme = quant_min, quant_max, qscheme
        self.observer = observer(dtype=dtype, quant_min=quant_min, quant_max=quant_max, qscheme=qscheme, **more)
        self.register_buffer("hides", torch.tensor(False))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Observe; returns `values`."""
        seen = values.detach()[~saturates(values)]
        if seen.numel():
            self.observer(seen)
        self.hides |= (values == HIDDEN).any()
        return values

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale (float32) and zero point (int64)."""
        scale, zero_point = self.observer.calculate_qparams()
        if not self.hides:
            return scale, zero_point
        codes = self.quant_max - self.quant_min
        wider = scale + MASKED_DISTANCE / codes
        below = torch.round(((zero_point - self.quant_min) * scale + MASKED_DISTANCE) / wider)
        return wider, (self.quant_min + below).clamp(self.quant_min, self.quant_max).to(zero_point.dtype)


class PerChannelRangeObserver(PerChannelMinMaxObserver):
    """The extremes of all values seen, one pair for each index of `ch_axis`."""

    def __init__(self, *args: Any, origin: Origin | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.origin = origin

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales (float32) and zero points (int64) of the ranges seen."""
        _check(self.min_val, self.max_val, self.origin)
        scale, zero_point = super().calculate_qparams()
        return scale, zero_point


class RecentRangeObserver(RangeObserver):
    """The extremes of late, for training: they follow values that grow at once, and those that shrink slowly.

    Several values that share their qparams share one observer, too. It sees them in turn, the large ones and the small,
    so that an average of their ranges would clip the large ones.
    """

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Take in one batch."""
        if values.numel() == 0:
            return values
        low, high = torch.aminmax(values.detach().to(self.min_val.dtype))
        seen = bool(self.min_val <= self.max_val)
        self.min_val.copy_(torch.min(low, torch.lerp(self.min_val, low, SHRINKAGE)) if seen else low)
        self.max_val.copy_(torch.max(high, torch.lerp(self.max_val, high, SHRINKAGE)) if seen else high)
        return values


class LatestRangeObserver(RangeObserver):
    """The extremes of what it saw last, for parameters: they are what they are, whatever they have been."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Forget what was, and take in `values`."""
        self.reset_min_max_vals()
        return super().forward(values)  # type: ignore[no-any-return]


class LatestPerChannelRangeObserver(PerChannelRangeObserver):
    """The extremes of what it saw last, one pair for each index of `ch_axis`."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Forget what was, and take in `values`."""
        self.reset_min_max_vals()
        return super().forward(values)  # type: ignore[no-any-return]
