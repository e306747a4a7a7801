"""Scales that kernels reject: no data ends the process, and operators with such scales run on the CPU."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tests.fidelity import signal_to_noise
from tests.flow_support import convert, lower_documented, seeded
from tests.net import FULLY, INT8, NO_ACTIVATION
from tests.oracle import Function
from torch import Tensor, nn
from torch.fx import GraphModule

from openneutron import NeutronQuantizer, lower, quantize
from openneutron.core.fx import is_dequantize, is_quantize
from openneutron.errors import CalibrationError, HostError, ModelError, OpenNeutronError
from openneutron.formats.tflite.trial import error_in_subprocess
from openneutron.ir.graph import Graph, Kind, Op, QParams
from openneutron.ir.graph import Tensor as Stored
from openneutron.ir.kinds import ADD, KINDS, MAXIMUM
from openneutron.ir.scales import scale_fault
from openneutron.ir.verify import IRError, verify
from openneutron.quantizer import RangeObserver, VanishingValuesWarning

SHAPE = (1, 4, 6, 6)
OPERATORS: dict[str, Callable[[], nn.Module]] = {
    "conv": lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, groups=4),
    "transposed": lambda: nn.ConvTranspose2d(4, 4, 2, stride=2),
    "linear": lambda: nn.Linear(6, 5),
    "sum": lambda: Function(lambda x: F.relu(x + x.flip(1))),
    "difference": lambda: Function(lambda x: x - x.flip(1)),
    "product": lambda: Function(lambda x: x * x.flip(1)),
    "matmul": lambda: Function(lambda x: x @ x.transpose(2, 3)),
    "mean": lambda: Function(lambda x: x.mean((2, 3))),
    "total": lambda: Function(lambda x: x.sum(1)),
    "softmax": lambda: Function(lambda x: x.softmax(1)),
    "sigmoid": lambda: Function(torch.sigmoid),
    "tanh": lambda: Function(torch.tanh),
    "hardswish": lambda: Function(F.hardswish),
    "silu": lambda: Function(F.silu),
    "leaky relu": lambda: Function(lambda x: F.leaky_relu(x, 0.1)),
    "abs": lambda: Function(torch.abs),
    "exp": lambda: Function(torch.exp),
    "pools": lambda: Function(lambda x: F.max_pool2d(F.avg_pool2d(x, 2), 2)),
    "maximum": lambda: Function(lambda x: torch.maximum(x, x.flip(1))),
    "layer norm": lambda: nn.LayerNorm(6),
}
DATA: dict[str, Callable[[Tensor, float], Tensor]] = {
    "scaled": lambda x, size: x * size,
    "zero": lambda x, _: x * 0,
    "one outlier": lambda x, size: torch.where(torch.arange(x.numel()).reshape(x.shape) == 0, size, x),
    "positive": lambda x, size: x.abs() + size,
    "negative": lambda x, size: -x.abs() * 1e-3 - size,
}


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(sorted(OPERATORS)), st.sampled_from(sorted(DATA)), st.integers(-42, 30), st.booleans(),
)  # fmt: skip
@example("sum", "negative", 6, False)
@example("conv", "zero", 0, True)
@example("hardswish", "negative", 9, False)
def test_no_data_ends_the_process(operator: str, data: str, exponent: int, documented: bool) -> None:
    model = seeded(OPERATORS[operator])
    values = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    inputs = (DATA[data](values, 10.0**exponent),)
    try:
        if documented:
            program: Any = lower_documented(convert(model, inputs), inputs)
        else:
            program = lower(quantize(model, inputs, [inputs], recover=None))
        found = program.run(*inputs)
    except HostError:  # an operator that cannot run is rejected before it is written
        raise
    except OpenNeutronError:
        return
    assert torch.isfinite(found).all()


SATURATED: dict[str, Callable[[], nn.Module]] = {
    "sigmoid": lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Sigmoid()),
    "relu6": lambda: nn.Sequential(nn.Conv2d(4, 4, 3, bias=False), nn.ReLU6()),
    "sum": lambda: Function(lambda first, last, x: torch.tanh(first(x) + last(x)), nn.Linear(6, 6), nn.Linear(6, 6)),
    "product": lambda: Function(
        lambda first, last, x: torch.tanh(first(x) * last(x)), nn.Linear(6, 6), nn.Linear(6, 6)
    ),
    "matmul": lambda: Function(lambda first, x: torch.sigmoid(first(x) @ x.transpose(2, 3)), nn.Linear(6, 6)),
    "difference": lambda: Function(lambda first, x: torch.sigmoid(first(x) - x), nn.Linear(6, 6)),
}


@pytest.mark.parametrize("exponent", [3, 8, 17])
@pytest.mark.parametrize("name", SATURATED)
def test_values_far_beyond_what_their_readers_need(name: str, exponent: int) -> None:
    """Their codes fit into int32, in both flows and with recovery, which adds up squares of the values."""
    model = seeded(SATURATED[name])
    samples = [(torch.randn(SHAPE, generator=torch.Generator().manual_seed(i)) * 10.0**exponent,) for i in range(16)]
    runs: dict[str, Any] = {"documented": lower_documented(convert(model, samples[0], calibration=samples), samples[0])}
    for recover in (None, "fast"):
        runs[str(recover)] = lower(quantize(model, samples[0], samples, recover=recover, progress=False))
    for label, program in runs.items():
        assert signal_to_noise(program.run, model, samples[:4]) >= 15, label


@pytest.mark.parametrize("recover", [None, "fast"])
def test_a_clamp_of_values_beyond_int32_is_refused(recover: str | None) -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 6, bias=False), nn.Hardtanh(-1.0, 0.0)))
    samples = [(torch.randn(SHAPE, generator=torch.Generator().manual_seed(i)) * 1e20,) for i in range(4)]
    with pytest.raises(CalibrationError, match=r"before a clamp.*exceed int32. Scale the model's data") as caught:
        quantize(model, samples[0], samples, recover=recover, progress=False)
    assert caught.value.node == "linear"
    with pytest.raises(CalibrationError, match="before a clamp"):
        convert(model, samples[0], calibration=samples)


@pytest.mark.parametrize("exponent", [6, 8, 12, 16])
@pytest.mark.parametrize("name", ["sum", "difference", "product", "matmul", "conv", "linear", "hardswish"])
def test_codes_with_a_small_output_scale(name: str, exponent: int) -> None:
    """LiteRT's kernels return codes of the wrong sign for some ratios of scales, so the CPU computes these."""
    inputs = (torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)),)
    converted = convert(seeded(OPERATORS[name]), inputs)
    scale = next(node for node in reversed(converted.graph.nodes) if is_quantize(node)).args[1] * 2.0**-exponent
    program = lower(with_output_scale(converted, scale), inputs)
    difference = torch.as_tensor(program.run(*inputs)) - converted(*inputs)
    assert (difference.abs() <= 2.01 * scale).all()


