"""--quick and --rest together run each test."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import pytest
from tests.selection import ROWS_OF_A_TABLE, quick_tests, rest_of_tests


@dataclass(frozen=True)
class Item:
    nodeid: str
    marks: tuple[str, ...] = ()

    def get_closest_marker(self, name: str) -> str | None:
        return name if name in self.marks else None


TABLE = [Item(f"a.py::test_table[{row}]") for row in range(10)]
PLAIN, SLOW, DATA = Item("a.py::test_plain"), Item("a.py::test_slow", ("slow",)), Item("a.py::test_data", ("data",))
SLOW_DATA = Item("a.py::test_both", ("slow", "data"))
ALL = cast("list[pytest.Item]", [*TABLE, PLAIN, SLOW, DATA, SLOW_DATA])


def test_quick_leaves_out_slow_tests_and_most_rows_of_a_table() -> None:
    quick = cast("list[Any]", quick_tests(ALL))
    assert sum(item in TABLE for item in quick) == ROWS_OF_A_TABLE
    assert [item for item in quick if item not in TABLE] == [PLAIN, DATA]


def test_rest_runs_all_tests_that_quick_skips() -> None:
    quick, rest = cast("list[Any]", quick_tests(ALL)), cast("list[Any]", rest_of_tests(ALL))
    assert {*quick, *rest} == set(ALL)
    assert {*quick} & {*rest} == {DATA}
    assert SLOW_DATA in rest
    assert rest == [item for item in ALL if item in rest], "the order is kept"
