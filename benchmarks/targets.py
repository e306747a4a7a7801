"""Targets of the rows of `benchmarks.accuracy`, and the comparison of int8 and float on the same samples."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Comparison", "Target", "compare"]

NOTHING = 1e-9  # tolerance for the rounding of percentages, which are sums of floats


@dataclass(frozen=True)
class Comparison:
    """The top-1 of int8 and float on the same samples.

    `top1_float` and `top1_int8` are percentages of samples whose top-1 class is right. `lost` counts the samples that
    are right only in float, `gained` the samples that are right only in int8.
    """

    samples: int
    top1_float: float
    top1_int8: float
    lost: int
    gained: int

    @property
    def difference(self) -> float:
        """Percentage points of int8 above float."""
        return 100 * (self.gained - self.lost) / self.samples

    @property
    def error(self) -> float:
        """The standard error of `difference` in points, from the samples that are right in only one of the two."""
        flipped, net = self.gained + self.lost, self.gained - self.lost
        return 100 * math.sqrt(max(flipped - net * net / self.samples, 0)) / self.samples


def compare(float_outputs: Tensor, int8_outputs: Tensor, right: Tensor) -> Comparison:
    """Compare outputs [N, classes] by the right classes [N]."""
    hits, hits_int8 = float_outputs.argmax(1) == right, int8_outputs.argmax(1) == right
    return Comparison(
        samples=len(right),
        top1_float=100 * hits.float().mean().item(),
        top1_int8=100 * hits_int8.float().mean().item(),
        lost=int((hits & ~hits_int8).sum()),
        gained=int((hits_int8 & ~hits).sum()),
    )


@dataclass(frozen=True)
class Target:
    """A target: int8 is at most `points` below float in top-1, and quantization takes at most `seconds`."""

    points: float
    seconds: float | None = None

    def holds(self, found: Comparison, seconds: float) -> bool:
        """Whether the measured loss and seconds are within the target."""
        in_time = self.seconds is None or seconds <= self.seconds
        return in_time and -found.difference <= self.points + NOTHING

    def __str__(self) -> str:
        return f"{self.points:g} points" + ("" if self.seconds is None else f", {_duration(self.seconds)}")


def _duration(seconds: float) -> str:
    return f"{seconds:g} s" if seconds <= 60 else f"{seconds / 60:g} min"
