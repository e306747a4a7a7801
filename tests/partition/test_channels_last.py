"""Models and inputs in channels-last format: transposes, and results, also with operators on the CPU."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from tests.flow_support import convert, flat, lower_documented, seeded, worst_lsb
from tests.models import trained
from torch import nn

from openneutron import QuantizedModel, lower, quantize
from openneutron.formats import pte
from openneutron.quantizer import UnquantizedWarning

CHANNELS_LAST = torch.channels_last
IMAGE = (1, 3, 8, 8)
MAX_LSB = 1.01  # one step, and float32 rounding


class Net(nn.Module):
    """A function of modules and of the input."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.function(self, *inputs)


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = F.adaptive_avg_pool2d(x, 1)
        return x * torch.sigmoid(self.b(F.relu(self.a(pooled))))


def conv(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


def residual() -> nn.Module:
    return Net(lambda m, x: F.relu(m.b(F.relu(m.a(x))) + m.p(x)), a=conv(3, 8), b=conv(8, 8), p=conv(3, 8, 1))


def concatenation() -> nn.Module:
    function = lambda m, x: m.c(torch.cat([m.a(x), m.b(x), x], 1))  # noqa: E731
    return Net(function, a=conv(3, 4), b=conv(3, 4, 1), c=conv(11, 4))


def mean_head() -> nn.Module:
    return Net(lambda m, x: m.l(F.relu(m.a(x)).mean((2, 3))), a=conv(3, 8), l=nn.Linear(8, 5))


def pool_head() -> nn.Module:
    return Net(lambda m, x: m.l(F.adaptive_avg_pool2d(m.a(x), 1).flatten(1)), a=conv(3, 8), l=nn.Linear(8, 5))


def flatten_head() -> nn.Module:
    return Net(lambda m, x: m.l(F.relu(m.a(x)).flatten(1)), a=conv(3, 8), l=nn.Linear(512, 5))


def gate() -> nn.Module:
    return Net(lambda m, x: m.a(x) * m.b(x).mean((2, 3), keepdim=True), a=conv(3, 8), b=conv(3, 8))


# name: model, shape of the input, names of nodes to leave to the CPU, one at a time
Case = tuple[Callable[[], nn.Module], tuple[int, ...], list[str]]
CASES: dict[str, Case] = {
    "convolutions": (
        lambda: nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 16, stride=2), nn.ReLU6()), IMAGE,
        ["conv2d", "relu", "conv2d_1", "relu6"],
    ),
    "residual": (residual, IMAGE, ["add", "relu_1", "conv2d_1"]),
    "squeeze and excite": (
        lambda: nn.Sequential(conv(3, 8), SqueezeExcite(8), conv(8, 4)), IMAGE,
        ["mul", "sigmoid", "adaptive_avg_pool2d", "conv2d_1"],
    ),
    "depthwise": (
        lambda: nn.Sequential(conv(3, 8), nn.ReLU6(), conv(8, 8, groups=8, stride=2), nn.ReLU6(), conv(8, 16, 1)),
        IMAGE, ["conv2d_1", "relu6_1"],
    ),
    "groups": (lambda: nn.Sequential(conv(3, 8), conv(8, 8, groups=2)), IMAGE, ["conv2d_1"]),
    "pools": (
        lambda: nn.Sequential(conv(3, 8), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2), conv(8, 4)), IMAGE,
        ["max_pool2d", "avg_pool2d"],
    ),
    "concatenation": (concatenation, IMAGE, ["cat", "conv2d_2"]),
    "mean head": (mean_head, IMAGE, ["mean", "linear", "relu"]),
    "pool head": (pool_head, IMAGE, ["flatten", "adaptive_avg_pool2d", "linear"]),
    "flatten head": (flatten_head, IMAGE, ["flatten", "linear"]),
    "padding": (
        lambda: Net(lambda m, x: m.a(F.pad(x, (0, 1, 0, 1))), a=nn.Conv2d(3, 8, 3, stride=2)), IMAGE, ["pad", "conv2d"],
    ),
    "slices": (lambda: Net(lambda m, x: m.b(m.a(x)[:, 2:6]), a=conv(3, 8), b=conv(4, 4)), IMAGE, ["slice_1"]),
    "silu": (lambda: nn.Sequential(conv(3, 8), nn.SiLU(), conv(8, 4)), IMAGE, ["aten::silu", "mul"]),
    "constants": (lambda: Net(lambda m, x: F.relu(m.a(x)) * 0.5 + 1.0, a=conv(3, 8)), IMAGE, ["conv2d"]),
    "broadcast": (gate, IMAGE, ["mul", "mean"]),
    "nearest neighbors": (
        lambda: nn.Sequential(conv(3, 8), nn.Upsample(scale_factor=2), conv(8, 4)), IMAGE, ["upsample_nearest2d"],
    ),
    "bilinear": (
        # A pool comes after the resize. A convolution would add single steps of ties to a difference of two steps.
        lambda: nn.Sequential(conv(3, 8), nn.Upsample(scale_factor=2, mode="bilinear"), nn.MaxPool2d(2)), IMAGE,
        ["upsample_bilinear2d"],
    ),
    "transposed convolution": (
        lambda: nn.Sequential(conv(3, 8), nn.ConvTranspose2d(8, 4, 2, stride=2), nn.ReLU()), IMAGE,
        ["conv_transpose2d"],
    ),
    "softmax": (lambda: Net(lambda m, x: torch.softmax(m.a(x), 1), a=conv(3, 8)), IMAGE, ["softmax"]),
    "batch norm first": (lambda: nn.Sequential(trained(nn.BatchNorm2d(3)), conv(3, 8)), IMAGE, ["conv2d"]),
    "batch of two": (lambda: nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 8)), (2, 3, 7, 5), ["relu", "conv2d_1"]),
    "one channel": (lambda: nn.Sequential(conv(1, 8), nn.ReLU(), conv(8, 1)), (1, 1, 8, 8), ["conv2d", "conv2d_1"]),
    "one channel inside": (lambda: nn.Sequential(conv(3, 1), nn.ReLU(), conv(1, 8)), IMAGE, ["conv2d", "conv2d_1"]),
    "one pixel": (lambda: nn.Sequential(conv(8, 4, 1), nn.ReLU(), conv(4, 8, 1)), (1, 8, 1, 1), ["conv2d", "relu"]),
    "one pixel out": (lambda: Net(lambda m, x: F.adaptive_avg_pool2d(m.a(x), 1), a=conv(3, 8)), IMAGE, ["conv2d"]),
}  # fmt: skip
BLOCKED = [(name, blocked) for name, (_, _, names) in CASES.items() for blocked in names]
FORMATS = [pytest.param(True, True, id="both"), pytest.param(False, True, id="input"),
           pytest.param(True, False, id="model")]  # fmt: skip


