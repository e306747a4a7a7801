"""Inputs that consist of two int8 tensors, because rounding them to one reduces the accuracy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.fidelity import signal_to_noise
from tests.flow_support import seeded
from torch import Tensor, nn
from torch.fx import GraphModule

from openneutron import NeutronQuantizer, finish_training, lower, prepare_training, quantize
from openneutron.accuracy import analyze
from openneutron.core.fx import is_quantize, placeholders
from openneutron.errors import CalibrationError, OptionError
from openneutron.recovery.wide_inputs import inputs_to_widen, widen_inputs

FRAMES, BANDS, UNITS, COUNT = 6, 8, 12, 40
GAIN_DB = 6.0


def heavy_tailed(*shape: int, seed: int = 0, signed: bool = False) -> Tensor:
    """Returns values from 1e-6 to 1, whose logarithms are uniform."""
    generator = torch.Generator().manual_seed(seed)
    values = 10 ** (-6 * torch.rand(shape, generator=generator))
    return values * torch.randn(shape, generator=generator).sign() if signed else values


class LogLinear(nn.Module):
    """Computes with the logarithm of a linear, so that small inputs matter as much as large ones."""

    def __init__(self, layer: nn.Module, before: Callable[[Tensor], Tensor] = lambda x: x, scale: float = 1e3) -> None:
        super().__init__()
        self.layer, self.before = layer, before
        self.head = nn.Sequential(nn.Linear(UNITS, 64), nn.ReLU(), nn.Linear(64, 4))
        for parameter in layer.parameters():
            parameter.detach().abs_().mul_(scale if parameter.dim() > 1 else 0.01)

    def forward(self, x: Tensor) -> Any:
        values = self.layer(self.before(x))
        values = torch.sigmoid(values)
        return self.head(values.flatten(2).mT if values.dim() == 4 else values)


def convolution() -> nn.Module:
    return nn.Conv2d(2, UNITS, (3, 3), padding=1)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: LogLinear(nn.Linear(BANDS, UNITS)), (1, FRAMES, BANDS)),
    "linear after moves": (
        lambda: LogLinear(nn.Linear(BANDS, UNITS), lambda x: x.transpose(1, 2).reshape(1, FRAMES, BANDS)),
        (1, BANDS, FRAMES),
    ),
    "convolution": (lambda: LogLinear(convolution()), (1, 2, FRAMES, BANDS)),
    "convolution of one channel": (lambda: LogLinear(nn.Conv2d(1, UNITS, 3)), (1, 1, FRAMES, BANDS)),
    "grouped convolution": (lambda: LogLinear(nn.Conv2d(2, UNITS, 3, groups=2)), (1, 2, FRAMES, BANDS)),
    "signed": (lambda: LogLinear(nn.Linear(BANDS, UNITS)), (1, FRAMES, BANDS)),
}


def samples_of(name: str, seed: int = 0) -> list[tuple[Tensor]]:
    _, shape = MODELS[name]
    return [(heavy_tailed(*shape, seed=seed * COUNT + n, signed=name == "signed"),) for n in range(COUNT)]


def prepared(model: nn.Module, samples: list[tuple[Tensor]]) -> GraphModule:
    exported = torch.export.export(model, samples[0]).module()
    return NeutronQuantizer().prepare_graph(exported, equalizes=False)


def input_quantizes(module: GraphModule) -> int:
    """Returns how many int8 tensors are quantized from the inputs, directly or after float operators."""
    float_values = set(placeholders(module.graph))
    count = 0
    for node in module.graph.nodes:
        if is_quantize(node):
            count += node.args[0] in float_values
        elif node.op == "call_function" and not float_values.isdisjoint(node.all_input_nodes):
            float_values.add(node)
    return count


@pytest.mark.parametrize("name", MODELS)
def test_outputs_do_not_change(name: str) -> None:
    model, samples = seeded(MODELS[name][0]).eval(), samples_of(name)
    graph = prepared(model, samples)
    widen_inputs(graph, samples, [str(node.target) for node in placeholders(graph.graph)])
    with torch.no_grad():
        for (x,) in samples[:4]:
            torch.testing.assert_close(graph(x), model(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_two_tensors_are_more_accurate_than_one(name: str) -> None:
    """Two tensors are more accurate than one on inputs that calibration has not seen, in the program too."""
    model, samples, tests = seeded(MODELS[name][0]).eval(), samples_of(name), samples_of(name, seed=1)
    (wide, narrow) = (quantize(model, samples[0], samples, wide=keys, progress=False) for keys in (["x"], []))
    assert input_quantizes(narrow.module) == 1
    assert input_quantizes(wide.module) == 2
    assert signal_to_noise(wide.module, model, tests) >= signal_to_noise(narrow.module, model, tests) + GAIN_DB
    program = lower(wide, samples[0])
    assert signal_to_noise(program.run, model, tests[:8]) >= signal_to_noise(narrow.module, model, tests[:8]) + GAIN_DB


SELECTED: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor], list[str]]] = {
    "heavy-tailed": (lambda: DeepLogLinear(8), lambda seed: heavy_tailed(1, BANDS, seed=seed), ["x"]),
    "uniform": (
        lambda: DeepLogLinear(8),
        lambda seed: torch.rand(1, BANDS, generator=torch.Generator().manual_seed(seed)),
        [],
    ),
    "small values do not matter": (
        lambda: Reads(lambda layer, x: layer(x), nn.Linear(BANDS, UNITS)),
        lambda seed: heavy_tailed(1, BANDS, seed=seed),
        [],
    ),
    "most of the work": (lambda: DeepLogLinear(0), lambda seed: heavy_tailed(1, BANDS, seed=seed), []),
    "no layer reads the input": (
        lambda: Reads(lambda _, x: torch.sigmoid(x), nn.Identity()),
        lambda seed: heavy_tailed(1, BANDS, seed=seed),
        [],
    ),
}


class DeepLogLinear(LogLinear):
    """A `LogLinear` that subtracts 0.5 and has `count` linears, which return their input."""

    def __init__(self, count: int) -> None:
        super().__init__(nn.Linear(BANDS, UNITS), scale=1e4)
        layers = [nn.Linear(UNITS, UNITS) for _ in range(count)]
        for layer in layers:
            nn.init.eye_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.head = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Any:
        return super().forward(x) - 0.5


class Reads(nn.Module):
    """Calls a function with a layer and the input `x`."""

    def __init__(self, function: Callable[..., Any], layer: nn.Module) -> None:
        super().__init__()
        self.function, self.layer = function, layer

    def forward(self, x: Tensor) -> Any:
        return self.function(self.layer, x)


@pytest.mark.parametrize("name", SELECTED)
def test_selection(name: str) -> None:
    """Recipes select the inputs whose rounding costs accuracy and whose additional layers are small."""
    build, value, names = SELECTED[name]
    model, samples = seeded(build).eval(), [(value(seed),) for seed in range(COUNT)]
    assert inputs_to_widen(prepared(model, samples), samples) == names
    for recover, keys, expected in (("auto", None, names), (None, None, []), ("auto", [], []), (None, "auto", names)):
        quantized = quantize(model, samples[0], samples, recover=recover, wide=keys, progress=False)
        if expected or keys != "auto":  # "auto" has no limit of the price
            assert input_quantizes(quantized.module) == 1 + len(expected)


def test_other_readers_keep_the_input() -> None:
    """An operator that is not a layer reads the input itself, with qparams of its own."""
    model = seeded(lambda: Reads(lambda layer, x: (layer(x), torch.sigmoid(x)), nn.Linear(BANDS, UNITS))).eval()
    samples = [(heavy_tailed(1, BANDS, seed=seed),) for seed in range(COUNT)]
    quantized = quantize(model, samples[0], samples, wide=["x"], progress=False)
    assert input_quantizes(quantized.module) == 3


@pytest.mark.parametrize(
    ("layer", "keys", "message"),
    [
        (nn.Sigmoid(), ["x"], r"wide\['x'\] is an input that no convolution.*Leave it out"),
        (nn.Linear(BANDS, UNITS), [["x"]], "wide"),
        (nn.Linear(BANDS, UNITS), ["y"], r"wide\['y'\] matches no module"),
    ],
)
def test_refused_inputs(layer: nn.Module, keys: list[Any], message: str) -> None:
    model = Reads(lambda inner, x: inner(x), layer).eval()
    samples = [(heavy_tailed(1, BANDS, seed=seed),) for seed in range(2)]
    with pytest.raises(OptionError, match=message):
        quantize(model, samples[0], samples, wide=keys)


@pytest.mark.parametrize("wide", [None, ["x"]])
@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_values_that_are_not_finite(value: float, wide: list[str] | None) -> None:
    model = seeded(MODELS["linear"][0]).eval()
    samples = [(sample.clone(),) for (sample,) in samples_of("linear")]
    samples[1][0].view(-1)[0] = value
    with pytest.raises(CalibrationError, match=r"Check the|contains NaN or infinite"):
        quantize(model, samples[0], samples, wide=wide, progress=False)


class ReadsNamed(nn.Module):
    """An input that has the name of a coarse tensor, and an input that has the name of a module."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(BANDS, UNITS)

    def forward(self, x: Tensor, x_coarse: Tensor, inner: Tensor) -> Any:
        return self.inner(x) + x_coarse + inner