def test_a_value_that_is_always_zero_stays_on_the_npu() -> None:
    def dead() -> nn.Module:
        layer = nn.Conv2d(4, 4, 3)
        nn.init.constant_(layer.bias, -100.0)  # type: ignore[arg-type]
        return Function(lambda first, last, x: last(F.relu(first(x)) + 1), layer, nn.Conv2d(4, 4, 1))

    inputs = (torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)),)
    model = seeded(dead)
    program = lower(quantize(model, inputs, [inputs], recover=None))
    assert {row.where for row in program.placement} == {"npu"}
    found = program.run(*inputs)
    assert isinstance(found, Tensor)
    torch.testing.assert_close(found, model(*inputs), atol=0.05, rtol=0.0)


def with_output_scale(model: GraphModule, scale: float) -> GraphModule:
    """Returns the converted module with another scale for the last value, as another quantizer might leave it."""
    last = [node for node in model.graph.nodes if is_quantize(node) or is_dequantize(node)][-2:]
    for node in last:
        node.args = (node.args[0], scale, *node.args[2:])
    model.recompile()
    return model


@pytest.mark.parametrize(
    ("operator", "inside", "outside"),
    [
        ("sum", 1e-3, 1e-5),
        ("difference", 1e-6, 1e-9),
        ("product", 1e-5, 1e-7),
        ("matmul", 1e-3, 1e-5),
        ("conv", 1e-3, 1e-7),
        ("hardswish", 1e-3, 1e-5),
    ],
)
def test_operators_with_scales_beyond_the_limits_run_on_the_cpu(operator: str, inside: float, outside: float) -> None:
    inputs = (torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)),)
    for scale, where in ((inside, "npu"), (outside, "cpu")):
        converted = with_output_scale(convert(seeded(OPERATORS[operator]), inputs), scale)
        program = lower(converted, inputs)
        left = [row.reason for row in program.placement if row.where == "cpu"]
        assert bool(left) == (where == "cpu")
        assert any("the ratio must be below" in str(reason) for reason in left) == (where == "cpu")
        assert torch.isfinite(torch.as_tensor(program.run(*inputs))).all()


def operator(kind: Kind, scale: float, output: float) -> Op:
    stored = [Stored((1, 4), INT8, QParams.per_tensor(value, 0)) for value in (scale, 1.0, output)]
    return Op(kind, (stored[0], stored[1]), stored[2], NO_ACTIVATION if kind is ADD else FULLY, "node")


