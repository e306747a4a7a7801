"""Removal of dead channels: only channels that are provably zero are removed, and the function does not change."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.flow_support import seeded
from tests.passes.test_passes import after, exported
from torch import nn
from torch.fx import GraphModule

from openneutron import passes
from openneutron.core.constants import constant_of

HUGE = 50.0


class Chain(nn.Module):
    """stem -> activation -> depthwise -> activation -> project, with 6 channels, of which some channels of the stem are
    dead.
    """

    def __init__(self, dead: frozenset[int], activation: Callable[[], nn.Module], bias: float = -0.5) -> None:
        super().__init__()
        self.stem, self.project = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 4, 1)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.first, self.second = activation(), activation()
        with torch.no_grad():
            for channel in dead:
                self.stem.weight[channel] *= 1e-20
                self.stem.bias[channel] = bias  # type: ignore[index]
                self.depthwise.weight[channel] *= HUGE

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(self.stem(x))
        out: torch.Tensor = self.project(self.second(self.depthwise(x)))
        return out


def weights(module: GraphModule) -> list[torch.Tensor]:
    convolutions = [node for node in module.graph.nodes if "conv2d" in str(node.target) and node.op == "call_function"]
    found = [constant_of(module, node.args[1]) for node in convolutions]
    return [weight for weight in found if weight is not None]


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6, nn.Hardtanh], ids=["relu", "relu6", "hardtanh_-1_1"])
@pytest.mark.parametrize("bias", [-0.5, 0.5], ids=["inactive", "constant"])
def test_rule_1_and_2_need_a_zero_activation(activation: Callable[[], nn.Module], bias: float) -> None:
    fires = activation is not nn.Hardtanh and bias < 0
    model = seeded(lambda: Chain(frozenset({1, 4}), activation, bias))
    module = after(passes.remove_dead_channels, model, changes=fires)
    stem, depthwise, _ = weights(module)
    assert [bool(stem[channel].any()) for channel in range(6)] == [not (fires and c in (1, 4)) for c in range(6)]
    assert (float(depthwise.abs().max()) < HUGE / 10) == fires


def test_rule_2_reaches_through_a_pool_and_an_addition() -> None:
    class Model(Chain):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(self.stem(x))
            out: torch.Tensor = self.project(torch.max_pool2d(x, 2) + torch.nn.functional.avg_pool2d(x, 2))
            return out

    module = after(passes.remove_dead_channels, seeded(lambda: Model(frozenset({2}), nn.ReLU)))
    assert not weights(module)[1][:, 2].any()
    assert weights(module)[1][:, 3].any()


def test_rule_2_does_not_fire_for_a_sum_of_values_of_different_rank() -> None:
    """Dimension 1 of the second operand is dimension 2 of the sum."""

    class Model(Chain):
        def __init__(self) -> None:
            super().__init__(frozenset({2}), nn.ReLU)
            self.rows = nn.Conv1d(4, 6, 1)
            with torch.no_grad():
                self.rows.weight[2], self.rows.bias[2] = 0.0, -1.0  # type: ignore[index]

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            x = self.first(self.stem(x))
            out: torch.Tensor = self.project(x + self.first(self.rows(y)))
            return out

    module = after(passes.remove_dead_channels, seeded(Model), torch.randn(1, 4, 6, 6), torch.randn(6, 4, 6))
    assert weights(module)[1][:, 2].any()


@pytest.mark.parametrize(
    "keeps",
    [
        lambda x: torch.nn.functional.interpolate(x, scale_factor=2.0),
        lambda x: torch.nn.functional.interpolate(x, scale_factor=2.0, mode="bilinear"),
    ],
)
def test_rule_2_reaches_through_operators_that_stay_within_the_range(
    keeps: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    class Model(Chain):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.project(keeps(self.first(self.stem(x))))
            return out

    found = weights(after(passes.remove_dead_channels, seeded(lambda: Model(frozenset({2}), nn.ReLU))))[1]
    assert not found[:, 2].any()
    assert found[:, 3].any()


def test_pools_without_a_batch_pool_over_dimension_1() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)
            with torch.no_grad():
                self.first.weight[2], self.first.bias[2] = 0.0, -1.0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.second(torch.max_pool1d(torch.relu(self.first(x)), 3, 1, 1))
            return found

    after(passes.remove_dead_channels, seeded(Model), torch.randn(2, 4))


def test_shared_weights_stay() -> None:
    class Model(Chain):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(self.stem(x))
            out: torch.Tensor = self.depthwise(self.depthwise(x))
            return out

    model = seeded(lambda: Model(frozenset({2}), nn.ReLU))
    module = exported(model)
    passes.remove_dead_channels(module)
    assert weights(module)[1][2].any()


def test_a_weight_of_a_channel_that_may_be_active_stays() -> None:
    model = seeded(lambda: Chain(frozenset(), nn.ReLU6))
    with torch.no_grad():
        model.get_parameter("stem.bias").fill_(-100.0)  # zero for images, but not for inputs of 1e6
    after(passes.remove_dead_channels, model, changes=False)


@settings(max_examples=15, deadline=None)
@given(
    dead=st.frozensets(st.integers(0, 5), min_size=1),  # not empty, because random weights may make a channel zero
    seed=st.integers(0, 1000),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
)
def test_removal_does_not_change_results(dead: frozenset[int], seed: int, scale: float) -> None:
    model = seeded(lambda: Chain(dead, nn.ReLU6), seed)
    image = scale * torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    after(passes.remove_dead_channels, model, image, changes=True)
