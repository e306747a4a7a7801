"""Limits in LSBs: the rounding of floats does not count."""

from __future__ import annotations

import pytest

from openneutron.accuracy.lsb_rounding import LARGEST_CODE, rounding_in_lsb
from openneutron.accuracy.validate import _failures
from openneutron.results.validation import OutputDifference


@pytest.mark.parametrize(
    ("lsb", "limit", "fails"), [(1.0000009, 1, False), (1.0001, 1, True), (1e-6, 0, True), (0, 0, False), (2, 1, True)]
)
def test_validate_allows_the_rounding_of_floats(lsb: float, limit: float, fails: bool) -> None:
    row = OutputDifference(0, "int8", 40.0, 1.0, lsb * 0.1, lsb, "y")
    assert bool(list(_failures([row], None, None, limit))) == fails


def test_rounding_is_less_than_the_docs_state() -> None:
    assert 0 < rounding_in_lsb(LARGEST_CODE, 1) < 0.0001
    assert rounding_in_lsb(LARGEST_CODE, 0) == 0
