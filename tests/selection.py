"""Two parts of the tests: those of --quick, the default, and those of --rest, which `.ci/run` runs afterwards."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import pytest

__all__ = ["ROWS_OF_A_TABLE", "quick_tests", "rest_of_tests"]

ROWS_OF_A_TABLE = 1
"""The number of rows of each parametrized test with --quick."""


def quick_tests(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """Returns tests that are not marked slow, with `ROWS_OF_A_TABLE` rows of each table, equal on each machine."""
    tables: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("slow") is None:
            tables.setdefault(item.nodeid.split("[")[0], []).append(item)
    drawn = {id(item) for rows in tables.values() for item in sorted(rows, key=_drawn)[:ROWS_OF_A_TABLE]}
    return [item for item in items if id(item) in drawn]


def rest_of_tests(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """Returns the other tests, and all tests marked data, because a quick run without data skips those."""
    drawn = {id(item) for item in quick_tests(items)}
    return [item for item in items if id(item) not in drawn or item.get_closest_marker("data") is not None]


def _drawn(item: pytest.Item) -> int:
    """Returns a number that depends neither on the row's position in its table nor on other rows."""
    return zlib.crc32(item.nodeid.encode())
