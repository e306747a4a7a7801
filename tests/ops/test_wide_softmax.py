"""Softmaxes over more values than int8 has codes: weighted sums divide afterwards, other readers are reported."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.both_flows import one_delegate
from tests.fidelity import signal_to_noise
from tests.flow_support import convert, lower_documented, seeded
from tests.oracle import Function
from torch import nn

from openneutron import NeutronQuantizer, quantize
from openneutron.core.fx import op_name
from openneutron.passes import divide_after_sums
from openneutron.quantizer import CoarseSoftmaxWarning
from openneutron.quantizer.score_ranges import ScoreRange
from openneutron.targets import NeutronTargetSpec

SIDE = 20
COUNT = SIDE * SIDE
GRID = torch.linspace(-1, 1, SIDE)
PLACES = torch.stack(torch.meshgrid(GRID, GRID, indexing="ij"), -1).reshape(COUNT, 2)

Maps = Callable[[torch.Tensor], Any]


def key_points(expected: Maps, scale: float = 3.0) -> nn.Module:
    """Applies `expected` to six maps of scores [1, 6, SIDE, SIDE], computed from images [1, 3, SIDE, SIDE]."""
    return seeded(lambda: Function(lambda layer, x: expected(layer(x) * scale), nn.Conv2d(3, 6, 3, padding=1)))


def attention(gain: float) -> nn.Module:
    """Attention of 8 queries to all keys that a mask shows, with two heads of 8 features."""

    def attend(q: nn.Module, k: nn.Module, v: nn.Module, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        query, key, value = (layer(x).unflatten(-1, (2, 8)).transpose(1, 2) for layer in (q, k, v))
        return F.scaled_dot_product_attention(query[:, :, :8] * gain, key, value, attn_mask=mask[:, None, None])

    return seeded(lambda: Function(attend, *(nn.Linear(16, 16) for _ in range(3))))


def maps(count: int = 12) -> list[tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(1, 3, SIDE, SIDE, generator=generator),) for _ in range(count)]


def _marginals(probabilities: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (probabilities.sum(2) * GRID).sum(-1), (probabilities.sum(3) * GRID).sum(-1)


EXPECTATIONS: dict[str, Maps] = {
    "sum of a product": lambda s: (s.flatten(2).softmax(-1) * PLACES[:, 0]).sum(-1),
    "kept dimension": lambda s: (s.flatten(2).softmax(2) * PLACES[:, 1]).sum(2, keepdim=True),
    "matmul": lambda s: s.flatten(2).softmax(-1) @ PLACES,
    "marginals": lambda s: (s.flatten(2).softmax(-1).view(1, 6, SIDE, SIDE).sum(2) * GRID).sum(-1),
    "both marginals": lambda s: _marginals(s.flatten(2).softmax(-1).view(1, 6, SIDE, SIDE)),
    "grid of two dimensions": lambda s: (s.flatten(2).softmax(-1).view_as(s) * PLACES.view(SIDE, SIDE, 2)[..., 0]).sum(
        (2, 3)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTATIONS)
def test_expectations(name: str) -> None:
    """The SQNR is below 5 dB if each probability is rounded to 1/256."""
    for scale, floor in ((1.0, 20), (3.0, 20)):
        one_delegate(key_points(EXPECTATIONS[name], scale), maps(), floor, recover=None)


def test_expectation_in_the_documented_flow_and_recovered() -> None:
    model, samples = key_points(EXPECTATIONS["sum of a product"]), maps(32)
    program = lower_documented(convert(model, samples[0], calibration=samples), samples[0])
    assert (program.delegates, program.cpu) == (1, [])
    assert signal_to_noise(program.run, model, samples[:4]) >= 20
    for recover in ("fast", "auto"):
        one_delegate(model, samples, 20, recover=recover)


@pytest.mark.parametrize("gain", [1.0, 6.0])
def test_attention_over_many_keys_with_a_mask(gain: float) -> None:
    model = attention(gain)
    generator = torch.Generator().manual_seed(0)
    samples = [
        (torch.randn(1, COUNT, 16, generator=generator), torch.arange(COUNT)[None] < COUNT - 40 * (index % 3))
        for index in range(8)
    ]
    quantized = quantize(model, samples[0], samples, recover=None, progress=False)
    assert signal_to_noise(quantized.module, model, samples) >= 20


def test_softmaxes_that_are_not_decomposed() -> None:
    """Softmaxes that are not rewritten: few values (heads of detectors), probabilities that are outputs, a bias after
    the sum.
    """
    few: Maps = lambda s: (s[:, :, :12].flatten(2).softmax(-1) * torch.ones(12 * SIDE)).sum(-1)  # noqa: E731
    kept: Maps = lambda s: s.flatten(2).softmax(-1)  # noqa: E731
    both: Maps = lambda s: kept(s) @ PLACES + kept(s).amax(-1, keepdim=True)  # noqa: E731
    bias: Maps = lambda s: F.linear(kept(s), PLACES.T, torch.ones(2))  # noqa: E731
    for expected in (few, kept, bias, both):
        exported = torch.export.export(key_points(expected), maps()[0]).module()
        target = NeutronTargetSpec("imxrt700").neutron_target
        changed = divide_after_sums(exported, target)
        assert not changed
        assert any(op_name(node) == "aten.softmax.int" for node in exported.graph.nodes)


def test_coarse_softmaxes_are_named_in_a_warning() -> None:
    model = key_points(lambda s: s.flatten(2).softmax(-1))
    with pytest.warns(CoarseSoftmaxWarning, match=rf"py:\d+\) returns {COUNT} probabilities"):
        convert(model, maps()[0], quantizer=NeutronQuantizer())
    with warnings.catch_warnings():
        warnings.simplefilter("error", CoarseSoftmaxWarning)
        convert(key_points(EXPECTATIONS["matmul"]), maps()[0])


def test_the_warning_for_another_dimension_says_what_to_do() -> None:
    model = key_points(lambda s: (s.flatten(2).transpose(1, 2).softmax(1) * GRID.repeat(SIDE)[:, None]).sum(1))
    with pytest.warns(CoarseSoftmaxWarning, match="Transpose its input, so that dimension 1 is the last one"):
        convert(model, maps()[0], quantizer=NeutronQuantizer())


def test_negligible_scores_are_clamped() -> None:
    scores = torch.tensor([[[0.0, 5.0], [9.0, -20.0]]])
    least = ScoreRange(count=4, distance=10.0).least(scores)
    assert least is not None
    assert torch.maximum(scores, least).tolist() == [[[0.0, 5.0], [9.0, -1.0]]]
    assert ScoreRange(count=3, distance=10.0).least(scores) is None
