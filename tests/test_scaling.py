"""Work grows with the graph and no faster: counted in calls, which a busy machine does not change."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from benchmarks.scaling import STAGES, own_work, transformer_chain
from benchmarks.subjects import CHAIN_CHANNELS, chain_of
from tests.flow_support import seeded
from tests.oracle import Function
from torch import nn

# Twice the nodes may take this many times the calls: what a graph costs however small it is makes it less than 2.
MAX_GROWTH = 2.2


def calls_of(build: Callable[[int], nn.Module], blocks: int, shape: tuple[int, ...]) -> Counter[str]:
    """How many calls of Python functions and builtins each stage makes."""
    counts: Counter[str] = Counter()

    def counted(stage: str, action: Callable[[], Any]) -> Any:
        def profile(_: FrameType, event: str, __: object) -> None:
            if event in ("call", "c_call"):
                counts[stage] += 1

        sys.setprofile(profile)
        try:
            return action()
        finally:
            sys.setprofile(None)

    own_work(seeded(lambda: build(blocks)), (torch.ones(shape),), counted)
    return counts


def recurrent_steps(steps: int) -> nn.Module:
    return Function(lambda layer, x: layer(x[:steps])[0], nn.GRU(4, 4, num_layers=2))


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        pytest.param(chain_of, (1, CHAIN_CHANNELS, 4, 4), id="residual blocks"),
        pytest.param(transformer_chain, (2, 8), id="decomposed blocks"),
        pytest.param(recurrent_steps, (32, 1, 4), id="steps of a recurrent network"),
    ],
)
def test_work_grows_with_the_graph_and_no_faster(build: Callable[[int], nn.Module], shape: tuple[int, ...]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first, second, third = (calls_of(build, blocks, shape) for blocks in (8, 16, 32))
    for stage in STAGES:
        assert first[stage] > 100, stage
        assert second[stage] / first[stage] <= MAX_GROWTH, stage
        assert third[stage] / second[stage] <= MAX_GROWTH, stage
