"""Ranges of operands of sums whose readers saturate: where they end, in both flows, and when they have no limit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tests.flow_support import Inputs, convert
from tests.oracle import Function
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e import HistogramObserver, MovingAverageMinMaxObserver
from torchao.quantization.pt2e.observer import UniformQuantizationObserverBase
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from openneutron import NeutronQuantizer, quantize
from openneutron.calibration import CalibrationOptions, calibrate
from openneutron.ops.intervals import AddendNeeds, Interval
from openneutron.quantizer import RangeObserver

FAR, NEAR = 40.0, 2.0
TANH, SIGMOID = 3.12, 6.24  # the larger ends of the intervals that tanh and sigmoid need


def samples_of(count: int = 8, scale: float = 1.0) -> list[Inputs]:
    """Inputs far from zero, whose doubles reach `FAR`, and inputs near zero."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(2, count, 4, 8, generator=generator) * 2 - 1
    return [(FAR / 2 * scale * far, NEAR * scale * near) for far, near in zip(*noise, strict=True)]


# Functions of a value up to 40 and a value up to 2, and the largest magnitude of the first one that changes a result.
LIMITED: dict[str, tuple[Callable[[Tensor, Tensor], Any], float]] = {
    "tanh": (lambda x, y: (x + y).tanh(), TANH + NEAR),
    "sigmoid": (lambda x, y: (x + y).sigmoid(), SIGMOID + NEAR),
    "relu6": (lambda x, y: F.relu6(x + y), 6 + NEAR),
    "hardtanh": (lambda x, y: F.hardtanh(x + y), 1 + NEAR),
    "second operand": (lambda x, y: (y + x).tanh(), TANH + NEAR),
    "difference": (lambda x, y: (x - y).tanh(), TANH + NEAR),
    "subtracted": (lambda x, y: (y - x).tanh(), TANH + NEAR),
    "alpha": (lambda x, y: torch.add(y, x, alpha=2.0).tanh(), (TANH + NEAR) / 2),
    "sums of slices": (lambda x, y: (x[:2] + y[:2]).tanh() + (x[2:] + y[2:]).sigmoid(), SIGMOID + NEAR),
    "another reader that saturates": (lambda x, y: ((x + y).tanh(), x.sigmoid()), SIGMOID),
    "fixed range": (lambda x, y: (x + y.sigmoid()).tanh(), TANH + 1),
}
UNLIMITED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "sum that is an output": lambda x, y: ((x + y).tanh(), x + y),
    "reader that does not saturate": lambda x, y: (x + y).tanh() + x,
    "one end": lambda x, y: F.relu(x + y),
    "a sum of sums": lambda x, y: ((x + y) + y).tanh(),
    "an operand of two sums": lambda x, y: (x + y).tanh() + (x - y) * y,
}
FLOWS: dict[str, Callable[[nn.Module, list[Inputs]], GraphModule]] = {
    "documented": lambda model, samples: convert(model, samples[0], calibration=samples),
    "quantize": lambda model, samples: quantize(model, samples[0], samples, recover=None, progress=False).module,
    "auto": lambda model, samples: quantize(model, samples[0], samples, progress=False).module,
}


def model_of_doubled(function: Callable[[Tensor, Tensor], Any]) -> nn.Module:
    """Returns a model that applies `function` to its doubled first input and its second input."""
    return Function(lambda x, y: function(x * 2.0, y)).eval()


def range_of_doubled(model: GraphModule) -> tuple[float, float]:
    """Returns the range of the doubled first input."""
    doubled = next(node for node in model.graph.nodes if "aten.mul" in str(node.target))
    quantize_node = next(user for user in doubled.users if "quantize_per_tensor" in str(user.target))
    _, scale, zero_point, low, high, *_ = quantize_node.args
    return (low - zero_point) * scale, (high - zero_point) * scale


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("name", LIMITED)
def test_ranges_end_at_the_saturation_of_the_sum(name: str, flow: str) -> None:
    function, limit = LIMITED[name]
    samples = samples_of()
    low, high = range_of_doubled(FLOWS[flow](model_of_doubled(function), samples))
    step = (high - low) / 255
    assert max(-low, high) <= limit * 1.03 + 2 * step
    assert max(-low, high) >= 0.5 * limit


FACTORS = st.sampled_from([-2.0, -1.0, 0.5, 1.0, 3.0])
NUMBERS = st.floats(-50, 50)
PAIRS = st.tuples(NUMBERS, NUMBERS)


