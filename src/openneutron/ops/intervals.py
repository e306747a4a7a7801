"""Intervals, and rules that map the needed range of an operator's output to the needed range of an operand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from openneutron.core.constants import constant_value
from openneutron.core.fx import arguments, note, note_of
from openneutron.ir.graph import QParams

__all__ = [
    "EVERYTHING",
    "AddendNeeds",
    "Interval",
    "IntervalNote",
    "NeededBySum",
    "NeededRangeRule",
    "distinguishable_range",
    "logit",
    "needed_by_abs",
    "needed_by_clamp",
    "needed_by_hardswish",
    "needed_by_identity",
    "needed_by_increasing",
    "needed_by_mul",
    "needed_by_neg",
    "representable_range",
]  # fmt: skip

LOWEST_CODE, HIGHEST_CODE = -128, 127
# The rounding error of a constant in int8, half a step, as a share of its range.
ROUNDING = 1 / 510


@dataclass(frozen=True)
class Interval:
    """The numbers from `low` to `high`; either may be infinite."""

    low: float = -math.inf
    high: float = math.inf

    @property
    def has_limit(self) -> bool:
        """Whether one end is finite."""
        return self != EVERYTHING

    def clamped(self, limits: Interval) -> Interval:
        """Returns the interval with both ends clamped to `limits`."""
        low, high = (min(max(end, limits.low), limits.high) for end in (self.low, self.high))
        return Interval(low, high)

    def joined(self, other: Interval) -> Interval:
        """Returns the smallest interval that contains both."""
        return Interval(min(self.low, other.low), max(self.high, other.high))

    def shifted(self, distance: float) -> Interval:
        """Returns the interval moved by `distance`."""
        return Interval(self.low + distance, self.high + distance)

    def scaled(self, factor: float) -> Interval:
        """Returns the products of its numbers and `factor`, which is not 0."""
        ends = self.low * factor, self.high * factor
        return Interval(min(ends), max(ends))


EVERYTHING = Interval()
"""All numbers."""


@dataclass(frozen=True)
class IntervalNote:
    """A note on a node that limits its values to an interval. Copies and exports of the graph keep the note."""

    key: str

    def write(self, node: Node, interval: Interval) -> None:
        """Sets the interval of `node`."""
        note(node, self.key, [interval.low, interval.high])

    def read(self, node: Node) -> Interval:
        """Returns the interval of `node`; `EVERYTHING` without a note."""
        return Interval(*(note_of(node, self.key) or ()))


NeededRangeRule = Callable[[Node, Node, Interval], Interval]
"""Returns the needed range of an operand: the values of the operand that can change the operator's output.

