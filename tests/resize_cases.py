"""Table of the operator tests: resizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from tests.case import Case, Rejected, Shape, of
from torch import nn

__all__ = ["CASES", "REJECTED"]

aten = torch.ops.aten
IMAGE = (1, 8, 6, 6)


def resize(to: Any, mode: str = "nearest", *, corners: bool | None = None, **options: Any) -> Callable[[], nn.Module]:
    """Returns a resize. A float `to` is a factor, any other the output's size."""
    is_factor = isinstance(to[0] if isinstance(to, tuple) else to, float)
    size = {"scale_factor" if is_factor else "size": to}
    return of(lambda x: F.interpolate(x, mode=mode, align_corners=corners, **size, **options))


_NAMES = {"nearest": "upsample_nearest", "nearest-exact": "_upsample_nearest_exact", "bilinear": "upsample_bilinear",
          "linear": "upsample_linear", "bicubic": "upsample_bicubic"}  # fmt: skip


def case(mode: str, label: str, shape: Shape, to: Any, *, corners: bool = False, by: bool = False) -> Case:
    model = resize(to, mode, corners=None if "nearest" in mode else corners)
    return Case(f"aten.{_NAMES[mode]}{len(shape) - 2}d.vec", label, model, (shape,), decomposed=by)


def default(name: str, shape: Shape, *args: Any, by: bool = False) -> Case:
    target = getattr(aten, name).default
    label = f"{args}".replace(".", "_")
    return Case(f"aten.{name}.default", label, of(lambda x: target(x, *args)), (shape,), decomposed=by)


def antialiased(mode: str, shape: Shape, to: Any) -> Case:
    target = f"aten._upsample_{mode}2d_aa.vec"
    return Case(target, f"to {to}", resize(to, mode, corners=False, antialias=True), (shape,))


