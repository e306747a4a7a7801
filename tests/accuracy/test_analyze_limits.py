"""An analysis does not count differences between values that the reading operators do not distinguish."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.accuracy_models import layer_row
from tests.flow_support import convert, seeded
from torch import Tensor, nn

from openneutron import quantize
from openneutron.accuracy import analyze


def test_values_that_readers_do_not_distinguish_are_not_an_error() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(16, 16), nn.Sigmoid(), nn.Linear(16, 8)))
    with torch.no_grad():
        model.get_parameter("0.weight").mul_(40)
    data = [torch.randn(4, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(6)]
    layer = layer_row(analyze(None, quantize(model, (data[0],), data, recover=None), data), "0")
    assert layer.int8_range == pytest.approx((-6.24, 5.13), abs=0.1)
    assert layer.float_range[1] > 10
    assert layer.saturation == 0
    assert layer.own_sqnr_db > 35


class SumOfLayers(nn.Module):
    """The tanh of the sum of a layer with values up to 40 and of a layer with values up to 2."""

    def __init__(self) -> None:
        super().__init__()
        self.far, self.near = nn.Linear(16, 16), nn.Linear(16, 16)
        with torch.no_grad():
            self.far.weight.mul_(40)

    def forward(self, values: Tensor) -> Tensor:
        bounded: Tensor = (self.far(values) + self.near(values)).tanh()
        return bounded


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("documented", [False, True])
def test_values_beyond_the_limits_of_a_sum_are_not_an_error(documented: bool, saved: bool, tmp_path: Path) -> None:
    model = seeded(SumOfLayers)
    data = [torch.randn(4, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(6)]
    inputs = [(one,) for one in data]
    quantized: Any = quantize(model, inputs[0], data, recover=None)
    if saved:
        quantized.save(tmp_path / "model.pt2")
        quantized = torch.export.load(tmp_path / "model.pt2").module()
    elif documented:
        quantized = convert(model, inputs[0], calibration=inputs)
    analysis = analyze(model if documented or saved else None, quantized, data)
    layer = layer_row(analysis, "far")
    assert layer.float_range[1] > 2 * layer.int8_range[1]
    assert layer.saturation == 0
    assert layer.own_sqnr_db > 30
    assert layer_row(analysis, "near").saturation < 0.01


def test_needed_values_beyond_the_range_of_an_addend_are_an_error() -> None:
    model = seeded(SumOfLayers)
    with torch.no_grad():
        model.get_parameter("far.weight").div_(40)
    data = [torch.randn(4, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(6)]
    quantized = quantize(model, (data[0],), [one * 0.1 for one in data], recover=None)
    layer = layer_row(analyze(None, quantized, data), "far")
    assert layer.saturation > 0.3
    assert layer.own_sqnr_db < 15
