"""Table of the operator tests: writes to a part of a tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tests.case import Case, Rejected, move, moved, of

__all__ = ["CASES", "REJECTED"]

aten = torch.ops.aten
IMAGE = (2, 4, 6, 8)
SPEC = "slice_scatter, select_scatter, index_put"


def case(target: str, label: str, function: Callable[[torch.Tensor], Any]) -> Case:
    return Case(f"aten.{target}", label, moved(function), (IMAGE,))


def indexed(target: str, label: str, function: Callable[..., Any], *indices: int | bool) -> Case:
    """Returns a case of `function` of constant indices and a value, after an operator that is worth a partition."""
    return Case(f"aten.{target}", label, of(lambda i, x: function(i, move(x)), torch.tensor(indices)), (IMAGE,))


CASES = (
    case("slice_scatter.default", "channels", lambda x: torch.slice_scatter(x, x[:, 2:], 1, 0, 2)),
    case("slice_scatter.default", "negative", lambda x: torch.slice_scatter(x, x[..., :3], -1, -3)),
    case("slice_scatter.default", "all", lambda x: torch.slice_scatter(x, x.flip(2), 2)),
    case("slice_scatter.default", "steps", lambda x: torch.slice_scatter(x, x[..., :4], 3, 0, 8, 2)),
    case("slice_scatter.default", "steps with a rest", lambda x: torch.slice_scatter(x, x[..., :3], 3, 1, 8, 3)),
    case("slice_scatter.default", "two in turn",
         lambda x: torch.slice_scatter(torch.slice_scatter(x, x[..., :4], 3, 0, 8, 2), x[..., 4:], 3, 1, 8, 2)),
    case("slice_scatter.default", "in two dimensions",
         lambda x: torch.slice_scatter(torch.slice_scatter(x, x[:, :2], 1, 1, 3), x[:, :, :2], 2, 4)),
    case("select_scatter.default", "channel", lambda x: torch.select_scatter(x, x[:, 2], 1, 0)),
    case("select_scatter.default", "last column", lambda x: torch.select_scatter(x, x[..., 2], 3, -1)),
    indexed("index_copy.default", "channels", lambda i, x: x.index_copy(1, i, x[:, 1:3]), 3, 0),
    indexed("index_fill.int_Scalar", "rows", lambda i, x: x.index_fill(2, i, 0.5).abs(), 1, 2, 5),
    indexed("index_put.default", "channels", lambda i, x: aten.index_put(x, [None, i], x[:, 1:3]), 3, 0),
    indexed("index_put.default", "where a mask is true",
            lambda i, x: aten.index_put(x, [None, i], x[:, 1:3]), True, False, True, False),
    indexed("index_put.default", "one for all", lambda i, x: aten.index_put(x, [i], x[:1, :, :1, :1]), 1),
)  # fmt: skip

REJECTED = (
    Rejected(
        SPEC, "writes_to_constant_indices", "",
        moved(lambda x: aten.index_put(x, [(x.flatten()[:1] * 0).to(torch.int64)], x[1:])), (IMAGE,),
    ),
)  # fmt: skip
