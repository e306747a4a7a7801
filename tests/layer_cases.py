"""Table of the operator tests: convolutions, linears, activations, additions and softmaxes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from tests.case import Case, Rejected, Shape, conv, of
from tests.oracle import Function
from torch import nn

__all__ = ["CASES", "REJECTED"]

aten = torch.ops.aten


def _conv2d() -> list[Case]:
    def case(label: str, shape: Shape, *args: Any, target: str = "aten.conv2d.default", **options: Any) -> Case:
        return Case(target, label, conv(2, *args, **options), (shape,))

    same: dict[str, Any] = {"target": "aten.conv2d.padding", "padding": "same"}
    valid: dict[str, Any] = {"target": "aten.conv2d.padding", "padding": "valid"}
    return [
        case("1x1", (1, 8, 7, 5), 8, 16, 1),
        case("1x1 stride 2", (1, 8, 7, 5), 8, 16, 1, stride=2),
        case("1x1 one channel", (1, 1, 5, 5), 1, 1, 1),
        case("3x3", (1, 3, 9, 11), 3, 5, 3),
        case("3x3 no bias", (1, 3, 9, 11), 3, 5, 3, bias=False),
        case("3x3 padded", (1, 3, 9, 11), 3, 5, 3, padding=1),
        case("3x3 stride 2 even", (1, 3, 8, 12), 3, 5, 3, stride=2, padding=1),
        case("3x3 stride 2 odd", (1, 3, 9, 13), 3, 5, 3, stride=2, padding=1),
        case("3x3 stride 3", (1, 3, 10, 11), 3, 5, 3, stride=3, padding=1),
        case("stride skips the end", (1, 3, 11, 11), 3, 4, 2, stride=4),
        case("unequal", (1, 3, 13, 17), 3, 7, (3, 5), stride=(2, 1), padding=(2, 1), dilation=(1, 2)),
        case("dilation 2", (1, 4, 11, 12), 4, 6, 3, dilation=2, padding=2),
        case("dilation 3 stride 2", (1, 4, 17, 15), 4, 6, 3, dilation=3, stride=2, padding=3),
        case("more padding than kernel", (1, 2, 5, 5), 2, 3, 3, padding=4),
        case("2x2 padded", (1, 2, 5, 6), 2, 3, 2, padding=1),
        case("4x4 stride 2", (1, 2, 8, 9), 2, 3, 4, stride=2, padding=1),
        case("7x7", (1, 3, 20, 20), 3, 8, 7, stride=2, padding=3),
        case("11x11", (1, 3, 31, 31), 3, 8, 11, stride=4, padding=2),
        case("kernel as large as the image", (1, 4, 6, 5), 4, 10, (6, 5)),
        case("1x9", (1, 4, 6, 15), 4, 4, (1, 9), padding=(0, 4)),
        case("deep", (1, 512, 3, 3), 512, 16, 3, padding=1),
        case("batch 3", (3, 3, 9, 9), 3, 5, 3, padding=1),
        case("batch 2 stride 2", (2, 3, 8, 8), 3, 5, 3, stride=2, padding=1),
        case("asymmetric pad", (1, 3, 9, 9), 3, 5, 3, pad=(0, 1, 2, 0)),
        case("TFLite's pad", (1, 3, 8, 8), 3, 5, 3, pad=(0, 1, 0, 1), stride=2),
        case("pad twice", (1, 3, 9, 9), 3, 5, 3, pad=(1, 1, 1, 1), padding=1),
        case("depthwise", (1, 8, 9, 9), 8, 8, 3, padding=1, groups=8),
        case("depthwise stride 2", (1, 8, 9, 10), 8, 8, 3, padding=1, groups=8, stride=2),
        case("depthwise dilated", (1, 8, 11, 11), 8, 8, 3, dilation=2, groups=8),
        case("depthwise multiplier 2", (1, 6, 9, 9), 6, 12, 3, padding=1, groups=6),
        case("depthwise multiplier 3 no bias", (1, 4, 9, 9), 4, 12, 3, groups=4, bias=False),
        case("depthwise batch 2", (2, 8, 9, 9), 8, 8, 5, padding=2, groups=8),
        case("groups 2", (1, 8, 9, 9), 8, 6, 3, padding=1, groups=2),
        case("groups 4 no bias", (1, 8, 9, 9), 8, 16, 1, groups=4, bias=False),
        case("groups 3 stride 2 batch 2", (2, 6, 9, 8), 6, 9, 3, stride=2, padding=1, groups=3),
        case("same", (1, 3, 9, 9), 3, 5, 3, **same),
        case("same even kernel", (1, 3, 9, 10), 3, 5, (4, 2), **same),
        case("same dilated", (1, 3, 12, 11), 3, 5, (3, 4), dilation=(2, 3), **same),
        case("valid stride 2", (1, 3, 9, 10), 3, 5, 3, stride=2, **valid),
        case("same depthwise", (1, 8, 9, 10), 8, 8, 5, groups=8, **same),
    ]


def _conv1d() -> list[Case]:
    def case(label: str, shape: Shape, *args: Any, target: str = "aten.conv1d.default", **options: Any) -> Case:
        return Case(target, label, conv(1, *args, **options), (shape,))

    padding: dict[str, Any] = {"target": "aten.conv1d.padding"}
    return [
        case("1", (1, 4, 15), 4, 6, 1),
        case("3 padded", (1, 4, 15), 4, 6, 3, padding=1),
        case("5 stride 2", (1, 4, 30), 4, 6, 5, stride=2, padding=2),
        case("3 dilation 4", (1, 4, 30), 4, 6, 3, dilation=4),
        case("3 stride 3 dilation 2", (1, 4, 31), 4, 6, 3, stride=3, dilation=2, padding=1),
        case("depthwise", (1, 8, 20), 8, 8, 5, groups=8, padding=2),
        case("depthwise multiplier 2 stride 2", (1, 4, 21), 4, 8, 3, groups=4, stride=2),
        case("groups 2 no bias", (1, 8, 20), 8, 4, 3, groups=2, bias=False),
        case("batch 3", (3, 4, 17), 4, 6, 4, stride=2),
        case("asymmetric pad", (1, 4, 17), 4, 6, 4, pad=(3, 0)),
        case("same dilated", (1, 4, 17), 4, 6, 4, padding="same", dilation=2, **padding),
        case("valid", (2, 4, 17), 4, 6, 4, padding="valid", stride=3, **padding),
    ]


def _per_channel() -> list[Case]:
    def case(
        label: str, rank: int, shape: Shape, *args: int, activation: Callable[..., Any] | None = None, **options: Any
    ) -> Case:
        target = "aten.conv1d.default" if rank == 1 else "aten.conv2d.default"

        def make() -> nn.Module:
            layer = conv(rank, *args, **options)()
            assert isinstance(layer, (nn.Conv1d, nn.Conv2d))
            channels = torch.linspace(1, 0.1, layer.out_channels)
            layer.weight.data *= channels.reshape(-1, *[1] * (rank + 1))
            return nn.Sequential(layer, Function(activation)) if activation else layer

        per_channel = (("weight_granularity", "per_channel"),)
        return Case(target, f"per channel {label}", make, (shape,), options=per_channel)

    return [
        case("3x3", 2, (1, 3, 9, 9), 3, 8, 3, padding=1),
        case("no bias", 2, (1, 3, 9, 9), 3, 8, 3, bias=False, stride=2),
        case("depthwise", 2, (1, 8, 9, 9), 8, 8, 3, groups=8, padding=1),
        case("depthwise multiplier 2", 2, (1, 4, 9, 9), 4, 8, 3, groups=4, bias=False),
        case("groups 2", 2, (1, 8, 9, 9), 8, 6, 3, groups=2),
        case("groups 4 no bias", 2, (1, 8, 9, 9), 8, 8, 1, groups=4, bias=False),
        case("groups 3 stride 2 batch 2", 2, (2, 6, 9, 8), 6, 9, 3, stride=2, padding=1, groups=3),
        case("depthwise multiplier 3 dilated", 2, (1, 4, 11, 11), 4, 12, 3, dilation=2, groups=4),
        case("1d", 1, (1, 4, 21), 4, 6, 3, stride=2),
        case("1d depthwise", 1, (1, 8, 20), 8, 8, 5, groups=8, padding=2),
        case("1d depthwise multiplier 2", 1, (1, 4, 21), 4, 8, 3, groups=4, stride=2),
        case("1d groups 2 no bias", 1, (1, 8, 20), 8, 4, 3, groups=2, bias=False),
        case("relu", 2, (1, 3, 9, 9), 3, 8, 3, padding=1, activation=F.relu),
        case("relu6 depthwise multiplier 2", 2, (1, 3, 9, 9), 3, 6, 3, groups=3, activation=F.relu6),
        case("hardtanh groups 3", 2, (1, 6, 9, 9), 6, 6, 1, groups=3, activation=F.hardtanh),
        case("1d relu", 1, (1, 4, 21), 4, 6, 3, activation=F.relu),
    ]


def _fused() -> list[Case]:
    activations: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "relu": F.relu,
        "relu6": F.relu6,
        "hardtanh 0..6": lambda values: F.hardtanh(values, 0, 6),
        "hardtanh 0..inf": lambda values: F.hardtanh(values, 0, math.inf),
        "hardtanh -1..1": F.hardtanh,
        "hardtanh 0..1": lambda values: F.hardtanh(values, 0, 1),
        "hardtanh -2..3": lambda values: F.hardtanh(values, -2, 3),
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
        "abs": torch.abs,
    }

    def after_conv(name: str) -> Callable[[], nn.Module]:
        return lambda: Function(lambda layer, values: activations[name](layer(values)), nn.Conv2d(3, 5, 3, padding=1))

    def after_linear(name: str) -> Callable[[], nn.Module]:
        return lambda: Function(lambda layer, values: activations[name](layer(values)), nn.Linear(12, 7))

    def after_add(name: str) -> Callable[[], nn.Module]:
        return of(lambda left, right: activations[name](left + right))

    spread = (0.0, 4.0)
    return [
        *(Case("aten.conv2d.default", f"then {a}", after_conv(a), ((1, 3, 7, 7),), spread) for a in activations),
        *(Case("aten.linear.default", f"then {a}", after_linear(a), ((3, 12),), spread)
          for a in ("relu", "relu6", "hardtanh -1..1", "sigmoid", "tanh")),
        *(Case("aten.add.Tensor", f"then {a}", after_add(a), ((2, 5, 7), (2, 5, 7)), spread)
          for a in ("relu", "relu6", "hardtanh -1..1", "hardtanh 0..1")),
    ]  # fmt: skip


def _linear() -> list[Case]:
    def case(label: str, shape: Shape, *args: Any, **options: Any) -> Case:
        return Case("aten.linear.default", label, lambda: nn.Linear(*args, **options), (shape,))

    def product(bias: torch.Tensor, weight: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return torch.addmm(bias, values, weight)

    def with_bias(bias: Shape) -> Callable[[], nn.Module]:
        return lambda: Function(product, torch.randn(bias), torch.randn(10, 6))

    def after_image(pool: nn.Module, linear: nn.Module, values: torch.Tensor) -> torch.Tensor:
        return linear(pool(values).flatten(1))  # type: ignore[no-any-return]

    return [
        case("rank 1", (10,), 10, 4),
        case("rank 2", (1, 10), 10, 4),
        case("rank 2 batch 5 no bias", (5, 10), 10, 4, bias=False),
        case("rank 3", (2, 5, 10), 10, 4),
        case("rank 3 no bias", (1, 7, 10), 10, 1, bias=False),
        case("rank 4", (2, 3, 5, 10), 10, 4),
        case("rank 5", (2, 3, 1, 5, 6), 6, 4),
        case("one feature", (4, 1), 1, 3),
        case("wide", (1, 1280), 1280, 100),
        Case("aten.linear.default", "after an image",
             lambda: Function(after_image, nn.MaxPool2d(2), nn.Linear(4 * 3 * 5, 6)), ((2, 4, 6, 10),)),
        Case("aten.addmm.default", "bias [p]", with_bias((6,)), ((4, 10),)),
        Case("aten.addmm.default", "bias [1, p]", with_bias((1, 6)), ((4, 10),)),
        Case("aten.addmm.default", "one row", with_bias((6,)), ((1, 10),)),
    ]  # fmt: skip


def _elementwise() -> list[Case]:
    def unary(target: str, label: str, function: Callable[[torch.Tensor], torch.Tensor], *spreads: Any) -> list[Case]:
        return [
            Case(target, f"{label} {mean}+-{deviation}".strip(), of(function), ((3, 7, 11),), (mean, deviation))
            for mean, deviation in spreads
        ]

    def clamp(low: float, high: float, deviation: float = 3.0, shape: Shape = (3, 7, 11)) -> Case:
        function, label = of(lambda x: F.hardtanh(x, low, high)), f"{low}..{high} 0+-{deviation} rank {len(shape)}"
        return Case("aten.hardtanh.default", label, function, (shape,), (0.0, deviation))

    def shaped(target: str, function: Callable[[torch.Tensor], torch.Tensor], *shapes: Shape) -> list[Case]:
        return [Case(target, f"rank {len(shape)}", of(function), (shape,)) for shape in shapes]

    wide = ((0.0, 1.0), (0.0, 30.0), (0.0, 0.01), (4.0, 1.0), (-4.0, 1.0))
    shapes = ((7,), (1, 3, 5, 7), (2, 3, 2, 5, 3))
    return [
        *unary("aten.abs.default", "", torch.abs, *wide, (-40.0, 0.5)),
        *unary("aten.abs_.default", "in place", lambda x: (x + x).abs_(), (0.0, 1.0)),
        *unary("aten.sigmoid.default", "", torch.sigmoid, *wide),
        *unary("aten.sigmoid_.default", "in place", lambda x: (x + x).sigmoid_(), (0.0, 1.0)),
        *unary("aten.tanh.default", "", torch.tanh, *wide),
        *unary("aten.tanh_.default", "in place", lambda x: (x + x).tanh_(), (0.0, 1.0)),
        *unary("aten.relu.default", "", torch.relu, *wide[:4]),
        *unary("aten.relu_.default", "in place", lambda x: F.relu(x.abs(), inplace=True), (0.0, 1.0)),
        *unary("aten.absolute.default", "", torch.absolute, (0.0, 1.0)),
        *unary("aten.special_expit.default", "", torch.special.expit, (0.0, 1.0)),
        *unary("aten.clip.default", "", lambda x: torch.clip(x, -1, 1), (0.0, 1.0)),
        *unary("aten.clip.default", "no relu", lambda x: torch.clip(x, -2, 3), (0.0, 3.0)),
        *unary("aten.relu6.default", "", F.relu6, (0.0, 1.0), (0.0, 30.0), (3.0, 1.0)),
        *unary("aten.relu6_.default", "in place", lambda x: F.relu6(x.abs(), inplace=True), (0.0, 5.0)),
        *unary("aten.hardtanh_.default", "in place", lambda x: F.hardtanh_(x.abs(), 0, 2), (0.0, 5.0)),
        *unary("aten.hardtanh_.default", "relu6 in place", lambda x: F.hardtanh_(x.abs(), 0, 6), (0.0, 5.0)),
        *shaped("aten.abs.default", torch.abs, *shapes),
        *shaped("aten.sigmoid.default", torch.sigmoid, *shapes),
        *shaped("aten.tanh.default", torch.tanh, *shapes),
        *shaped("aten.relu.default", torch.relu, *shapes),
        *(clamp(low, high) for low, high in (
            (0, 1), (-1, 1), (-2, 3), (0, math.inf), (0, 6), (-math.inf, 1), (-1, math.inf), (1, 2), (-3, -1), (0, 4),
            (-100, 100), (2, 2))),
        clamp(0, 1, 0.2),
        clamp(-1, 1, 20.0),
        *(clamp(-2, 3, shape=shape) for shape in shapes),
    ]  # fmt: skip


def _add() -> list[Case]:
    def case(label: str, left: Shape, right: Shape) -> Case:
        return Case("aten.add.Tensor", label, of(lambda x, y: x + y), (left, right))

    def constant(label: str, shape: Shape, value: torch.Tensor) -> Case:
        return Case("aten.add.Tensor", label, of(lambda c, x: x + c, value), (shape,))

    def in_place(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        z = x.abs()
        z += y
        return z

    generator = torch.Generator().manual_seed(3)
    channels = torch.randn(5, 1, 1, generator=generator)
    return [
        case("equal shapes", (2, 5, 7), (2, 5, 7)),
        case("images", (2, 5, 7, 6), (2, 5, 7, 6)),
        case("right broadcast", (2, 5, 7, 6), (1, 5, 1, 1)),
        case("left broadcast", (5, 1, 1), (2, 5, 7, 6)),
        case("one value", (2, 5, 7), (1,)),
        case("fewer dimensions", (2, 5, 7, 6), (7, 6)),
        case("rank 1", (9,), (9,)),
        case("rank 5", (2, 3, 2, 4, 3), (2, 3, 2, 4, 3)),
        case("rank 5 broadcast", (2, 3, 2, 4, 3), (3, 1, 4, 1)),
        Case("aten.add.Tensor", "to itself", of(lambda x: x + x), ((2, 5, 7),)),
        Case("aten.add.Tensor", "with a sigmoid", of(lambda x, y: x + y.sigmoid()), ((2, 5), (2, 5)), (0, 9.0)),
        constant("constant per channel", (2, 5, 7, 6), channels),
        constant("constant image", (1, 5, 4, 3), torch.randn(1, 5, 4, 3, generator=generator)),
        constant("constant scalar", (2, 5, 7), torch.tensor(0.75)),
        constant("constant negative scalar", (2, 5, 7), torch.tensor(-3.5)),
        Case("aten.add_.Tensor", "in place", of(in_place), ((2, 5, 7), (2, 5, 7))),
        Case("aten.add.Tensor", "residual",
             lambda: Function(lambda c, x: x + c(x), nn.Conv2d(6, 6, 1)), ((1, 6, 7, 5),)),
        Case("aten.add.Tensor", "conv plus channels",
             lambda: Function(lambda c, b, x: c(x) + b, nn.Conv2d(6, 5, 1), channels), ((1, 6, 7, 5),)),
    ]  # fmt: skip


def _softmax() -> list[Case]:
    def case(label: str, shape: Shape, dim: int, deviation: float = 2.0) -> Case:
        return Case("aten.softmax.int", label, of(lambda x: torch.softmax(x, dim)), (shape,), (0.0, deviation))

    raw = of(lambda x: aten._softmax(x, -1, False))
    return [
        case("rank 1", (10,), 0),
        case("rank 2", (3, 10), 1),
        case("rank 2 negative", (3, 10), -1),
        case("rank 3", (2, 3, 10), 2),
        case("rank 4 last", (2, 3, 4, 10), -1),
        case("rank 4 channels", (2, 10, 4, 3), 1),
        case("rank 5", (2, 3, 2, 3, 10), 4),
        case("one value", (3, 1), 1),
        case("wide", (1, 1000), 1),
        case("sharp", (3, 10), 1, 30.0),
        case("flat", (3, 10), 1, 0.01),
        Case("aten._softmax.default", "rank 2", raw, ((3, 10),)),
    ]


def _int8_convolution(codes: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Returns a convolution as another quantizer leaves it, with an int8 weight."""
    dequantize = torch.ops.quantized_decomposed.dequantize_per_tensor.default
    return F.conv2d(values, dequantize(codes, 0.02, 0, -127, 127, torch.int8))