class TestFaults:
    @pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.accumulator])
    def test_the_limit(self, name: str) -> None:
        kind = KINDS[name]
        assert kind.accumulator is not None
        limit = kind.accumulator.limit(terms=4)
        assert not scale_fault(operator(kind, 1.0, 1.01 / limit))
        assert "the ratio must be below" in scale_fault(operator(kind, 1.0, 0.99 / limit))

    @pytest.mark.parametrize("scale", [0.0, math.inf, math.nan, 1e-39, 2.0**107.01, 1e39])
    def test_scales_beyond_the_limits_of_litert(self, scale: float) -> None:
        fault = scale_fault(operator(ADD, scale, 1.0))
        assert fault.startswith(f"has a scale of {scale:.3g}, which is not between 2^-126")
        assert "multiply the tensor by a constant" in fault

    @pytest.mark.parametrize("scale", [2.0**-126, 1.0, 2.0**107])
    def test_scales_at_the_limits_of_litert(self, scale: float) -> None:
        assert not scale_fault(operator(MAXIMUM, scale, scale))

    def test_an_operator_without_a_limit(self) -> None:
        assert not scale_fault(operator(MAXIMUM, 1e20, 1e-20))

    def test_verify_names_the_node(self) -> None:
        op = operator(ADD, 1.0, 2.0**-20)
        with pytest.raises(IRError, match="the ratio must be below") as error:
            verify(Graph(op.inputs, (op.output,), (op,)), "a test")
        assert error.value.node == "node"


def test_an_isolated_program_ends_its_own_process_only() -> None:
    assert error_in_subprocess(b"no model") is not None


def test_a_model_that_ends_every_process_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openneutron.partition.compile.error_in_subprocess", lambda _: "signal 6")
    inputs = (torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * 1e20,)
    quantized = quantize(seeded(OPERATORS["leaky relu"]), inputs, [inputs], recover=None)
    with pytest.raises(ModelError, match=r"signal 6.*Give inputs in other units") as error:
        lower(quantized)
    assert error.value.source is not None


def test_scales_of_ordinary_data_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(_: bytes) -> None:
        raise AssertionError("an ordinary model was tried in a process")

    monkeypatch.setattr("openneutron.partition.compile.error_in_subprocess", never)
    inputs = (torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * 1e4,)
    lower(quantize(seeded(OPERATORS["conv"]), inputs, [inputs], recover=None))


@pytest.mark.parametrize("observer", [None, RangeObserver])
@pytest.mark.parametrize(("size", "named"), [(1e-8, "x"), (1.0, "relu")])
def test_values_that_become_zeros_are_named(observer: Any, size: float, named: str) -> None:
    """Tests an input, and a layer in the middle."""
    model = seeded(lambda: nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.ReLU(), nn.Conv2d(4, 4, 1)))
    if size == 1.0:
        with torch.no_grad():
            model.get_parameter("0.weight").mul_(1e-8)
            model.get_parameter("2.weight").mul_(1e8)
    samples = [(torch.randn(SHAPE, generator=torch.Generator().manual_seed(i)) * size,) for i in range(4)]
    options = {} if observer is None else {"observer": observer}
    quantizer = NeutronQuantizer(equalize=False, **options)
    with pytest.warns(VanishingValuesWarning, match=r"within 2 of the zero point. Scale the model's data") as seen:
        convert(model, samples[0], quantizer=quantizer, calibration=samples)
    assert any(("input" if named == "x" else named) in str(warning.message) for warning in seen)
    with pytest.warns(VanishingValuesWarning):
        quantize(model, samples[0], samples, recover=None, equalize=False, progress=False, **options)


def test_small_values_do_not_count_as_zeros() -> None:
    samples = [(torch.randn(SHAPE, generator=torch.Generator().manual_seed(i)) * 1e-5,) for i in range(4)]
    with warnings.catch_warnings():
        warnings.simplefilter("error", VanishingValuesWarning)
        quantize(seeded(OPERATORS["conv"]), samples[0], samples, recover=None, progress=False)
        zeros = [(torch.zeros(SHAPE),)] * 2
        quantize(seeded(OPERATORS["conv"]), zeros[0], zeros, recover=None, progress=False)


class AddsZero(nn.Module):
    """A sum with a value that is zero, as in the first step of a recurrent cell."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.zero, self.other, self.size = nn.Linear(4, 4, bias=False), nn.Linear(4, 4), size
        nn.init.zeros_(self.zero.weight)

    def forward(self, x: Tensor) -> Any:
        return torch.relu(self.zero(x)) + self.other(x) * self.size


@pytest.mark.parametrize("size", [1.0, 0.3, 0.05, 0.01, 0.002])
def test_sums_with_zeros_stay_on_the_npu(size: float) -> None:
    """The scale of zeros is 1, which may be more than 2^8 times the scale of the sum."""
    generator = torch.Generator().manual_seed(0)
    model = seeded(lambda: AddsZero(size)).eval()
    samples = [(torch.randn(1, 4, generator=generator),) for _ in range(16)]
    quantized = quantize(model, samples[0], samples, recover=None, progress=False)
    program = lower(quantized)
    assert {row.where for row in program.placement} == {"npu"}
    wanted = torch.cat([quantized(*sample) for sample in samples])
    found = torch.cat([program.run(*sample) for sample in samples])
    assert (found - wanted).abs().max() <= wanted.abs().max() / 100  # a step is at most 2 / 255 of the maximum
