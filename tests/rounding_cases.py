"""Table of the operator tests: roundings and remainders."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tests.arithmetic_cases import IMAGE, SPREADS
from tests.case import Case, Rejected, of

__all__ = ["CASES", "REJECTED"]

Function = Callable[[torch.Tensor], torch.Tensor]
HALF = torch.tensor(0.5)
WIDE = (0.0, 300.0)


def _roundings() -> list[Case]:
    def case(target: str, function: Function, *labels: str) -> list[Case]:
        ranges = {**SPREADS, "beyond 256 integers": WIDE}
        return [Case(f"aten.{target}", label or "unit", of(function), (IMAGE,), ranges[label]) for label in labels]

    return [
        *case("round.default", torch.round, "", "large", "tiny", "beyond 256 integers"),
        *case("round.decimals", lambda x: x.round(decimals=1), "", "large"),
        *case("floor.default", torch.floor, "", "one-sided", "beyond 256 integers"),
        *case("ceil.default", torch.ceil, "", "tiny", "beyond 256 integers"),
        *case("trunc.default", torch.trunc, "", "one-sided", "beyond 256 integers"),
        Case("aten.trunc.default", "never positive", of(lambda x: (-x.abs() * 3).trunc()), (IMAGE,)),
        Case("aten.fix.default", "unit", of(torch.fix), (IMAGE,)),
    ]


def _remainders() -> list[Case]:
    def case(target: str, label: str, function: Function) -> Case:
        return Case(f"aten.{target}", label, of(lambda x: function(x * 1.5)), (IMAGE,))

    return [
        case("frac.default", "unit", torch.frac),
        case("fmod.Scalar", "positive", lambda x: torch.fmod(x, 0.7)),
        case("fmod.Scalar", "negative", lambda x: torch.fmod(x, -0.7)),
        case("remainder.Scalar", "positive", lambda x: x % 0.7),
        case("remainder.Scalar", "negative", lambda x: x % -0.7),
        Case("aten.fmod.Scalar", "far below the divisor", of(lambda x: torch.fmod(x * 1e-6, 1.5)), (IMAGE,)),
        Case("aten.remainder.Scalar", "far below the divisor", of(lambda x: x.abs() * 1e-6 % 1.5), (IMAGE,)),
        case("fmod.Tensor", "constant", lambda x: torch.fmod(x, HALF)),
        case("remainder.Tensor", "constant", lambda x: torch.remainder(x, HALF)),
        case("div.Tensor_mode", "floor", lambda x: torch.div(x, 0.5, rounding_mode="floor")),
        case("divide.Tensor_mode", "floor", lambda x: torch.divide(x, 0.5, rounding_mode="floor")),
        case("div.Tensor_mode", "trunc by a constant", lambda x: torch.div(x, HALF, rounding_mode="trunc")),
        case("floor_divide.default", "number", lambda x: x // 0.5),
        Case("aten.floor_divide.Scalar", "number", of(lambda x: torch.ops.aten.floor_divide.Scalar(x, 0.5)), (IMAGE,)),
        Case("aten.div.Scalar_mode", "floor", _scalar_mode, (IMAGE,)),
    ]


def _scalar_mode() -> torch.nn.Module:
    return of(lambda x: torch.ops.aten.div.Scalar_mode(x, 0.5, rounding_mode="floor"))()


CASES = (*_roundings(), *_remainders())

REJECTED = (
    Rejected(
        "rounded quotient", "rounds_by_a_number", "",
        of(lambda x, y: torch.div(x, y.abs() + 1, rounding_mode="floor")), (IMAGE, IMAGE),
    ),
    Rejected("remainder by a tensor", "divides_by_a_number", "", of(torch.fmod), (IMAGE, IMAGE)),
    Rejected("remainder", "is_of_a_computed_value", "", of(lambda x: (x % 0.7) + 1), (IMAGE,)),
    Rejected("fmod", "has_fine_steps", "", of(lambda x: torch.fmod(x, 0.3)), (IMAGE,), quantized_elsewhere=True),
)  # fmt: skip
