"""Table of the operator tests: sums, means and maxima of looked-up rows."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from tests.case import Case, Rejected, of

__all__ = ["CASES", "REJECTED"]

ROWS = (10, 4)
SAME, FLAT, OFFSETS = (
    torch.tensor([[1, 2, 3], [4, 5, 0]]),
    torch.tensor([1, 2, 3, 4, 9, 0, 7]),
    torch.tensor([0, 2, 2, 5]),
)
ON_CPU = ("aten.embedding.default",)
MODES = ("sum", "mean", "max")


def _bags(label: str, indices: torch.Tensor, offsets: torch.Tensor, **options: Any) -> Case:
    model = of(lambda i, starts, x: F.embedding_bag(i, x, starts, **options), indices, offsets)
    return Case("aten.embedding_bag.padding_idx", label, model, (ROWS,), on_cpu=ON_CPU)


CASES: tuple[Case, ...] = (
    *(_bags(mode, FLAT[:6], torch.tensor([0, 3]), mode=mode) for mode in MODES),
    *(_bags(f"{mode} of bags of different sizes", FLAT, OFFSETS, mode=mode) for mode in MODES),
    _bags("the last offset", FLAT, torch.tensor([0, 3, 7]), include_last_offset=True),
    Case("aten.embedding_bag.default", "plain",
         of(lambda indices, starts, x: torch.embedding_bag(x, indices, starts)[0], FLAT, OFFSETS), (ROWS,),
         on_cpu=ON_CPU),
)  # fmt: skip


REJECTED: tuple[Rejected, ...] = (
    Rejected("embedding_bag", "has_constant_bags", "",
             of(lambda i, x: F.embedding_bag(i, x, (x[:2, 0] * 0).long().cumsum(0)), FLAT), (ROWS,), lowers=False),
    Rejected("embedding_bag", "has_few_indices", "",
             of(lambda i, s, x: F.embedding_bag(i, x, s, mode="max"), FLAT[:1].repeat(100), torch.arange(40)), (ROWS,),
             lowers=False),
    Rejected("embedding_bag", "sums_without_padding", "",
             of(lambda i, x: F.embedding_bag(i, x, mode="mean", padding_idx=2), SAME), (ROWS,), lowers=False),
)  # fmt: skip
