"""Shapes that torch.export leaves open although they depend on constants alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.both_flows import assert_one_delegate_in_both_flows, samples_of
from tests.flow_support import seeded
from tests.models import Model
from tests.passes.test_passes import exported
from torch import nn

from openneutron import passes, quantize
from openneutron.errors import ModelError
from openneutron.targets import TARGETS

Function = Callable[[Any, torch.Tensor], Any]
MASK = torch.tensor([True, False, True, True, False, False, True, False])
GRID = torch.stack([MASK, ~MASK])
SHAPE = (2, 8)

SELECTIONS: dict[str, Function] = {
    "columns": lambda m, x: m.last(x[:, m.mask]),
    "computed mask": lambda m, x: m.last(x[:, m.mask & (torch.arange(8) < 9)]),
    "a new dimension": lambda m, x: m.last(x[:, m.mask, None].flatten(1)),
    "points": lambda m, x: m.last(x[m.grid].reshape(2, 4)),
    "masked_select": lambda m, x: m.last(x.masked_select(m.grid).view(2, 4)),
    "masked_select of columns": lambda m, x: m.last(torch.masked_select(x, m.mask).view(2, -1)),
    "nonzero": lambda m, x: m.last(x[:, m.mask.nonzero().flatten()]),
    "where": lambda m, x: m.last(x[:, torch.where(m.mask)[0]]),
    "argwhere": lambda m, x: m.last(x[:, torch.argwhere(m.mask)[:, 0]]),
    "unique": lambda m, x: m.last(x[:, torch.unique(torch.tensor([6, 0, 3, 3, 2]))]),
    "size": lambda m, x: (y := x[:, m.mask], m.last(y.reshape(y.shape[0] * y.shape[1]).view(2, 4)))[1],
}


def _model(function: Function) -> nn.Module:
    def build() -> nn.Module:
        model = Model(lambda m, x: function(m, m.first(x)), first=nn.Linear(8, 8), last=nn.Linear(4, 3))
        model.register_buffer("mask", MASK)
        model.register_buffer("grid", GRID)
        return model

    return seeded(build)


@pytest.mark.parametrize("name", SELECTIONS)
def test_the_prepared_graph_has_fixed_shapes_and_computes_the_same(name: str) -> None:
    model, inputs = _model(SELECTIONS[name]), samples_of([SHAPE])[0]
    module = passes.prepare(exported(model, inputs[0]), TARGETS["imxrt700"])
    assert all(isinstance(size, int) for node in module.graph.nodes if node.op == "call_function"
               for size in node.meta["val"].shape)  # fmt: skip
    torch.testing.assert_close(module(*inputs), model(*inputs))


@pytest.mark.parametrize("name", SELECTIONS)
def test_one_delegate_in_both_flows(name: str) -> None:
    assert_one_delegate_in_both_flows(_model(SELECTIONS[name]), samples_of([SHAPE]), 25.0, recover=None)


@pytest.mark.parametrize("writes", [lambda m, x: m.mask.logical_or_(x[0] > 0), lambda m, _: m.mask[:4].fill_(True)])
def test_a_mask_that_the_model_writes_is_not_a_constant(writes: Function) -> None:
    model, samples = _model(lambda m, x: (writes(m, x), x[:, m.mask])[1]), samples_of([SHAPE])
    with pytest.raises(ModelError, match="how many values of a mask are true"):
        quantize(model, samples[0], samples, recover=None, progress=False)
