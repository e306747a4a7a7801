"""Table of the operator tests: means, sums, maxima, minima, variances and norms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from tests.case import Case, Rejected, Shape, of
from torch import nn

__all__ = ["CASES", "REJECTED"]

aten = torch.ops.aten
IMAGE = (2, 4, 6, 8)


def mean(label: str, shape: Shape, dims: Any, keepdim: bool, spread: tuple[float, float] = (0.0, 1.0)) -> Case:
    return Case("aten.mean.dim", label, of(lambda x: x.mean(dims, keepdim)), (shape,), spread)


def case(target: str, label: str, shape: Shape, function: Callable[..., Any], *args: Any, **options: Any) -> Case:
    return Case(f"aten.{target}", label, of(lambda x: function(x, *args, **options)), (shape,))


def first(function: Callable[..., Any]) -> Callable[..., torch.Tensor]:
    return lambda *args, **options: function(*args, **options)[0]


def _extremes() -> list[Case]:
    cases = []
    for name, reduce, over in (("amax", torch.amax, torch.max), ("amin", torch.amin, torch.min)):
        target, plain = f"{name}.default", name.removeprefix("a")
        cases += [
            case(target, "image", IMAGE, reduce, (2, 3)),
            case(target, "channels kept", IMAGE, reduce, -3, True),
            case(target, "batch and width", IMAGE, reduce, (0, -1)),
            case(target, "rank 5", (2, 3, 4, 5, 3), reduce, (1, 3), True),
            case(target, "rank 1", (9,), reduce, 0),
            case(target, "everything", (5, 7), reduce),
            case(target, "everything kept", (5, 7), reduce, (), True),
            case(f"{plain}.default", "everything", IMAGE, over),
            case(f"{plain}.dim", "channels", IMAGE, first(over), 1),
            case(f"{plain}.dim", "width kept", IMAGE, first(over), -1, keepdim=True),
            case(f"{plain}.dim", "rank 2", (3, 5), first(over), 0),
        ]
    return cases


def _moments() -> list[Case]:
    both = torch.var_mean
    return [
        case("var.dim", "image", (2, 4, 7, 9), torch.var, (2, 3)),
        case("var.dim", "biased rows kept", (5, 12), torch.var, 1, unbiased=False, keepdim=True),
        case("var.correction", "image kept", IMAGE, torch.var, (2, 3), correction=0, keepdim=True),
        case("var.correction", "channels", IMAGE, torch.var, 1, correction=2),
        case("var.correction", "everything", IMAGE, torch.var),
        case("var.default", "everything biased", IMAGE, aten.var.default, False),
        case("var_mean.dim", "image", IMAGE, both, (2, 3)),
        case("var_mean.correction", "image kept", IMAGE, both, (2, 3), correction=0, keepdim=True),
        case("var_mean.correction", "variance alone", IMAGE, first(both), (2, 3), correction=1),
        case("var_mean.default", "everything", IMAGE, aten.var_mean.default, True),
    ]


def _norms() -> list[Case]:
    norm = torch.linalg.vector_norm
    return [
        case("linalg_vector_norm.default", "1", IMAGE, norm, 1, 1),
        case("linalg_vector_norm.default", "inf kept", IMAGE, norm, math.inf, (2, 3), True),
        case("linalg_vector_norm.default", "-inf", IMAGE, norm, -math.inf, -1),
    ]


CASES = (
    mean("image", (1, 8, 7, 7), (2, 3), True),
    mean("image squeezed", (2, 8, 7, 7), (2, 3), False),
    mean("image negative", (2, 8, 7, 5), (-1, -2), False),
    mean("channels", (1, 8, 7, 5), 1, False),
    mean("channels kept", (1, 8, 7, 5), -3, True),
    mean("batch", (3, 8, 7, 5), 0, False),
    mean("height", (2, 8, 7, 5), 2, False),
    mean("width", (2, 8, 7, 5), -1, True),
    mean("all but the batch", (3, 8, 7, 5), (1, 2, 3), False),
    mean("everything", (3, 8, 7, 5), (0, 1, 2, 3), False),
    mean("everything kept", (2, 3, 5), (0, 1, 2), True),
    mean("no dimension named", (2, 3, 5), (), False),
    mean("none", (2, 3, 5), None, True),
    mean("rank 2", (3, 10), 1, False),
    mean("rank 2 first", (3, 10), 0, True),
    mean("rank 3", (3, 10, 5), (0, 2), False),
    mean("rank 5", (2, 3, 4, 5, 3), (1, 3), False),
    mean("rank 5 last", (2, 3, 4, 5, 3), -1, True),
    mean("rank 1", (16,), 0, False),
    mean("rank 1 kept", (16,), 0, True),
    mean("large", (1, 4, 56, 56), (2, 3), False),
    mean("one-sided", (1, 8, 7, 7), (2, 3), True, (6.0, 1.0)),
    mean("of one value", (1, 8, 1, 1), (2, 3), False),
    mean("unsorted", (2, 8, 7, 5), (3, 1), False),
    case("mean.default", "everything", IMAGE, torch.mean),
    case("mean.default", "of a sum", IMAGE, lambda x: (x - x.mean()).abs()),
    case("sum.default", "everything", IMAGE, torch.sum),
    case("sum.default", "rank 1", (9,), torch.sum),
    case("sum.dim_IntList", "none", IMAGE, lambda x: aten.sum.dim_IntList(x, None)),
    case("sum.dim_IntList", "image", IMAGE, torch.sum, (2, 3)),
    case("sum.dim_IntList", "image keepdim", IMAGE, torch.sum, (-1, -2), keepdim=True),
    case("sum.dim_IntList", "channels", IMAGE, torch.sum, 1),
    case("sum.dim_IntList", "rows", (5, 7), torch.sum, -1),
    case("sum.dim_IntList", "16x16", (1, 8, 16, 16), torch.sum, (2, 3)),
    *_extremes(),
    *_moments(),
    *_norms(),
)  # fmt: skip


def over_channels(function: Callable[..., Any]) -> Callable[[], nn.Module]:
    """Returns the values, and the indices as values."""
    return of(lambda x: [part * 1.0 for part in function(x, 1)])


IMAGES = (1, 8, 6, 6)

REJECTED = (
    Rejected("mean", "means_over_an_image", "everything", of(torch.mean), (IMAGES,)),
    Rejected("max over a dimension", "has_unused_indices", "", over_channels(torch.max), (IMAGES,)),
    Rejected("min over a dimension", "has_unused_indices", "", over_channels(torch.min), (IMAGES,)),
    Rejected("vector_norm", "is_a_simple_norm", "", of(lambda x: torch.linalg.vector_norm(x, 3, 1)), (IMAGES,)),
)
