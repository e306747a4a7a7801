"""Each function of torch.nn.functional, and each function of torch with an ATen operator, runs or is refused by name.

Functions of torch whose operators are declared have cases in a table tests/*_cases.py. The others have a row here or in
test_torch_scan.py, or a reason why they need none. A new version of torch with a function in no table fails the test.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.ops.test_torch_scan import (
    BINARY,
    FUNCTIONS_OF_ROWS,
    REFUSED,
    ROW_FUNCTIONS,
    UNARY,
    Side,
    in_groups,
    refused_of,
    samples_of_shapes,
)
from tests.scan_tables import (
    CALLED_BY_MODULES,
    FUNCTIONAL,
    FUNCTIONAL_WITHOUT_ROW,
    REFUSED_FIRST,
    RUN_NOWHERE,
    TORCH,
    TORCH_WITHOUT_ROW,
    Row,
)

from openneutron import quantize
from openneutron.errors import ModelError
from openneutron.ops import DECOMPOSITIONS, OPERATORS
from openneutron.ops.aliases import ALIASES

ALL: dict[str, Row] = {
    **{f"torch.{name}": row for name, row in TORCH.items()},
    **{f"functional.{name}": row for name, row in FUNCTIONAL.items()},
}
TOLERANCE = 4


def _is_function(value: object) -> bool:
    return inspect.isfunction(value) or inspect.isbuiltin(value)


def _in_place(name: str) -> bool:
    return name.endswith("_")


def test_every_function_of_torch_nn_functional_has_a_row() -> None:
    functions = {
        name for name, value in vars(F).items()
        if not name.startswith("_") and not _in_place(name) and _is_function(value)
    }  # fmt: skip
    without = {name for names in FUNCTIONAL_WITHOUT_ROW.values() for name in names.split()}
    known = FUNCTIONAL.keys() | CALLED_BY_MODULES | without | set(FUNCTIONS_OF_ROWS.split())
    assert functions - known == set()
    assert (FUNCTIONAL.keys() | CALLED_BY_MODULES) & without == set()


def test_every_function_of_torch_with_an_operator_has_a_row() -> None:
    functions = {
        name for name, value in vars(torch).items()
        if not name.startswith("_") and not _in_place(name) and callable(value) and hasattr(torch.ops.aten, name)
    }  # fmt: skip
    declared = {target.split(".")[1] for target in OPERATORS.keys() | DECOMPOSITIONS.keys()} | ALIASES.keys()
    rows = TORCH.keys() | set(UNARY.split()) | set(BINARY.split()) | ROW_FUNCTIONS.keys() | REFUSED.keys()
    patterns = [pattern for names in TORCH_WITHOUT_ROW.values() for pattern in names.split()]
    left = functions - declared - rows
    assert {name for name in left if not any(re.fullmatch(pattern, name) for pattern in patterns)} == set()
    assert TORCH.keys() >= RUN_NOWHERE
    assert TORCH.keys() | FUNCTIONAL.keys() >= REFUSED_FIRST


def _constant(function: Callable[..., Any]) -> Callable[[], Any]:
    return lambda: function


Group = tuple[tuple[tuple[int, ...], ...], dict[str, Callable[[], Any]]]


def _groups(names: Iterable[str]) -> list[Group]:
    """Returns at most `ROWS_AT_ONCE` functions of the same input shapes in each group."""
    names = list(names)
    found: list[Group] = []
    for shapes in dict.fromkeys(ALL[name][1] for name in names):
        parts = {name: _constant(ALL[name][0]) for name in names if ALL[name][1] == shapes}
        found += [(shapes, group) for group in in_groups(parts)]
    return found


def _last(name: str) -> str:
    return name.rpartition(".")[2]


RUN = _groups(name for name in ALL if _last(name) not in RUN_NOWHERE | REFUSED_FIRST)
NOWHERE = _groups(f"torch.{name}" for name in sorted(RUN_NOWHERE))


@pytest.mark.slow
@pytest.mark.parametrize("group", RUN, ids=lambda group: next(iter(group[1])))
def test_functions_that_run(group: Group) -> None:
    shapes, parts = group
    assert refused_of(parts, samples_of_shapes(*shapes), TOLERANCE) == set()


def test_a_few_functions() -> None:
    names = ("torch.addr", "torch.aminmax", "torch.alias_copy")
    ((shapes, parts), *_) = _groups(name for name in names if name in ALL)
    assert refused_of(parts, samples_of_shapes(*shapes), TOLERANCE) == set()


@pytest.mark.slow
@pytest.mark.parametrize("group", NOWHERE, ids=lambda group: next(iter(group[1])))
def test_functions_that_nothing_runs_are_named(group: Group) -> None:
    shapes, parts = group
    samples = samples_of_shapes(*shapes)
    model = Side([part() for part in parts.values()]).eval()
    with pytest.raises(ModelError, match="neither on the NPU nor on the CPU") as error:
        quantize(model, samples[0], samples, recover=None, progress=False)
    assert {name for name in parts if f"aten.{_last(name)}." not in str(error.value)} == set()


@pytest.mark.parametrize("name", sorted(name for name in ALL if _last(name) in REFUSED_FIRST))
def test_functions_that_are_refused_first(name: str) -> None:
    function, shapes = ALL[name]
    samples = samples_of_shapes(*shapes)
    with pytest.raises(ModelError) as error:
        quantize(Side([function]).eval(), samples[0], samples, recover=None, progress=False)
    assert any(named in str(error.value) for named in ("aten.", "torch.export", _last(name)))
    assert error.value.source is not None