def in_channels_last(model: nn.Module) -> nn.Module:
    return model.to(memory_format=CHANNELS_LAST)  # type: ignore[call-overload, no-any-return]


def samples(shape: tuple[int, ...], *, channels_last: bool, seed: int = 0) -> tuple[torch.Tensor]:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (values.contiguous(memory_format=CHANNELS_LAST) if channels_last else values,)


def built(name: str, *, channels_last: bool) -> nn.Module:
    model = seeded(CASES[name][0])
    return in_channels_last(model) if channels_last else model


@functools.cache
def quantized(name: str, *, model: bool, inputs: bool) -> QuantizedModel:
    (example,) = samples(CASES[name][1], channels_last=inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnquantizedWarning)
        return quantize(built(name, channels_last=model), (example,), [example])


def operators(folder: Path) -> list[str]:
    """Returns the operators in the TFLite files of a program's partitions."""
    resolver = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    models = (Interpreter(str(path), experimental_op_resolver_type=resolver) for path in folder.glob("*.tflite"))
    return [operator["op_name"] for model in models for operator in model._get_ops_details()]


# PyTorch's fake tensors, which torch.export uses, have another memory format than the output of its kernels.
UNORDERED = "one channel inside"


def assert_in_order(name: str, found: Any, expected: Any) -> None:
    """Checks that outputs have the memory format of the converted module's outputs."""
    if name == UNORDERED:
        return
    for got, want in zip(flat(found), flat(expected), strict=True):
        assert got.is_contiguous() == want.is_contiguous()
        assert want.dim() != 4 or got.is_contiguous(memory_format=CHANNELS_LAST) == want.is_contiguous(
            memory_format=CHANNELS_LAST
        )


@pytest.mark.parametrize(("model", "inputs"), FORMATS)
@pytest.mark.parametrize("name", CASES)
def test_a_channels_last_input_needs_no_transpose(name: str, model: bool, inputs: bool, tmp_path: Path) -> None:
    chosen = quantized(name, model=model, inputs=inputs)
    program = lower(chosen, intermediates_dir=str(tmp_path))
    assert {row.where for row in program.placement} == {"npu"}
    (given,) = samples(CASES[name][1], channels_last=inputs, seed=1)
    assert worst_lsb(chosen.module, program.run, [(given,)]) <= MAX_LSB
    assert_in_order(name, program.run(given), chosen(given))
    found = operators(tmp_path)
    assert found
    # PyTorch's softmax returns NCHW for each format of its input.
    returned = [value for value in flat(chosen(given)) if value.dim() == 4]
    in_nchw = [not inputs, *(not value.is_contiguous(memory_format=CHANNELS_LAST) for value in returned)]
    assert found.count("TRANSPOSE") <= sum(in_nchw), found


@pytest.mark.parametrize(("model", "inputs"), [FORMATS[0], FORMATS[2]])
@pytest.mark.parametrize(("name", "blocked"), BLOCKED)
def test_a_part_on_the_cpu_gives_the_same(name: str, blocked: str, model: bool, inputs: bool) -> None:
    chosen = quantized(name, model=model, inputs=inputs)
    program = lower(chosen, operators_not_to_delegate=[blocked])
    assert "cpu" in {row.where for row in program.placement}
    given = [samples(CASES[name][1], channels_last=inputs, seed=seed) for seed in (1, 2)]
    assert worst_lsb(chosen.module, program.run, given) <= MAX_LSB
    assert_in_order(name, program.run(*given[0]), chosen(*given[0]))


