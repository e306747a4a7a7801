"""Work grows linearly with the graph. The tests count calls, which do not depend on the machine's load."""

from __future__ import annotations

import itertools
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

import pytest
import torch
from benchmarks.scaling import STAGES, own_work, transformer_chain
from benchmarks.workloads import CHAIN_CHANNELS, chain_of
from tests.flow_support import seeded
from tests.oracle import Function
from torch import nn
from torch.fx import GraphModule
from torch.overrides import TorchFunctionMode

from openneutron import NeutronQuantizer, lower, quantize

# Twice the nodes may take this many times the calls. A constant part makes the ratio less than 2.
MAX_GROWTH = 2.2


def counted(action: Callable[[], Any]) -> tuple[int, Any]:
    """Returns the number of calls of Python functions and builtins in an action, and its result."""
    count = 0

    def profile(_: FrameType, event: str, __: object) -> None:
        nonlocal count
        if event in ("call", "c_call"):
            count += 1

    sys.setprofile(profile)
    try:
        result = action()
    finally:
        sys.setprofile(None)
    return count, result


def calls_of(build: Callable[[int], nn.Module], blocks: int, shape: tuple[int, ...]) -> Counter[str]:
    """Returns the number of calls of each stage."""
    counts: Counter[str] = Counter()

    def count_stage(stage: str, action: Callable[[], Any]) -> Any:
        count, result = counted(action)
        counts[stage] += count
        return result

    own_work(seeded(lambda: build(blocks)), (torch.ones(shape),), count_stage)
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


def test_preparing_for_training_grows_with_the_graph_and_no_faster() -> None:
    counts = []
    for blocks in (8, 16, 32):
        layers = [(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout()) for _ in range(blocks)]
        model = nn.Sequential(*(layer for block in layers for layer in block)).train()
        module: GraphModule = torch.export.export(model, (torch.ones(2, 4, 4, 4),)).module()
        quantizer = NeutronQuantizer(is_qat=True)

        def prepare(module: GraphModule = module, quantizer: NeutronQuantizer = quantizer) -> GraphModule:
            return quantizer.annotate(quantizer.transform_for_annotation(module))

        counts.append(counted(prepare)[0])
    first, second, third = counts
    assert first > 100
    assert second / first <= MAX_GROWTH
    assert third / second <= MAX_GROWTH


@dataclass(frozen=True)
class Growing:
    """Networks of which one property doubles from one of `sizes` to the next."""

    build: Callable[[int], nn.Module]
    shape: Callable[[int], tuple[int, ...]]
    samples: Callable[[int], int]
    sizes: tuple[int, int, int]
    quantized: float
    """The largest ratio of calls of `quantize(recover=None)` from one size to the next."""
    recovered: float
    """The same for `recover="auto"`."""
    lowered: float
    """The same for `lower`."""


EQUAL = 1.2
GROWING = {
    "weights": Growing(
        lambda size: nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, size)),
        lambda size: (1, size), lambda _: 16, (64, 128, 256), EQUAL, EQUAL, EQUAL,
    ),
    "samples": Growing(
        lambda _: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()),
        lambda _: (1, 3, 8, 8), lambda size: size, (256, 512, 1024), MAX_GROWTH, MAX_GROWTH, EQUAL,
    ),
    "image size": Growing(
        lambda _: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()),
        lambda size: (1, 3, size, size), lambda _: 16, (16, 32, 64), EQUAL, EQUAL, EQUAL,
    ),
    "operators": Growing(
        chain_of, lambda _: (1, CHAIN_CHANNELS, 4, 4), lambda _: 16, (2, 4, 8), MAX_GROWTH, MAX_GROWTH, MAX_GROWTH,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GROWING)
def test_the_flow_grows_with_a_property_and_no_faster(name: str) -> None:
    growing = GROWING[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        calls_of_flow(growing, growing.sizes[0] // 2)  # imports and caches
        counts = [calls_of_flow(growing, size) for size in growing.sizes]
    for stage, limit in (("quantize", growing.quantized), ("auto", growing.recovered), ("lower", growing.lowered)):
        for before, after in itertools.pairwise(count[stage] for count in counts):
            assert before > 1000, stage
            assert after / before <= limit, stage


def calls_of_flow(growing: Growing, size: int) -> dict[str, int]:
    model, shape = seeded(lambda: growing.build(size)).eval(), growing.shape(size)
    generator = torch.Generator().manual_seed(0)
    samples = [(torch.randn(shape, generator=generator),) for _ in range(growing.samples(size))]
    auto, _ = counted(lambda: quantize(model, samples[0], samples, recover="auto"))
    quantizing, quantized = counted(lambda: quantize(model, samples[0], samples, recover=None))
    return {"quantize": quantizing, "auto": auto, "lower": counted(lambda: lower(quantized))[0]}


SHAPED: dict[str, Callable[[torch.Tensor], Any]] = {
    "an output": torch.sigmoid,
    "several outputs": lambda x: (x.sigmoid(), x.mean(-1), x.tanh()),
    "an output without dimensions": lambda x: x.mean(),
    "lists on the CPU": lambda x: [part.sin() for part in torch.split(x.sin(), 2, -1)],
    "two partitions": lambda x: x.sigmoid().sin().tanh(),
}


class TorchCalls(TorchFunctionMode):
    """Counts calls of torch's functions and of tensor methods, including indexing."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", SHAPED)
def test_lowering_does_not_depend_on_shapes(name: str) -> None:
    """ExecuTorch's verifier splits the first tensor of a returned list along its first dimension."""
    few, many = (torch_calls_of_lowering(SHAPED[name], rows) for rows in (2, 4096))
    assert few > 50
    assert many <= few + 50


def torch_calls_of_lowering(function: Callable[[torch.Tensor], Any], rows: int) -> int:
    inputs = (torch.rand(rows, 4),)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = quantize(Function(lambda _, x: function(x), nn.Identity()).eval(), inputs, [inputs], recover=None)
        calls = TorchCalls()
        with calls:
            lower(model)
    return calls.count
