"""Programs with int8 inputs and outputs: their results, their qparams, and the ends that remain float."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from executorch.exir import to_edge_transform_and_lower
from executorch.exir.passes.quantize_io_pass import QuantizeInputs, QuantizeOutputs
from tests.flow_support import Inputs, convert, flat, seeded
from torch import nn

from openneutron import (
    NeutronPartitioner,
    NeutronProgram,
    QuantizedModel,
    generate_neutron_compile_spec,
    int8_io,
    load,
    lower,
    quantize,
)
from openneutron.core.fx import is_dequantize, is_quantize
from openneutron.errors import InputError, OptionError
from openneutron.partition.quantized_io import FloatIOWarning
from openneutron.quantizer import UnquantizedWarning
from openneutron.runtime import HostProgram, TensorInfo

IMAGE = (1, 4, 8, 8)


class Model(nn.Module):
    """A function of two convolutions and the inputs."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.c, self.d = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.register_buffer("k", torch.randn(3))

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.function(self, *inputs)


def two_qparams(m: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.sigmoid(m.c(x)), x], 1) + torch.cat([x, torch.tanh(x)], 1)


def intermediate(m: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    first = m.c(x)
    return first, m.d(first)


# name: function, inputs, dtypes of the program's inputs and outputs: "q" is int8
Case = tuple[Callable[..., Any], int, str, str]
CASES: dict[str, Case] = {
    "one of each": (lambda m, x: F.relu(m.c(x)), 1, "q", "q"),
    "two inputs": (lambda m, x, y: m.c(x) + m.d(y), 2, "qq", "q"),
    "an input with two readers": (lambda m, x: m.c(x) + m.d(x), 1, "q", "q"),
    "an input with two qparams": (two_qparams, 1, "q", "q"),
    "parts of equal ranges": (lambda m, x: torch.cat([m.c(x), m.c(x).flip(3)], 1), 1, "q", "q"),
    "parts of other ranges": (lambda m, x: torch.cat([m.c(x) * 50, m.d(x)], 1), 1, "q", "f"),
    "an input as a part": (lambda m, x: torch.cat([x, m.d(x) * 50], 1), 1, "q", "f"),
    "an input returned": (lambda m, x: (x, m.c(x)), 1, "q", "qq"),
    "an input that the CPU reads too": (lambda m, x: m.c(x) + torch.sin(x), 1, "q", "q"),
    "an input that the CPU alone reads": (lambda m, x, y: m.c(x) + torch.sin(y), 2, "qf", "q"),
    "an input that nothing reads": (lambda m, x, _: m.c(x), 2, "qf", "q"),
    "an output of the CPU": (lambda m, x: (torch.sin(m.c(x)), m.d(x)), 1, "q", "fq"),
    "an intermediate": (intermediate, 1, "q", "qq"),
    "one value twice": (lambda m, x: (m.c(x),) * 2, 1, "q", "qq"),
    "a dictionary": (lambda m, x: {"b": m.c(x), "a": [x, m.d(x)]}, 1, "q", "qqq"),
    "views": (lambda m, x: m.c(x.reshape(IMAGE)).flatten(1), 1, "q", "q"),
    "the CPU in the middle": (lambda m, x: m.d(torch.sin(m.c(x))), 1, "q", "q"),
    "a constant output": (lambda m, x: (m.c(x), m.k * 2), 1, "q", "qf"),
    "nothing for the NPU": (lambda _, x: torch.sin(x), 1, "f", "f"),
}
DTYPES = {"q": torch.int8, "f": torch.float32}


def inputs_of(count: int, *, channels_last: bool = False, seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    values = (torch.randn(IMAGE, generator=generator) for _ in range(count))
    return tuple(value.to(memory_format=torch.channels_last) if channels_last else value for value in values)


def quantized(function: Callable[..., Any], inputs: Inputs) -> QuantizedModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnquantizedWarning)
        return quantize(seeded(lambda: Model(function)), inputs, [inputs], recover=None)


def with_int8_io(model: QuantizedModel) -> NeutronProgram:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FloatIOWarning)
        return lower(model, int8_io=True)


def integers(infos: tuple[TensorInfo, ...], values: Inputs) -> Inputs:
    return tuple(info.quantize(value) if info.scale else value for info, value in zip(infos, values, strict=True))


