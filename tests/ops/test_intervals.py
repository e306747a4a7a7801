"""The values of an operand that can change an operator's int8 output."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tests.oracle import Function
from torch import Tensor
from torch.fx import Node

from openneutron import NeutronQuantizer
from openneutron.core.constants import constant_value
from openneutron.core.fx import is_operator, op_name
from openneutron.ir.graph import QParams
from openneutron.ops import OPERATORS, facts_of
from openneutron.ops.intervals import EVERYTHING, Interval, distinguishable_range

STEP = torch.tensor([0.5, 1.0, 2.5])
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": F.relu,
    "relu6": F.relu6,
    "hardtanh": lambda x: F.hardtanh(x, -2.0, 3.0),
    "clamp below": lambda x: x.clamp(min=-1.5),
    "clamp above": lambda x: x.clamp(max=0.5),
    "hardswish": F.hardswish,
    "abs": torch.abs,
    "neg": torch.neg,
    "sum with a number": lambda x: x + 1.5,
    "sum with alpha": lambda x: torch.add(STEP, x, alpha=-2),
    "difference": lambda x: x - STEP,
    "difference from a constant": lambda x: 2.0 - x,
    "difference with alpha": lambda x: torch.sub(STEP, x, alpha=0.5),
    "product with a number": lambda x: x * -1.7,
    "product with a constant": lambda x: x * STEP,
    "maximum of itself": lambda x: torch.maximum(x, x),
}


def call_of(function: Callable[[Tensor], Tensor]) -> tuple[Node, Node, Callable[[Tensor], Tensor]]:
    """Returns the operator of `function`, its operand, and the prepared module."""
    module = torch.export.export(Function(function), (torch.zeros(3),)).module()
    prepared = NeutronQuantizer().prepare_graph(module, equalizes=False)
    (node,) = [node for node in prepared.graph.nodes if is_operator(node)]
    (operand, *_) = [value for value in node.all_input_nodes if constant_value(value) is None]
    return node, operand, prepared


CALLS = {name: call_of(function) for name, function in FUNCTIONS.items()}


def codes(values: Tensor, qparams: QParams) -> Tensor:
    return ((values.double() / qparams.scale[0]).round() + qparams.zero_point[0]).clamp(-128, 127)


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(sorted(CALLS)),
    st.floats(1e-3, 0.2),
    st.integers(-128, 127),
    st.lists(st.floats(-50, 50, width=32), min_size=3, max_size=3),
)
@example("sigmoid", 0.001, 0, [-50.0, 0.0, 50.0])
@example("tanh", 0.001, 0, [-50.0, 0.0, 50.0])
@example("hardswish", 0.01, -100, [-3.5, -2.9, 4.0])
@example("sum with alpha", 0.05, 100, [-9.0, 0.0, 9.0])
def test_clamping_the_operand_changes_no_code(name: str, scale: float, zero_point: int, values: list[float]) -> None:
    node, operand, run = CALLS[name]
    fixed = OPERATORS[op_name(node)].output_rule(node)
    qparams = fixed if isinstance(fixed, QParams) else QParams.per_tensor(scale, zero_point)
    inputs = torch.tensor(values)
    rule = facts_of(node).needed_range
    assert rule is not None
    needed = rule(node, operand, distinguishable_range(qparams))
    difference = codes(run(inputs), qparams) - codes(run(inputs.clamp(needed.low, needed.high)), qparams)
    # The ends of the interval are where codes change, so float rounding may decide between two codes there.
    at_ends = (inputs < needed.low) | (inputs > needed.high)
    assert not bool((difference.abs() > at_ends).any())
    inner = inputs.clamp(needed.low - 1e-3, needed.high + 1e-3)
    assert torch.equal(codes(run(inputs), qparams), codes(run(inner), qparams))


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("sigmoid", -math.log(511), math.log(254.5 / 1.5)),
        ("tanh", -math.atanh(127.5 / 128), math.atanh(126.5 / 128)),
        ("relu", 0.0, math.inf),
        ("relu6", 0.0, 6.0),
        ("hardtanh", -2.0, 3.0),
        ("clamp below", -1.5, math.inf),
        ("clamp above", -math.inf, 0.5),
        ("hardswish", -3.0, math.inf),
        ("abs", -math.inf, math.inf),
        ("sum with a number", -math.inf, math.inf),
    ],
)
def test_limits_of_operators(name: str, low: float, high: float) -> None:
    node, operand, _ = CALLS[name]
    rule = facts_of(node).needed_range
    assert rule is not None
    needed = rule(node, operand, EVERYTHING)
    assert (needed.low, needed.high) == pytest.approx((low, high))


@pytest.mark.parametrize("function", [lambda x: x + x, lambda x: x * x, lambda x: x - x, torch.exp, torch.rsqrt])
def test_other_operators_need_everything(function: Callable[[Tensor], Tensor]) -> None:
    node, operand, _ = call_of(function)
    rule = facts_of(node).needed_range
    assert rule is None or rule(node, operand, Interval(-1.0, 1.0)) == EVERYTHING


@pytest.mark.parametrize("factor", [torch.tensor([1.0, -1.0, 2.0]), torch.zeros(3), torch.tensor([0.001, 1.0, 2.0])])
def test_factors_of_both_signs_or_near_zero_need_everything(factor: Tensor) -> None:
    node, operand, _ = call_of(lambda x: x * factor)
    rule = facts_of(node).needed_range
    assert rule is not None
    assert rule(node, operand, Interval(-1.0, 1.0)) == EVERYTHING
