"""Accuracy of quantized activations, functions, norms and gates in dB, and values with qparams of their own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.case import of
from tests.fidelity import signal_to_noise
from tests.flow_support import convert, seeded
from tests.models import Model
from tests.oracle import Inputs, everything_on_the_npu, lowered, quantized, samples_like
from torch import nn

from openneutron import quantize
from openneutron.core.fx import is_dequantize, op_name
from openneutron.quantizer import RangeObserver
from openneutron.runtime import HostProgram

Function = Callable[..., torch.Tensor]
IMAGE, TOKENS, CONVNEXT = (2, 16, 12, 12), (1, 50, 192), (1, 96, 8, 8)


def program_fidelity(
    model: nn.Module, calibration: Sequence[Inputs], samples: Sequence[Inputs], observer: Any = None
) -> float:
    """Returns the SQNR in dB of the `.pte` on this machine relative to the float model."""
    program = lowered(quantize(model.eval(), calibration[0], calibration, observer=observer))
    assert everything_on_the_npu(program), program.placement
    host = HostProgram.from_bytes(program.buffer)
    return signal_to_noise(host.run, model, samples)


def fidelity(
    function: Function | nn.Module, shapes: Sequence[tuple[int, ...]], deviation: float, observer: Any = None
) -> float:
    """Returns the same for inputs from N(0, deviation)."""
    model = function if isinstance(function, nn.Module) else of(function)()
    calibration, samples = (samples_like(shapes, count, seed, (0.0, deviation)) for count, seed in ((8, 0), (4, 1)))
    return program_fidelity(model, calibration, samples, observer)


# SQNR in dB for inputs from N(0, 1) and N(0, 3). Quantized inputs and outputs alone limit most of them to 36 to 43.
ACTIVATIONS: dict[str, tuple[Function, float, float]] = {
    "silu": (F.silu, 36, 37),
    "gelu": (F.gelu, 35, 36),
    "gelu tanh": (lambda x: F.gelu(x, approximate="tanh"), 35, 36),
    "hardsigmoid": (F.hardsigmoid, 47, 42),
    "hardswish": (F.hardswish, 36, 37),
    "elu": (F.elu, 36, 37),
    "celu": (lambda x: F.celu(x, 2.0), 36, 37),
    "selu": (F.selu, 36, 36),
    "softplus": (F.softplus, 40, 37),
    "mish": (F.mish, 36, 34),
    "log_sigmoid": (F.logsigmoid, 40, 38),
    "log_softmax": (lambda x: F.log_softmax(x, 1), 39, 37),
    "softshrink": (F.softshrink, 35, 36),
    "hardshrink": (F.hardshrink, 23, 34),
    "threshold": (lambda x: F.threshold(x, 0.5, 0.2), 28, 36),
    "logsumexp": (lambda x: x.logsumexp(1), 44, 40),
    "softsign": (F.softsign, 36, 35),
    "prelu": (lambda x: F.prelu(x, torch.tensor([0.25])), 37, 37),
    "clamp": (lambda x: x.clamp(-0.5, 1.5), 37, 34),
    "sqrt": (lambda x: torch.sqrt(x.abs()), 34, 34),
    "sqrt of zeros": (lambda x: torch.sqrt(x.relu()), 33, 32),
    "square": (torch.square, 34, 34),
    "cube": (lambda x: x**3, 27, 27),
    # 36 with "minmax" ranges: clipped values get larger errors
    "fractional power": (lambda x: (x.abs() + 1) ** 1.5, 38, 35),
    "reciprocal": (lambda x: 1 / (x.abs() + 1), 39, 32),
    "quotient": (lambda x: x / (x.abs().mean(1, keepdim=True) + 0.1), 35, 35),
    "normalize": (lambda x: F.normalize(x, dim=1), 36, 36),
    "log1p": (lambda x: torch.log1p(x.abs()), 36, 36),
    "logit": (lambda x: torch.logit(x / 8 + 0.5, 1e-2), 29, 29),
    "glu": (lambda x: F.glu(x, 1), 33, 33),
    "masked": (lambda x: x.masked_fill(torch.arange(12) % 3 > 0, -1.0), 41, 33),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_sqnr_of_activations(name: str) -> None:
    function, *floors = ACTIVATIONS[name]
    found = [fidelity(function, [IMAGE], deviation) for deviation in (1.0, 3.0)]
    assert all(value >= floor for value, floor in zip(found, floors, strict=True)), found


class TestForms:
    """The decompositions in use, compared with alternatives."""

    def test_gelu(self) -> None:
        """It is at most 3 dB less accurate than the tanh form, which takes twice as many operators."""

        def cubic(x: torch.Tensor) -> torch.Tensor:
            return x * torch.sigmoid(x * (x * x * 0.0713548 + 1.5957691))

        taken, left = (
            [fidelity(form, [TOKENS], deviation, RangeObserver) for deviation in (1.0, 3.0)] for form in (F.gelu, cubic)
        )
        assert min(taken) > min(left) - 3
        assert min(taken) > 34

    def test_sqrt(self) -> None:
        """The form x * rsqrt(x) is less accurate, because its int8 range includes rsqrt of the smallest x."""
        by_rsqrt = fidelity(lambda x: x.abs() * torch.rsqrt(x.abs() + 1e-6), [IMAGE], 1.0)
        assert fidelity(lambda x: torch.sqrt(x.abs()), [IMAGE], 1.0) > by_rsqrt + 15

    def test_log_softmax(self) -> None:
        by_softmax = fidelity(lambda x: torch.log(torch.softmax(x, 1) + 1e-6), [IMAGE], 3.0)
        assert fidelity(lambda x: F.log_softmax(x, 1), [IMAGE], 3.0) > by_softmax + 15

    def test_lerp(self) -> None:
        """The form with a difference is less accurate, because the difference is rounded once more in its own range."""
        by_difference = fidelity(lambda x, y: torch.add(x, y - x, alpha=0.9), [IMAGE, IMAGE], 1.0, RangeObserver)
        assert fidelity(lambda x, y: torch.lerp(x, y, 0.9), [IMAGE, IMAGE], 1.0, RangeObserver) > by_difference + 1

    def test_comparison_with_a_number(self) -> None:
        """If int8 cannot tell on which side of the number a value is, 1/2 has the smaller error."""

        def halves(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
            values = layer(x)
            masked: torch.Tensor = values * (values > 0.5)
            return masked

        def steps(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
            values = layer(x)
            masked: torch.Tensor = values * torch.sign(values - 0.5).relu()
            return masked

        taken, left = (
            fidelity(seeded(of(form, seeded(lambda: nn.Conv2d(16, 16, 3)))), [IMAGE], 1.0) for form in (halves, steps)
        )
        assert taken > left + 1

    def test_two_steps_of_a_norm(self) -> None:
        """The first step helps if groups have different ranges. Otherwise it costs less than one decibel."""

        def in_one_step(x: torch.Tensor) -> torch.Tensor:
            centered = x - x.mean(-1, True)
            variance = centered.abs().pow(2).mean(-1, True)  # abs prevents pattern fusion
            return centered * torch.rsqrt(variance + 1e-5)

        norm = nn.LayerNorm(192, elementwise_affine=False)
        differences = []
        for inputs in ("N(0, 1)", "uneven"):
            spread = [[(INPUTS[inputs](x, 2),) for (x,) in samples_like([TOKENS], 4, n, (0.0, 1.0))] for n in (0, 1)]
            differences.append(program_fidelity(norm, *spread) - program_fidelity(of(in_one_step)(), *spread))
        usual, uneven = differences
        assert usual > -1.2
        assert uneven > 5


def outlier_channel(values: torch.Tensor, axis: int) -> torch.Tensor:
    """Makes one channel thirty times as large as the others."""
    gains = torch.ones(values.shape[axis])
    gains[5] = 30
    return values * gains.reshape([-1 if dim == axis else 1 for dim in range(values.dim())])


def uneven(values: torch.Tensor, axis: int) -> torch.Tensor:
    """Gives the normalized groups different ranges, from one sixth to six times the usual range."""
    shape = [1 if dim == axis else size for dim, size in enumerate(values.shape)]
    gains = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    return values * torch.exp(0.7 * gains)


INPUTS: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "N(0, 1)": lambda values, _: values,
    "N(0, 3)": lambda values, _: values * 3,
    "one-sided": lambda values, _: values + 4,
    "uneven": uneven,
    "outlier channel": outlier_channel,
}


class ChannelNorm(nn.Module):
    """The norm of ConvNeXt: a layer norm over the channels of an image."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, 1e-6)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        moved: torch.Tensor = self.norm(values.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return moved