def floats(infos: tuple[TensorInfo, ...], values: Any) -> list[torch.Tensor]:
    pairs = zip(infos, flat(values), strict=True)
    return [info.dequantize(value) if info.scale else value for info, value in pairs]


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", CASES)
def test_int8_io_equals_the_float_program_on_dequantized_inputs(name: str, channels_last: bool) -> None:
    function, count, inputs, outputs = CASES[name]
    model = quantized(function, inputs_of(count, channels_last=channels_last))
    program = with_int8_io(model)
    assert [info.dtype for info in program.inputs] == [DTYPES[kind] for kind in inputs]
    assert [info.dtype for info in program.outputs] == [DTYPES[kind] for kind in outputs]
    assert all((info.scale is None) == (info.dtype == torch.float32) for info in program.inputs + program.outputs)
    given = integers(program.inputs, inputs_of(count, channels_last=channels_last, seed=1))
    in_float = lower(model)
    expected = flat(in_float.run(*floats(program.inputs, given)))
    for got, want in zip(floats(program.outputs, program.run(*given)), expected, strict=True):
        assert torch.equal(got, want)
        assert got.stride() == want.stride()


def test_no_requantization_remains_at_inputs_and_outputs() -> None:
    model = quantized(two_qparams, inputs_of(1))
    exported = torch.export.export(model.module, model.example_inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FloatIOWarning)
        int8_io(exported)
    (placeholder,) = (node for node in exported.graph.nodes if node.name == "inputs_0")
    assert not any(map(is_quantize, placeholder.users))
    assert is_quantize(next(iter(exported.graph.output_node().all_input_nodes)))
    assert exported.example_inputs is not None
    assert exported.example_inputs[0][0].dtype == torch.int8
    assert {row.where for row in lower(model, int8_io=True).placement} == {"npu"}


def test_the_exported_program_runs_too() -> None:
    """The exported program after `int8_io` runs in torch with int8 inputs and outputs."""
    model = quantized(*CASES["an input returned"][:1], inputs_of(1))
    exported = torch.export.export(model.module, model.example_inputs)
    qparams = int8_io(exported)
    assert exported.example_inputs is not None
    first, second = exported.module()(*exported.example_inputs[0])
    assert torch.equal(first, exported.example_inputs[0][0])
    zero_point, scale = qparams["output1_zp"], qparams["output1_scale"]
    torch.testing.assert_close((second.float() - zero_point) * scale, model(*model.example_inputs)[1])


@pytest.mark.parametrize("strict", [False, True])
def test_the_documented_flow(strict: bool) -> None:
    inputs = inputs_of(2)
    function = CASES["two inputs"][0]
    converted = convert(seeded(lambda: Model(function)), inputs, strict=strict)
    exported = torch.export.export(converted, inputs, strict=strict)
    qparams = int8_io(exported)
    partitioner = NeutronPartitioner(generate_neutron_compile_spec("imxrt700"))
    edge = to_edge_transform_and_lower(exported, partitioner=[partitioner], constant_methods=qparams)
    nodes = edge.exported_program().graph.nodes
    assert not [node for node in nodes if is_quantize(node) or is_dequantize(node)]
    program = HostProgram.from_bytes(bytes(edge.to_executorch().buffer))
    short = lower(quantized(function, inputs), int8_io=True)
    assert (program.inputs, program.outputs) == (short.inputs, short.outputs)
    given = integers(program.inputs, inputs)
    assert torch.equal(flat(program.run(*given))[0], flat(short.run(*given))[0])


def test_executorchs_own_passes_leave_the_same_qparams() -> None:
    model = quantized(CASES["two inputs"][0], inputs_of(2))
    exported = torch.export.export(model.module, model.example_inputs)
    partitioner = NeutronPartitioner(generate_neutron_compile_spec("imxrt700"))
    edge = to_edge_transform_and_lower(exported, partitioner=[partitioner])
    edge = edge.transform([QuantizeInputs(edge, [0, 1]), QuantizeOutputs(edge, [0])])
    program = HostProgram.from_bytes(bytes(edge.to_executorch().buffer))
    ours = lower(model, int8_io=True)
    assert (program.inputs, program.outputs) == (ours.inputs, ours.outputs)


