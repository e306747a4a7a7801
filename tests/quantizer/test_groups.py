"""Group convolutions: the number of groups in a CONV_2D minimizes the cost, and each number gives equal results."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
from tests.graphs import kinds, partition_graphs
from tests.oracle import agreement, everything_on_the_npu, lowered, quantized
from torch import nn

from openneutron import QuantizedModel
from openneutron.ir.cost import cycles_of
from openneutron.ops import convolution
from openneutron.targets import TARGETS


@dataclass(frozen=True)
class Groups:
    """A group convolution. `network` names the network that has this shape."""

    network: str
    channels: int
    outputs: int
    groups: int
    kernel: int
    size: int
    stride: int = 1

    def quantized(self, **options: Any) -> QuantizedModel:
        layer = nn.Conv2d(
            self.channels, self.outputs, self.kernel, self.stride, self.kernel // 2, groups=self.groups, bias=False
        )
        return quantized(layer, ((1, self.channels, self.size, self.size),), **options)


GROUPS = (
    Groups("RegNetX-200MF", 24, 24, 3, 3, 56, 2),
    Groups("RegNetX-200MF", 368, 368, 46, 3, 7),
    Groups("RegNetX-1.6GF", 168, 168, 7, 3, 28),
    Groups("RegNetX-400MF", 160, 160, 10, 3, 28),
    Groups("ResNeXt-50 32x4d", 128, 128, 32, 3, 56),
    Groups("ResNeXt-50 32x4d", 1024, 1024, 32, 3, 7),
    Groups("ShuffleNet 1x g3", 240, 60, 3, 1, 28),
    Groups("ShuffleNet 1x g8", 384, 96, 8, 1, 28),
)


def forced(monkeypatch: pytest.MonkeyPatch, merged: int) -> None:
    """Forces `merged` groups into each convolution."""
    monkeypatch.setattr(convolution, "_possible_merges", lambda *_: [merged])


def divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


@pytest.mark.parametrize("target", ["imxrt700", "mcxn94x", "imx95"])
@pytest.mark.parametrize("groups", GROUPS, ids=str)
def test_choice_costs_least(groups: Groups, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = groups.quantized(target=target)
    (chosen,) = partition_graphs(model)
    costs = {}
    for merged in divisors(groups.groups):
        with monkeypatch.context() as patched:
            forced(patched, merged)
            (graph,) = partition_graphs(model)
        assert kinds(graph).count("CONV_2D") == groups.groups // merged
        costs[merged] = cycles_of(graph.ops, TARGETS[target])
    assert cycles_of(chosen.ops, TARGETS[target]) == min(costs.values()), costs


@pytest.mark.parametrize(
    ("groups", "target", "convolutions"),
    [
        # few positions: the start of operators dominates
        (Groups("small", 16, 16, 2, 3, 4), "imxrt700", 1),
        # many positions: products with zeros dominate
        (Groups("large", 16, 16, 2, 3, 64), "imxrt700", 2),
        # groups of 4 channels fill half of a pipeline with 8 MACs, and all of a pipeline with 4
        (Groups("ResNeXt", 128, 128, 32, 3, 56), "imxrt700", 16),
        (Groups("ResNeXt", 128, 128, 32, 3, 56), "mcxn94x", 32),
        # an array of 1024 MACs has capacity for the zeros
        (Groups("ResNeXt", 128, 128, 32, 3, 56), "imx95", 2),
    ],
)
def test_both_sides_of_the_boundary(groups: Groups, target: str, convolutions: int) -> None:
    (graph,) = partition_graphs(groups.quantized(target=target))
    counts = Counter(kinds(graph))
    assert counts["CONV_2D"] == convolutions
    assert counts["SLICE"] == (convolutions if convolutions > 1 else 0)
    assert counts["CONCATENATION"] == (convolutions > 1)


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("merged", divisors(6))
def test_every_number_of_merged_groups_follows_the_converted_module(
    merged: int, rank: int, granularity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = (nn.Conv1d if rank == 1 else nn.Conv2d)(18, 12, 3, stride=2, padding=1, groups=6)
    model = quantized(nn.Sequential(layer, nn.ReLU()), ((2, 18, 9, 8)[: rank + 2],), weight_granularity=granularity)
    forced(monkeypatch, merged)
    program = lowered(model)
    assert everything_on_the_npu(program)
    assert agreement(program, model).worst <= 1


def test_no_choice_breaks_the_limit_on_weights() -> None:
    # 3 x 3 x 4096 weights of an output fit, 3 x 3 x 8192 do not, although one convolution would cost less
    model = quantized(nn.Conv2d(8192, 2, 3, groups=2), ((1, 8192, 3, 3),))
    (graph,) = partition_graphs(model)
    assert kinds(graph).count("CONV_2D") == 2


def test_legacy_choices_slice_and_concatenate_aligned_channels() -> None:
    legacy = {"neutron_converter_flavor": "SDK_25_06"}
    for groups, convolutions in ((Groups("whole", 32, 32, 2, 3, 32), 2), (Groups("not", 24, 24, 2, 3, 32), 1)):
        (graph,) = partition_graphs(groups.quantized(), **legacy)
        assert kinds(graph).count("CONV_2D") == convolutions
