"""The rules of name_numbers: where each fires, where it must not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.flow_support import seeded
from tests.test_flow import Model
from tests.test_passes import after, names

from openneutron import passes

DIVISOR = torch.tensor([0.5, 2.0, -4.0, 8.0]).reshape(4, 1, 1)


@pytest.mark.parametrize(
    ("function", "becomes"),
    [
        (lambda _, x: x + 1.5, ["add.Tensor"]),
        (lambda _, x: torch.sub(x, 2.0, alpha=3.0), ["sub.Tensor"]),
        (lambda _, x: x * -0.5, ["mul.Tensor"]),
        (lambda _, x: x / 255.0, ["mul.Tensor"]),
        (lambda m, x: x / m.c, ["mul.Tensor"]),
        (lambda _, x: 1.0 - x, ["sub.Tensor"]),
    ],
    ids=["rule 1 sum", "rule 1 alpha", "rule 1 product", "rule 2 number", "rule 2 constant", "rule 3"],
)
def test_fires(function: Callable[[Any, torch.Tensor], torch.Tensor], becomes: list[str]) -> None:
    model = seeded(lambda: Model(function, c=torch.nn.Buffer(DIVISOR.clone())))
    assert names(after(passes.name_numbers, model)) == becomes


@pytest.mark.parametrize(
    "function",
    [
        lambda _, x: x + x,
        lambda _, x: x / (x.abs() + 1.0).relu(),
        lambda _, x: (x > 0).int() + 1,
        lambda m, x: x / m.zero,
        lambda _, x: torch.rsub(x, 1.0, alpha=2),
    ],
    ids=["two values", "computed divisor", "integers", "division by zero", "rsub with alpha"],
)
def test_must_not_fire(function: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
    model = seeded(lambda: Model(function, zero=torch.nn.Buffer(torch.zeros(()))))
    module = torch.export.export(model, (torch.ones(1, 4, 2, 2),)).module()
    before = [node.target for node in module.graph.nodes if "div" in str(node.target) or "rsub" in str(node.target)]
    passes.name_numbers(module)
    assert [node.target for node in module.graph.nodes if node.target in before] == before
