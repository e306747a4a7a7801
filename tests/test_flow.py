"""The documented flow and the short flow, end to end: results of the `.pte`, and placement."""

from __future__ import annotations

import copy
import inspect
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from benchmarks.models import MobileNetV2
from executorch.exir import to_edge, to_edge_transform_and_lower
from tests.flow_support import (
    Inputs,
    convert,
    delegate_count,
    flat,
    lower_documented,
    qparams,
    quantization_nodes,
    seeded,
    worst_lsb,
)
from tests.models import IMAGE, Model, bn, bn1, conv, conv_bn_relu, image, small
from torch import nn

import openneutron
from openneutron import (
    NeutronPartitioner,
    NeutronQuantizer,
    flow,
    generate_neutron_compile_spec,
    lower,
    quantize,
)
from openneutron.errors import OptionError
from openneutron.runtime.program import HostProgram

# Relative to the largest value of an output. int8 has steps of 1/255; wrong weights cause errors of 50 % and more.
MAX_QUANTIZATION_ERROR = 0.05


def shares_weights(m: Any, x: torch.Tensor) -> torch.Tensor:
    return F.conv2d(F.relu(m.c(x)), m.c.weight, None, padding=1)


def branches(m: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    first = F.relu(m.c(x))
    return first, m.d(first)


def residual(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.c(x)
    y += x
    return F.relu(y)


def two_levels(m: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    first = m.c(x)
    second = m.d(first)
    third = m.d(torch.sin(first)) + second
    return third, m.c(torch.sin(third))


def dead(m: Any, x: torch.Tensor) -> torch.Tensor:
    m.d(x)
    torch.sin(x)
    result: torch.Tensor = m.c(x)
    return result


def read_by_norm_and_more(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.c(x)
    result: torch.Tensor = m.b(y) + y
    return result


def fixed_qparams(m: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.cat([m.c(x), torch.sigmoid(m.d(x)), torch.tanh(m.d(x))], 1).abs()


Case = tuple[Callable[[], Model], tuple[tuple[int, ...], ...], int, list[str]]

# name: model, shapes of its inputs, delegates, operators on the CPU
CASES: dict[str, Case] = {
    "batch of three": (small, ((3, 4, 8, 8),), 1, []),
    "convolution, batch norm, relu": (conv_bn_relu, (IMAGE,), 1, []),
    "several inputs and outputs": (
        lambda: Model(lambda m, x, y: (F.relu(m.c(x) + m.d(y)), m.d(y)), c=conv(), d=conv()), (IMAGE, IMAGE), 1, [],
    ),
    "inputs of different shapes": (
        lambda: Model(lambda m, x, y: m.c(x) + m.l(y).reshape(1, 4, 1, 1), c=conv(), l=nn.Linear(6, 4)),
        (IMAGE, (1, 6)), 1, [],
    ),
    "a dictionary of outputs": (
        lambda: Model(lambda m, x: {"b": m.c(x), "a": (F.relu(m.d(x)), [x.mean((2, 3))])}, c=conv(), d=conv()),
        (IMAGE,), 1, [],
    ),
    "weights shared by two layers": (lambda: Model(shares_weights, c=conv()), (IMAGE,), 1, []),
    "a convolution used twice": (lambda: Model(lambda m, x: m.c(F.relu(m.c(x))), c=conv()), (IMAGE,), 1, []),
    "convolution and batch norm used twice": (
        lambda: Model(lambda m, x: m.c(F.relu(m.c(x))), c=nn.Sequential(conv(), bn())), (IMAGE,), 1, [],
    ),
    "the same without a bias": (
        lambda: Model(lambda m, x: m.c(F.relu(m.c(x))), c=nn.Sequential(conv(bias=False), bn())), (IMAGE,), 1, [],
    ),
    "one convolution, a batch norm for each use": (
        lambda: Model(lambda m, x: m.b(m.c(F.relu(m.a(m.c(x))))), c=conv(), a=bn(), b=bn()), (IMAGE,), 1, [],
    ),
    "one convolution, a batch norm for one use": (
        lambda: Model(lambda m, x: m.c(F.relu(m.a(m.c(x)))), c=conv(), a=bn()), (IMAGE,), 1, [],
    ),
    "a convolution read by a batch norm and more": (
        lambda: Model(read_by_norm_and_more, c=conv(), b=bn()), (IMAGE,), 1, [],
    ),
    "linear and batch norm": (
        lambda: Model(lambda m, x: F.relu(m.b(m.l(x))), l=nn.Linear(16, 8), b=bn1(8)), ((4, 16),), 1, [],
    ),
    "linear and batch norm over another dimension": (
        lambda: Model(lambda m, x: F.relu(m.b(m.l(x))), l=nn.Linear(5, 8), b=bn1(6)), ((2, 6, 5),), 1, [],
    ),
    "conv1d and batch norm": (
        lambda: Model(lambda m, x: F.relu(m.b(m.c(x))), c=nn.Conv1d(4, 8, 3), b=bn1(8)), ((2, 4, 16),), 1, [],
    ),
    "a batch norm alone": (
        lambda: Model(lambda m, x: m.c(m.b(x)), c=conv(), b=bn()), (IMAGE,), 1, [],
    ),
    "an input used more than once": (
        lambda: Model(lambda m, x: m.c(x) + m.d(x) + F.adaptive_avg_pool2d(x, 1), c=conv(), d=conv()), (IMAGE,), 1, [],
    ),
    "an output that is an intermediate": (lambda: Model(branches, c=conv(), d=conv()), (IMAGE,), 1, []),
    "one value returned twice": (
        lambda: Model(lambda m, x: (m.c(x),) * 2, c=conv()), (IMAGE,), 1, [],
    ),
    "a constant branch": (
        lambda: Model(lambda m, x: m.c(x) + F.relu(m.d(m.k)), c=conv(), d=conv(), k=torch.randn(IMAGE)), (IMAGE,), 1,
        [],
    ),
    "a constant per channel": (
        lambda: Model(lambda m, x: m.c(x) + m.k, c=conv(), k=torch.randn(1, 4, 1, 1)), (IMAGE,), 1, [],
    ),
    "a constant output": (lambda: Model(lambda m, x: (m.c(x), m.k * 2), c=conv(), k=torch.randn(3)), (IMAGE,), 1, []),
    "an input returned": (lambda: Model(lambda m, x: (x, m.c(x)), c=conv()), (IMAGE,), 1, []),
    "an input that nothing reads": (lambda: Model(lambda m, x, _: m.c(x), c=conv()), (IMAGE, IMAGE), 1, []),
    "one operator": (lambda: Model(lambda _, x: F.relu(x)), (IMAGE,), 1, []),
    "nothing but a view": (lambda: Model(lambda _, x: x.view(1, -1)), (IMAGE,), 0, ["aten.view_copy.default"]),
    "dead branches": (lambda: Model(dead, c=conv(), d=conv()), (IMAGE,), 1, []),
    "in place": (lambda: Model(residual, c=conv()), (IMAGE,), 1, []),
    "a scalar": (lambda: Model(lambda m, x: m.c(x) + 1.0, c=conv()), (IMAGE,), 1, []),
    "unsupported in the middle": (
        lambda: Model(lambda m, x: m.d(torch.sin(m.c(x))), c=conv(), d=conv()), (IMAGE,), 2, ["aten.sin.default"],
    ),
    "unsupported at the start": (
        lambda: Model(lambda m, x: m.d(m.c(torch.sin(x))), c=conv(), d=conv()), (IMAGE,), 1, ["aten.sin.default"],
    ),
    "unsupported at the end": (
        lambda: Model(lambda m, x: torch.sin(m.d(m.c(x))), c=conv(), d=conv()), (IMAGE,), 1, ["aten.sin.default"],
    ),
    "unsupported in a parallel branch": (
        lambda: Model(lambda m, x: m.c(x) + m.d(torch.sin(m.c(x))), c=conv(), d=conv()), (IMAGE,), 2,
        ["aten.sin.default"],
    ),
    "three levels": (lambda: Model(two_levels, c=conv(), d=conv()), (IMAGE,), 3, ["aten.sin.default"] * 2),
    "fixed qparams in a concatenation": (
        lambda: Model(fixed_qparams, c=conv(), d=conv()), (IMAGE,), 1, [],
    ),
}  # fmt: skip


def inputs_of(shapes: tuple[tuple[int, ...], ...], seed: int = 0) -> Inputs:
    return tuple(image(*shape, seed=seed + index) for index, shape in enumerate(shapes))


def assert_close_to_float(model: nn.Module, converted: Callable[..., Any], inputs: Inputs) -> None:
    for want, got in zip(flat(model(*inputs)), flat(converted(*inputs)), strict=True):
        assert (want - got).abs().max() <= MAX_QUANTIZATION_ERROR * want.abs().max()


@pytest.mark.parametrize("name", CASES)
def test_documented_flow(name: str) -> None:
    build, shapes, delegates, cpu = CASES[name]
    model, inputs = seeded(build), inputs_of(shapes)
    converted, from_strict = convert(model, inputs), convert(model, inputs, strict=True)
    assert_close_to_float(model, converted, inputs)
    assert quantization_nodes(converted) == quantization_nodes(from_strict)
    assert qparams(converted) == qparams(from_strict)
    lowered = lower_documented(converted, inputs)
    assert (lowered.delegates, lowered.cpu) == (delegates, cpu)
    assert worst_lsb(converted, lowered.run, [inputs, inputs_of(shapes, seed=50)]) <= 1


@pytest.mark.parametrize("name", CASES)
def test_short_flow(name: str) -> None:
    build, shapes, delegates, _ = CASES[name]
    model, inputs = seeded(build), inputs_of(shapes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = quantize(model, inputs, [inputs])
    assert_close_to_float(model, quantized, inputs)
    program = lower(quantized)
    assert len({row.partition for row in program.placement} - {None}) == delegates
    assert worst_lsb(quantized.module, program.run, [inputs, inputs_of(shapes, seed=50)]) <= 1


def test_a_program_is_loaded_once_and_can_be_pickled_and_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[bytes] = []
    load_program = HostProgram.__init__

    def counted(program: HostProgram, data: bytes, **options: Any) -> None:
        loaded.append(data)
        load_program(program, data, **options)

    monkeypatch.setattr(HostProgram, "__init__", counted)
    program = lower(quantize(seeded(small), (image(),), [image()]))
    first, second = flat(program.run(image())), flat(program.run(2 * image()))
    assert loaded == [program.buffer]
    assert (program.inputs[0].shape, program.outputs[0].shape) == ((1, 4, 8, 8), tuple(first[0].shape))
    assert loaded == [program.buffer]
    for copied in (pickle.loads(pickle.dumps(program)), copy.deepcopy(program)):
        assert copied == program
        assert torch.equal(flat(copied.run(image()))[0], first[0])
    other = replace(program, buffer=lower(quantize(seeded(small), (image(),), [3 * image()])).buffer)
    assert not torch.equal(flat(other.run(image()))[0], first[0])
    assert torch.equal(flat(program.run(2 * image()))[0], second[0])


def test_strict_export_of_the_converted_module() -> None:
    inputs = (image(),)
    converted = convert(seeded(small), inputs, strict=True)
    lowered = lower_documented(converted, inputs, strict=True)
    assert (lowered.delegates, lowered.cpu) == (1, [])
    assert lowered.pte == lower_documented(converted, inputs).pte


def test_one_quantizer_serves_two_models() -> None:
    inputs, shared = (image(),), NeutronQuantizer()
    for build in (small, conv_bn_relu, small):
        model = seeded(build)
        alone, after_others = convert(model, inputs), convert(model, inputs, quantizer=shared)
        assert alone.code == after_others.code
        assert qparams(alone) == qparams(after_others)


def test_an_input_of_integers_stays_on_the_cpu() -> None:
    model = seeded(lambda: Model(lambda m, x, i: (m.c(x), i + 1), c=conv()))
    inputs = (image(), torch.arange(5))
    converted = convert(model, inputs)
    lowered = lower_documented(converted, inputs)
    assert (lowered.delegates, lowered.cpu) == (1, ["aten.add.Tensor"])
    found = lowered.run(*inputs)
    assert isinstance(found, tuple)
    assert torch.equal(found[1], inputs[1] + 1)


def test_lowering_does_not_change_the_exported_program() -> None:
    inputs = (image(),)
    exported = torch.export.export(convert(seeded(small), inputs), inputs)
    before = str(exported), {name: value.clone() for name, value in exported.state_dict.items()}
    to_edge_transform_and_lower(exported, partitioner=[NeutronPartitioner(generate_neutron_compile_spec("imxrt700"))])
    assert str(exported) == before[0]
    assert exported.state_dict.keys() == before[1].keys()
    assert all(torch.equal(exported.state_dict[name], value) for name, value in before[1].items())


def test_quantization_does_not_change_the_model() -> None:
    model, inputs = seeded(small), (image(),)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    quantize(model, inputs, [inputs])
    convert(model, inputs)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_several_methods_in_one_program() -> None:
    inputs = {"forward": (image(),), "other": (image(2, 4, 8, 8),)}
    models = {"forward": small, "other": conv_bn_relu}
    converted = {name: convert(seeded(build), inputs[name]) for name, build in models.items()}
    exported = {name: torch.export.export(module, inputs[name]) for name, module in converted.items()}
    edge = to_edge_transform_and_lower(
        exported, partitioner=[NeutronPartitioner(generate_neutron_compile_spec("imxrt700"))]
    )
    assert [delegate_count(edge.exported_program(name).graph_module) for name in exported] == [1, 1]
    pte = bytes(edge.to_executorch().buffer)
    run = openneutron.runtime.HostProgram.from_bytes(pte).run
    assert worst_lsb(converted["forward"], run, [inputs["forward"]]) <= 1


SCRIPT = """
import sys, torch
from torch import nn
from executorch.exir import to_edge_transform_and_lower
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from openneutron import NeutronPartitioner, NeutronQuantizer, generate_neutron_compile_spec, lower, quantize
torch.manual_seed(0)
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.c, self.b, self.d = nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1, groups=2)
    def forward(self, x):
        y = torch.relu(self.b(self.c(x)))
        return torch.sigmoid(self.d(torch.sin(y))), torch.cat([y, self.d(y)], 1)
model, x = Net().eval(), (torch.randn(1, 4, 8, 8),)
prepared = prepare_pt2e(torch.export.export(model, x).module(), NeutronQuantizer())
prepared(*x)
spec = generate_neutron_compile_spec("imxrt700")
exported = torch.export.export(convert_pt2e(prepared), x)
edge = to_edge_transform_and_lower(exported, partitioner=[NeutronPartitioner(spec)])
open(sys.argv[1] + ".pte", "wb").write(edge.to_executorch().buffer)
lower(quantize(model, x, [x])).save(sys.argv[1] + "_short.pte")
"""


@pytest.mark.slow
def test_two_runs_give_equal_bytes(tmp_path: Path) -> None:
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", SCRIPT, str(tmp_path / seed)]
        subprocess.run(command, env=environment, check=True, capture_output=True)
    for kind in (".pte", "_short.pte"):
        assert (tmp_path / f"1{kind}").read_bytes() == (tmp_path / f"2{kind}").read_bytes()


@pytest.mark.slow
def test_mobilenet_v2_is_one_delegate() -> None:
    model, inputs = seeded(MobileNetV2), (image(1, 3, 224, 224),)
    converted = convert(model, inputs)
    lowered = lower_documented(converted, inputs, neutron_converter_flavor="SDK_25_06")
    assert lowered.cpu == []
    assert lowered.delegates == 1
    assert worst_lsb(converted, lowered.run, [inputs]) <= 1


def test_the_older_call_is_refused_with_a_message() -> None:
    inputs = (image(),)
    edge = to_edge(torch.export.export(convert(seeded(small), inputs), inputs))
    with pytest.raises(OptionError, match="to_edge_transform_and_lower"):
        edge.to_backend(NeutronPartitioner(generate_neutron_compile_spec("imxrt700")))


def test_intermediates_are_written(tmp_path: Path) -> None:
    quantized = quantize(seeded(small), (image(),), [image()])
    lower(quantized, intermediates_dir=str(tmp_path))
    assert (tmp_path / "partition_0.tflite").read_bytes()[4:8] == b"TFL3"


OPTIONS: dict[str, Any] = {
    "recover": "fast", "recovery_seconds": 7.0, "strict": True, "transform": torch.neg, "batch_size": 2, "jobs": 2,
    "stop_when_converged": True, "progress": False,
}  # fmt: skip
"""A value for each option of `quantize` that is not its default."""


def test_each_option_of_quantize_reaches_the_quantization(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = inspect.signature(quantize).parameters.values()
    defaults = {one.name: one.default for one in parameters if one.kind is one.KEYWORD_ONLY}
    assert defaults.keys() == OPTIONS.keys()

    monkeypatch.setattr(flow, "_quantized_for", lambda *arguments: arguments)
    arguments = ("model", "inputs", "data", "imxrt700")
    first: Any = flow.quantize
    second: Any = flow.quantize_for_lowering
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [(OPTIONS, {"equalize": False}), ({}, {})]
    for given, rest in cases:
        found = first(*arguments, **given, **rest)
        *others, options = found
        reached = {**vars(options), **vars(options.running)}
        assert others == ["imxrt700", "model", "inputs", "data"]
        assert {name: reached[name] for name in defaults} == {**defaults, **given}
        assert options.quantizer == rest
        found = second(("aten::relu",), *arguments, **given, **rest)
        assert found == (*others, replace(options, not_delegated=("aten::relu",)))