class TestFloatOperators:
    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("an input that the CPU alone reads",
             r"input 1, 'inputs_1': it is read in float by 'sin' \(aten\.sin\.default\)\."),
            ("an input that nothing reads", r"input 1, 'inputs_1': nothing reads it\."),
            ("an output of the CPU", r"output 0, 'sin': aten\.sin\.default returns it in float\."),
        ],
    )  # fmt: skip
    def test_a_value_left_in_float_is_listed_with_its_reason(self, name: str, message: str) -> None:
        function, count, *_ = CASES[name]
        model = quantized(function, inputs_of(count))
        with pytest.warns(FloatIOWarning, match=f"These inputs and outputs remain in float:\n  {message}"):
            lower(model, int8_io=True)

    def test_inputs_and_outputs_of_float_layers_stay_in_float(self) -> None:
        layers = seeded(lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1)))
        model = quantize(layers, inputs_of(1), [inputs_of(1)], layers={"0": "float", "2": "float"})
        program = with_int8_io(model)
        assert (program.inputs[0].dtype, program.outputs[0].dtype) == (torch.float32, torch.float32)

    def test_integer_outputs_stay_integers_without_a_warning(self) -> None:
        inputs = (*inputs_of(1), torch.arange(5))
        model = quantized(lambda m, x, i: (m.c(x), i + 1), inputs)
        with warnings.catch_warnings():
            warnings.simplefilter("error", FloatIOWarning)
            program = lower(model, int8_io=True)
        assert [info.dtype for info in program.inputs] == [torch.int8, torch.int64]
        assert (program.inputs[1].scale, program.outputs[1].scale) == (None, None)


class TestOnTheHost:
    @pytest.fixture(scope="class")
    @classmethod
    def model(cls) -> QuantizedModel:
        return quantized(CASES["one of each"][0], inputs_of(1))

    def test_a_saved_program_says_its_qparams(self, model: QuantizedModel, tmp_path: Any) -> None:
        program = lower(model, int8_io=True)
        program.save(tmp_path / "model.pte")
        loaded = load(tmp_path / "model.pte")
        assert (loaded.inputs, loaded.outputs) == (program.inputs, program.outputs)
        nodes = list(model.module.graph.nodes)
        first = next(node for node in nodes if is_quantize(node))
        last = next(node for node in reversed(nodes) if is_dequantize(node))
        for (info,), node in ((loaded.inputs, first), (loaded.outputs, last)):
            assert info == TensorInfo(IMAGE, torch.int8, *node.args[1:3])
        given = loaded.inputs[0].quantize(inputs_of(1)[0])
        assert torch.equal(flat(loaded.run(given.numpy()))[0], flat(program.run(given))[0])

    def test_a_float_input_is_refused_with_the_qparams(self, model: QuantizedModel) -> None:
        program = lower(model, int8_io=True)
        (info,), (leaf,) = program.inputs, program.leaves or ()
        message = (
            rf"input '{leaf.name}' has dtype torch\.float32, expected torch\.int8 of scale {info.scale:.9g} and zero "
            rf"point {info.zero_point}: give inputs\[0\]\.quantize\(values\)"
        )
        with pytest.raises(InputError, match=message):
            program.run(*inputs_of(1))

    def test_a_float_program_has_no_qparams(self, model: QuantizedModel) -> None:
        program = lower(model)
        assert program.inputs == (TensorInfo(IMAGE, torch.float32),)
        with pytest.raises(InputError, match="is not quantized"):
            program.inputs[0].quantize(*inputs_of(1))
        with pytest.raises(InputError, match="is not quantized"):
            program.outputs[0].dequantize(*inputs_of(1))

    def test_integers_equal_the_quantize_operator(self) -> None:
        values = torch.cat([inputs_of(1)[0].flatten() * 3, torch.tensor([1e9, -1e9, 0.0])])
        for scale, zero_point in ((0.02166391, 5), (1 / 256, -128), (3.7, 127)):
            info = TensorInfo(tuple(values.shape), torch.int8, scale, zero_point)
            arguments = (scale, zero_point, -128, 127, torch.int8)
            expected = torch.ops.quantized_decomposed.quantize_per_tensor.default(values, *arguments)
            assert torch.equal(info.quantize(values), expected)
            back = torch.ops.quantized_decomposed.dequantize_per_tensor.default(expected, *arguments)
            assert torch.equal(info.dequantize(expected), back)


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_the_option_is_true_or_false(value: Any) -> None:
    model = quantized(CASES["one of each"][0], inputs_of(1))
    with pytest.raises(OptionError, match="int8_io takes True or False"):
        lower(model, int8_io=value)


def test_a_misspelt_option_is_recognized() -> None:
    model = quantized(CASES["one of each"][0], inputs_of(1))
    with pytest.raises(OptionError, match="Did you mean 'int8_io'"):
        lower(model, int8_oi=True)
