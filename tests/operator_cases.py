"""All rows of the operator tests, collected from the tables `tests/*_cases.py`.

The tuple `CASES` of a table has the tested shapes and attributes of ATen operators. Its tuple `REJECTED` has calls that
break a limit. `tests/ops/test_operators.py` and `benchmarks/operators.py` read the rows.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from tests.case import Case, Rejected

__all__ = ["CASES", "REJECTED"]

_HERE = Path(__file__)
_TABLES = [import_module(f"tests.{path.stem}") for path in sorted(_HERE.parent.glob("*_cases.py")) if path != _HERE]

CASES: tuple[Case, ...] = tuple(row for table in _TABLES for row in getattr(table, "CASES", ()))
REJECTED: tuple[Rejected, ...] = tuple(row for table in _TABLES for row in getattr(table, "REJECTED", ()))
