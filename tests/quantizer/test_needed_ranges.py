"""Ranges of values whose readers saturate: where they end, in both flows, and when they have no limit."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.flow_support import Inputs, convert, seeded
from tests.oracle import Function
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e import HistogramObserver, MovingAverageMinMaxObserver
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e

from openneutron import NeutronQuantizer, quantize
from openneutron.errors import CalibrationError
from openneutron.quantizer import RangeObserver

SIGMOID = (-math.log(511), math.log(254.5 / 1.5))
TANH = (-math.atanh(127.5 / 128), math.atanh(126.5 / 128))
UP = math.inf


@dataclass(frozen=True)
class Case:
    """A function of a sum with values from -40 to 40, and the interval of the sum that it needs."""

    function: Callable[[Tensor], Any]
    low: float = -UP
    high: float = UP
    slope: float = 1.0
    """The largest derivative of the function."""


LIMITED = {
    "sigmoid": Case(torch.sigmoid, *SIGMOID),
    "tanh": Case(torch.tanh, *TANH),
    "hardtanh": Case(lambda x: F.hardtanh(x, -2.0, 3.0), -2.0, 3.0),
    "clamp above": Case(lambda x: x.clamp(max=2.0), high=2.0),
    "hardswish": Case(F.hardswish, -3.0, slope=1.5),
    "silu": Case(F.silu, SIGMOID[0], slope=1.1),
    "gelu": Case(F.gelu, SIGMOID[0] / 1.702, slope=1.2),
    "softplus": Case(F.softplus, -SIGMOID[1]),
    "hardswish by hand": Case(lambda x: x * F.relu6(x + 3) / 6, -3.0, slope=1.5),
    "sigmoid of a multiple": Case(lambda x: torch.sigmoid(-2.0 * x), -SIGMOID[1] / 2, -SIGMOID[0] / 2, 0.5),
    "sigmoid of a shifted value": Case(lambda x: torch.sigmoid(x - 4.0), SIGMOID[0] + 4, SIGMOID[1] + 4),
    "gates of a cell": Case(lambda x: torch.cat([x[:, :4].sigmoid(), x[:, 4:].tanh()], 1), *SIGMOID),
    "moves": Case(lambda x: x.reshape(4, 2, 4).transpose(1, 2).flatten(1).sigmoid(), *SIGMOID),
    "maximum": Case(lambda x: torch.sigmoid(F.max_pool1d(x, 2)), *SIGMOID),
    "sigmoid after a hardtanh": Case(lambda x: F.hardtanh(x, -1.0, 4.0).sigmoid(), -1.0, 4.0),
    "two readers": Case(lambda x: (x.tanh(), x.clamp(min=-1.0)), TANH[0], UP),
}
UNLIMITED = {
    "an output": lambda x: (x.sigmoid(), x),
    "a second reader": lambda x: x.sigmoid() + x,
    "a reader of a view": lambda x: (x.sigmoid(), x.reshape(-1) * 2.0),
    "an output that is a view": lambda x: (x.sigmoid(), x.reshape(-1)),
    "a gate that opens downwards": lambda x: x * torch.sigmoid(-x),
    "a gate of another value": lambda x: x * torch.sigmoid(x.roll(1, 0)),
    "a gate through a clamp": lambda x: x * torch.sigmoid(F.relu6(x) - 3.0),
    "a gate with an offset": lambda x: x * (torch.sigmoid(x) + 0.5),
    "a mean": lambda x: torch.sigmoid(x.mean(1)),
    "a reader in float": lambda x: (x.sigmoid(), torch.cumsum(x, 1)),
}
FLOWS: dict[str, Callable[[nn.Module, list[Inputs]], GraphModule]] = {
    "documented": lambda model, samples: convert(model, samples[0], calibration=samples),
    "quantize": lambda model, samples: quantize(model, samples[0], samples, recover=None, progress=False).module,
    "auto": lambda model, samples: quantize(model, samples[0], samples, recover="auto", progress=False).module,
}


def samples_of(count: int = 8) -> list[Inputs]:
    generator = torch.Generator().manual_seed(0)
    return [tuple((torch.rand(4, 8, generator=generator) - 0.5) * 40 for _ in range(2)) for _ in range(count)]


def model_of_sum(function: Callable[[Tensor], Any]) -> nn.Module:
    return Function(lambda x, y: function(x + y)).eval()


def range_of_sum(model: GraphModule) -> tuple[float, float]:
    """Returns the range of the sum of the model's two inputs."""
    total = next(node for node in model.graph.nodes if "aten.add" in str(node.target))
    _, scale, zero_point, low, high, *_ = next(iter(next(iter(total.users)).users)).args
    return (low - zero_point) * scale, (high - zero_point) * scale


def outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    found = model(*inputs)
    return list(found) if isinstance(found, (tuple, list)) else [found]


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("name", LIMITED)
def test_ranges_end_at_values_that_do_not_change_outputs(name: str, flow: str) -> None:
    case, samples = LIMITED[name], samples_of()
    converted = FLOWS[flow](model_of_sum(case.function), samples)
    low, high = range_of_sum(converted)
    seen = torch.stack([x + y for x, y in samples])
    widest = max(float(seen.min()), case.low), min(float(seen.max()), case.high)
    step = (high - low) / 255
    assert widest[0] - 2 * step <= low
    assert high <= widest[1] + 2 * step
    for limit, end in ((case.low, low), (case.high, high)):
        assert math.isinf(limit) or abs(limit) <= abs(end) + step or abs(end - limit) <= step