# SQNR in dB for each of INPUTS. Quantized inputs and outputs alone would give about 36, 36, 36, 24 and 17.
NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, tuple[float, ...]]] = {
    "layer_norm of tokens": (lambda: nn.LayerNorm(192), TOKENS, 2, (33, 33, 33, 21, 11)),
    "layer_norm of channels": (lambda: ChannelNorm(96), CONVNEXT, 1, (33, 33, 33, 20, 14)),
    "rms_norm": (lambda: nn.RMSNorm(192), TOKENS, 2, (34, 34, 45, 23, 12)),
    "group_norm": (lambda: nn.GroupNorm(8, 96), CONVNEXT, 1, (33, 33, 33, 25, 12)),
    "instance_norm": (lambda: nn.InstanceNorm2d(96), CONVNEXT, 1, (33, 33, 32, 24, 11)),
}


def norm_fidelity(name: str, inputs: str) -> float:
    make, shape, axis, _ = NORMS[name]
    calibration, samples = (
        [(INPUTS[inputs](value, axis),) for (value,) in samples_like([shape], count, seed, (0.0, 1.0))]
        for count, seed in ((8, 0), (4, 1))
    )
    return program_fidelity(seeded(make), calibration, samples)


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("name", NORMS)
def test_sqnr_of_norms(name: str, inputs: str) -> None:
    floor = NORMS[name][3][list(INPUTS).index(inputs)]
    found = norm_fidelity(name, inputs)
    assert found >= floor


