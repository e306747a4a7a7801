"""Table of the operator tests: writes to constant positions that are not whole indices of one dimension."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tests.case import Case, Rejected, Shape, move, of

__all__ = ["CASES", "REJECTED"]

aten = torch.ops.aten
ROWS, SQUARE, IMAGE = (4, 10), (6, 6), (2, 4, 5, 6)
SPEC, DIAGONAL = "write to constant positions", "diag, diag_embed, diagflat"
CHECKERBOARD = (torch.arange(40).reshape(4, 10) % 7) < 3
TRUE = int(CHECKERBOARD.sum())


def case(target: str, label: str, function: Callable[..., Any], *constants: torch.Tensor, shape: Shape = ROWS) -> Case:
    """Returns a case of `function` of constants and a value, after an operator that is worth a partition."""
    return Case(
        f"aten.{target}", label, of(lambda *given: function(*given[:-1], move(given[-1])), *constants), (shape,)
    )


FRAME = torch.zeros(4, 10).index_fill(1, torch.tensor([2]), 1.0) == 1
PLACES = torch.tensor([[3, 0], [5, 1], [9, 2]])
REPEATED = torch.tensor([[3, 3, 1], [5, 1, 1], [0, 2, 1]])
CHANNELS = torch.tensor([3, 0, 3])


CASES = (
    case("scatter.src", "rows", lambda i, x: x.scatter(1, i, x[1:, 4:6]), PLACES),
    case("scatter.src", "whole columns", lambda i, x: x.scatter(1, i, x[:, 4:6]), torch.tensor([[7, 2]] * 4)),
    case("scatter.src", "many runs", lambda i, x: x.scatter(1, i, x), torch.arange(40).reshape(4, 10) * 3 % 10),
    case("scatter.value", "rows", lambda i, x: x.scatter(1, i, 0.5).abs(), PLACES),
    case("scatter.value", "many runs",
         lambda i, x: x.scatter(1, i, 0.5), torch.arange(0, 1200, 4).reshape(2, 150) % 300, shape=(2, 300)),
    case("index_fill.int_Tensor", "channels", lambda i, v, x: x.index_fill(1, i, v).abs(), CHANNELS, torch.tensor(0.5)),
    case("masked_scatter.default", "checkerboard", lambda m, x: x.masked_scatter(m, x.flip(0)), CHECKERBOARD),
    case("diagonal_scatter.default", "above", lambda x: x.diagonal_scatter(x[0, :5], 1), shape=SQUARE),
    case("diagonal_scatter.default", "images",
         lambda x: x.diagonal_scatter(x[:, 0].transpose(1, 2), 0, 1, 2), shape=(2, 4, 4, 3)),
    case("as_strided_scatter.default", "steps", lambda x: x.as_strided_scatter(x[:2, :3], (2, 3), (20, 2), 1)),
    case("put.default", "positions", lambda i, x: x.put(i, x[0, :3]), torch.tensor([3, -1, 11])),
    case("put.default", "accumulate", lambda i, x: x.put(i, x[0, :3], accumulate=True), torch.tensor([3, 3, 11])),
    case("scatter_add.default", "rows", lambda i, x: x.scatter_add(1, i, x[1:, 4:6]), PLACES),
    case("scatter_add.default", "repeated", lambda i, x: x.scatter_add(1, i, x[1:, 4:7]), REPEATED),
    case("scatter_add.default", "into zeros", lambda z, i, x: z.scatter_add(1, i, x), torch.zeros(4, 3),
         torch.arange(40).reshape(4, 10) % 3),
    case("scatter.reduce", "add", lambda i, x: x.scatter(1, i, x[1:, 4:6], reduce="add"), PLACES),
    case("scatter.reduce", "multiply", lambda i, x: x.scatter(1, i, x[1:, 4:7], reduce="multiply"), REPEATED),
    case("scatter.value_reduce", "add", lambda i, x: x.scatter(1, i, 0.5, reduce="add"), REPEATED),
    case("scatter.value_reduce", "multiply", lambda i, x: x.scatter(1, i, 0.5, reduce="multiply"), REPEATED),
    *(
        case("scatter_reduce.two", f"{reduce} {'and' if own else 'of'} repeated",
             lambda i, x, reduce=reduce, own=own: x.scatter_reduce(1, i, x[1:, 4:7], reduce, include_self=own),
             REPEATED)
        for reduce in ("sum", "prod", "mean", "amax", "amin") for own in (True, False)
    ),
    case("index_add.default", "channels", lambda i, x: x.index_add(1, i, x[:, 1:], alpha=2), CHANNELS, shape=IMAGE),
    case("index_add.default", "once", lambda i, x: x.index_add(2, i, x[:, :, 1:3]), torch.tensor([4, 0]), shape=IMAGE),
    case("index_reduce.default", "channels",
         lambda i, x: x.index_reduce(1, i, x[:, 1:], "amax", include_self=False), CHANNELS, shape=IMAGE),
    case("index_reduce.default", "mean", lambda i, x: x.index_reduce(1, i, x[:, 1:], "mean"), CHANNELS, shape=IMAGE),
    case("index_put.default", "points", lambda i, x: aten.index_put(x, [i, i], x[0, :2]), torch.tensor([1, 3])),
    case("index_put.default", "points in channels",
         lambda i, x: aten.index_put(x, [None, None, i, i], x[:, :, 0, :2]), torch.tensor([1, 3]), shape=IMAGE),
    case("index_put.default", "accumulate",
         lambda i, x: aten.index_put(x, [None, i], x[:, 1:], accumulate=True), CHANNELS, shape=IMAGE),
    case("index_put.default", "where a mask is true, one by one",
         lambda m, x: aten.index_put(x, [m], x.flatten()[:TRUE]), CHECKERBOARD),
    case("index_put.default", "part of an image where a mask is true",
         lambda m, x: aten.index_put(x, [None, None, m], x[0, :, :, 0]), FRAME, shape=(1, 4, 4, 10)),
    case("diag.default", "of a vector", lambda x: torch.diag(x, -1), shape=(6,)),
    case("diag.default", "of a matrix", lambda x: torch.diag(x, 1), shape=SQUARE),
    case("diag_embed.default", "rows", torch.diag_embed),
    case("diagflat.default", "vector", torch.diagflat, shape=(6,)),
    case("trace.default", "square", torch.trace, shape=SQUARE),
)  # fmt: skip

REJECTED = (
    Rejected(
        SPEC, "writes_to_constant_positions", "",
        of(lambda x: move(x).scatter_add(1, (x[:, :2] * 0).to(torch.int64), x[:, :2])), (ROWS,),
    ),
    Rejected(
        SPEC, "writes_to_constant_positions", "product of many",
        of(lambda i, x: move(x).scatter_reduce(1, i, x, "prod"), torch.zeros(4, 10, dtype=torch.int64)), (ROWS,),
        lowers=False,
    ),
    Rejected(DIAGONAL, "has_a_small_diagonal", "", of(lambda x: torch.diag_embed(move(x))), ((1, 300),)),
)  # fmt: skip