@pytest.mark.parametrize("by_the_runtime", [False, True])
@pytest.mark.parametrize("name", ["residual", "squeeze and excite", "concatenation", "flatten head", "one channel"])
def test_the_documented_flow_does_the_same(name: str, by_the_runtime: bool) -> None:
    _, shape, names = CASES[name]
    for blocked in ([], names[:1]):
        for model, inputs in ((True, True), (False, True), (True, False)):
            given = samples(shape, channels_last=inputs)
            converted = convert(built(name, channels_last=model), given)
            lowered = lower_documented(
                converted, given, operators_not_to_delegate=blocked,
                use_neutron_for_format_conversion=not by_the_runtime,
            )  # fmt: skip
            assert worst_lsb(converted, lowered.run, [given, samples(shape, channels_last=inputs, seed=1)]) <= MAX_LSB
            assert_in_order(name, lowered.run(*given), converted(*given))


@pytest.mark.parametrize("blocked", [[], ["aten::permute"]])
@pytest.mark.parametrize("channels_last", [False, True])
def test_permutes_between_the_orders(channels_last: bool, blocked: list[str]) -> None:
    """PyTorch's results are views. ExecuTorch's kernels write them contiguously."""
    model = seeded(lambda: Net(lambda m, x: m.a(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1), a=conv(3, 8)))
    given = samples((1, 8, 8, 3), channels_last=channels_last)
    chosen = quantize(model, given, [given])
    program = lower(chosen, operators_not_to_delegate=blocked)
    assert worst_lsb(chosen.module, program.run, [given]) <= MAX_LSB


def test_float_layers_read_weights_in_channels_last() -> None:
    (example,) = samples(IMAGE, channels_last=True)
    model = in_channels_last(seeded(lambda: nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 4))))
    chosen = quantize(model, (example,), [example], layers={"2": "float"})
    program = lower(chosen)
    torch.testing.assert_close(program.run(example), chosen(example))
    assert_in_order("float", program.run(example), chosen(example))


def test_a_copy_into_another_order_on_the_cpu() -> None:
    """OpenNeutron's passes remove such copies, but other graphs may have them."""
    (example,) = samples(IMAGE, channels_last=False)
    with pytest.warns(UnquantizedWarning):
        chosen = quantize(
            seeded(lambda: Net(lambda m, x: m.b(torch.sin(m.a(x)).abs()), a=conv(3, 8), b=conv(8, 4))), (example,),
            [example],
        )  # fmt: skip
    graph = chosen.module.graph
    (sine,) = (node for node in graph.nodes if node.name == "sin")
    with graph.inserting_after(sine):
        copied = graph.call_function(torch.ops.aten.clone.default, (sine,), {"memory_format": CHANNELS_LAST})
    sine.replace_all_uses_with(copied)
    copied.args = (sine,)
    chosen.module.recompile()
    program = lower(chosen, operators_not_to_delegate=["aten::clone"])
    assert [row.node for row in program.placement if row.where == "cpu"] == ["sin", "clone"]
    assert worst_lsb(chosen.module, program.run, [(example,)]) <= MAX_LSB


@pytest.mark.parametrize("blocked", [[], ["conv2d_1"]])
def test_int8_at_the_ends(blocked: list[str]) -> None:
    chosen = quantized("residual", model=True, inputs=True)
    program = lower(chosen, int8_io=True, operators_not_to_delegate=blocked)
    (given,) = samples(IMAGE, channels_last=True, seed=1)
    found = program.run(program.inputs[0].quantize(given))
    assert isinstance(found, torch.Tensor)
    assert found.is_contiguous(memory_format=CHANNELS_LAST)
    expected = chosen(program.inputs[0].dequantize(program.inputs[0].quantize(given)))
    scale = program.outputs[0].scale
    assert scale is not None
    assert (program.outputs[0].dequantize(found) - expected).abs().max() <= 1.01 * scale


@pytest.mark.parametrize("int8_io", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("documented", [False, True], ids=["lower", "documented"])
@pytest.mark.parametrize(("channels", "order"), [(3, (0, 2, 3, 1)), (1, (0, 1, 2, 3))])
def test_dim_order_of_an_image_with_a_new_batch_dimension(
    channels: int, order: tuple[int, ...], int8_io: bool, documented: bool
) -> None:
    """The stride of a batch of one may be any number; ExecuTorch's kernels and NXP's delegate take two orders only."""
    image = torch.rand(8, 6, channels).permute(2, 0, 1)[None]
    assert image.stride(0) != image.numel()
    quantized = quantize(nn.Sequential(conv(channels, 4), nn.ReLU()).eval(), (image,), [(image,)], recover=None)
    if documented:
        if int8_io:
            pytest.skip("an option of lower")
        program = lower_documented(quantized.module, (image,)).pte
    else:
        program = lower(quantized, int8_io=int8_io).portable
    forward = next(method for method in pte.read(program).methods if method.name == "forward")
    assert tuple(forward.inputs[0].dim_order) == order
