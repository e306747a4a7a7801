"""Rounding up to a multiple, and noise in decibels."""

from __future__ import annotations

import math

import pytest

from openneutron.core.numbers import decibels, rounded_up


@pytest.mark.parametrize(("size", "expected"), [(0, 0), (1, 16), (16, 16), (17, 32)])
def test_sizes_are_rounded_up_to_a_multiple(size: int, expected: int) -> None:
    assert rounded_up(size, 16) == expected


@pytest.mark.parametrize(("ratio", "expected"), [(0.0, math.inf), (1.0, 0.0), (0.01, 20.0), (100.0, -20.0)])
def test_decibels_of_noise(ratio: float, expected: float) -> None:
    assert decibels(ratio) == pytest.approx(expected)
