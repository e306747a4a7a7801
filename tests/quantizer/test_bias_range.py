"""Biases fit int32, however small the inputs and weights of their layers are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.flow_support import convert, seeded
from torch import nn
from torchao.quantization.pt2e import HistogramObserver

from openneutron import QuantizedModel, lower, quantize
from openneutron.quantizer import VanishingValuesWarning
from openneutron.quantizer.qspecs import LARGEST_BIAS_CODE, least_scale_of_input

Layer = Callable[[], Any]
LAYERS: dict[str, tuple[Layer, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(16, 16), (1, 16)),
    "rows": (lambda: nn.Linear(8, 4), (1, 3, 8)),
    "convolution": (lambda: nn.Conv2d(3, 4, 3), (1, 3, 6, 6)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), (1, 4, 6, 6)),
    "of a sequence": (lambda: nn.Conv1d(4, 4, 3), (1, 4, 8)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 4, 2, stride=2), (1, 3, 4, 4)),
    "volume": (lambda: nn.Conv3d(2, 4, 2), (1, 2, 3, 4, 4)),
    "no batch": (lambda: nn.Conv1d(4, 4, 3), (4, 8)),
}


def quantized(layer: nn.Module, inputs: list[torch.Tensor], flow: str) -> QuantizedModel:
    if flow == "documented":
        return QuantizedModel(
            convert(layer, (inputs[0],), calibration=[(x,) for x in inputs]), (inputs[0],), "imxrt700"
        )
    if flow == "per channel":
        return quantize(layer, inputs[0], inputs, recover=None, weight_granularity="per_channel")
    if flow.endswith("bits"):
        return quantize(layer, inputs[0], inputs, recover=None, weight_bits=int(flow[0]))
    if flow == "histogram":
        return quantize(layer, inputs[0], inputs, recover=None, observer=HistogramObserver)
    return quantize(layer, inputs[0], inputs, recover=None if flow == "none" else "auto")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "flow"),
    [
        *((name, "none") for name in LAYERS),
        *(("linear", flow) for flow in ("auto", "documented", "per channel", "histogram", "2 bits", "3 bits")),
    ],
)
@pytest.mark.parametrize(("weights", "inputs"), [(1e-5, 1e-4), (1e-2, 1e-5), (0.0, 1e-3)])
def test_a_bias_that_is_nearly_all_of_the_output_is_kept(name: str, weights: float, inputs: float, flow: str) -> None:
    make, shape = LAYERS[name]
    layer: Any = seeded(make)
    with torch.no_grad():
        layer.weight.normal_(generator=torch.Generator().manual_seed(0)).mul_(weights)
        layer.bias.fill_(0.3)
    samples = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * inputs for seed in range(4)]
    model = quantized(layer, samples, flow)
    wanted = layer(samples[1])
    for found in (model(samples[1]), lower(model).run(samples[1])):
        torch.testing.assert_close(found, wanted, rtol=0.01, atol=0)


def test_usual_layers_get_the_scale_that_their_inputs_have() -> None:
    layer: Any = seeded(lambda: nn.Linear(8, 4))
    assert least_scale_of_input(layer.weight, layer.bias, None) < 1e-6


@pytest.mark.parametrize("axis", [None, 0])
def test_the_largest_bias_gets_the_largest_code_of_a_bias(axis: int | None) -> None:
    weight, bias = torch.tensor([[1e-3, 2e-3], [0.0, 0.0]]), torch.tensor([-3.0, 0.5])
    scale = least_scale_of_input(weight, bias, axis)
    scales = {None: [2e-3 / 127] * 2, 0: [2e-3 / 127, 2.0**-14]}[axis]
    codes = [abs(float(value)) / (scale * of_weight) for value, of_weight in zip(bias, scales, strict=True)]
    assert max(codes) == pytest.approx(LARGEST_BIAS_CODE)


def test_values_below_the_least_scale_of_a_bias_cause_a_warning() -> None:
    layer: Any = seeded(lambda: nn.Linear(8, 4))
    with torch.no_grad():
        layer.weight.mul_(1e-4)
    inputs = [torch.full((1, 8), 1e-4) for _ in range(4)]
    with pytest.warns(VanishingValuesWarning, match="int8 codes are within 2 of the zero point"):
        quantize(layer, inputs[0], inputs, recover=None)
