"""The rules of scalars_to_constants: where each fires, where it must not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.flow_support import seeded
from tests.models import Model
from tests.passes.test_passes import after, names
from torch.fx import GraphModule

from openneutron import passes

CHANNELS = torch.tensor([0.5, 2.0, -4.0, 8.0]).reshape(4, 1, 1)


@pytest.mark.parametrize(
    ("function", "becomes"),
    [
        (lambda _, x: x + 1.5, ["add.Tensor"]),
        (lambda _, x: x * -0.5, ["mul.Tensor"]),
        (lambda _, x: x - 3, ["sub.Tensor"]),
        (lambda _, x: torch.ops.aten.mul.Scalar(x, 2), ["mul.Tensor"]),
        (lambda _, x: torch.ops.aten.add.Scalar(x, 2, 0.5), ["add.Tensor"]),
        (lambda _, x: torch.ops.aten.sub.Scalar(x, 2.5), ["sub.Tensor"]),
        (lambda m, x: x * m.integers, ["mul.Tensor"]),
        (lambda m, x: m.integers - x, ["sub.Tensor"]),
        (lambda m, x: x + m.wide, ["add.Tensor"]),
        (lambda m, x: x * (m.c > 1), ["mul.Tensor"]),
        (lambda m, x: torch.max(x, m.wide), ["maximum.default"]),
        (lambda _, x: torch.sub(x, 2.0, alpha=3.0), ["sub.Tensor"]),
        (lambda m, x: torch.add(x, m.c, alpha=0.5), ["add.Tensor"]),
        (lambda m, x: torch.sub(m.integers, x, alpha=2), ["sub.Tensor"]),
    ],
    ids=[
        "rule 1 sum", "rule 1 product", "rule 1 difference", "rule 1 Scalar product", "rule 1 Scalar sum",
        "rule 1 Scalar difference", "rule 2 integers", "rule 2 integers first", "rule 2 double", "rule 2 truth values",
        "rule 2 extremes", "rule 3 number", "rule 3 constant", "alpha of a computed value stays",
    ],
)  # fmt: skip
def test_scalars_become_constants(function: Callable[[Any, torch.Tensor], torch.Tensor], becomes: list[str]) -> None:
    integers = torch.nn.Buffer(torch.tensor([1, -2, 3, 4]).reshape(4, 1, 1))
    wide = torch.nn.Buffer(torch.tensor(2.5, dtype=torch.float64))
    model = seeded(lambda: Model(function, c=torch.nn.Buffer(CHANNELS.clone()), integers=integers, wide=wide))

    def run(module: GraphModule) -> bool:
        passes.fold_constants(module)
        return passes.scalars_to_constants(module)

    module = after(run, model)
    assert names(module) == becomes
    constants = [node.meta["val"] for node in module.graph.nodes if node.op == "get_attr" and node.users]
    assert {constant.dtype for constant in constants} == {torch.float32}


@pytest.mark.parametrize(
    "function",
    [
        lambda _, x: x + x,
        lambda m, x: x * m.c,
        lambda _, x: (x > 0).int() + 1,
        lambda _, x: torch.add(x, x, alpha=2),
        lambda m, x: x.double() * m.c.double(),
    ],
    ids=["two values", "float constant", "integers", "alpha of a computed value", "double"],
)
def test_must_not_fire(function: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
    model = seeded(lambda: Model(function, c=torch.nn.Buffer(CHANNELS.clone())))
    after(passes.scalars_to_constants, model, changes=False)