class SqueezeAndExcite(nn.Module):
    """Squeeze-and-excite as in MobileNetV3 and EfficientNet."""

    def __init__(self, activation: Function, gate: Function) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.activation, self.gate = activation, gate

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        squeezed = F.adaptive_avg_pool2d(values, 1)
        return values * self.gate(self.expand(self.activation(self.reduce(squeezed))))


class TestRanges:
    """Operators that change the range of values have their own output qparams. Inputs never get fixed qparams."""

    def test_gate_by_a_sigmoid(self) -> None:
        shapes = [IMAGE, IMAGE]
        assert fidelity(lambda x, y: x * torch.sigmoid(y), shapes, 2.0) >= 30

    @pytest.mark.parametrize(
        ("activation", "gate"), [(F.relu, F.hardsigmoid), (F.silu, torch.sigmoid)], ids=["MobileNetV3", "EfficientNet"]
    )
    def test_squeeze_and_excite(self, activation: Function, gate: Function) -> None:
        assert fidelity(seeded(lambda: SqueezeAndExcite(activation, gate)), [IMAGE], 2.0) >= 25

    def test_a_sum_does_not_coarsen_its_operands(self) -> None:
        values = torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(0))
        module = convert(Model(lambda _, x: x.relu().sum((2, 3))), (values,))
        dequantized = filter(is_dequantize, module.graph.nodes)
        scales = {op_name(user): float(str(node.args[1])) for node in dequantized for user in node.users}
        assert scales["aten.sum.dim_IntList"] == pytest.approx(float(values.max()) / 255)
        assert scales["output"] > 10 * scales["aten.sum.dim_IntList"]

    @pytest.mark.parametrize(
        "function",
        [
            torch.abs, torch.exp, lambda x: x.mean(1), lambda x: x.sum(1), torch.relu, F.leaky_relu, F.hardswish,
            lambda x: -x, lambda x: x + x, lambda x: x - 2 * x, lambda x: x * x, lambda x: F.adaptive_avg_pool2d(x, 1),
            lambda x: F.prelu(x, torch.tensor([0.1])), lambda x: x.clamp(0, 6), lambda x: (x.abs() + 1).log(),
            lambda x: (x.abs() + 1).rsqrt(),
        ],
    )  # fmt: skip
    def test_output_has_the_range_of_its_values(self, function: Function) -> None:
        calibration = samples_like([IMAGE], 4, 0, (0.0, 1.0))
        module = quantized(of(function)(), [IMAGE]).module
        (output,) = (node for node in module.graph.nodes if node.op == "output")
        (dequantize,) = output.all_input_nodes
        values = torch.cat([function(*inputs).flatten() for inputs in calibration])
        span = max(float(values.max()), 0.0) - min(float(values.min()), 0.0)
        assert dequantize.args[1] == pytest.approx(span / 255, rel=0.05)


def test_root_of_zero_is_finite_in_calibration_and_zero_in_the_program() -> None:
    model = of(lambda x: torch.sqrt(x.relu()))().eval()
    calibration = samples_like([IMAGE], 4, 0, (0.0, 1.0))
    program = lowered(quantize(model, calibration[0], calibration))
    found = program.run(torch.full(IMAGE, -1.0))
    assert isinstance(found, torch.Tensor)
    assert float(found.max()) <= 0.01


@pytest.mark.parametrize("make", [lambda: nn.LayerNorm(16), lambda: nn.RMSNorm(16, 1e-5)])
def test_the_norm_of_constant_values_is_finite(make: Callable[[], nn.Module]) -> None:
    """A row of equal values has variance 0. The result is finite, although int8 rounds eps to zero."""
    values = samples_like([(1, 8, 16)], 1, 0, (0.0, 1.0))[0][0]
    values[0, 3] = 0.0
    program = lowered(quantize(make().eval(), (values,), [(values,)]))
    found = program.run(values)
    assert isinstance(found, torch.Tensor)
    torch.testing.assert_close(found[0, 3], torch.zeros(16), atol=0.05, rtol=0)
    torch.testing.assert_close(found, make()(values), atol=0.3, rtol=0)
    assert math.isfinite(float(found.abs().max()))
