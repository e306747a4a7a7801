"""Formats numbers for people."""

from __future__ import annotations

import math

from openneutron.core.numbers import in_percent, number_text

__all__ = [
    "bytes_text", "count_of", "decibels_text", "gain_text", "measure_text", "number_text", "percent_text", "range_text",
]  # fmt: skip

_UNITS = (("MiB", 1 << 20), ("KiB", 1 << 10))


def bytes_text(size: int) -> str:
    """Returns bytes with three digits in the largest fitting unit, such as "7.50 MiB" or "512 KiB"."""
    for unit, factor in _UNITS:
        if size >= factor:
            return f"{number_text(size / factor)} {unit}"
    return f"{size} B"


def measure_text(value: float | None, unit: str = "") -> str:
    """Returns the value of a metric with its unit. Percentages have two digits after the point, so that one sample of
    ten thousand shows; other values have three significant digits.
    """
    if unit != "%" or value is None or not math.isfinite(value):
        return f"{number_text(value)} {unit}".rstrip()
    return f"{value:.2f} %"


def count_of(count: int, noun: str) -> str:
    """Returns a count with its noun in the singular or plural: "1 operator", "3 operators"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def decibels_text(value: float | None) -> str:
    """Returns an SQNR with one digit after the point; "no error" for None, which stands for an infinite SQNR."""
    return "no error" if value is None else f"{round(value, 1) + 0.0:.1f} dB"


def gain_text(gain: float | None) -> str:
    """Returns a change of the SQNR with its sign; "unknown" for None, a change that is infinite or was not measured."""
    return "unknown" if gain is None else f"{round(gain, 1) + 0.0:+.1f} dB"


def percent_text(share: float | None) -> str:
    """Returns a share from 0 to 1 in percent with one digit after the point."""
    return "unknown" if share is None else in_percent(share, 1)


def range_text(ends: tuple[float, float] | None, unit: str = "") -> str:
    """Returns a range as "low to high", with the digits that `measure_text` gives to values of `unit`."""
    if ends is None:
        return ""
    low, high = (measure_text(end, unit).removesuffix(f" {unit}") for end in ends)
    return f"{low} to {high}"


def short_op(op: str) -> str:
    """Returns the name of an operator without namespace and overload: "aten.conv2d.default" becomes "conv2d"."""
    return op.removeprefix("aten.").removeprefix("aten::").rpartition(".")[0] or op
