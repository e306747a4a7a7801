"""Table of the operator tests: pools."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from tests.case import Case, Rejected, Shape, of
from torch import nn

__all__ = ["CASES", "REJECTED"]

aten = torch.ops.aten
IMAGE = (1, 8, 6, 6)


def _case(
    name: str, module: Callable[..., nn.Module], label: str, shape: Shape, *args: Any, by: bool = False, **options: Any
) -> Case:
    """`by` means that the operator is decomposed."""
    return Case(f"aten.{name}.default", label, lambda: module(*args, **options), (shape,), decomposed=by)


average = partial(_case, "avg_pool2d", nn.AvgPool2d)
average_1d = partial(_case, "avg_pool1d", nn.AvgPool1d)
adaptive = partial(_case, "adaptive_avg_pool2d", nn.AdaptiveAvgPool2d)
adaptive_1d = partial(_case, "adaptive_avg_pool1d", nn.AdaptiveAvgPool1d)
maximum = partial(_case, "max_pool2d", nn.MaxPool2d)
maximum_1d = partial(_case, "max_pool1d", nn.MaxPool1d)


def adaptive_maximum(label: str, shape: Shape, *size: Any) -> Case:
    rank = len(size)
    pool = nn.AdaptiveMaxPool1d if rank == 1 else nn.AdaptiveMaxPool2d
    return Case(f"aten.adaptive_max_pool{rank}d.default", label, lambda: pool(size if rank > 1 else size[0]), (shape,))


def first_of(function: Callable[..., Any], *args: Any, **options: Any) -> Callable[[], nn.Module]:
    return of(lambda x: function(x, *args, **options)[0])


CASES = (
    average("2x2", (1, 5, 8, 9), 2),
    average("3x3 stride 1", (1, 5, 8, 9), 3, 1),
    average("3x3 stride 1 padded", (1, 5, 8, 9), 3, 1, 1),
    average("3x3 stride 2 padded", (1, 5, 9, 8), 3, 2, 1),
    average("unequal padded", (2, 5, 9, 8), (2, 4), (1, 3), (1, 2)),
    average("not counting what is not there", (1, 5, 8, 8), 2, count_include_pad=False),
    average("not counting SAME padding", (2, 5, 8, 9), 3, 1, 1, count_include_pad=False),
    average("not counting SAME padding stride 2", (1, 5, 9, 7), 3, 2, 1, count_include_pad=False),
    average("not counting SAME padding of columns", (1, 5, 9, 7), (1, 5), 1, (0, 2), count_include_pad=False),
    average("ceil", (1, 5, 8, 7), 3, 2, ceil_mode=True),
    average("ceil that adds nothing", (1, 5, 9, 9), 3, 2, ceil_mode=True),
    average("divisor that is the window", (1, 5, 8, 8), 2, divisor_override=4),
    average("rank 3", (5, 8, 8), 2),
    average("whole image", (1, 7, 9, 5), (9, 5)),
    average("rank 3 padded", (5, 8, 8), 3, 2, 1),
    average("not counting other padding", (2, 5, 8, 10), 3, 2, 1, count_include_pad=False, by=True),
    average("not counting wide padding", (1, 5, 14, 13), 7, 3, 3, count_include_pad=False, by=True),
    average("not counting padding rank 3", (5, 8, 8), (4, 2), 2, (2, 1), count_include_pad=False, by=True),
    average("ceil padded", (1, 4, 8, 8), 3, 2, 1, ceil_mode=True, by=True),
    average("ceil not SAME", (1, 4, 8, 8), (4, 2), (3, 2), ceil_mode=True, by=True),
    average("ceil padded not counting", (2, 4, 8, 10), 3, 2, 1, ceil_mode=True, count_include_pad=False, by=True),
    average("sum", (1, 5, 8, 9), 2, divisor_override=1, by=True),
    average("divisor padded batch 2", (2, 5, 9, 8), 3, 2, 1, divisor_override=7, by=True),
    average("divisor rank 3 one channel", (1, 8, 8), 2, divisor_override=3, by=True),
    average("divisor ceil", (1, 5, 8, 8), 3, 2, ceil_mode=True, divisor_override=5, by=True),
    average_1d("3 stride 2 padded", (2, 5, 9), 3, 2, 1),
    average_1d("rank 2", (5, 9), 2),
    average_1d("ceil", (2, 5, 10), 3, 2, ceil_mode=True),
    average_1d("not counting padding", (2, 5, 10), 3, 2, 1, count_include_pad=False, by=True),
    average_1d("rank 2 ceil padded", (5, 10), 3, 2, 1, ceil_mode=True, by=True),
    adaptive("to 1", (1, 9, 7, 5), 1),
    adaptive("to 1 batch 2", (2, 9, 7, 5), (1, 1)),
    adaptive("to 1 rank 3", (9, 7, 5), 1),
    adaptive("to 2x3", (1, 9, 8, 9), (2, 3)),
    adaptive("to 1x3", (1, 4, 8, 9), (1, 3)),
    adaptive("to itself", (1, 4, 5, 5), 5),
    adaptive("one dimension kept", (1, 4, 6, 5), (3, None)),
    adaptive("to 2 rank 3", (4, 6, 6), 2),
    adaptive("overlapping", (2, 4, 8, 7), (7, 3)),
    adaptive("uneven", (2, 5, 12, 13), 7, by=True),
    adaptive("uneven rank 3", (5, 10, 8), (7, 3), by=True),
    adaptive("uneven rows", (1, 5, 10, 8), (4, 8), by=True),
    adaptive("uneven large", (1, 4, 29, 33), (6, 5), by=True),
    adaptive("uneven large rows", (2, 4, 38, 33), (6, 33), by=True),
    adaptive("to more", (1, 4, 3, 5), (7, 5), by=True),
    adaptive_1d("to 3", (2, 5, 9), 3),
    adaptive_1d("to 1", (2, 5, 9), 1),
    adaptive_1d("to 1 rank 2", (5, 9), 1),
    adaptive_1d("overlapping", (5, 9), 8),
    adaptive_1d("uneven", (2, 5, 12), 5, by=True),
    maximum("2x2", (1, 5, 8, 9), 2),
    maximum("3x3 SAME", (1, 5, 9, 7), 3, 2, 1),
    maximum("3x3 not SAME", (1, 5, 8, 8), 3, 2, 1),
    maximum("3x3 stride 1", (2, 5, 8, 8), 3, 1, 1),
    maximum("unequal", (1, 5, 9, 10), (2, 4), (3, 1), (1, 2)),
    maximum("rank 3", (5, 8, 8), 2),
    maximum("rank 3 padded", (5, 8, 8), 3, 2, 1),
    maximum("ceil SAME", (1, 5, 8, 8), 3, 2, ceil_mode=True),
    maximum("ceil not SAME", (2, 5, 9, 12), 2, (3, 5), ceil_mode=True),
    maximum("ceil padded", (1, 5, 8, 9), 3, 2, 1, ceil_mode=True),
    maximum("ceil rank 3", (5, 7, 7), 2, ceil_mode=True),
    maximum_1d("3 stride 2 padded", (2, 5, 9), 3, 2, 1),
    maximum_1d("rank 2", (5, 9), 2),
    maximum_1d("ceil", (2, 5, 9), 2, ceil_mode=True),
    Case("aten.max_pool2d_with_indices.default", "padded", first_of(F.max_pool2d, 3, 2, 1, return_indices=True),
         ((2, 5, 8, 9),)),
    Case("aten.max_pool1d_with_indices.default", "ceil",
         first_of(F.max_pool1d, 2, ceil_mode=True, return_indices=True), ((2, 5, 9),)),
    adaptive_maximum("to 1", (2, 5, 7, 6), 1, 1),
    adaptive_maximum("to 2x3", (2, 5, 8, 9), 2, 3),
    adaptive_maximum("overlapping rank 3", (5, 8, 7), 7, 3),
    adaptive_maximum("uneven", (2, 5, 12, 9), 7, 3),
    adaptive_maximum("uneven rank 3", (5, 10, 10), 4, 7),
    adaptive_maximum("to 3", (2, 5, 9), 3),
    adaptive_maximum("uneven", (2, 5, 12), 5),
)  # fmt: skip


def average_pool(*args: Any, **options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.AvgPool2d(*args, **options)


def both(function: Callable[..., Any], *args: Any, **options: Any) -> Callable[[], nn.Module]:
    """Returns the values, and the indices as values."""
    return of(lambda x: [part * 1.0 for part in function(x, *args, **options)])


REJECTED = (
    Rejected("avg_pool", "has_small_kernel", "kernel", average_pool((1, 4097), 1), ((1, 2, 1, 4100),)),
    Rejected("avg_pool", "has_small_kernel", "stride", average_pool(1, (1, 4097)), ((1, 2, 1, 4100),)),
    Rejected("avg_pool", "divides_as_tflite_does", "divisor", average_pool(2, divisor_override=3), (IMAGE,),
             quantized_elsewhere=True),
    Rejected("avg_pool", "divides_as_tflite_does", "padding", average_pool(3, 2, 1, count_include_pad=False), (IMAGE,),
             quantized_elsewhere=True),
    Rejected("avg_pool with other divisors", "has_small_kernel", "",
             average_pool((1, 4097), (1, 3), divisor_override=9), ((1, 2, 1, 4100),)),
    Rejected("avg_pool with other divisors", "fits_accumulation", "", average_pool(91, divisor_override=9),
             ((1, 2, 92, 92),)),
    Rejected("adaptive_avg_pool", "has_even_windows", "", lambda: nn.AdaptiveAvgPool2d((4, 3)), (IMAGE,),
             quantized_elsewhere=True),
    Rejected("adaptive_avg_pool with uneven windows", "has_short_axes", "", lambda: nn.AdaptiveAvgPool2d((1, 4)),
             ((1, 2, 2, 515),)),
    Rejected("adaptive_avg_pool", "has_small_kernel", "", lambda: nn.AdaptiveAvgPool2d((1, 2)), ((1, 1, 1, 8194),)),
    Rejected("max_pool", "has_small_stride", "", lambda: nn.MaxPool2d(1, (1, 4097)), ((1, 8, 1, 4100),)),
    Rejected("max_pool with indices", "has_unused_indices", "", both(F.max_pool2d, 2, return_indices=True),
             (IMAGE,)),
    Rejected("adaptive_max_pool", "has_unused_indices", "",
             both(F.adaptive_max_pool2d, 2, return_indices=True), (IMAGE,), lowers=False),
    Rejected("adaptive_max_pool", "has_few_uneven_windows", "", lambda: nn.AdaptiveMaxPool2d((17, 1)), ((1, 8, 20, 6),),
             lowers=False),
)  # fmt: skip
