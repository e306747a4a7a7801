"""Export infers batch norms from their input: the metadata equal those of torch's decomposition."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from tests.flow_support import seeded
from tests.models import bn, bn1
from torch import nn
from torch._decomp import decomposition_table

from openneutron.model import exporting, norm_inference
from openneutron.model.examples import Examples
from openneutron.model.exporting import export

CHANNELS_LAST = torch.channels_last
NORM = torch.ops.aten._native_batch_norm_legit_no_training.default


def without_affine() -> nn.Module:
    return nn.BatchNorm2d(4, affine=False)


def double() -> nn.Module:
    return bn().double()


# name: model, input, whether torch's decomposition runs
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], torch.Tensor], bool]] = {
    "images": (bn, lambda: torch.randn(2, 4, 8, 6), False),
    "images of one pixel": (bn, lambda: torch.randn(2, 4, 1, 1), False),
    "no weight": (without_affine, lambda: torch.randn(1, 4, 8, 6), False),
    "rows": (lambda: bn1(4), lambda: torch.randn(3, 4), False),
    "sequences": (lambda: bn1(4), lambda: torch.randn(3, 4, 7), False),
    "channels-last images": (bn, lambda: torch.randn(2, 4, 8, 6).contiguous(memory_format=CHANNELS_LAST), False),
    "one channels-last image": (bn, lambda: torch.randn(1, 4, 8, 6).contiguous(memory_format=CHANNELS_LAST), False),
    "channels-last rows of images": (
        bn, lambda: torch.randn(2, 4, 1, 6).contiguous(memory_format=CHANNELS_LAST), True,
    ),
    "a slice": (bn, lambda: torch.randn(2, 4, 8, 12)[..., ::2], True),
    "an expanded image": (bn, lambda: torch.randn(2, 1, 8, 6).expand(2, 4, 8, 6), True),
    "float64": (double, lambda: torch.randn(2, 4, 8, 6, dtype=torch.float64), True),
}


def metadata(model: nn.Module, value: torch.Tensor) -> list[Any]:
    torch._subclasses.FakeTensorMode.cache_clear()
    values = [(node.name, node.meta.get("val")) for node in export(model, Examples((value,), {})).graph.nodes]
    return [(name, one.shape, one.stride(), one.dtype) for name, one in values if isinstance(one, torch.Tensor)]


@pytest.mark.parametrize("name", CASES)
def test_metadata_equal_those_of_the_decomposition(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, make, decomposes = CASES[name]
    model, value, calls = seeded(build), make(), 0
    decompose = decomposition_table[NORM]

    @functools.wraps(decompose)
    def counted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        return decompose(*args)

    monkeypatch.setitem(decomposition_table, NORM, counted)
    found = metadata(model, value)
    assert bool(calls) == decomposes
    assert decomposition_table[NORM] is counted
    monkeypatch.setattr(exporting, "infer_norms_without_arithmetic", nullcontext)
    assert metadata(model, value) == found
    assert calls


@pytest.mark.parametrize("channels", [3, 5])
def test_statistics_of_other_channels_are_left_to_torch(channels: int) -> None:
    row = torch.ones(channels)
    assert not norm_inference._has_output_like(torch.randn(1, 4, 8, 8), None, None, row, row)


def test_a_torch_without_the_decomposition_infers_shapes_in_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    # A table without the entry in place of torch's, from which the export reads the decomposition itself.
    table: dict[Any, Any] = {}
    monkeypatch.setattr(norm_inference, "decomposition_table", table)
    model, value = seeded(bn), torch.randn(2, 4, 8, 6)
    found = metadata(model, value)
    assert (2, 4, 8, 6) in [shape for _, shape, _, _ in found]
    assert not table