def named_samples() -> list[tuple[Tensor, ...]]:
    samples = [heavy_tailed(1, BANDS, seed=seed) for seed in range(8)]
    return [(sample, torch.ones(1, UNITS), torch.ones(1, UNITS)) for sample in samples]


def test_an_input_with_the_name_of_a_coarse_tensor() -> None:
    model, samples = seeded(ReadsNamed).eval(), named_samples()
    quantized = quantize(model, samples[0], samples, recover=None, wide=["x"], progress=False)
    kept, new = analyze(None, quantized, samples), analyze(model, quantized.module, samples)
    assert [layer.node for layer in new.layers] == [layer.node for layer in kept.layers]


def test_a_name_of_an_input_and_of_a_module() -> None:
    samples = named_samples()
    with pytest.raises(OptionError, match="'inner', which an input and a module have"):
        quantize(seeded(ReadsNamed).eval(), samples[0], samples, wide=["inner"], progress=False)


def test_the_program_with_int8_inputs() -> None:
    """An input that consists of two tensors stays in float, because one int8 tensor cannot hold it."""
    model, samples = seeded(MODELS["linear"][0]).eval(), samples_of("linear")
    quantized = quantize(model, samples[0], samples, wide=["x"], progress=False)
    program = lower(quantized, int8_io=True)
    assert (program.inputs[0].dtype, program.outputs[0].dtype) == (torch.float32, torch.int8)


