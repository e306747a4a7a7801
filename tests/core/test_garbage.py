"""Tests of garbage collection: `openneutron.core.garbage`."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import pytest
import torch
from tests.flow_support import convert, lower_documented
from torch import nn
from torch.fx import GraphModule

from openneutron import lower, quantize
from openneutron.core.garbage import FULL_COLLECTION_THRESHOLD, rare_full_collections

Thresholds = tuple[int, int, int]


@pytest.fixture
def given() -> Iterator[Thresholds]:
    """Thresholds of a user."""
    before = gc.get_threshold()
    gc.set_threshold(600, 9, 8)
    yield gc.get_threshold()
    gc.set_threshold(*before)


@pytest.mark.parametrize("own", [8, FULL_COLLECTION_THRESHOLD + 1])
def test_full_collections_are_rare_in_the_block_only(given: Thresholds, own: int) -> None:
    gc.set_threshold(*given[:2], own)
    with rare_full_collections():
        assert gc.get_threshold() == (*given[:2], max(own, FULL_COLLECTION_THRESHOLD))
    assert gc.get_threshold() == (*given[:2], own)


def test_an_error_restores_the_thresholds(given: Thresholds) -> None:
    with pytest.raises(ZeroDivisionError), rare_full_collections():
        _ = 1 / 0
    assert gc.get_threshold() == given


def test_quantize_and_lower_collect_rarely(given: Thresholds, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []
    export = torch.export.export

    def noted(*args: object, **options: object) -> object:
        found.append(gc.get_threshold()[2])
        return export(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.export, "export", noted)
    inputs = torch.zeros(1, 3)
    quantized = quantize(nn.Linear(3, 2).eval(), inputs, [inputs, inputs + 1], recover=None)
    lower(quantized.module, (inputs,))
    lower(torch.export.export(quantized.module, (inputs,)))
    assert found[0] == FULL_COLLECTION_THRESHOLD
    assert gc.get_threshold() == given


def short_flow() -> None:
    inputs = torch.zeros(1, 3)
    lower(quantize(nn.Linear(3, 2).eval(), inputs, [inputs, inputs + 1], recover=None))


def lowering_of_the_documented_flow() -> None:
    lower_documented(CONVERTED, (torch.zeros(1, 3),))


CONVERTED = convert(nn.Linear(3, 2).eval(), (torch.zeros(1, 3),))


def graphs() -> int:
    """Returns the number of graph modules in memory."""
    gc.collect()
    return sum(issubclass(type(value), GraphModule) for value in gc.get_objects())


@pytest.mark.parametrize("run", [short_flow, lowering_of_the_documented_flow])
def test_models_and_programs_are_freed(run: Callable[[], None]) -> None:
    run()  # torch keeps the last graph of some kinds
    before = graphs()
    run()
    run()
    assert graphs() <= before
