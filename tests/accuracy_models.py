"""A network for the tests of the accuracy analysis, with its data, and forms of it that quantize badly."""

from __future__ import annotations

import copy
from typing import Any

import torch
from tests.flow_support import seeded
from torch import Tensor, nn

from openneutron import QuantizedModel, quantize
from openneutron.accuracy import Analysis, LayerAccuracy

SHAPE = (1, 8, 12, 12)
# Layers without recovery, so that a sabotaged layer remains sabotaged.
PLAIN: dict[str, Any] = {"equalize": False, "correct_bias": False}


class Net(nn.Module):
    """Four layers with weights, and two operators that only move values."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(8, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.third = nn.Conv2d(16, 16, 3)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = nn.functional.max_pool2d(nn.functional.relu6(self.second(x)), 2)
        x = torch.relu(self.third(x)).mean((2, 3))
        logits: Tensor = self.head(x)
        return logits


def net(seed: int = 0) -> Net:
    """Returns the network with weights large enough for the outputs to depend on the inputs."""
    model = seeded(Net, seed)
    assert isinstance(model, Net)
    with torch.no_grad():
        for layer in (model.first, model.second, model.third):
            layer.weight *= 2
            layer.bias.zero_()  # type: ignore[union-attr]
    return model


def images(count: int, seed: int = 1, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=generator) * scale for _ in range(count)]


def sabotaged() -> Net:
    """Makes the weights of one channel of `second` 100 times as large as the others. The relu6 after it limits its
    range.
    """
    model = net()
    with torch.no_grad():
        model.second.weight[3] *= 100
        model.third.weight[:, 3] *= 0.05
    return model


def quantized(model: nn.Module, **options: Any) -> QuantizedModel:
    """Quantizes as in the documented flow, one sample at a time, because observers sample other values from a batch."""
    return quantize(model, (images(1)[0],), images(8), batch_size=1, recover=None, **{**PLAIN, **options})


def altered(model: QuantizedModel, name: str) -> QuantizedModel:
    """Returns the model with other weights of the first output channel of layer `name`, whose inputs are positive."""
    other = copy.deepcopy(model)
    (layer,) = (node for node in other.module.graph.nodes if node.name == name)
    constant = other.module.get_buffer(layer.args[1].args[0].target)
    constant[0] = 60
    return other


def layer_row(analysis: Analysis, module: str) -> LayerAccuracy:
    (found,) = (layer for layer in analysis.layers if layer.module == module and layer.weight_range is not None)
    return found
