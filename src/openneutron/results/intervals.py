"""95 % intervals of measured accuracies."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["normal_interval", "wilson_interval"]

_NORMAL_QUANTILE = 1.959963984540054
"""The quantile of the standard normal distribution at 97.5 %."""


def normal_interval(scores: Sequence[float]) -> tuple[float, float] | None:
    """Returns the 95 % interval of the mean of `scores`: mean -+ 1.96 x standard deviation / sqrt(number).

    This is the normal approximation for independent scores. Returns None for fewer than two scores.
    """
    count = len(scores)
    if count < 2:
        return None
    mean = math.fsum(scores) / count
    half = _NORMAL_QUANTILE * math.sqrt(math.fsum((score - mean) ** 2 for score in scores) / (count - 1) / count)
    return mean - half, mean + half


def wilson_interval(percentage: float, samples: int) -> tuple[float, float]:
    """Returns Wilson's 95 % interval of a percentage that was measured on `samples` independent samples, in percent.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    if samples < 1:
        return (0.0, 100.0)
    share, z = percentage / 100, _NORMAL_QUANTILE
    scale = 1 + z * z / samples
    middle = (share + z * z / (2 * samples)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / samples + z * z / (4 * samples * samples))
    return (100 * max(0.0, middle - half), 100 * min(1.0, middle + half))
