"""Comparisons with infinity, and the decompositions of torch that contain them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.flow_support import convert, lower_documented, seeded
from torch import nn

from openneutron import lower, quantize
from openneutron.core.fx import op_name
from openneutron.passes import fold_infinite_comparisons

INF = math.inf


class Computes(nn.Module):
    """A linear, and a function of its output and of the input."""

    def __init__(self, function: Callable[[torch.Tensor, torch.Tensor], Any], size: int = 16) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self.linear(x), x)


def after(rule: Callable[..., bool], function: Callable[..., Any], *, changes: bool = True) -> list[str]:
    """Returns the operators of the model after a pass, without those that nothing reads."""
    x = torch.randn(1, 16)
    model = seeded(lambda: Computes(function))
    module = torch.export.export(model, (x,)).module()
    assert rule(module) is changes
    torch.testing.assert_close(module(x), model(x), equal_nan=True)
    module.graph.eliminate_dead_code()
    return [op_name(node).removeprefix("aten.") for node in module.graph.nodes if node.op == "call_function"]


def attention(x: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    query, key, value = x[..., :4], x[..., 4:8], x[..., 8:12]
    return F.scaled_dot_product_attention(query, key, value)


def safe_softmax(x: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """The decomposition of torch for masked attention. The input may be a mask with -inf."""
    scores = x + given
    rows = ~(scores != -INF).any(-1, keepdim=True)
    return torch.where(rows, 0.0, scores.softmax(-1))


def softmax_without_nan(x: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    weights = (x + given).softmax(-1)
    return torch.where(weights.isnan(), 0.0, weights)


def softmax_with_replaced_nan(x: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    return torch.nan_to_num((x + given).softmax(-1))


class TestFolds:
    @pytest.mark.parametrize(
        ("function", "left"),
        [
            pytest.param(lambda v, _: torch.where(v == INF, 0 * v, v), ["linear.default"], id="equal"),
            pytest.param(lambda v, _: torch.where(v.abs() != INF, v, 0 * v), ["linear.default"], id="not equal"),
            pytest.param(lambda v, _: torch.where(v < -INF, 0 * v, v), ["linear.default"], id="less"),
            pytest.param(lambda v, _: torch.where(v >= -INF, v, 0 * v), ["linear.default"], id="at least"),
            pytest.param(lambda v, _: torch.where(v.isnan(), 0 * v, v), ["linear.default"], id="nan"),
            pytest.param(lambda v, _: torch.where(v.isinf(), 0 * v, v), ["linear.default"], id="infinite"),
            pytest.param(lambda v, _: v.masked_fill(torch.ne(v, v), 0), ["linear.default"], id="itself"),
            pytest.param(lambda v, _: v.masked_fill(~v.isfinite(), 0), ["linear.default"], id="not finite"),
            pytest.param(lambda v, _: v.nan_to_num(0.5), ["linear.default"], id="replaced nan"),
            pytest.param(
                lambda v, _: torch.where((v == INF) & (v > 0), 0 * v, v), ["linear.default"], id="conjunction"
            ),
            pytest.param(lambda v, x: x.masked_fill((x == INF) | v.isnan(), 0), [], id="an input is never inf"),
            pytest.param(lambda v, _: (v == INF).any(-1, keepdim=True).expand(1, 16) | (v > 0), None, id="constant"),
        ],
    )
    def test_a_comparison_of_a_finite_value(self, function: Callable[..., Any], left: list[str] | None) -> None:
        found = after(fold_infinite_comparisons, function)
        assert left is None or found == left
        assert not {"eq.Scalar", "ne.Scalar", "isnan.default", "isinf.default", "where.self"} & {*found}

    def test_a_value_of_the_selected_kind_is_expanded(self) -> None:
        found = after(fold_infinite_comparisons, lambda v, _: torch.where(v.isnan(), v, v[:, :1]))
        assert found == ["linear.default", "slice.Tensor", "expand.default"]

    @pytest.mark.parametrize("function", [safe_softmax, softmax_without_nan, softmax_with_replaced_nan])
    def test_a_softmax_that_is_zero_without_visible_scores(self, function: Callable[..., Any]) -> None:
        found = after(fold_infinite_comparisons, function)
        assert found == ["linear.default", "add.Tensor", "clamp.default", "softmax.int"]

    @pytest.mark.parametrize(
        "function",
        [
            pytest.param(lambda v, _: torch.where(v == 3, 0 * v, v), id="a finite number"),
            pytest.param(lambda v, x: torch.where(x == -INF, 0 * v, v), id="an input that may be a mask"),
            pytest.param(lambda v, x: torch.where((v + x).isnan(), 0 * v, v), id="a sum with a mask"),
            pytest.param(lambda v, _: torch.where((v * INF).isnan(), 0 * v, v), id="infinite"),
            pytest.param(lambda v, _: torch.where(v.relu().log().isinf(), 0 * v, v), id="a logarithm"),
            pytest.param(lambda v, _: torch.where((1 / v).isinf(), 0 * v, v), id="a quotient"),
            pytest.param(lambda v, _: torch.where(v.sqrt().isnan(), 0 * v, v), id="a root"),
            pytest.param(lambda v, x: torch.where(v > 0, v, x.nan_to_num()), id="an input with nan"),
            pytest.param(lambda v, x: torch.where(~((v + x) != -INF).any(0), 0.0, (v + x).softmax(-1)), id="columns"),
            pytest.param(lambda v, x: torch.where(~((v + x) != -INF).any(-1), 1.0, (v + x).softmax(-1)), id="one"),
        ],
    )
    def test_other_comparisons_stay(self, function: Callable[..., Any]) -> None:
        found = after(fold_infinite_comparisons, function, changes=False)
        assert any(name.startswith("where") for name in found)


@pytest.mark.parametrize("flow", ["short", "documented"])
@pytest.mark.parametrize(
    "function",
    [
        pytest.param(attention, id="attention"),
        pytest.param(lambda v, _: torch.logsumexp(v, -1), id="logsumexp"),
        pytest.param(lambda v, _: torch.logaddexp(v, 2 * v), id="logaddexp"),
    ],
)
def test_decompositions_of_torch_are_one_delegate(flow: str, function: Callable[..., Any]) -> None:
    """Both flows take a program after `run_decompositions`."""
    model = seeded(lambda: Computes(function))
    samples = [(torch.randn(1, 8, 16),) for _ in range(8)]
    decomposed = torch.export.export(model, samples[0]).run_decompositions()
    if flow == "documented":
        lowered = lower_documented(convert(decomposed.module(), samples[0], calibration=samples), samples[0])
        assert (lowered.delegates, lowered.cpu) == (1, [])
    else:
        program = lower(quantize(decomposed, samples[0], samples, recover=None))
        assert {row.where for row in program.placement} == {"npu"}