def test_analysis_of_a_converted_module() -> None:
    """`analyze` splits the input of a new float graph as the converted module does."""
    model, samples = seeded(MODELS["linear after moves"][0]).eval(), samples_of("linear after moves")
    quantized = quantize(model, samples[0], samples, recover=None, wide=["x"], progress=False)
    kept, new = analyze(None, quantized, samples), analyze(model, quantized.module, samples)
    assert [layer.node for layer in new.layers] == [layer.node for layer in kept.layers]
    assert new.output_sqnr_db == pytest.approx(kept.output_sqnr_db, abs=0.1)


class IgnoresOne(nn.Linear):
    """A linear that multiplies the first feature by zero."""

    def __init__(self) -> None:
        super().__init__(BANDS, UNITS)
        self.weight.detach()[:, 0] = 0


ADVISED: dict[str, tuple[Callable[[], nn.Module], str, bool]] = {
    "a layer reads the input": (lambda: Reads(lambda layer, x: layer(x), IgnoresOne()), 'wide=["x"]', True),
    "no layer reads the input": (
        lambda: Reads(lambda _, x: torch.sigmoid(x) - 0.7, nn.Identity()),
        "",
        False,
    ),
}


@pytest.mark.parametrize("name", ADVISED)
def test_advice(name: str) -> None:
    """`analyze` advises the option for an input that loses the accuracy, if a layer reads it."""
    build, code, is_measured = ADVISED[name]
    model, values = seeded(build).eval(), torch.rand(COUNT, 1, BANDS, generator=torch.Generator().manual_seed(0))
    values[..., 0] += 1000
    samples = [(value,) for value in values]
    narrow = quantize(model, samples[0], samples, recover=None, progress=False)
    (advice,) = (one for one in analyze(model, narrow, samples).advice if one.node == "x")
    assert advice.code == code
    assert ((advice.error_reduction or 0) > 0.5) == is_measured


def test_training() -> None:
    """Training starts from a module with two tensors, and keeps them."""
    model, samples = seeded(MODELS["linear"][0]).eval(), samples_of("linear")
    quantized = quantize(model, samples[0], samples, wide=["x"], progress=False)
    module = prepare_training(quantized)
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-6)
    with torch.enable_grad():
        loss = (module(samples[0][0]) - model(samples[0][0]).detach()).square().mean()
        torch.autograd.backward(loss)
        optimizer.step()
    trained = finish_training(module)
    tests = samples_of("linear", seed=1)
    assert signal_to_noise(trained, model, tests) >= signal_to_noise(quantized.module, model, tests) - 1
