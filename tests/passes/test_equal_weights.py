"""share_equal_weights: layers of a loop whose weights were folded share them, and other layers do not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.flow_support import seeded
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.functional import linear

from openneutron.core.fx import arguments
from openneutron.ops.declared import layer_kind
from openneutron.passes.fold_arithmetic import fold_arithmetic
from openneutron.passes.fold_batch_norm import fold_batch_norm
from openneutron.passes.fold_constants import fold_constants
from openneutron.passes.fold_norm_affine import fold_norm_affine
from openneutron.passes.share_equal_weights import share_equal_weights

STEPS, WIDTH = 4, 8


class Loop(nn.Module):
    """Calls `step` with a value, a linear and its number `STEPS` times."""

    def __init__(self, step: Callable[[Loop, Tensor, int], Tensor]) -> None:
        super().__init__()
        self.layer, self.step = nn.Linear(WIDTH, WIDTH), step
        self.other = nn.Linear(WIDTH, WIDTH)
        self.other.load_state_dict(self.layer.state_dict())
        self.norm, self.batch_norm = nn.LayerNorm(WIDTH), nn.BatchNorm1d(WIDTH)
        self.doubled = nn.Parameter(self.layer.weight.detach() * 2)
        self.copied = nn.Parameter(self.layer.weight.detach().clone())
        self.zeros, self.zeros_too = (nn.Parameter(torch.zeros(WIDTH)) for _ in range(2))
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH))
        for parameter in (*self.norm.parameters(), *self.batch_norm.parameters()):
            nn.init.uniform_(parameter, 0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        for number in range(STEPS):
            x = torch.tanh(self.step(self, x, number))
        return x


class Head(nn.Module):
    """Applies one layer and one batch norm to parts of the input, which do not depend on each other."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.batch_norm = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.batch_norm(self.layer(x * (1 + number))) for number in range(STEPS)])


def folded(make: Callable[[], nn.Module]) -> GraphModule:
    module = torch.export.export(seeded(make).eval(), (torch.randn(2, WIDTH),)).module()
    assert isinstance(module, GraphModule)
    fold_constants(module)
    fold_norm_affine(module)
    fold_batch_norm(module)
    fold_arithmetic(module)
    return module


def constants(module: GraphModule, role: str) -> set[str]:
    return {str(arguments(node)[role].target) for node in module.graph.nodes if layer_kind(node) is not None}


SHARED: dict[str, Callable[[Loop, Tensor, int], Tensor]] = {
    "norm before the layer": lambda loop, x, _: loop.layer(loop.norm(x)),
    "batch norm after the layer": lambda loop, x, _: loop.batch_norm(loop.layer(x)),
    "product after the layer": lambda loop, x, _: loop.layer(x) * loop.scale,
    "sum after the layer": lambda loop, x, _: loop.layer(x) + loop.scale,
}
# With the numbers of different weights and biases.
DIFFERENT: dict[str, tuple[Callable[[Loop, Tensor, int], Tensor], int, int]] = {
    "a product for each step": (lambda loop, x, number: loop.layer(x) * (loop.scale * (1 + number)), STEPS, STEPS),
    "a sum for each step": (lambda loop, x, number: loop.layer(x) + loop.scale * (1 + number), 1, STEPS),
    "a sum in one step": (lambda loop, x, n: loop.layer(x) + loop.scale if n == 2 else loop.layer(x), 1, 2),
    "two modules with equal weights": (lambda loop, x, n: (loop.other if n % 2 else loop.layer)(x), 2, 2),
    "two parameters with equal values": (
        lambda loop, x, n: linear(x, loop.layer.weight if n % 2 else loop.copied, loop.zeros),
        2,
        1,
    ),
    "two biases with equal values": (
        lambda loop, x, n: (
            loop.layer(loop.norm(x)) if n > 1 else linear(x, loop.layer.weight, loop.zeros if n else loop.zeros_too)
        ),
        2,
        3,
    ),
    "equal biases of different weights": (
        lambda loop, x, n: linear(
            x, loop.layer.weight if n % 2 else loop.doubled, loop.zeros if n % 2 else loop.zeros_too
        ),
        2,
        2,
    ),
}


@pytest.mark.parametrize("name", SHARED)
def test_steps_with_folded_constants_share_them(name: str) -> None:
    module, x = folded(lambda: Loop(SHARED[name])), torch.randn(2, WIDTH)
    before = module(x)
    assert len(constants(module, "bias")) == STEPS
    assert share_equal_weights(module)
    assert len(constants(module, "weight")) == len(constants(module, "bias")) == 1
    torch.testing.assert_close(module(x), before)
    assert not share_equal_weights(module)


@pytest.mark.parametrize("name", DIFFERENT)
def test_other_constants_are_not_shared(name: str) -> None:
    step, weights, biases = DIFFERENT[name]
    module, x = folded(lambda: Loop(step)), torch.randn(2, WIDTH)
    before = module(x)
    share_equal_weights(module)
    assert (len(constants(module, "weight")), len(constants(module, "bias"))) == (weights, biases)
    torch.testing.assert_close(module(x), before)


def test_layers_that_do_not_depend_on_each_other_keep_their_weights() -> None:
    module = folded(Head)
    assert not share_equal_weights(module)
    assert len(constants(module, "weight")) == len(constants(module, "bias")) == STEPS