CASES = (
    case("nearest", "2", (2, 5, 4, 7), 2.0),
    case("nearest", "to 8x28", (1, 5, 4, 7), (8, 28)),
    case("nearest", "1", (1, 5, 4, 7), 1.0),
    case("nearest", "rows", (1, 5, 4, 7), (16, 7)),
    case("nearest", "8", (1, 3, 2, 3), 8.0),
    case("nearest", "16 and 2", (1, 3, 2, 3), (16.0, 2.0)),
    case("nearest", "128", (1, 2, 1, 2), 128.0),
    case("nearest", "3", (2, 5, 4, 3), 3.0),
    case("nearest", "5 and 12", (1, 5, 2, 3), (5.0, 12.0)),
    case("nearest", "two thirds", (1, 5, 6, 9), (4, 6), by=True),
    case("nearest", "1_5", (2, 5, 4, 6), 1.5, by=True),
    case("nearest", "factor that the size rounds down", (1, 5, 4, 5), 3.1, by=True),
    case("nearest", "large", (1, 2, 20, 30), (30, 45), by=True),
    case("nearest-exact", "2", (2, 5, 4, 7), 2.0),
    case("nearest-exact", "6", (1, 5, 4, 3), 6.0),
    case("nearest-exact", "half", (1, 5, 6, 8), 0.5, by=True),
    case("nearest", "2", (2, 5, 7), 2.0),
    case("nearest", "6", (1, 5, 7), 6.0),
    case("nearest", "half", (1, 5, 8), 0.5, by=True),
    case("nearest-exact", "4", (2, 5, 7), 4.0),
    case("nearest-exact", "third", (2, 5, 9), 3, by=True),
    default("upsample_nearest2d", (1, 5, 4, 6), [8, 12]),
    default("upsample_nearest2d", (1, 5, 4, 6), [4, 9], by=True),
    default("_upsample_nearest_exact2d", (1, 5, 4, 6), [8, 12]),
    default("upsample_nearest1d", (1, 5, 6), [12]),
    default("_upsample_nearest_exact1d", (1, 5, 6), [12]),
    case("bilinear", "2", (2, 5, 6, 7), 2.0),
    case("bilinear", "4 and 8", (1, 5, 3, 4), (4.0, 8.0)),
    case("bilinear", "1", (1, 5, 6, 7), 1.0),
    case("bilinear", "columns", (1, 5, 6, 7), (6, 14)),
    case("bilinear", "from one", (1, 5, 1, 1), 8.0),
    case("bilinear", "corners 2 and 4", (2, 5, 6, 7), (11, 25), corners=True),
    case("bilinear", "corners 8", (1, 5, 4, 5), (25, 33), corners=True),
    case("bilinear", "corners 1", (1, 5, 6, 7), (6, 13), corners=True),
    case("bilinear", "3", (2, 5, 6, 7), 3.0, by=True),
    case("bilinear", "16", (1, 5, 3, 4), 16.0, by=True),
    case("bilinear", "half", (1, 5, 6, 8), 0.5, by=True),
    case("bilinear", "1_7", (1, 5, 6, 7), 1.7, by=True),
    case("bilinear", "factor that the size rounds down", (1, 5, 4, 5), 2.1, by=True),
    case("bilinear", "large", (1, 2, 33, 20), (65, 97), by=True),
    case("bilinear", "large rows", (2, 2, 33, 65), (97, 65), by=True),
    case("bilinear", "corners twice the size", (2, 5, 6, 7), 2.0, corners=True, by=True),
    case("bilinear", "corners from one", (1, 5, 1, 4), (3, 7), corners=True, by=True),
    case("linear", "2", (2, 5, 7), 2.0),
    case("linear", "corners 4", (2, 5, 7), 25, corners=True),
    case("linear", "3", (2, 5, 7), 3.0, by=True),
    default("upsample_bilinear2d", (1, 5, 4, 6), [8, 12], False),
    default("upsample_bilinear2d", (1, 5, 4, 6), [8, 12], True, by=True),
    default("upsample_linear1d", (1, 5, 6), [12], False),
    case("bicubic", "2", (2, 5, 6, 7), 2.0),
    case("bicubic", "corners", (1, 5, 6, 7), (9, 12), corners=True),
    default("upsample_bicubic2d", (1, 5, 4, 6), [6, 9], False),
    antialiased("bilinear", (1, 3, 16, 12), 0.5),
    antialiased("bilinear", (1, 2, 33, 32), (20, 16)),
    antialiased("bicubic", (1, 3, 12, 9), (7, 5)),
    default("_upsample_bilinear2d_aa", (1, 5, 8, 6), [4, 3], False),
    default("_upsample_bicubic2d_aa", (1, 5, 8, 6), [4, 3], False),
)

WIDE = (1, 2, 2, 513)

REJECTED = (
    Rejected("upsample_nearest", "grows_by_whole_factors", "", resize(1.5), (IMAGE,), quantized_elsewhere=True),
    Rejected("upsample_nearest", "grows_by_legacy_factors", "odd", resize(3.0), (IMAGE,)),
    Rejected("upsample_nearest", "grows_by_legacy_factors", "16", resize(16.0), (IMAGE,)),
    Rejected("upsample_nearest", "has_aligned_channels", "", resize(2.0), ((1, 12, 6, 6),), padded=True),
    Rejected("upsample_nearest by other factors", "has_short_axes", "", resize((2, 600)), (WIDE,)),
    Rejected("upsample_bilinear", "grows_by_native_factors", "", resize(3.0, "bilinear"), (IMAGE,),
             quantized_elsewhere=True),
    Rejected("upsample_bilinear", "has_aligned_channels", "", resize(2.0, "bilinear"), ((1, 12, 6, 6),), padded=True),
    Rejected("upsample_bilinear by other factors", "has_short_axes", "", resize((2, 600), "bilinear"), (WIDE,)),
    Rejected("upsample_bicubic", "has_short_axes", "", resize((2, 600), "bicubic"), (WIDE,)),
    Rejected("upsample with antialiasing", "has_short_axes", "", resize((2, 300), "bilinear", antialias=True), (WIDE,)),
)  # fmt: skip