@pytest.mark.parametrize("name", LIMITED)
def test_outputs_differ_by_rounding_only(name: str) -> None:
    case, samples = LIMITED[name], samples_of()
    model = model_of_sum(case.function)
    converted = convert(model, samples[0], quantizer=NeutronQuantizer(observer=RangeObserver), calibration=samples)
    low, high = range_of_sum(converted)
    for sample in samples:
        for wanted, found in zip(outputs(model, sample), outputs(converted, sample), strict=True):
            outermost = float(wanted.max() - wanted.min())
            steps_before = 0.5 * case.slope * (40 / 255 + (high - low) / 255)
            assert float((wanted - found).abs().max()) <= steps_before + 4 * outermost / 255


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("name", UNLIMITED)
def test_other_values_have_no_limit(name: str, flow: str) -> None:
    samples = samples_of()
    low, high = range_of_sum(FLOWS[flow](model_of_sum(UNLIMITED[name]), samples))
    seen = torch.stack([x + y for x, y in samples])
    assert low < 0.7 * float(seen.min())
    assert high > 0.7 * float(seen.max())


class Delay(nn.Module):
    """Keeps the sum of its inputs as a state. Only saturating functions read the sum and the state."""

    last: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.zeros(4, 8))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        total, last = x + y, self.last.tanh()
        self.last.copy_(total)
        return total.sigmoid() + last


@pytest.mark.parametrize("flow", ["documented", "quantize"])
def test_states_have_no_limit(flow: str) -> None:
    samples = samples_of()
    low, high = range_of_sum(FLOWS[flow](Delay().eval(), samples))
    assert (low, high) == pytest.approx((-40, 40), rel=0.3)


@pytest.mark.parametrize("observer", [HistogramObserver, MovingAverageMinMaxObserver, RangeObserver])
def test_any_observer_has_the_limit(observer: Any) -> None:
    samples = samples_of()
    quantizer = NeutronQuantizer(observer=observer)
    low, high = range_of_sum(convert(model_of_sum(torch.sigmoid), samples[0], quantizer=quantizer, calibration=samples))
    assert (low, high) == pytest.approx(SIGMOID, abs=0.1)


def test_training_has_the_limit() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 4)))
    samples = [(x,) for x, _ in samples_of()]
    exported = torch.export.export(model.train(), samples[0]).module()
    prepared = prepare_qat_pt2e(exported, NeutronQuantizer(is_qat=True))
    for sample in samples:
        prepared(*sample)
    found = convert_pt2e(prepared)
    linear = next(node for node in found.graph.nodes if "aten.linear" in str(node.target))
    _, scale, zero_point, low, high, *_ = next(iter(next(iter(linear.users)).users)).args
    assert ((low - zero_point) * scale, (high - zero_point) * scale) == pytest.approx(SIGMOID, abs=0.1)


def test_training_may_change_parameters() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.slope = nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.sigmoid((x + y) * self.slope)

    samples = samples_of()
    exported = torch.export.export(Scaled().train(), samples[0]).module()
    prepared = prepare_qat_pt2e(exported, NeutronQuantizer(is_qat=True))
    for sample in samples:
        prepared(*sample)
    low, high = range_of_sum(convert_pt2e(prepared))
    assert low < -30
    assert high > 30


SCORES: dict[str, tuple[Callable[[Tensor], Any], bool]] = {
    "softmax": (lambda x: x.softmax(-1), True),
    "softmax of a view": (lambda x: x.reshape(2, 2, 8).softmax(-1), True),
    "softmax of a multiple": (lambda x: (x * 0.8).softmax(-1), True),
    "softmax of a negative multiple": (lambda x: (x * -2.0).softmax(-1), False),
    "softmax over another dimension": (lambda x: x.softmax(0), False),
    "softmax of a part": (lambda x: (x[:2].softmax(-1), x[2:]), False),
    "softmax and another reader": (lambda x: (x.softmax(-1), x * 2.0), False),
}


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("name", SCORES)
def test_scores_end_at_values_that_do_not_change_probabilities(name: str, flow: str) -> None:
    function, is_limited = SCORES[name]
    samples = samples_of()
    low, high = range_of_sum(FLOWS[flow](model_of_sum(function), samples))
    seen = torch.stack([x + y for x, y in samples])
    distance = (math.log(8) + math.log(512)) / (0.8 if name == "softmax of a multiple" else 1)
    limit = float((seen.amax(-1) - distance).min())
    assert high > 0.7 * float(seen.max())
    if is_limited:
        assert limit - 0.3 <= low <= 0.8 * limit
    else:
        assert low < min(0.7 * float(seen.min()), limit)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.floats(-40, 40, width=32), min_size=2, max_size=40))
def test_clamping_scores_changes_no_probability_by_half_a_step(scores: list[float]) -> None:
    row = torch.tensor(scores, dtype=torch.float64)
    clamped = row.clamp(min=float(row.max()) - math.log(len(scores)) - math.log(512))
    assert float((row.softmax(0) - clamped.softmax(0)).abs().max()) < 1 / 512


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_values_that_are_not_finite_are_reported(value: float) -> None:
    samples = [*samples_of(2), (torch.full((4, 8), value), torch.zeros(4, 8))]
    with pytest.raises(CalibrationError, match="NaN or infinite"):
        convert(model_of_sum(torch.sigmoid), samples[0], calibration=samples)


def test_finer_range_gains_accuracy() -> None:
    samples = samples_of()
    model = model_of_sum(torch.sigmoid)
    converted = convert(model, samples[0], calibration=samples)
    wanted, found = (torch.cat([run(*sample) for sample in samples]) for run in (model, converted))
    # A step of 11.4 / 255 in the input, times the slope of at most 1/4, and half a step of 1/256 in the output.
    assert float((wanted - found).abs().max()) <= 0.25 * (80 / 255 + 11.6 / 255) / 2 + 1.5 / 256
