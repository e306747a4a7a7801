"""Table of the operator tests: running maxima, products and logarithms of sums; buckets; fftshift;
conv_tbc."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from tests.case import Case, Rejected, move, of

__all__ = ["CASES", "REJECTED"]

ROWS, IMAGE = (3, 11), (2, 3, 4, 5)
BOUNDS = torch.linspace(-1, 1, 5)
COUNTED = ("aten.gt.Tensor", "aten.sum.dim_IntList")
COUNTED_FROM = ("aten.ge.Tensor", "aten.sum.dim_IntList")
SLICE, COMBINED = "aten.slice_copy.Tensor", ("aten.maximum.default", "aten.cat.default")
POSITIONS = ("aten.eq.Tensor", "aten.where.self", *(SLICE,) * 3, *COMBINED, *(SLICE,) * 2, *COMBINED)
BOUNDS_OF_ROWS = torch.tensor([[-1.0, 0.0], [-0.5, 0.5], [0.0, 0.1]])
WEIGHT, POINT = torch.linspace(-0.5, 0.4, 72).reshape(3, 4, 6), torch.linspace(-0.5, 0.4, 8).reshape(1, 4, 2)

CASES: tuple[Case, ...] = (
    Case("aten.cummax.default", "rows", of(lambda x: torch.cummax(move(x), 1)[0].relu()), (ROWS,)),
    Case("aten.cummax.default", "channels", of(lambda x: move(x.cummax(1).values)), (IMAGE,)),
    Case("aten.cummin.default", "first dimension", of(lambda x: move(x.cummin(0)[0])), (ROWS,)),
    Case("aten.cummin.default", "one value", of(lambda x: move(x.cummin(0)[0])), ((1, 4),)),
    Case("aten.cummax.default", "indices", of(lambda x: torch.cummax(move(x), 1)), ((3, 4),), on_cpu=POSITIONS),
    Case("aten.cummin.default", "indices of channels", of(lambda x: torch.cummin(move(x), 1)[1]), ((2, 3, 4, 5),),
         on_cpu=POSITIONS),
    Case("aten.cumprod.default", "rows", of(lambda x: move(torch.cumprod(x.sigmoid() + 0.5, 1))), (ROWS,)),
    Case("aten.cumprod.default", "dtype", of(lambda x: move(x.tanh().cumprod(-1, dtype=torch.float32))), (ROWS,)),
    Case("aten.logcumsumexp.default", "rows", of(lambda x: move(torch.logcumsumexp(x, 1))), (ROWS,)),
    Case("aten.logcumsumexp.default", "channels", of(lambda x: move(x.logcumsumexp(1))), (IMAGE,)),
    Case("aten.cumsum.default", "of integers", of(lambda x: move(x) * (x > 0).int().cumsum(1, dtype=torch.float32)),
         (ROWS,), on_cpu=("aten.gt.Scalar", *("dim_order_ops._to_dim_order_copy.default",) * 2)),
    Case("aten.conv_tbc.default", "padded", of(lambda w, b, x: F.conv_tbc(x, w, b, 1), WEIGHT, torch.ones(6)),
         ((7, 2, 4),)),
    Case("aten.conv_tbc.default", "one step", of(lambda w, b, x: F.conv_tbc(x, w, b).relu(), POINT, torch.zeros(2)),
         ((5, 1, 4),)),
    Case("aten.fft_fftshift.default", "odd", of(lambda x: torch.fft.fftshift(move(x))), (ROWS,)),
    Case("aten.fft_ifftshift.default", "channels", of(lambda x: torch.fft.ifftshift(move(x), dim=1)), (IMAGE,)),
    Case("aten.bucketize.Tensor", "left", of(lambda b, x: torch.bucketize(move(x), b), BOUNDS), (IMAGE,),
         on_cpu=COUNTED),
    Case("aten.bucketize.Tensor", "right", of(lambda b, x: torch.bucketize(
        move(x), b, right=True, out_int32=True), BOUNDS), (ROWS,), on_cpu=COUNTED_FROM),
    Case("aten.searchsorted.Tensor", "side", of(lambda b, x: torch.searchsorted(b, move(x), side="right"), BOUNDS),
         (ROWS,), on_cpu=COUNTED_FROM),
    Case("aten.searchsorted.Tensor", "rows", of(lambda b, x: torch.searchsorted(b, move(x)), BOUNDS_OF_ROWS), (ROWS,),
         on_cpu=COUNTED),
)  # fmt: skip

REJECTED: tuple[Rejected, ...] = (
    Rejected("bucketize, searchsorted", "has_sorted_boundaries", "", of(
        lambda b, x: torch.searchsorted(b, x, sorter=torch.arange(5)), BOUNDS), (ROWS,), lowers=False),
    Rejected("bucketize, searchsorted", "makes_few_comparisons", "", of(
        lambda b, x: torch.bucketize(x, b), torch.arange(1 << 17).float()), (ROWS,), lowers=False),
)  # fmt: skip