The arguments are the operator, the operand, and the interval of output values that readers of the output need. Clamping
the operand to the returned interval J changes no output that is clamped to the given interval I:
clamp(f(clamp(x, J)), I) = clamp(f(x), I).
"""


def distinguishable_range(qparams: QParams) -> Interval:
    """Returns the range of values outside of which each value gets the lowest or the highest int8 code of `qparams`."""
    scale, zero_point = qparams.scale[0], qparams.zero_point[0]
    return Interval((LOWEST_CODE + 0.5 - zero_point) * scale, (HIGHEST_CODE - 0.5 - zero_point) * scale)


def representable_range(qparams: QParams) -> Interval:
    """Returns the range of int8 codes with `qparams`."""
    scale, zero_point = qparams.scale[0], qparams.zero_point[0]
    return Interval((LOWEST_CODE - zero_point) * scale, (HIGHEST_CODE - zero_point) * scale)


def logit(share: float) -> float:
    """Returns the inverse of the sigmoid: infinite for 0 or less and for 1 or more."""
    if not 0 < share < 1:
        return math.copysign(math.inf, share - 0.5)
    return math.log(share / (1 - share))


def needed_by_increasing(inverse: Callable[[float], float], qparams: QParams) -> NeededRangeRule:
    """Returns the rule for an increasing function of one operand, with the fixed `qparams` of its output."""
    codes = distinguishable_range(qparams)

    def needs(_: Node, __: Node, output: Interval) -> Interval:
        needed = output.clamped(codes)
        return Interval(inverse(needed.low), inverse(needed.high))

    return needs


def needed_by_clamp(limits: Callable[[Node], tuple[float, float]]) -> NeededRangeRule:
    """Returns the rule for a clamp with these limits."""
    return lambda node, _, output: output.clamped(Interval(*limits(node)))


def needed_by_identity(_: Node, __: Node, output: Interval) -> Interval:
    """The rule for an operator whose output values are values of its operands, such as the maximum of two values."""
    return output


def needed_by_neg(_: Node, __: Node, output: Interval) -> Interval:
    """The rule for -x."""
    return output.scaled(-1.0)


def needed_by_abs(_: Node, __: Node, output: Interval) -> Interval:
    """The rule for |x|."""
    return Interval(-max(output.high, 0.0), max(output.high, 0.0))


def needed_by_hardswish(_: Node, __: Node, output: Interval) -> Interval:
    """The rule for x * relu6(x + 3) / 6: 0 for x up to -3, x from 3 on."""
    return Interval(-3.0, max(output.high, 3.0))


@dataclass(frozen=True)
class AddendNeeds:
    """What a sum `factor` * addend + `other_factor` * other needs of the addend, if it needs sums in `output`."""

    factor: float
    other_factor: float
    output: Interval

    def beside(self, other: Interval) -> Interval:
        """Returns the values of the addend that can change the sum if the other addend is within `other`."""
        if 0 in (self.factor, self.other_factor) or not (math.isfinite(other.low) and math.isfinite(other.high)):
            return EVERYTHING
        added = other.scaled(self.other_factor)
        return Interval(self.output.low - added.high, self.output.high - added.low).scaled(1 / self.factor)


@dataclass(frozen=True)
class NeededBySum:
    """The rule for self + sign * alpha * other. A call returns `EVERYTHING` if neither operand is a constant.

    The quantizer limits computed operands by `needs_of`, when it has the range of the other operand.
    """

    sign: int

    def __call__(self, node: Node, operand: Node, output: Interval) -> Interval:
        """Returns the values of `operand` that can change the output, if the other operand is a constant."""
        extremes = _extremes_of_constant(self.other(node, operand))
        needs = self.needs_of(node, operand, output)
        return EVERYTHING if extremes is None else needs.beside(Interval(*extremes))

    def other(self, node: Node, operand: Node) -> Any:
        """Returns the argument that is added to `operand`."""
        args = arguments(node)
        return args["other" if args["self"] is operand else "self"]

    def needs_of(self, node: Node, operand: Node, output: Interval) -> AddendNeeds:
        """Returns what the sum needs of `operand`, for a given range of the other operand."""
        args = arguments(node)
        factors = 1.0, self.sign * float(args["alpha"])
        return AddendNeeds(*(factors if args["self"] is operand else factors[::-1]), output)


def needed_by_mul(node: Node, operand: Node, output: Interval) -> Interval:
    """The rule for self * other. Everything is needed if neither is a constant, or if a factor may be 0."""
    args = arguments(node)
    extremes = _extremes_of_constant(args["other" if args["self"] is operand else "self"])
    if extremes is None or extremes[0] <= 0 <= extremes[1]:
        return EVERYTHING
    first, last = (output.scaled(1 / factor) for factor in extremes)
    return first.joined(last)


def _extremes_of_constant(operand: object) -> tuple[float, float] | None:
    """Returns the least and the largest value of a constant, extended by the error of rounding it to int8.

    Returns None for an operand that is computed, and for a constant with values that are not finite.
    """
    constant = constant_value(operand)
    if constant is None or not constant.numel():
        return None
    least, most = float(constant.min()), float(constant.max())
    if not math.isfinite(most - least):
        return None
    error = 0.0 if least == most else (max(most, 0.0) - min(least, 0.0)) * ROUNDING
    return least - error, most + error
