"""Table of the operator tests: matrix products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from tests.case import Case, Rejected, Shape, of

__all__ = ["CASES", "REJECTED"]

aten = torch.ops.aten


def constant(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def pairs_of_inputs(target: str, function: Callable[..., Any], *pairs: tuple[Shape, Shape]) -> list[Case]:
    """Returns cases with two computed factors, with a constant right factor, and with a constant left factor."""
    return [
        case
        for left, right in pairs
        for case in (
            Case(target, f"{left} {right}", of(function), (left, right)),
            Case(target, f"{left} constant {right}", of(lambda c, x: function(x, c), constant(*right)), (left,)),
            Case(target, f"constant {left} {right}", of(function, constant(*left)), (right,)),
        )
    ]


def _bmm() -> list[Case]:
    def case(label: str, function: Callable[..., Any], *shapes: Shape, spread: tuple[float, float] = (0, 1)) -> Case:
        return Case("aten.bmm.default", label, of(function), shapes, spread)

    return [
        case("square", torch.bmm, (8, 8, 8), (8, 8, 8)),
        case("one-sided", torch.bmm, (2, 3, 4), (2, 4, 5), spread=(3.0, 1.0)),
        case("wide", torch.bmm, (1, 2, 300), (1, 300, 2), spread=(0.0, 30.0)),
        case("after relu", lambda x, y: torch.bmm(F.relu(x), y), (2, 3, 4), (2, 4, 5)),
        case("after sigmoid and tanh", lambda x, y: torch.bmm(x.sigmoid(), y.tanh()), (2, 3, 4), (2, 4, 5)),
        case("with itself", lambda x: torch.bmm(x, x), (2, 4, 4)),
        case("with its transpose", lambda x: torch.bmm(x, x.transpose(1, 2)) + x, (2, 4, 4)),
        case("what others read too", lambda x, y: torch.bmm(y := F.relu(x), y) + y, (2, 4, 4), (2, 4, 4)),
        case("chain", lambda x, y: torch.bmm(torch.bmm(x, y), y), (2, 4, 4), (2, 4, 4)),
    ]


def _matmul() -> list[Case]:
    pairs: list[tuple[Shape, Shape]] = [
        ((4,), (4,)),
        ((4,), (4, 5)),
        ((3, 4), (4,)),
        ((3, 4), (4, 5)),
        ((2, 3, 4), (4,)),
        ((4,), (2, 4, 5)),
        ((2, 3, 4), (4, 5)),
        ((3, 4), (2, 4, 5)),
        ((2, 3, 4), (2, 4, 5)),
        ((2, 3, 4), (1, 4, 5)),
        ((1, 3, 4), (2, 4, 5)),
        ((2, 3, 3, 4), (4, 5)),
        ((2, 3, 3, 4), (3, 4, 5)),
        ((2, 3, 3, 4), (2, 1, 4, 5)),
        ((2, 1, 3, 4), (2, 3, 4, 5)),
        ((2, 1, 3, 4), (1, 3, 4, 5)),
        ((2, 2, 3, 3, 4), (2, 3, 4, 5)),
    ]
    return pairs_of_inputs("aten.matmul.default", torch.matmul, *pairs)


def _sums() -> list[Case]:
    def case(target: str, label: str, *shapes: Shape, fixed: tuple[Shape, ...] = (), **options: float) -> Case:
        function: Callable[..., Any] = getattr(torch, target.split(".")[1])
        parts = [constant(*shape) for shape in fixed]
        return Case(target, label, of(lambda *values: function(*values, **options), *parts), shapes)

    def linear(label: str, *shapes: Shape) -> Case:
        return Case("aten.linear.default", label, of(F.linear), shapes)

    def reordered(target: str, label: str, parts: tuple[Shape, ...], shape: Shape, **options: float) -> Case:
        constants = [constant(*part) for part in parts]
        product: Callable[..., Any] = torch.addmm
        return Case(target, label, of(lambda b, w, x: product(b, x, w, **options), *constants), (shape,))

    return [
        linear("computed weight", (2, 3, 4), (5, 4)),
        linear("computed weight and bias", (2, 3, 4), (5, 4), (5,)),
        Case("aten.linear.default", "computed bias", of(lambda w, x, b: F.linear(x, w, b), constant(5, 4)),
             ((2, 4), (5,))),
        Case("aten.linear.default", "one output", of(lambda w, x: F.linear(x, w), constant(4)), ((3, 4),)),
        Case("aten.linear.default", "one value as bias", of(lambda w, b, x: F.linear(x, w, b), constant(5, 4),
             constant(1)), ((3, 4),)),
        case("aten.addmm.default", "computed", (3, 5), (3, 4), (4, 5)),
        case("aten.addmm.default", "computed, scaled", (5,), (3, 4), (4, 5), alpha=0.5, beta=2),
        reordered("aten.addmm.default", "alpha", ((5,), (4, 5)), (3, 4), alpha=2.0),
        reordered("aten.addmm.default", "beta", ((5,), (4, 5)), (3, 4), beta=0.5),
        reordered("aten.addmm.default", "without bias", ((5,), (4, 5)), (3, 4), beta=0, alpha=-1),
        reordered("aten.addmm.default", "matrix as bias", ((3, 5), (4, 5)), (3, 4)),
        reordered("aten.addmm.default", "one value as bias", ((1,), (4, 5)), (3, 4)),
        case("aten.baddbmm.default", "plain", (2, 3, 5), (2, 3, 4), (2, 4, 5)),
        case("aten.baddbmm.default", "broadcast, scaled", (1, 5), (2, 3, 4), (2, 4, 5), alpha=0.25, beta=3),
        case("aten.baddbmm.default", "constant", (2, 3, 4), (2, 4, 5), fixed=((2, 3, 5),), beta=2),
        case("aten.baddbmm.default", "scale alone", (2, 3, 4), (2, 4, 5), fixed=((2, 3, 5),), alpha=0.5, beta=0),
        case("aten.addbmm.default", "plain", (3, 5), (2, 3, 4), (2, 4, 5)),
        case("aten.addmv.default", "plain", (3,), (3, 4), (4,)),
        case("aten.addmv.default", "constants", (4,), fixed=((3,), (3, 4))),
    ]  # fmt: skip


def _bilinear() -> list[Case]:
    def case(label: str, first: Shape, second: Shape, *fixed: Shape) -> Case:
        function: Callable[..., Any] = lambda *values: F.bilinear(*values[-2:], *values[:-2])  # noqa: E731
        parts = [constant(*shape) for shape in fixed]
        return Case("aten.bilinear.default", label, of(function, *parts), (first, second))

    return [
        case("rows", (3, 4), (3, 5), (6, 4, 5)),
        case("rows and bias", (3, 4), (3, 5), (6, 4, 5), (6,)),
        case("batches of rows", (2, 3, 4), (2, 3, 5), (6, 4, 5), (6,)),
        case("one row", (4,), (5,), (6, 4, 5), (6,)),
        Case("aten.bilinear.default", "computed weight", of(F.bilinear), ((3, 4), (3, 5), (2, 4, 5))),
    ]


def _indices() -> list[Case]:
    def einsum(equation: str, *shapes: Shape, fixed: tuple[Shape, ...] = ()) -> Case:
        label = equation + "".join(f" constant {shape}" for shape in fixed)
        parts = [constant(*shape) for shape in fixed]
        return Case("aten.einsum.default", label, of(lambda *x: torch.einsum(equation, *x), *parts), shapes)

    target = "aten.tensordot.default"
    return [
        einsum("bhqd,bhkd->bhqk", (2, 3, 4, 5), (2, 3, 6, 5)),
        einsum("bhqk,bhkd->bqhd", (2, 3, 4, 6), (2, 3, 6, 5)),
        einsum("bij,jk->bik", (2, 3, 4), (4, 5)),
        einsum("jk,bij->bik", (2, 3, 4), fixed=((4, 5),)),
        einsum("oi,bihw->bohw", (2, 4, 3, 5), fixed=((6, 4),)),
        einsum("kvw,nkctv->nctw", (1, 2, 3, 4, 5), fixed=((2, 5, 5),)),
        einsum("bi,oij,bj->bo", (3, 4), (5, 4, 2), (3, 2)),
        einsum("bij,bij->b", (2, 3, 4), (2, 3, 4)),
        einsum("...i,ij->...j", (2, 3, 4), (4, 5)),
        einsum("bij->bi", (2, 3, 4)),
        *pairs_of_inputs("aten.inner.default", torch.inner, ((3, 4), (5, 4)), ((2, 3, 4), (5, 4))),
        *pairs_of_inputs(target, lambda x, y: torch.tensordot(x, y, 1), ((3, 4), (4, 5))),
        *pairs_of_inputs(target, lambda x, y: torch.tensordot(x, y, ([1, 2], [0, 1])), ((2, 3, 4), (3, 4, 5))),
        Case("aten.linalg_multi_dot.default", "three",
             of(lambda *values: torch.linalg.multi_dot(values)), ((3, 4), (4, 2), (2, 5))),
        Case("aten.chain_matmul.default", "three", of(torch.chain_matmul), ((3, 4), (4, 2), (2, 5))),
        *pairs_of_inputs("aten.linalg_vecdot.default", torch.linalg.vecdot, ((3, 4), (3, 4)), ((2, 3, 4), (4,))),
    ]  # fmt: skip


CASES: tuple[Case, ...] = (
    *_bmm(),
    *_matmul(),
    *pairs_of_inputs("aten.bmm.default", torch.bmm, ((2, 3, 4), (2, 4, 5)), ((1, 3, 4), (1, 4, 5))),
    *pairs_of_inputs("aten.mm.default", torch.mm, ((3, 4), (4, 5)), ((1, 8), (8, 1))),
    *pairs_of_inputs("aten.mv.default", torch.mv, ((3, 4), (4,))),
    *pairs_of_inputs("aten.dot.default", torch.dot, ((4,), (4,))),
    *pairs_of_inputs("aten.vdot.default", torch.vdot, ((4,), (4,))),
    *_bilinear(),
    *pairs_of_inputs("aten.outer.default", torch.outer, ((3,), (5,))),
    *pairs_of_inputs("aten.ger.default", aten.ger.default, ((3,), (5,))),
    *_sums(),
    *_indices(),
)


def dequantized(codes: torch.Tensor) -> torch.Tensor:
    """Returns an int8 weight, or an int32 bias, as another quantizer leaves it."""
    dequantize = torch.ops.quantized_decomposed.dequantize_per_tensor.default
    if codes.dtype == torch.int8:
        return dequantize(codes, 0.1, 0, -127, 127, torch.int8)  # type: ignore[no-any-return]
    return dequantize(codes, 0.05 * 0.1, 0, -(2**31), 2**31 - 1, torch.int32)  # type: ignore[no-any-return]


def linear(weight: torch.Tensor, *bias_and_values: torch.Tensor) -> torch.Tensor:
    *bias, values = bias_and_values
    return F.linear(values, dequantized(weight), *map(dequantized, bias))


def addmm(**options: Any) -> Callable[..., torch.Tensor]:
    return lambda bias, weight, values: torch.addmm(dequantized(bias), values, dequantized(weight), **options)


WEIGHT = (constant(6, 10) * 40).to(torch.int8)
BIAS = torch.arange(6, dtype=torch.int32)

REJECTED: tuple[Rejected, ...] = (
    Rejected("bmm", "multiplies_aligned_matrices", "rows", of(torch.bmm), ((8, 12, 8), (8, 8, 8)), padded=True),
    Rejected("bmm", "multiplies_aligned_matrices", "everything", of(torch.bmm), ((2, 3, 5), (2, 5, 4)), padded=True),
    Rejected("linear", "has_a_matrix_as_weight", "", of(linear, WEIGHT[0]), ((4, 10),), quantized_elsewhere=True),
    Rejected("linear", "has_a_plain_bias", "", of(linear, WEIGHT, BIAS[:1]), ((4, 10),), quantized_elsewhere=True),
    Rejected("addmm", "has_a_plain_bias", "", of(addmm(), BIAS[:1], WEIGHT.t()), ((4, 10),), quantized_elsewhere=True),
    Rejected("addmm", "does_not_scale", "alpha", of(addmm(alpha=2), BIAS, WEIGHT.t()), ((4, 10),),
             quantized_elsewhere=True),
    Rejected("addmm", "does_not_scale", "beta", of(addmm(beta=2), BIAS, WEIGHT.t()), ((4, 10),),
             quantized_elsewhere=True),
)  # fmt: skip
