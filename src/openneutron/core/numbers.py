"""Functions of numbers that several rooms need."""

from __future__ import annotations

import math

__all__ = ["decibels", "in_milliseconds", "in_percent", "number_text", "rounded_up"]


def rounded_up(size: int, multiple: int) -> int:
    """Returns the smallest multiple of `multiple` that is not below `size`."""
    return -(-size // multiple) * multiple


def decibels(noise_ratio: float) -> float:
    """Returns the SQNR in dB for a ratio of noise energy to signal energy; infinite without noise."""
    return math.inf if noise_ratio == 0 else -10 * math.log10(noise_ratio)


def in_milliseconds(milliseconds: float) -> str:
    """Returns a time with three significant digits: "0.277 ms", "1,234 ms"."""
    return f"{number_text(milliseconds)} ms"


def number_text(value: float | None) -> str:
    """Returns a number with three significant digits, without an exponent between 0.001 and 999,999."""
    if value is None or not math.isfinite(value):
        return "unknown"
    if value == 0:
        return "0"
    digits = 2 - math.floor(math.log10(abs(value)))
    if digits <= 0:
        return f"{value:,.0f}" if abs(value) < 1e6 else f"{value:.3g}"
    return f"{value:.{digits}f}" if digits <= 6 else f"{value:.3g}"


def in_percent(share: float, digits: int = 0) -> str:
    """Returns a share from 0 to 1 in percent, with `digits` after the point: "88 %"."""
    return f"{100 * share:.{digits}f} %"
