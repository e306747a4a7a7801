"""Functions of numbers that several rooms need."""

from __future__ import annotations

import math

__all__ = ["decibels", "in_percent", "rounded_up"]


def rounded_up(size: int, multiple: int) -> int:
    """Returns the smallest multiple of `multiple` that is not below `size`."""
    return -(-size // multiple) * multiple


def decibels(noise_ratio: float) -> float:
    """Returns the SQNR in dB for a ratio of noise energy to signal energy; infinite without noise."""
    return math.inf if noise_ratio == 0 else -10 * math.log10(noise_ratio)


def in_percent(share: float, digits: int = 0) -> str:
    """Returns a share from 0 to 1 in percent, with `digits` after the point: "88 %"."""
    return f"{100 * share:.{digits}f} %"
