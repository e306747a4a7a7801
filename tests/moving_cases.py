"""Table of the operator tests: concatenations, pads, permutes, reshapes and dropouts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from tests.case import Case, Rejected, Shape, conv, move, moved, of
from tests.oracle import Function
from torch import nn

__all__ = ["CASES", "REJECTED"]

aten = torch.ops.aten


def _cat() -> list[Case]:
    def along(dim: int, *sizes: int) -> Case:
        shapes = []
        for size in sizes:
            shape = [2, 3, 4, 5]
            shape[dim] = size
            shapes.append(tuple(shape))
        function = of(lambda *values: torch.cat([move(value) for value in values], dim))
        return Case("aten.cat.default", f"dim {dim} of {len(sizes)}", function, tuple(shapes))

    def twice(x: torch.Tensor) -> torch.Tensor:
        y = move(x)
        return torch.cat([y, y], 1)

    def gate(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.sigmoid(x), layer(x)], 1).abs()

    def gates(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.sigmoid(x), torch.tanh(y)], -1).abs()

    def pair(dim: int) -> Callable[[], nn.Module]:
        return of(lambda x, y: torch.cat([move(x), move(y)], dim))

    def both(first: nn.Module, second: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([first(x), second(x)], 1)

    image, sigmoids = (1, 4, 5, 6), of(lambda x, y: torch.cat([x.sigmoid(), y.sigmoid()], 1))
    conv3x3, conv1x1 = conv(2, 4, 6, 3, padding=1), conv(2, 4, 3, 1)
    return [
        along(0, 1, 2),
        along(1, 3, 5),
        along(2, 4, 1, 2),
        along(3, 5, 5, 2, 1),
        along(-1, 3, 4),
        along(-3, 3, 1, 4),
        Case("aten.cat.default", "one tensor twice", of(twice), ((1, 3, 4, 5),)),
        Case("aten.cat.default", "of one", moved(lambda x: torch.cat([x], 1)), ((1, 3, 4, 5),)),
        Case("aten.cat.default", "rank 1", pair(0), ((4,), (7,))),
        Case("aten.cat.default", "rank 5", pair(3), ((2, 3, 2, 1, 4), (2, 3, 2, 5, 4))),
        Case("aten.cat.default", "sigmoid with convolution", lambda: Function(gate, conv3x3()), (image,)),
        Case("aten.cat.default", "sigmoids", sigmoids, ((2, 3), (2, 4))),
        Case("aten.cat.default", "convolutions", lambda: Function(both, conv3x3(), conv1x1()), (image,)),
        Case("quantized_decomposed.quantize_per_tensor.default", "sigmoid with tanh", of(gates), ((2, 3), (2, 4))),
        Case("aten.concat.default", "dim 1", of(lambda x, y: aten.concat([move(x), move(y)], 1)), ((2, 3), (2, 4))),
    ]


def _pads() -> list[Case]:
    def case(label: str, shape: Shape, pad: Shape, mode: str = "constant", value: float | None = None) -> Case:
        def padded(x: torch.Tensor) -> torch.Tensor:
            values = F.pad(x, pad, mode, value)
            return values if value is None else values.abs()  # a value that is only returned is padded in float

        return Case("aten.pad.default", label, moved(padded), (shape,))

    constant = moved(lambda x: aten.constant_pad_nd(x, [1, 2, 0, 1], 1.0).abs())
    return [
        case("width", (1, 3, 4, 5), (1, 2)),
        case("image", (1, 3, 4, 5), (1, 2, 3, 0)),
        case("channels", (1, 3, 4, 5), (0, 0, 0, 0, 2, 1)),
        case("batch", (1, 3, 4, 5), (0, 0, 0, 0, 0, 0, 1, 1)),
        case("value", (1, 3, 4, 5), (1, 2, 3, 0), value=1.5),
        case("negative value", (2, 3, 4, 5), (1, 2), value=-0.5),
        case("value out of range", (2, 3, 4, 5), (1, 2), value=100.0),
        case("rank 1", (5,), (2, 3)),
        case("rank 2 value", (3, 5), (2, 3), value=1.0),
        case("rank 5", (2, 3, 2, 2, 3), (1, 0, 0, 1, 1, 1)),
        case("nothing", (1, 3, 4, 5), (0, 0)),
        case("cropped", (2, 3, 5, 6), (-1, 0, -2, -1)),
        case("cropped and padded", (2, 3, 5, 6), (-1, 2, 1, -2, 0, -1), value=0.5),
        case("reflect image", (1, 3, 4, 5), (1, 2, 3, 1), "reflect"),
        case("reflect line", (2, 3, 5), (4, 2), "reflect"),
        case("reflect rank 2", (3, 5), (2, 1), "reflect"),
        Case("aten.pad.default", "reflect then conv",
             lambda: Function(lambda c, x: c(F.pad(x, (1, 1, 1, 1), "reflect")), nn.Conv2d(3, 4, 3)), ((1, 3, 6, 5),)),
        Case("aten.constant_pad_nd.default", "value", constant, ((1, 3, 4, 5),)),
    ]  # fmt: skip


def _shapes() -> list[Case]:
    def case(target: str, label: str, shape: Shape, function: Callable[[torch.Tensor], torch.Tensor]) -> Case:
        return Case(f"aten.{target}", label, moved(function), (shape,))

    def permute(shape: Shape, *dims: int) -> Case:
        label = f"{','.join(map(str, dims))} rank {len(shape)}"
        return case("permute.default", label, shape, lambda x: x.permute(dims))

    def between(function: Callable[[torch.Tensor], torch.Tensor], channels: int) -> Callable[[], nn.Module]:
        def run(first: nn.Module, second: nn.Module, x: torch.Tensor) -> torch.Tensor:
            return second(function(first(x)))  # type: ignore[no-any-return]

        return lambda: Function(run, nn.MaxPool2d(2), nn.Conv2d(channels, 5, 1))

    def shuffle(x: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.shape
        return x.reshape(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)

    def pixels(x: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.shape
        return x.view(n, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, c // 4, h * 2, w * 2)

    image = (2, 4, 6, 8)
    return [
        permute((3, 5), 1, 0),
        permute((2, 3, 5), 2, 0, 1),
        permute((2, 3, 5), 0, 2, 1),
        permute(image, 0, 2, 3, 1),
        permute(image, 0, 3, 1, 2),
        permute(image, 3, 2, 1, 0),
        permute(image, 0, 1, -1, -2),
        permute(image, 1, 0, 2, 3),
        permute(image, 0, 1, 2, 3),
        permute((2, 3, 2, 4, 3), 4, 0, 3, 1, 2),
        permute((2, 3, 2, 4, 3, 2), 5, 1, 3, 0, 4, 2),
        case("transpose.int", "1,2", (2, 3, 5), lambda x: x.transpose(1, 2)),
        case("transpose.int", "negative", image, lambda x: x.transpose(-1, 0)),
        case("view.default", "flat", image, lambda x: x.view(-1)),
        case("view.default", "split", (2, 12), lambda x: x.view(2, 3, 4, 1)),
        case("view.default", "rank 7", (2, 12), lambda x: x.view(1, 2, 1, 3, 2, 1, 2)),
        case("reshape.default", "merge", image, lambda x: x.reshape(8, 48)),
        case("reshape.default", "after a transpose", image, lambda x: x.transpose(1, 3).reshape(2, 48, 4)),
        case("_unsafe_view.default", "merge", image, lambda x: aten._unsafe_view(x, [8, 48])),
        case("flatten.using_ints", "from 1", image, lambda x: x.flatten(1)),
        case("flatten.using_ints", "1 to 2", image, lambda x: x.flatten(1, -2)),
        case("unflatten.int", "1", image, lambda x: aten.unflatten(x, 1, [2, 2])),
        case("squeeze.default", "all", (1, 4, 1, 3), torch.squeeze),
        case("squeeze.dim", "2", (1, 4, 1, 3), lambda x: x.squeeze(2)),
        case("squeeze.dims", "0,-2", (1, 4, 1, 3), lambda x: x.squeeze((0, -2))),
        case("unsqueeze.default", "-1", (4, 3), lambda x: x.unsqueeze(-1)),
        Case("aten.reshape.default", "channel shuffle", between(shuffle, 4), (image,)),
        Case("aten.reshape.default", "pixel shuffle", between(pixels, 1), (image,)),
        Case("aten.view.default", "images swapped", between(lambda x: x.view(2, 3, 4, 4), 3), (image,)),
        Case("aten.flatten.using_ints", "between",
             between(lambda x: aten.unflatten(x.flatten(2), 2, [3, 4]), 4), (image,)),
        Case("aten.unsqueeze.default", "between", between(lambda x: x.flatten(2).unsqueeze(2), 4), (image,)),
        Case("aten.permute.default", "between", between(lambda x: x.permute(0, 3, 1, 2), 4), (image,)),
        Case("aten.transpose.int", "between", between(lambda x: x.transpose(2, 3), 4), (image,)),
    ]  # fmt: skip


def _dropout() -> list[Case]:
    def raw(name: str, *args: Any) -> Callable[[], nn.Module]:
        return moved(lambda x: getattr(aten, name)(x, *args))

    return [
        Case("aten.dropout.default", "eval", moved(lambda x: F.dropout(x, 0.4, training=False)), ((2, 3, 4),)),
        Case("aten.dropout_.default", "eval", raw("dropout_", 0.4, False), ((2, 3, 4),)),
        Case("aten.feature_dropout.default", "eval", raw("feature_dropout", 0.4, False), ((2, 3, 4, 5),)),
    ]


CASES: tuple[Case, ...] = (*_cat(), *_pads(), *_shapes(), *_dropout())
REJECTED: tuple[Rejected, ...] = (
    Rejected("reshape", "has_rank_for_reshape", "", moved(lambda x: x.view(1, 2, 1, 3, 2, 1, 2, 1)), ((2, 12),)),
    Rejected("permute", "has_rank_for_transpose", "", moved(lambda x: x.permute(6, 5, 4, 3, 2, 1, 0)),
             ((1, 2, 1, 3, 2, 1, 2),)),
)  # fmt: skip
