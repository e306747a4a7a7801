"""Two halves of the tests: those of --quick, and those of --rest, which `.ci/run` runs after them."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import pytest

__all__ = ["ROWS_OF_A_TABLE", "quick_tests", "rest_of_tests"]

ROWS_OF_A_TABLE = 2
"""With --quick, so many rows of each parametrized test run."""


def quick_tests(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """Tests that are not marked slow, with a few rows of each table: the same ones on every machine."""
    tables: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("slow") is None:
            tables.setdefault(item.nodeid.split("[")[0], []).append(item)
    drawn = {id(item) for rows in tables.values() for item in sorted(rows, key=_drawn)[:ROWS_OF_A_TABLE]}
    return [item for item in items if id(item) in drawn]


def rest_of_tests(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """The tests that `quick_tests` leaves out, and all that are marked data: a quick run without data skips them."""
    drawn = {id(item) for item in quick_tests(items)}
    return [item for item in items if id(item) not in drawn or item.get_closest_marker("data") is not None]


def _drawn(item: pytest.Item) -> int:
    """A number that has nothing to do with the row's place in its table, nor with other rows."""
    return zlib.crc32(item.nodeid.encode())
