"""Table of the operator tests: constant indices, overlapping windows, triangles and comparisons."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from tests.case import Case, Rejected, Shape, move, moved, of

__all__ = ["CASES", "REJECTED"]

aten = torch.ops.aten

IMAGE: Shape = (2, 6, 5, 4)
SHUFFLED = [index * 7 % 50 for index in range(50)]
FAR = list(range(1197, -1, -3))

Function = Callable[..., torch.Tensor]


def _moving(target: str, label: str, function: Function, shape: Shape = IMAGE, **options: Any) -> Case:
    return Case(f"aten.{target}", label, moved(function), (shape,), **options)


def _computing(target: str, label: str, function: Function, *shapes: Shape, **options: Any) -> Case:
    return Case(f"aten.{target}", label, of(function), shapes or (IMAGE,), **options)


def _picks() -> list[Case]:
    def case(target: str, label: str, function: Function, *indices: Any, shape: Shape = IMAGE) -> Case:
        """Returns a case of `function` of the indices and the values."""
        model = of(lambda *args: function(*args[:-1], move(args[-1])), *map(torch.tensor, indices))
        return Case(f"aten.{target}", label, model, (shape,))

    apart: Shape = (1, 2, 2, 4)
    rows = [[0, 2, 3], [1, 1, 1]]
    return [
        case("index.Tensor", "channels", lambda i, x: x[:, i], [0, 2, 5, 1]),
        case("index.Tensor", "negative", lambda i, x: x[..., i], [-1, 0]),
        case("index.Tensor", "a table of channels", lambda i, x: x[:, i], [[0, 1], [5, 3]]),
        case("index.Tensor", "neighbors", lambda i, j, x: x[:, i, j], [0, 1], [2, 3]),
        case("index.Tensor", "dimensions apart", lambda i, j, x: x[:, i, :, j], [0, 1], [2, 3], shape=apart),
        case("index.Tensor", "shuffled", lambda i, x: x[:, i], SHUFFLED, shape=(2, 50, 3)),
        case("index_select.default", "rows", lambda i, x: x.index_select(2, i), [4, 0, 0]),
        case("gather.default", "one for all", lambda i, x: x.gather(1, i), [[[[1] * 4] * 5] * 2] * 2),
        case("gather.default", "rows", lambda i, x: x.gather(1, i), rows, shape=(2, 9)),
        case("take_along_dim.default", "channel", lambda i, x: x.take_along_dim(i, 1), [[[[1]], [[4]]]]),
        case("take.default", "anywhere", lambda i, x: x.take(i), [3, 4, 77]),
        _moving("diagonal.default", "of images", lambda x: x.diagonal(1, 2, 3)),
    ]


def _windows() -> list[Case]:
    def unfold(label: str, shape: Shape, *args: int) -> Case:
        return _moving("unfold.default", label, lambda x: x.unfold(*args), shape, decomposed=True)

    def columns(label: str, shape: Shape, *args: Any, **options: Any) -> Case:
        return _moving("im2col.default", label, lambda x: F.unfold(x, *args, **options), shape)

    def image(label: str, shape: Shape, *args: Any, **options: Any) -> Case:
        return _moving("col2im.default", label, lambda x: F.fold(x, *args, **options), shape)

    return [
        unfold("half over each other", (2, 3, 32), -1, 8, 4),
        unfold("channels with a rest", (1, 11, 4, 3), 1, 5, 3),
        unfold("steps by one", (2, 3, 10), 2, 3, 1),
        unfold("with gaps", (1, 2, 9), -1, 2, 4),
        columns("over each other", (1, 3, 6, 5), 3),
        columns("side by side", (2, 3, 6, 4), 2, stride=2),
        columns("dilated and padded", (1, 3, 8, 7), (3, 2), dilation=2, padding=1, stride=(1, 2)),
        columns("without batch", (3, 6, 5), 2),
        image("over each other", (1, 18, 24), (6, 5), (3, 2), padding=(1, 0)),
        image("side by side", (2, 12, 6), (6, 4), 2, stride=2),
        image("strided", (1, 9, 9), (7, 8), 3, stride=(2, 2), padding=(0, 0)),
    ]


def _sums() -> list[Case]:
    return [
        _computing("diff.default", "of neighbors", torch.diff),
        _computing("diff.default", "twice after others", lambda x, y: torch.diff(x, 2, 1, prepend=y), IMAGE, IMAGE),
        _computing("tril.default", "image", torch.tril),
        _computing("triu.default", "above", lambda x: x.triu(1)),
        _computing("cumsum.default", "rows", lambda x: x.cumsum(2)),
    ]


def _comparisons() -> list[Case]:
    def product(label: str, truths: Function, *shapes: Shape) -> Case:
        function = lambda x, *others: x * truths(x, *others)  # noqa: E731
        return _computing("mul.Tensor", label, function, *shapes, decomposed=True)

    def number(target: str, label: str, function: Function) -> Case:
        return _computing(target, label, function, decomposed=target.startswith(("to", "type", "_to")))

    def where(label: str, function: Function, *shapes: Shape, target: str = "where.self") -> Case:
        return _computing(target, label, function, *shapes)

    two = (IMAGE, IMAGE)
    return [
        product("above a number", lambda x: x > 0.5),
        product("above zero", lambda x: x > 0),
        product("below another", lambda x, y: x <= y, *two),
        product("of a channel", lambda x: (x.mean(1) > 0).unsqueeze(1)),
        product("in between", lambda x: (x > -1) & (x < 1)),
        product("outside", lambda x: torch.logical_or(x < -1, x >= 1)),
        product("either", lambda x: (x > 0) ^ (x > 1)),
        product("not", lambda x: ~(x > 0.3)),
        product("equal", lambda x: x.relu() == 0),
        product("different", lambda x: x.relu().bool()),
        number("to.dtype", "float", lambda x: (x > 0.2).float()),
        number("type_as.default", "float", lambda x: 1 - (x > 0.2).type_as(x)),
        number("to.dtype_layout", "float", lambda x: aten.to.dtype_layout(x > 0.2, dtype=torch.float32)),
        number("_to_copy.default", "float", lambda x: aten._to_copy(x > 0.2, dtype=torch.float32)),
        where("of computed values", lambda x, y: torch.where(x > y.mean(), x, -y), *two),
        where("the larger one", lambda x, y: torch.where(x > y, x, y), *two),
        where("the smaller one", lambda x, y: torch.where(x > y, y, x), *two),
        where("or a number", lambda x, y: torch.where(x <= y, x, 3.0), *two, target="where.ScalarOther"),
        where("a number or", lambda x, y: torch.where(x < y, 3.0, x), *two, target="where.ScalarSelf"),
        where("two numbers", lambda x: torch.where(x > 0.1, 2.0, -1.0), target="where.Scalar"),
        where("a leaky relu", lambda x: torch.where(x > 0, x, 0.1 * x)),
        where("from a number on", lambda x: torch.where(x >= 0.5, x, 0.5), target="where.ScalarOther"),
        where("up to a number", lambda x: torch.where(x > 0.5, 0.5, x), target="where.ScalarSelf"),
        _computing("masked_fill.Scalar", "below a number", lambda x: x.masked_fill(x < 0.5, -1.0)),
        _computing("hardshrink.default", "", F.hardshrink),
        _computing("threshold.default", "zero below", lambda x: F.threshold(x, 0.5, 0.0)),
        _computing("threshold.default", "a number below", lambda x: F.threshold(x, 0.5, 0.2)),
        _computing("sign.default", "", torch.sign),
        _computing("sgn.default", "of a difference", lambda x: torch.sgn(x - 0.3)),
        _computing("sign_.default", "in place", lambda x: (x + 1).sign_()),
        _computing("sgn_.default", "in place", lambda x: (x + 1).sgn_()),
    ]


CASES = (*_picks(), *_windows(), *_sums(), *_comparisons())

REJECTED = (
    Rejected("values at constant indices", "has_few_index_runs", "",
             of(lambda i, x: move(x).take(i), torch.tensor(FAR)), ((1, 1200),)),
    Rejected("values at constant indices", "has_constant_indices", "",
             of(lambda x, y: move(x).gather(0, y.argmax(0, keepdim=True))), ((4, 5), (4, 5))),
    Rejected("unfold with windows that overlap", "unfolds_in_few_parts", "",
             moved(lambda x: x.unfold(1, 65, 1)), ((2, 70),)),
    Rejected("unfold", "unfolds_without_overlap", "", of(lambda x: x.unfold(1, 3, 1)), ((2, 5),),
             quantized_elsewhere=True),
    Rejected("cumsum", "sums_few_values", "", of(lambda x: x.cumsum(1)), ((1, 513),)),
    Rejected("hardshrink", "has_no_negative_limit", "", of(lambda x: F.hardshrink(x, -0.5)), (IMAGE,)),
    Rejected("threshold", "fills_in_a_small_number", "", of(lambda x: F.threshold(x, 0.5, 1e4)), (IMAGE,)),
)  # fmt: skip