@given(st.tuples(FACTORS, FACTORS), NUMBERS, st.floats(0, 1), PAIRS, PAIRS)
def test_clamping_an_addend_changes_no_clamped_sum(
    factors: tuple[float, float], value: float, share: float, ends: tuple[float, float], others: tuple[float, float]
) -> None:
    factor, other_factor = factors
    output, range_of_other = Interval(*sorted(ends)), Interval(*sorted(others))
    other = range_of_other.low + share * (range_of_other.high - range_of_other.low)
    needed = AddendNeeds(factor, other_factor, output).beside(range_of_other)

    def clamped(number: float, interval: Interval) -> float:
        return min(max(number, interval.low), interval.high)

    whole = clamped(factor * value + other_factor * other, output)
    assert clamped(factor * clamped(value, needed) + other_factor * other, output) == pytest.approx(whole, abs=1e-9)


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("name", UNLIMITED)
def test_other_operands_have_no_limit(name: str, flow: str) -> None:
    low, high = range_of_doubled(FLOWS[flow](model_of_doubled(UNLIMITED[name]), samples_of()))
    assert min(-low, high) > 0.7 * FAR


class OwnObserver(UniformQuantizationObserverBase):  # type: ignore[misc]
    """A user's observer, which does not have the attributes of torchao's observers (`min_val`, `max_val`)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.largest: list[float] = []

    def forward(self, values: Tensor) -> Tensor:
        self.largest.append(float(values.abs().max()))
        return values

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        bound = torch.tensor(max(self.largest))
        scale, zero_point = self._calculate_qparams(-bound, bound)
        return scale, zero_point


@pytest.mark.parametrize("observer", [HistogramObserver, MovingAverageMinMaxObserver, RangeObserver, OwnObserver])
def test_any_observer_has_the_limit(observer: Any) -> None:
    samples, quantizer = samples_of(), NeutronQuantizer(observer=observer)
    model = model_of_doubled(lambda x, y: (x + y).tanh())
    low, high = range_of_doubled(convert(model, samples[0], quantizer=quantizer, calibration=samples))
    assert max(-low, high) == pytest.approx(TANH + NEAR, rel=0.2)


# Values that a wrapper of the observer limits or joins.
WRAPPED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "needed range": lambda x, y: x.sigmoid() * y,
    "parts of an output": lambda x, y: torch.cat([x * 2, y * 3]),
    "mask": lambda x, y: x.masked_fill(y > 0, -torch.inf).softmax(-1),
    "scores": lambda x, y: (x * y).softmax(-1),
}


@pytest.mark.parametrize("flow", ["documented", "quantize"])
@pytest.mark.parametrize("name", WRAPPED)
def test_a_wrapped_observer_needs_no_attributes(name: str, flow: str) -> None:
    samples, model = samples_of(), model_of_doubled(WRAPPED[name])
    if flow == "documented":
        quantizer = NeutronQuantizer(observer=OwnObserver)
        converted = convert(model, samples[0], quantizer=quantizer, calibration=samples)
    else:
        options: dict[str, Any] = {"recover": None, "progress": False, "observer": OwnObserver}
        converted = quantize(model, samples[0], samples, **options).module
    wanted = model(*samples[0])
    assert float((converted(*samples[0]) - wanted).abs().max()) < 0.1 * float(wanted.abs().max())


def test_copied_and_merged_observers_use_their_own_statistics() -> None:
    samples, model = samples_of(), model_of_doubled(lambda x, y: (x + y).tanh())
    prepared = prepare_pt2e(torch.export.export(model, samples[0]).module(), NeutronQuantizer())
    copied = copy.deepcopy(prepared)
    in_processes = copy.deepcopy(prepared)
    calibrate(prepared, samples)
    calibrate(copied, samples_of(scale=2.0))
    calibrate(in_processes, samples, CalibrationOptions(jobs=2))
    small, large, merged = (range_of_doubled(convert_pt2e(each)) for each in (prepared, copied, in_processes))
    assert max(map(abs, small)) == pytest.approx(TANH + NEAR, rel=0.1)
    assert max(map(abs, large)) == pytest.approx(TANH + 2 * NEAR, rel=0.1)
    assert merged == small


def test_limits_of_both_operands() -> None:
    """With both operands far from zero, each may cancel the other, so neither has a limit below the other's range."""
    generator = torch.Generator().manual_seed(0)
    samples: list[Inputs] = [
        (far, FAR * 0.5 * (torch.rand(4, 8, generator=generator) * 2 - 1)) for far, _ in samples_of()
    ]
    low, high = range_of_doubled(FLOWS["documented"](model_of_doubled(lambda x, y: (x + y).tanh()), samples))
    assert max(-low, high) == pytest.approx(TANH + FAR * 0.5, rel=0.1)
