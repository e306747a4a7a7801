"""Operators that have several names: each name runs as the same operator."""

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

from openneutron import passes
from openneutron.core.fx import op_name
from openneutron.ops.aliases import ALIASES, canonical_overload
from openneutron.targets import TARGETS

aten = torch.ops.aten


def _overloads() -> list[str]:
    return [f"{name}.{overload}" for name in ALIASES for overload in getattr(aten, name).overloads()
            if "out" not in overload]  # fmt: skip


def test_each_alias_has_a_canonical_operator() -> None:
    found = {name: canonical_overload(getattr(getattr(aten, name.split(".")[0]), name.split(".")[1]))
             for name in _overloads()}  # fmt: skip
    assert {name for name, overload in found.items() if overload is None} == set()


Function = Callable[[Any, torch.Tensor], Any]
NAMES: dict[str, Function] = {
    "greater in where": lambda _, x: torch.where(torch.greater(x, 0.3), x, 0.0),
    "less_equal in a product": lambda _, x: x * torch.less_equal(x, 0.3),
    "not_equal": lambda _, x: x * torch.not_equal(x.relu(), 0.0),
    "greater of two": lambda _, x: x * torch.greater_equal(x, x.flip(-1)),
    "signbit": lambda _, x: torch.where(torch.signbit(x), -x, 2 * x),
    "divide": lambda _, x: torch.divide(x, x.abs() + 1),
    "true_divide by a number": lambda _, x: torch.true_divide(x, 3.0),
    "floor by divide": lambda _, x: torch.divide(x.mul(4), 1.0, rounding_mode="floor"),
    "exp2": lambda _, x: torch.special.exp2(x),
    "expm1": lambda _, x: torch.special.expm1(x),
    "log1p": lambda _, x: torch.special.log1p(x.abs()),
    "softmax": lambda _, x: torch.special.softmax(x, -1),
    "log_softmax": lambda _, x: torch.special.log_softmax(x, -1),
    "logsumexp": lambda _, x: torch.special.logsumexp(x, -1, keepdim=True),
    "round": lambda _, x: torch.special.round(x.mul(4)),
    "round to decimals": lambda _, x: torch.special.round(x.mul(4), decimals=0),
    "fix": lambda _, x: torch.fix(x.mul(4)),
    "in place": lambda _, x: x.mul(2).multiply_(0.5).clip_(-1, 1).negative_().absolute_(),
    "in place, greater": lambda _, x: x * x.clone().greater_(0.25),
    "copies of views": lambda _, x: torch.transpose_copy(torch.slice_copy(torch.t_copy(x), 0, 0, 8), 0, 1) * 2,
    "indices like the values": lambda _, x: torch.zeros(4, 8).scatter_add_(
        0, torch.tensor([[1], [3], [1], [0]]).expand_as(x), x
    ),
    "identities": lambda _, x: torch.positive(torch.real(x).conj()).resolve_conj().resolve_neg() * 2,
}


def _model(name: str) -> nn.Module:
    return seeded(lambda: Model(lambda m, x: m.last(NAMES[name](m, m.first(x))), first=nn.Linear(8, 8),
                                last=nn.Linear(1 if name == "logsumexp" else 8, 4)))  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_model_with_another_name_is_one_delegate(name: str) -> None:
    model, samples = _model(name), samples_of([(4, 8)])
    module = passes.prepare(exported(model, samples[0][0]), TARGETS["imxrt700"])
    names = {op_name(node).split(".")[1] for node in module.graph.nodes if node.op == "call_function"}
    assert not names & ALIASES.keys()
    assert_one_delegate_in_both_flows(model, samples, 15.0, recover=None)
