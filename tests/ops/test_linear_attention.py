"""Attention with ReLU instead of softmax, whose sums of weights are computed with a row or column of ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.both_flows import assert_one_delegate_in_both_flows, one_delegate, samples_of
from tests.flow_support import seeded
from tests.oracle import Function
from torch import nn

from openneutron.core.fx import op_name
from openneutron.passes import split_padded_products
from openneutron.targets import TARGETS

TOKENS, WIDTH = 24, 8
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _rows(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Appends a row of ones to [..., WIDTH, TOKENS]."""
    query, key, value = (each.transpose(-1, -2) for each in (query, key, value))
    found = (F.pad(value, (0, 0, 0, 1), value=1.0) @ key.transpose(-1, -2)) @ query
    return (found[:, :, :-1] / (found[:, :, -1:] + 1e-15)).transpose(-1, -2)


def _columns(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Appends a column of ones to [..., TOKENS, WIDTH]."""
    found = query @ (key.transpose(-1, -2) @ F.pad(value, (0, 1), value=1.0))
    return found[..., :-1] / (found[..., -1:] + 1e-15)


def _one_product(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    found = (query @ key.transpose(-1, -2)) @ F.pad(value, (0, 1), value=2.0)
    return 2 * found[..., :WIDTH] / (found[..., WIDTH:] + 1e-6)


def _without_autocast(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    with torch.autocast(value.device.type, enabled=False):
        return _columns(query.float(), key.float(), value.float())


def attention(attend: Attend) -> nn.Module:
    """Computes attention with two heads on tokens [1, TOKENS, 2 * WIDTH]. No sum of weights is close to zero, because
    the inverse has one scale for all sums.
    """

    def forward(q: nn.Module, k: nn.Module, v: nn.Module, x: torch.Tensor) -> torch.Tensor:
        query, key, value = (layer(x).unflatten(-1, (2, WIDTH)).transpose(1, 2) for layer in (q, k, v))
        return attend(F.relu(query + 1), F.relu(key + 1), value).transpose(1, 2).flatten(2)

    return seeded(lambda: Function(forward, *(nn.Linear(2 * WIDTH, 2 * WIDTH) for _ in range(3))))


SAMPLES = samples_of([(1, TOKENS, 2 * WIDTH)])
SPELLINGS: dict[str, Attend] = {
    "rows": _rows, "columns": _columns, "one product": _one_product, "autocast": _without_autocast,
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
def test_linear_attention_is_one_delegate(name: str) -> None:
    assert_one_delegate_in_both_flows(attention(SPELLINGS[name]), SAMPLES, 20, recover=None)


@pytest.mark.parametrize("recover", ["fast", "auto"])
def test_recovered_linear_attention_is_one_delegate(recover: str) -> None:
    one_delegate(attention(_rows), SAMPLES, 20, recover)


def _of(value: torch.Tensor, readers: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    return readers(value)


def _split(function: Callable[..., Any]) -> tuple[bool, list[str], float]:
    """Returns whether products in `function` of [1, 2, 5, 8] and [1, 2, 8, 6] are split, its
    operators, and the error.
    """
    sample = tuple(
        torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in ((1, 2, 5, 8), (1, 2, 8, 6))
    )
    module = torch.export.export(Function(function), sample).module()
    expected = function(*sample)
    changed = split_padded_products(module, TARGETS["imxrt700"])
    return changed, [op_name(node) for node in module.graph.nodes], float((module(*sample) - expected).abs().max())


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: (F.pad(x, (0, 0, 0, 1), value=1.0) @ y)[:, :, -1:],
        lambda x, y: (F.pad(x, (0, 0, 0, 1), value=-3.0) @ y)[:, :, 5:].neg(),
        lambda x, y: _of(x @ F.pad(y, (0, 1), value=1.0), lambda z: z[..., 1:5:2] * z[..., -1:]),
        lambda x, y: _of(x @ F.pad(y, (0, 1, 0, 0), value=1.0), lambda z: z[..., :-1] / z[..., 6:]),
    ],
)
def test_rule_1_sums_replace_a_padded_row_or_column(function: Callable[..., Any]) -> None:
    changed, operators, difference = _split(function)
    assert changed
    assert "aten.sum.dim_IntList" in operators
    assert "aten.pad.default" not in operators
    assert difference < 1e-4


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: (F.pad(x, (0, 0, 0, 1), value=1.0) @ y)[:, :, :-1],  # the row has no reader
        lambda x, y: (F.pad(x, (0, 0, 0, 1), value=1.0) @ y)[:, :, 3:],  # a slice reads both parts
        lambda x, y: (F.pad(x, (0, 0, 0, 1), value=1.0) @ y)[:, :, -1],  # there is no slice
        lambda x, y: (F.pad(x, (0, 0, 0, 1), value=1.0) @ y)[..., -1:],  # a slice of another axis
        lambda x, y: (F.pad(x, (0, 0, 0, 2), value=1.0) @ y)[:, :, -1:],
        lambda x, y: (F.pad(x, (0, 0, 1, 0), value=1.0) @ y)[:, :, -1:],
        lambda x, y: (F.pad(x, (0, 0, 0, 1), mode="replicate") @ y)[:, :, -1:],
        lambda x, y: (F.pad(x[0, 0], (0, 0, 0, 1), value=1.0) @ y)[:, :, -1:],  # the row is broadcast
        lambda x, y: _of(F.pad(x, (0, 0, 0, 1), value=1.0), lambda z: (z @ y)[:, :, -1:] + z.sum()),
        lambda x, y: _of(F.pad(x, (0, 0, 0, 1), value=1.0) @ y, lambda z: z[:, :, -1:] + z.sum()),
    ],
)  # fmt: skip
def test_rule_1_other_products_stay(function: Callable[..., Any]) -> None:
    assert not _split(function)[0]


def test_rule_1_products_in_float_are_not_split() -> None:
    sample = torch.randn(2, 3), torch.randn(3, 4)
    module = torch.export.export(Function(lambda x, y: (F.pad(x, (0, 0, 0, 1), value=1.0) @ y)[-1:]), sample).module()
    assert not split_padded_products(module, TARGETS["imxrt700"], lambda node: op_name(node) == "aten.matmul.default")