CASES: tuple[Case, ...] = (
    *_conv2d(),
    *_conv1d(),
    *_per_channel(),
    *_fused(),
    *_linear(),
    *_elementwise(),
    *_add(),
    *_softmax(),
)
REJECTED: tuple[Rejected, ...] = (
    Rejected("convolution", "has_a_batch", "2d", of(_int8_convolution, torch.ones(5, 3, 3, 3, dtype=torch.int8)),
             ((3, 7, 7),), quantized_elsewhere=True),
    Rejected("convolution", "has_supported_geometry", "kernel", conv(2, 1, 2, (1, 4097)), ((1, 1, 1, 4100),)),
    Rejected("convolution", "has_supported_geometry", "stride", conv(2, 1, 2, 1, stride=(1, 4097)), ((1, 1, 2, 4100),)),
    Rejected("convolution", "has_supported_geometry", "dilation", conv(1, 1, 2, 2, dilation=4097), ((1, 1, 4100),)),
    Rejected("convolution", "fits_accumulation", "", conv(2, 8192, 2, 3), ((1, 8192, 3, 3),)),
    Rejected("softmax", "has_few_softmax_channels", "channels", of(lambda x: x.softmax(1)), ((1, 2041),)),
    Rejected("softmax", "has_few_softmax_channels", "positions", of(lambda x: x.softmax(1)), ((4097, 2),),
             quantized_elsewhere=True),
    Rejected("softmax", "has_few_softmax_channels", "elements", of(lambda x: x.softmax(1)), ((1025, 512),),
             quantized_elsewhere=True),
)  # fmt: skip
