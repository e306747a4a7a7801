"""Integers between truth values and float32 become truth values or float32."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.both_flows import assert_one_delegate_in_both_flows, samples_of
from tests.flow_support import seeded
from tests.models import Model, conv, image
from tests.passes.test_passes import exported, names
from torch import nn

from openneutron import lower, passes, quantize
from openneutron.targets import TARGETS

Function = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

RULES: dict[str, tuple[Function, list[str]]] = {
    "float of integer": (lambda x, m: x * m.int().float(), ["to.dtype", "mul.Tensor"]),
    "one minus": (lambda x, m: x + (1 - m.int()).float(), ["to.dtype", "sub.Tensor", "add.Tensor"]),
    "as bool": (lambda x, m: torch.where(m.long().bool(), x, 0.0), ["where.self", "mul.Tensor"]),
    "equal zero": (lambda x, m: x * (m.int() == 0), ["logical_not.default", "to.dtype", "mul.Tensor"]),
    "product": (lambda x, m: x * (m.int() * m[:, :1].int()), ["slice.Tensor", "logical_and.default", "to.dtype",
                                                           "mul.Tensor"]),
    "truth value": (lambda x, m: x * m, ["to.dtype", "mul.Tensor"]),
    "own dtype": (lambda x, m: x + m.type_as(x), ["to.dtype", "add.Tensor"]),
    "wraps": (lambda x, m: x * (m.byte() - 1).float(), ["to.dtype", "mul.Tensor", "add.Tensor", "mul.Tensor"]),
    "truncated": (lambda x, _: x.int().float(), ["trunc.default"]),
    "truncated twice": (lambda x, _: x.long().to(torch.int32).float(), ["trunc.default"]),
}  # fmt: skip
STAYS: dict[str, Function] = {
    "small integers wrap around": lambda x, _: (x * 100).to(torch.int8).float(),
    "arithmetic of integers": lambda x, _: (x.int() * 3).float(),
    "integers that are returned": lambda _, m: m.int() + 1,
}


def _inputs() -> tuple[torch.Tensor, torch.Tensor]:
    values = image()
    return values * 3, torch.rand(values.shape, generator=torch.Generator().manual_seed(1)) > 0.5


def _prepared(function: Function) -> torch.fx.GraphModule:
    return passes.prepare(exported(Model(lambda _, x, m: function(x, m)), *_inputs()), TARGETS["imxrt700"])


@pytest.mark.parametrize("name", RULES)
def test_rule(name: str) -> None:
    function, expected = RULES[name]
    module = _prepared(function)
    assert [found for found in names(module) if found not in ("placeholder", "output")] == expected
    torch.testing.assert_close(module(*_inputs()), function(*_inputs()))


@pytest.mark.parametrize("name", STAYS)
def test_operators_that_stay_on_integers(name: str) -> None:
    module = _prepared(STAYS[name])
    assert not passes.integers_to_floats(module, TARGETS["imxrt700"])
    torch.testing.assert_close(module(*_inputs()), STAYS[name](*_inputs()))


def test_a_comparison_stays_one_operator() -> None:
    assert names(_prepared(lambda x, _: x * (x > 0).int())).count("relu.default") == 1


ROUNDINGS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "round": torch.round, "floor": torch.floor, "ceil": torch.ceil, "int": lambda x: x.int().float(),
    "floor_divide": lambda x: x // 2,
}  # fmt: skip


@pytest.mark.parametrize("name", ROUNDINGS)
def test_roundings_are_one_delegate_in_both_flows(name: str) -> None:
    model = seeded(lambda: Model(lambda m, x: m.d(ROUNDINGS[name](m.c(x) * 20)), c=conv(), d=conv()))
    assert_one_delegate_in_both_flows(model, samples_of([(1, 4, 8, 8)]), 20.0, recover=None)


@pytest.mark.parametrize("recover", [None, "fast"])
def test_a_mask_after_a_softmax(recover: str | None) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scores, self.values = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            attended: torch.Tensor = self.values(self.scores(x).softmax(-1) * mask.int()[:, None])
            return attended

    model = seeded(Masked)
    samples = [(x, torch.arange(8)[None] < 5) for (x,) in samples_of([(1, 6, 8)])]
    program = lower(quantize(model, samples[0], samples, recover=recover, progress=False))
    assert {row.partition for row in program.placement if row.where == "npu"} == {0}
    left = [row.op.partition(".")[2] for row in program.placement if row.where == "cpu"]
    assert left == ["view_copy.default", "_to_dim_order_copy.default"]
