"""Programs with values of many dimensions, or of none, are loaded and run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tests.oracle import Function, agreement, lowered, quantized
from torch import Tensor, nn

MODELS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "mean of a mean": (lambda x: F.relu(x).mean().mean(), 3),
    "amax of a mean": (lambda x: F.relu(x).mean().amax(), 3),
    "sum of a sum": (lambda x: F.relu(x).sum().sum(), 2),
    "pad": (lambda x: F.pad(F.relu(x), (1, 1)), 6),
    "slice": (lambda x: F.relu(x)[..., 1:2], 7),
    "product by a number": (lambda x: F.relu(x) * 0.5, 9),
    "broadcast sum": (lambda x: x + torch.ones(1, 2, 1, 2, 1, 2, 1, 2), 8),
    "broadcast sum on the CPU": (lambda x: x + torch.ones(1, 2, 1, 2, 1, 2, 1, 2, 1), 9),
    "slopes": (lambda x: F.prelu(x, torch.tensor([0.1, 0.3])), 5),
}


@pytest.mark.parametrize("name", MODELS)
def test_values_of_many_dimensions_run(name: str) -> None:
    function, rank = MODELS[name]
    model: nn.Module = Function(function)
    converted = quantized(model, ((2,) * rank,))
    assert agreement(lowered(converted), converted).worst <= 1
