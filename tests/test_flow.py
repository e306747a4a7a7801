"""The documented flow and the short way, end to end: what the `.pte` computes, and where."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
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
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

import openneutron
from openneutron import (
    NeutronPartitioner,
    NeutronQuantizer,
    generate_neutron_compile_spec,
    load,
    lower,
    quantize,
)
from openneutron.errors import (
    CalibrationError,
    InputError,
    ModelError,
    OpenNeutronError,
    OptionError,
    OutputError,
    TargetError,
)
from openneutron.partition.partitioner import CpuWarning

IMAGE = (1, 4, 8, 8)
# Relative to the largest value of an output. int8 has steps of 1/255; wrong weights give 50% and more.
MAX_QUANTIZATION_ERROR = 0.05


class Model(nn.Module):
    """A function of its own modules and constants, and of the inputs."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module | torch.Tensor) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                self.add_module(name, part)
            else:
                self.register_buffer(name, part)

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.function(self, *inputs)


def conv(channels_in: int = 4, channels_out: int = 4, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, padding=1, **options)


def trained(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> nn.Module:
    """With statistics and weights that a training would leave, far from 0 and 1."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    norm.weight.data.uniform_(0.5, 1.5)
    norm.bias.data.normal_()
    return norm


def bn(channels: int = 4) -> nn.Module:
    return trained(nn.BatchNorm2d(channels))


def bn1(channels: int) -> nn.Module:
    return trained(nn.BatchNorm1d(channels))


def conv_bn_relu() -> Model:
    return Model(lambda m, x: m.d(F.relu(m.b(m.c(x)))), c=conv(bias=False), b=bn(), d=conv())


def small() -> Model:
    return Model(
        lambda m, x: m.l(m.p(F.relu(m.b(m.c(x)))).flatten(1)),
        c=conv(4, 8), b=bn(8), p=nn.AdaptiveAvgPool2d(1), l=nn.Linear(8, 5),
    )  # fmt: skip


def image(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape or IMAGE, generator=torch.Generator().manual_seed(seed))


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
    return torch.cat([m.c(x), torch.sigmoid(m.d(x)), torch.tanh(m.d(x))], 1)


def with_dropout(m: Any, x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = m.l(m.d(m.b(m.c(x))).flatten(1))
    return result


Case = tuple[Callable[[], Model], tuple[tuple[int, ...], ...], int, list[str]]

# name: model, shapes of its inputs, delegates, what is left on the CPU
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
def test_short_way(name: str) -> None:
    build, shapes, delegates, _ = CASES[name]
    model, inputs = seeded(build), inputs_of(shapes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = quantize(model, inputs, [inputs])
    assert_close_to_float(model, quantized, inputs)
    program = lower(quantized)
    assert len({row.partition for row in program.placement} - {None}) == delegates
    assert worst_lsb(quantized.module, program.run, [inputs, inputs_of(shapes, seed=50)]) <= 1


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


def test_lowering_leaves_the_exported_program_as_it_was() -> None:
    inputs = (image(),)
    exported = torch.export.export(convert(seeded(small), inputs), inputs)
    before = str(exported), {name: value.clone() for name, value in exported.state_dict.items()}
    to_edge_transform_and_lower(exported, partitioner=[NeutronPartitioner(generate_neutron_compile_spec("imxrt700"))])
    assert str(exported) == before[0]
    assert exported.state_dict.keys() == before[1].keys()
    assert all(torch.equal(exported.state_dict[name], value) for name, value in before[1].items())


def test_quantization_leaves_the_model_as_it_was() -> None:
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


class TestOperatorsNotToDelegate:
    @pytest.fixture(scope="class")
    def converted(self) -> torch.fx.GraphModule:
        model = seeded(
            lambda: Model(lambda m, x: m.l((m.c(x) + m.d(x)).flatten(1)), c=conv(), d=conv(), l=nn.Linear(256, 5))
        )
        return convert(model, (image(),))

    def blocked(self, converted: torch.fx.GraphModule, *names: str) -> set[str]:
        """Operators on the CPU; the program is right all the same."""
        program = lower(converted, (image(),), operators_not_to_delegate=list(names))
        assert worst_lsb(converted, program.run, [(image(),)]) <= 1
        documented = lower_documented(converted, (image(),), operators_not_to_delegate=list(names))
        assert worst_lsb(converted, documented.run, [(image(),)]) <= 1
        return {row.node for row in program.placement if row.where == "cpu"}

    @pytest.mark.parametrize(
        "name",
        ["aten::conv2d", "aten.conv2d", "aten.conv2d.default", "aten::conv2d.default", "aten.convolution.default",
         "aten::convolution"],
    )  # fmt: skip
    def test_operator_names(self, converted: torch.fx.GraphModule, name: str) -> None:
        assert self.blocked(converted, name) == {"conv2d", "conv2d_1"}

    def test_node_names(self, converted: torch.fx.GraphModule) -> None:
        assert self.blocked(converted, "conv2d_1") == {"conv2d_1"}

    def test_names_are_no_substrings(self, converted: torch.fx.GraphModule) -> None:
        assert self.blocked(converted, "aten::addmm") == set()
        assert self.blocked(converted, "aten::add") == {"add"}

    def test_everything_blocked_is_a_program_on_the_cpu(self, converted: torch.fx.GraphModule) -> None:
        names = ["aten::conv2d", "aten::add", "aten::linear", "aten::flatten"]
        assert {"conv2d", "conv2d_1", "add", "linear"} <= self.blocked(converted, *names)

    @pytest.mark.parametrize("name", ["conv", "conv2", "aten", "aten::conv2", "add.Tensor", "conv2d_12"])
    def test_unknown_names_list_near_matches(self, converted: torch.fx.GraphModule, name: str) -> None:
        with pytest.raises(OptionError, match=f"'{name}', which is no operator and no node") as error:
            lower(converted, (image(),), operators_not_to_delegate=[name])
        assert name in ("aten", "conv") or "conv2d" in str(error.value) or "add" in str(error.value)

    def test_reason_names_the_option(self, converted: torch.fx.GraphModule) -> None:
        rows = lower(converted, (image(),), operators_not_to_delegate=["aten::add"]).placement
        (row,) = (row for row in rows if row.where == "cpu")
        assert row.reason == "'aten::add' is in operators_not_to_delegate."
        assert row.op == "aten.add.Tensor"
        assert row.partition is None
        assert row.source is not None
        assert Path(__file__).name in row.source


def test_the_older_call_is_refused_in_words() -> None:
    inputs = (image(),)
    edge = to_edge(torch.export.export(convert(seeded(small), inputs), inputs))
    with pytest.raises(OptionError, match="to_edge_transform_and_lower"):
        edge.to_backend(NeutronPartitioner(generate_neutron_compile_spec("imxrt700")))


def test_a_model_without_anything_for_the_npu_still_lowers() -> None:
    model = Model(lambda _, x: torch.sin(x))
    lowered = lower_documented(convert(model, (image(),)), (image(),))
    assert (lowered.delegates, lowered.cpu) == (0, ["aten.sin.default"])
    found = lowered.run(image())
    assert isinstance(found, torch.Tensor)
    torch.testing.assert_close(found, torch.sin(image()))


def test_what_runs_on_the_cpu_is_warned_about_with_its_reason() -> None:
    model = Model(lambda m, x: torch.sin(m.c(x)), c=conv())
    exported = torch.export.export(convert(model.eval(), (image(),)), (image(),))
    partitioner = NeutronPartitioner(generate_neutron_compile_spec("imxrt700"))
    with pytest.warns(CpuWarning, match=r"sin \(aten\.sin\.default, .*test_flow\.py:\d+\): OpenNeutron has no such"):
        to_edge_transform_and_lower(exported, partitioner=[partitioner])


def test_intermediates_are_written(tmp_path: Path) -> None:
    quantized = quantize(seeded(small), (image(),), [image()])
    lower(quantized, intermediates_dir=str(tmp_path))
    assert (tmp_path / "partition_0.tflite").read_bytes()[4:8] == b"TFL3"


class TestLegacyGeneration:
    def test_what_it_does_not_take_runs_on_the_cpu_with_the_limit_as_reason(self) -> None:
        inputs = (image(2, 4, 8, 8),)
        quantized = quantize(seeded(small), inputs, [inputs])
        assert {row.where for row in lower(quantized).placement} == {"npu"}
        program = lower(quantized, neutron_converter_flavor="SDK_25_06")
        reasons = {row.node: row.reason for row in program.placement if row.where == "cpu"}
        assert (reasons["conv2d"] or "").startswith("imxrt700 takes convolution only if: The batch size is 1, or ")
        assert worst_lsb(quantized.module, program.run, [inputs]) <= 1


def prepared(model: nn.Module, inputs: Inputs, **options: Any) -> Any:
    return prepare_pt2e(torch.export.export(model, inputs, **options).module(), NeutronQuantizer())


def in_train_mode(name: str) -> nn.Module:
    model = seeded(lambda: Model(with_dropout, c=conv(), b=bn(), d=nn.Dropout(0.5), l=nn.Linear(256, 5)))
    model.get_submodule(name).train()
    return model


class TestErrors:
    @pytest.mark.parametrize("name", ["", "b", "d"])
    def test_train_mode(self, name: str) -> None:
        with pytest.raises(ModelError, match=r"train mode\. Call model\.eval\(\)") as error:
            prepared(in_train_mode(name), (image(),))
        assert error.value.node is not None
        assert error.value.source is not None
        assert error.value.source.startswith(__file__)
        with pytest.raises(ModelError, match=r"train mode \('.+'\)\. Call model\.eval\(\)"):
            quantize(in_train_mode(name), (image(),), [image()])

    def test_batch_norm_without_statistics(self) -> None:
        norm = nn.BatchNorm2d(4, track_running_stats=False)
        model = Model(lambda m, x: m.b(m.c(x)), c=conv(), b=norm).eval()
        with pytest.raises(ModelError, match="track_running_stats=True") as error:
            prepared(model, (image(),))
        assert (error.value.node, error.value.op) == ("batch_norm", "aten.batch_norm.default")
        with pytest.raises(ModelError, match="track_running_stats=True"):
            quantize(model, (image(),), [image()])

    def test_dynamic_shapes(self) -> None:
        shapes = ({0: torch.export.Dim("batch", min=1, max=8)},)
        model = nn.Sequential(conv(), nn.ReLU()).eval()
        with pytest.raises(ModelError, match=r"dynamic.*Export without dynamic_shapes") as error:
            prepared(model, (image(2, 4, 8, 8),), dynamic_shapes=shapes)
        assert error.value.node is not None
        assert error.value.node.startswith("input")

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
    def test_dtype(self, dtype: torch.dtype) -> None:
        model, x = nn.Sequential(conv(), nn.ReLU()).eval().to(dtype), image().to(dtype)
        with pytest.raises(ModelError, match=rf"{dtype} is not supported.*model\.float\(\)"):
            prepared(model, (x,))
        with pytest.raises(ModelError, match=rf"{dtype} is not supported.*model\.float\(\)"):
            quantize(model, (x,), [x])

    def test_dtype_of_the_input_alone(self) -> None:
        with pytest.raises(InputError, match=r"torch\.float64 \(1, 4, 8, 8\)"):
            quantize(seeded(small), (image().double(),), [image().double()])

    def test_calibration_never_ran(self) -> None:
        with pytest.raises(CalibrationError, match=r"never reached.*before convert_pt2e") as error:
            convert_pt2e(prepared(seeded(small), (image(),)))
        assert error.value.node is not None
        with pytest.raises(CalibrationError, match="empty"):
            quantize(seeded(small), (image(),), [])

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_calibration_on_what_is_not_finite(self, value: float) -> None:
        x = image()
        x[0, 0, 0, 0] = value
        module = prepared(seeded(small), (image(),))
        module(x)
        module(image())
        with pytest.raises(CalibrationError, match="NaN or infinite") as error:
            convert_pt2e(module)
        assert error.value.node is not None
        with pytest.raises(CalibrationError, match="input 1 holds NaN or infinite"):
            quantize(seeded(small), (image(),), [image(), x])

    def test_weights_that_are_not_finite(self) -> None:
        convolution = conv()
        convolution.weight.data[0] = float("nan")
        model = Model(lambda m, x: m.c(x), c=convolution).eval()
        with pytest.raises(CalibrationError, match="weights") as error:
            quantize(model, (image(),), [image()])
        assert error.value.source is not None
        assert error.value.source.startswith(__file__)

    @pytest.mark.parametrize(
        "x", [image(1, 4, 9, 9), image(2, 4, 8, 8), image(1, 3, 8, 8), image().double(), image().int()]
    )
    def test_calibration_of_another_shape_or_dtype(self, x: torch.Tensor) -> None:
        described = rf"{x.dtype} \({', '.join(map(str, x.shape))}\)".replace(".", r"\.")
        with pytest.raises(InputError, match=rf"Input 'inputs_0' is {described}; .*torch\.float32 \(1, 4, 8, 8\)"):
            prepared(seeded(small), (image(),))(x)
        with pytest.raises(CalibrationError, match="Calibration input 1 is"):
            quantize(seeded(small), (image(),), [image(), x])

    @pytest.mark.parametrize("data", [None, 3])
    def test_calibration_that_is_none(self, data: Any) -> None:
        with pytest.raises(CalibrationError, match="iterable"):
            quantize(seeded(small), (image(),), data)
        with pytest.raises(CalibrationError, match="Calibration input 0 is"):
            quantize(seeded(small), (image(),), [data])

    @pytest.mark.parametrize("examples", [(image(1, 3, 8, 8),), (image(), image()), (), None, (3,), 3])
    def test_example_inputs_that_do_not_match(self, examples: Any) -> None:
        with pytest.raises(InputError, match=r"example.inputs"):
            quantize(seeded(small), examples, [image()])

    @pytest.mark.parametrize("examples", [(image(1, 4, 9, 9),), (image().double(),), (image(), image()), None])
    def test_lower_with_example_inputs_that_do_not_match(self, examples: Any) -> None:
        module = convert(seeded(small), (image(),))
        with pytest.raises(InputError, match=r"example.inputs"):
            lower(module, examples)

    def test_lower_what_is_not_quantized(self) -> None:
        for model in (seeded(small), torch.export.export(seeded(small), (image(),)).module()):
            with pytest.raises(ModelError, match=r"Call quantize\(\) first"):
                lower(model, (image(),))  # type: ignore[arg-type]

    def test_unknown_target(self) -> None:
        module = convert(seeded(small), (image(),))
        attempts: list[Callable[[], object]] = [
            lambda: NeutronQuantizer("imxrt800"),
            lambda: quantize(seeded(small), (image(),), [image()], "imxrt800"),
            lambda: lower(module, (image(),), target="imxrt800"),
            lambda: generate_neutron_compile_spec("imxrt800"),
        ]
        for attempt in attempts:
            with pytest.raises(TargetError, match=r"Did you mean 'imxrt700'.*Known targets: imxrt700, mcxn94x"):
                attempt()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"use_profilling": True}, "Did you mean 'use_profiling'"),
            ({"use_profiling": "yes"}, "True or False"),
            ({"neutron_converter_flavor": 25}, "text or None"),
            ({"neutron_converter_flavor": "25_06"}, "SDK_25_06"),
            ({"operators_not_to_delegate": "aten::add"}, "list of names"),
            ({"operators_not_to_delegate": 3}, "list of names"),
            ({"operators_not_to_delegate": [3]}, "names; 3 is none"),
            ({"extra_flags": 1}, "text or None"),
        ],
    )
    def test_options_of_lower(self, options: dict[str, Any], message: str) -> None:
        module = convert(seeded(small), (image(),))
        with pytest.raises(OptionError, match=message):
            lower(module, (image(),), **options)

    @pytest.mark.parametrize(
        "options", [{"weight_granularity": "channel"}, {"observer": 3}, {"is_qat": True}, {"weight_granularit": 1}]
    )
    def test_options_of_quantize(self, options: dict[str, Any]) -> None:
        with pytest.raises(OptionError):
            quantize(seeded(small), (image(),), [image()], **options)

    @pytest.mark.parametrize("spec", [None, "imxrt700", [3], 3])
    def test_partitioner_without_a_compile_spec(self, spec: Any) -> None:
        with pytest.raises(OptionError, match="generate_neutron_compile_spec"):
            NeutronPartitioner(spec)

    def test_partitioner_for_another_target(self) -> None:
        with pytest.raises(OptionError, match="'imxrt700', the partitioner for 'imx95'"):
            NeutronPartitioner(generate_neutron_compile_spec("imxrt700"), "imx95")

    @pytest.mark.parametrize("path", ["missing/model.pte", "folder", "file/model.pte"])
    def test_output_that_cannot_be_written(self, path: str, tmp_path: Path) -> None:
        (tmp_path / "folder").mkdir()
        (tmp_path / "file").touch()
        program = lower(quantize(seeded(small), (image(),), [image()]))
        with pytest.raises(OutputError, match=f"Cannot write '{tmp_path / path}'.*Give a path"):
            program.save(tmp_path / path)
        assert sorted(entry.name for entry in tmp_path.rglob("*")) == ["file", "folder"]

    def test_saving_replaces_the_file(self, tmp_path: Path) -> None:
        program = lower(quantize(seeded(small), (image(),), [image()]))
        path = tmp_path / "model.pte"
        path.write_bytes(b"old")
        program.save(path)
        assert path.read_bytes() == program.buffer
        assert [entry.name for entry in tmp_path.iterdir()] == ["model.pte"]
        assert torch.equal(flat(load(path).run(image()))[0], flat(program.run(image()))[0])

    def test_every_error_is_an_open_neutron_error(self) -> None:
        from openneutron import errors

        for name in errors.__all__:
            assert issubclass(getattr(errors, name), OpenNeutronError)
