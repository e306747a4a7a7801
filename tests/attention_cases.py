"""Table of the operator tests: attention, masks, and softmaxes of many rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from tests.case import Case, Rejected, Shape, of
from torch import nn

__all__ = ["CASES", "REJECTED"]

attend: Callable[..., torch.Tensor] = F.scaled_dot_product_attention

HEADS = (2, 3, 5, 4)
SEEN = torch.tensor([[1, 1, 0, 0, 1], [1, 0, 1, 0, 0], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 1, 0]]).bool()
BLIND = SEEN.index_fill(0, torch.tensor([2]), False)
LOWEST = torch.finfo(torch.float32).min
BIAS = torch.linspace(-2, 2, 25).reshape(5, 5)


class SelfAttention(nn.Module):
    """Self-attention of a sequence."""

    def __init__(self, mask: torch.Tensor | None = None, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)
        self.mask = None if mask is None else nn.Buffer(mask)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Computes on x [batch, length, 8]."""
        return self.attention(x, x, x, attn_mask=self.mask, need_weights=False)[0]  # type: ignore[no-any-return]


class CrossAttention(nn.Module):
    """Cross-attention of two sequences, which also returns the attention weights."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 4, kdim=6, vdim=6)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes on [length, batch, 8] and [length, batch, 6]."""
        return self.attention(x, y, y)  # type: ignore[no-any-return]


def _attention() -> list[Case]:
    target = "aten.scaled_dot_product_attention.default"

    def case(label: str, *shapes: Shape, mask: torch.Tensor | None = None, **options: Any) -> Case:
        def run(mask: torch.Tensor | None, *values: torch.Tensor) -> torch.Tensor:
            return attend(*values[:3], values[3] if mask is None and len(values) == 4 else mask, **options)

        return Case(target, label, of(run, mask) if mask is not None else of(lambda *x: run(None, *x)), shapes)

    def module(label: str, build: Callable[[], nn.Module], *shapes: Shape) -> Case:
        return Case(target, label, build, shapes)

    same = (HEADS,) * 3
    return [
        case("plain", *same),
        case("rank 3", (3, 5, 4), (3, 6, 4), (3, 6, 2)),
        case("rank 2", (5, 4), (6, 4), (6, 2)),
        case("few queries", (1, 2, 2, 4), (1, 2, 9, 4), (1, 2, 9, 4)),
        case("scale", *same, scale=0.125),
        case("causal", *same, is_causal=True),
        case("truth values", *same, mask=SEEN),
        case("a query that sees nothing", *same, mask=BLIND),
        case("sums", *same, mask=BIAS),
        case("sums and minus infinity", *same, mask=BIAS.masked_fill(~SEEN, -math.inf)),
        case("large negative sums", *same, mask=torch.zeros(5, 5).masked_fill(~SEEN, -1e4)),
        case("computed sums", *same, (5, 5)),
        case("grouped queries", (2, 6, 5, 4), (2, 2, 5, 4), (2, 2, 5, 4), enable_gqa=True),
        case("causal grouped queries", (2, 4, 5, 4), (2, 1, 5, 4), (2, 1, 5, 4), enable_gqa=True, is_causal=True),
        module("MultiheadAttention", SelfAttention, (2, 5, 8)),
        module("MultiheadAttention without bias", lambda: SelfAttention(bias=False), (2, 5, 8)),
        module("MultiheadAttention with a mask", lambda: SelfAttention(~SEEN), (2, 5, 8)),
        module("MultiheadAttention with a mask of sums", lambda: SelfAttention(BIAS), (2, 5, 8)),
    ]


def _masks() -> list[Case]:
    def case(target: str, label: str, function: Callable[..., Any], *parts: torch.Tensor) -> Case:
        return Case(f"aten.{target}", label, of(function, *parts), ((2, 5, 5),))

    def add(label: str, mask: torch.Tensor) -> Case:
        function = of(lambda m, x: (x + m).softmax(-1), mask)
        return Case("aten.add.Tensor", label, function, ((2, 5, 5),), decomposed=True)

    return [
        add("minus infinity", torch.zeros(5, 5).masked_fill(~SEEN, -math.inf)),
        add("large negative numbers", torch.zeros(5, 5).masked_fill(~SEEN, -1e9)),
        add("bias and minus infinity", BIAS.masked_fill(~SEEN, -math.inf)),
        case("masked_fill.Scalar", "minus infinity", lambda m, x: x.masked_fill(m, -math.inf).softmax(-1), ~SEEN),
        case("masked_fill.Scalar", "large", lambda m, x: x.masked_fill(m, -1e4).softmax(-1), ~SEEN),
        case("masked_fill.Scalar", "lowest", lambda m, x: x.masked_fill(m, LOWEST).softmax(-1), ~SEEN),
        case("masked_fill.Scalar", "scaled", lambda m, x: (x * 0.5).masked_fill(m, -math.inf).softmax(-1) * 2, ~SEEN),
        case("masked_fill.Scalar", "not for a softmax", lambda m, x: x.masked_fill(m, 1e3), ~SEEN),
        case("masked_fill.Tensor", "minus infinity", lambda m, f, x: x.masked_fill(m, f).softmax(-1),
             ~SEEN, torch.tensor(-math.inf)),
        case("where.ScalarOther", "minus infinity", lambda m, x: torch.where(m, x, -math.inf).softmax(-1), SEEN),
        case("where.ScalarSelf", "large", lambda m, x: torch.where(m, -1e4, x).softmax(-1), ~SEEN),
        case("where.self", "minus infinity", lambda m, f, x: torch.where(m, x, f).softmax(-1), SEEN,
             torch.tensor(-math.inf)),
    ]  # fmt: skip


def _many_rows() -> list[Case]:
    return [
        Case("aten.softmax.int", "rows", of(lambda x: x.softmax(-1)), ((3, 1400, 5),), decomposed=True),
        Case("aten.softmax.int", "elements", of(lambda x: x.softmax(1)), ((2, 1024, 300),), decomposed=True),
    ]


CASES: tuple[Case, ...] = (
    *_attention(),
    Case("aten.scaled_dot_product_attention.default", "MultiheadAttention of two", CrossAttention,
         ((3, 2, 8), (5, 2, 6))),
    *_masks(),
    *_many_rows(),
)  # fmt: skip

REJECTED: tuple[Rejected, ...] = (
    Rejected("masked_fill", "has_a_constant_mask", "", of(lambda x: x.masked_fill(x.isnan(), 1.0)), (HEADS,)),
)  # fmt: skip
