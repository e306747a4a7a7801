"""Table of the operator tests: arithmetic of two values, and functions of one value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from tests.case import Case, moved, of

__all__ = ["CASES"]

IMAGE = (2, 4, 6, 8)
SPREADS = {"": (0.0, 1.0), "large": (0.0, 30.0), "tiny": (0.0, 0.01), "one-sided": (4.0, 1.0)}


def two(target: str, function: Callable[..., Any]) -> list[Case]:
    """Returns cases of a binary operator: equal shapes, broadcasts of both sides, constants, and one value twice."""
    constant, scalar = torch.linspace(-1, 2, 4).reshape(4, 1, 1), torch.tensor(0.7)
    return [
        Case(target, "equal shapes", of(function), (IMAGE, IMAGE)),
        Case(target, "vectors", of(function), ((9,), (9,))),
        Case(target, "right per channel", of(function), (IMAGE, (1, 4, 1, 1))),
        Case(target, "left per channel", of(function), ((2, 4, 1, 1), IMAGE)),
        Case(target, "lower rank", of(function), ((2, 3, 8), (8,))),
        Case(target, "constant", of(lambda c, x: function(x, c), constant), (IMAGE,)),
        Case(target, "scalar tensor", of(function, scalar), (IMAGE,)),
        Case(target, "twice", of(lambda x: function(x, x)), (IMAGE,)),
        Case(target, "large and tiny", of(lambda x, y: function(x * 50, y)), (IMAGE, IMAGE)),
        Case(target, "between convolutions", _between(function), (IMAGE,)),
    ]


def _between(function: Callable[..., Any]) -> Callable[[], torch.nn.Module]:
    def make() -> torch.nn.Module:
        first, second, last = (torch.nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        return of(lambda a, b, c, x: c(function(a(x), torch.sigmoid(b(x)))), first, second, last)()

    return make


def one(target: str, function: Callable[..., Any], *spreads: str) -> list[Case]:
    """Returns cases of a function of one value with several ranges."""
    return [Case(target, name or "unit", of(function), (IMAGE,), SPREADS[name]) for name in spreads or SPREADS]


def positive(target: str, function: Callable[..., Any]) -> list[Case]:
    """Returns cases of a function of positive values."""
    return [
        Case(target, "above one", of(lambda x: function(x.abs() + 1)), (IMAGE,)),
        Case(target, "above a tenth", of(lambda x: function(x.abs() + 0.1)), ((3, 5),)),
    ]


def _slices() -> list[Case]:
    def case(label: str, function: Callable[[torch.Tensor], torch.Tensor]) -> Case:
        return Case("aten.slice.Tensor", label, moved(function), (IMAGE,))

    return [
        case("rows", lambda x: x[:, :, 1:4]),
        case("channels", lambda x: x[:, 1:3]),
        case("negative", lambda x: x[..., -5:-1]),
        case("past the end", lambda x: x[:, :, 2:100]),
        case("batch", lambda x: x[1:]),
        case("two dimensions", lambda x: x[:, :, 1:5, 2:]),
    ]


def _numbers() -> list[Case]:
    return [
        Case("aten.add.Tensor", "number", of(lambda x: x + 1.5), (IMAGE,)),
        Case("aten.add.Tensor", "number with alpha", of(lambda x: torch.add(x, 2.0, alpha=-0.5)), (IMAGE,)),
        Case("aten.sub.Tensor", "number", of(lambda x: x - 0.25), (IMAGE,)),
        Case("aten.sub.Tensor", "from a number", of(lambda x: 1.0 - x), (IMAGE,)),
        Case("aten.mul.Tensor", "number", of(lambda x: x * -3.0), (IMAGE,)),
        Case("aten.mul.Tensor", "in place", of(lambda x: (x + 1.0).mul_(0.5)), (IMAGE,)),
        Case("aten.mul.Tensor", "division by a number", of(lambda x: x / 255.0), (IMAGE,)),
        Case("aten.mul.Tensor", "division by a constant", of(lambda c, x: x / c, torch.tensor([0.5, 2.0])), ((3, 2),)),
    ]


CASES: tuple[Case, ...] = (
    *two("aten.mul.Tensor", lambda x, y: x * y),
    *two("aten.sub.Tensor", lambda x, y: x - y),
    *two("aten.maximum.default", torch.maximum),
    *two("aten.minimum.default", torch.minimum),
    Case("aten.mul_.Tensor", "in place", of(lambda x, y: (-x).mul_(y)), (IMAGE, IMAGE)),
    Case("aten.sub_.Tensor", "in place", of(lambda x, y: (-x).sub_(y)), (IMAGE, IMAGE)),
    *one("aten.leaky_relu.default", lambda x: F.leaky_relu(x, 0.1)),
    *one("aten.leaky_relu_.default", lambda x: F.leaky_relu_(-x, 0.01), ""),
    *one("aten.neg.default", torch.neg),
    *one("aten.negative.default", torch.negative),
    *one("aten.multiply.Tensor", lambda x: torch.multiply(x, x)),
    *one("aten.subtract.Tensor", lambda x: torch.subtract(x, 0.5)),
    *one("aten.neg_.default", lambda x: (x + 1.0).neg_(), ""),
    *one("aten.exp.default", torch.exp, "", "tiny", "one-sided"),
    *one("aten.exp_.default", lambda x: (-x).exp_(), ""),
    *one("aten.hardswish.default", F.hardswish),
    *one("aten.hardswish_.default", lambda x: F.hardswish(-x, inplace=True), ""),
    *positive("aten.log.default", torch.log),
    *positive("aten.log_.default", lambda x: x.log_()),
    *positive("aten.rsqrt.default", torch.rsqrt),
    *positive("aten.rsqrt_.default", lambda x: x.rsqrt_()),
    *one("aten.silu.default", F.silu),
    *_slices(),
    *_numbers(),
)
