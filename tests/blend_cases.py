"""Table of the operator tests: addcmul, addcdiv, lerp, distances, and operands that both broadcast."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from tests.case import Case, Rejected, Shape, of

__all__ = ["CASES", "REJECTED"]

IMAGE: Shape = (2, 6, 5, 4)
ROWS: Shape = (5, 32)
Function = Callable[..., torch.Tensor]


def _case(target: str, label: str, function: Function, *shapes: Shape) -> Case:
    return Case(f"aten.{target}", label, of(function), shapes)


def _blends() -> list[Case]:
    two, three = (IMAGE, IMAGE), (IMAGE, IMAGE, IMAGE)
    ones = torch.ones(6, 1, 1)
    return [
        _case("addcmul.default", "", torch.addcmul, *three),
        _case("addcmul.default", "half", lambda x, y: torch.addcmul(x, x, y, value=0.5), *two),
        _case("addcmul.default", "channels", lambda x, y, z: torch.addcmul(y, z, x), IMAGE, (6, 1, 1), (6, 1, 1)),
        Case("aten.addcmul.default", "constants", of(lambda c, x: torch.addcmul(c, c, x.exp()), ones), (IMAGE,)),
        _case("addcmul.default", "nothing", lambda x, y: torch.addcmul(x.abs(), x, y, value=0), *two),
        _case("addcdiv.default", "", lambda x, y: torch.addcdiv(x, x, y.abs() + 1, value=-2), *two),
        _case("lerp.Scalar", "quarter", lambda x, y: torch.lerp(x, y, 0.25), *two),
        _case("lerp.Scalar", "beyond", lambda x, y: torch.lerp(x, y, 1.5), *two),
        _case("lerp.Scalar", "end", lambda x, y: torch.lerp(x, y.abs(), 1.0), *two),
        _case("lerp.Tensor", "gate", lambda x, y: torch.lerp(x, y, (x - y).sigmoid()), *two),
    ]


def _distances() -> list[Case]:
    two = (ROWS, ROWS)
    return [
        _case("cosine_similarity.default", "rows", F.cosine_similarity, *two),
        _case("cosine_similarity.default", "each with each",
              lambda x, y: F.cosine_similarity(x[:, None], y[None], dim=-1), ROWS, (7, 32)),
        _case("cosine_similarity.default", "one value for each row",
              lambda x, y: F.cosine_similarity(x, y, dim=1), ROWS, (ROWS[0], 1)),
        _case("cosine_similarity.default", "a row and a column", lambda x, y: F.cosine_similarity(x, y, dim=0),
              (ROWS[1],), (ROWS[0], 1)),
        _case("cosine_similarity.default", "no dimension", lambda x, y: F.cosine_similarity(x.sum(), y), *two),
        _case("pairwise_distance.default", "", F.pairwise_distance, *two),
        _case("pairwise_distance.default", "of order 1", lambda x, y: F.pairwise_distance(x, y, 1, keepdim=True), *two),
        _case("cdist.default", "", torch.cdist, ROWS, (7, 32)),
        _case("cdist.default", "of order 1", lambda x, y: torch.cdist(x, y, 1), (2, 5, 8), (2, 4, 8)),
        _case("logsumexp.default", "channels", lambda x: x.logsumexp(1), IMAGE),
        _case("logsumexp.default", "image", lambda x: x.logsumexp((2, 3), keepdim=True), IMAGE),
        _case("logaddexp.default", "", torch.logaddexp, *two),
    ]  # fmt: skip


def _both_broadcast() -> list[Case]:
    column = torch.linspace(-1, 1, 12).reshape(12, 1)

    def constant(target: str, function: Function) -> Case:
        return Case(f"aten.{target}", "both with a constant", of(function, column), ((1, 7),))

    return [
        _case("add.Tensor", "both broadcast", lambda x: x.mean(3, keepdim=True) + x.mean(2, keepdim=True), IMAGE),
        _case("mul.Tensor", "both broadcast", torch.mul, (1, 8, 6, 1), (1, 8, 1, 20)),
        _case("sub.Tensor", "both broadcast", torch.sub, (2, 3, 1, 4, 1), (2, 1, 5, 1, 3)),
        _case("maximum.default", "both broadcast", torch.maximum, (3, 1, 5), (4, 1)),
        _case("minimum.default", "both broadcast", torch.minimum, (1, 12), (80, 1)),
        constant("add.Tensor", lambda c, x: x + c),
        constant("mul.Tensor", lambda c, x: c * x),
    ]


CASES = (*_blends(), *_distances(), *_both_broadcast())

deep: Shape = (1, 2, 1, 3, 1, 4, 1)
other: Shape = (1, 2, 2, 1, 5, 1, 3)

many: Shape = (2,) * 9

REJECTED = (
    *(
        Rejected(name, "has_rank_to_broadcast", "", of(getattr(torch, name)), (many, (1, 2, 1, 2, 1, 2, 1, 2, 1)))
        for name in ("add", "sub", "mul", "maximum", "minimum")
    ),
    *(
        Rejected(name, "expands_few_dimensions", "", of(getattr(torch, name)), (deep, other))
        for name in ("add", "sub", "mul", "maximum", "minimum")
    ),
    *(
        Rejected(name, "has_one_full_operand", "", of(getattr(torch, name)), ((1, 8, 1, 8), (1, 8, 8, 1)))
        for name in ("add", "sub", "mul", "maximum", "minimum")
    ),
    Rejected("addcdiv", "divides_by_positive_values", "", of(torch.addcdiv), (IMAGE, IMAGE, IMAGE)),
    Rejected("addcdiv", "divides_by_positive_values", "by observed values above 0",
             of(lambda x, y, z: torch.addcdiv(x, y, z + 9)), (IMAGE, IMAGE, IMAGE)),
    Rejected("pairwise_distance", "has_a_simple_order", "", of(lambda x, y: F.pairwise_distance(x, y, 3)),
             (ROWS, ROWS)),
    Rejected("cdist", "has_a_simple_order", "", of(lambda x, y: torch.cdist(x, y, 3)), (ROWS, ROWS)),
)  # fmt: skip
