"""Ranges of operands of sums whose readers saturate.

If only a tanh reads x + y, and calibration finds y between -3 and 3, then values of x beyond -6.2 and 5.6 change no
int8 output of the tanh: the sum is beyond the limit of the tanh for each y. The range of x ends there. The ranges of x
and y are known after calibration only, so an observer of x asks the observer of y for its range when it computes its
qparams.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from openneutron.core.fx import arguments, first_operand, is_quantize, note, note_of
from openneutron.ops.intervals import EVERYTHING, AddendNeeds, Interval, NeededBySum
from openneutron.quantizer.observers import DistributionObserver
from openneutron.quantizer.ranges import SMALLEST_SCALE
from openneutron.quantizer.wrapping_observers import WrappingObserver, extended_by_one_step, within_reach

__all__ = [
    "MOST_SUMS", "AddendLimit", "AddendObserver", "SumTerm", "joined_terms", "link_addends", "needed_of_addends",
    "note_addend", "note_limit",
]  # fmt: skip

# A value that more sums read has no limit, so that the time to find the limits is linear in nodes.
MOST_SUMS = 4096

_ADDEND, _LIMIT = "openneutron.addend", "openneutron.addend_limit"


@dataclass(frozen=True)
class SumTerm:
    """A sum that reads a value: the node of the sum, the value, and the interval of sums that is needed."""

    rule: NeededBySum
    node: Node
    operand: Node
    output: Interval

    @property
    def other(self) -> Node:
        """The other operand of the sum."""
        found = self.rule.other(self.node, self.operand)
        assert isinstance(found, Node)
        return found

    @property
    def needed(self) -> AddendNeeds:
        """What the sum needs of the value, as a function of the range of the other operand."""
        return self.rule.needs_of(self.node, self.operand, self.output)


@dataclass(frozen=True)
class AddendLimit:
    """The limit of an addend by the sums that read it. It contains what each reader needs.

    Holds no nodes, because torchao copies the arguments of observers.
    """

    by_other_readers: Interval | None
    """What other readers than sums need; None if there are none."""
    terms: tuple[tuple[int, AddendNeeds], ...]
    """For each sum, the number of the other addend, and what the sum needs."""

    def needed(self, others: Sequence[Interval]) -> Interval:
        """Returns the interval of values that the readers need. `others` are the ranges of the other addends."""
        found = [needs.beside(other) for other, (_, needs) in zip(others, self.terms, strict=True)]
        found += [] if self.by_other_readers is None else [self.by_other_readers]
        return Interval(min(each.low for each in found), max(each.high for each in found))


class AddendObserver(WrappingObserver):
    """Wraps the observer of an operand of sums. `calculate_qparams` clips the range to the `limit` of these sums.

    `number` identifies the addend in the limits of others. `link_addends` sets `others`, the observers of the terms of
    `limit`.
    """

    def __init__(self, *args: Any, number: int, limit: AddendLimit | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.number = number
        self.limit = limit
        self.others: tuple[AddendObserver, ...] = ()
        self._calls = 0
        self._found: tuple[int, tuple[torch.Tensor, torch.Tensor]] | None = None
        self._limited: tuple[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]] | None = None

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Observes `values`, and returns them."""
        self._calls += 1
        return super().forward(values)

    def merge(self, later: Mapping[str, torch.Tensor]) -> None:
        """Adds the `state` of an observer that saw the next part of the stream."""
        self._calls += 1
        super().merge(later)

    def own_interval(self) -> Interval:
        """Returns the range of the wrapped observer; everything if it saw no values."""
        if not self.has_seen:
            return EVERYTHING
        return self._interval_of(self._own_qparams())

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns scale (float32) and zero point (int64).

        Caches them, because conversion asks for them at each value of a group, and a group has many values.
        """
        calls = (self._calls, *(other._calls for other in self.others))
        if self._limited is None or self._limited[0] != calls:
            self._limited = calls, self._limited_qparams()
        return self._limited[1]

    def _limited_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        own = self._own_qparams()
        if self.limit is None:
            return own
        needed = extended_by_one_step(
            self.limit.needed([other.own_interval() for other in self.others]), self.quant_max - self.quant_min
        )
        found = self._interval_of(own)
        if needed.low <= found.low and found.high <= needed.high:
            return own
        largest = max(-found.low, found.high)
        return within_reach(*self._qparams_within(own, found, needed), largest, (self.quant_min, self.quant_max))

    def _qparams_within(
        self, own: tuple[torch.Tensor, torch.Tensor], found: Interval, needed: Interval
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the qparams of the range `found` of the values, clipped to the `needed` interval."""
        if isinstance(self.observer, DistributionObserver):
            return self.observer.qparams_within(max(found.low, needed.low), min(found.high, needed.high))
        low, high = max(found.low, min(needed.low, 0.0)), min(found.high, max(needed.high, 0.0))
        step = (high - low) / (self.quant_max - self.quant_min)
        scale = torch.full_like(own[0], max(step, SMALLEST_SCALE))
        zero_point = self.quant_min - torch.round(low / scale)
        return scale, zero_point.clamp(self.quant_min, self.quant_max).to(own[1].dtype)

    def _own_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the qparams of the wrapped observer. Caches them, because each sum asks for them."""
        if self._found is None or self._found[0] != self._calls:
            self._found = self._calls, self.observer.calculate_qparams()
        return self._found[1]

    def _interval_of(self, qparams: tuple[torch.Tensor, torch.Tensor]) -> Interval:
        scale, zero_point = float(qparams[0]), int(qparams[1])
        return Interval((self.quant_min - zero_point) * scale, (self.quant_max - zero_point) * scale)


def link_addends(observers: Iterable[Any]) -> None:
    """Gives each `AddendObserver` the observers of the other operands of its sums."""
    addends = (inner for observer in observers if isinstance(inner := _unwrapped(observer), AddendObserver))
    found = {addend.number: addend for addend in addends}
    for addend in found.values():
        if addend.limit is not None:
            addend.others = tuple(found[number] for number, _ in addend.limit.terms)


def _unwrapped(observer: Any) -> Any:
    """Returns the first observer of a chain of wrappers that is an `AddendObserver`, or else the innermost one."""
    while isinstance(observer, WrappingObserver) and not isinstance(observer, AddendObserver):
        observer = observer.observer
    return observer


def joined_terms(found: Sequence[tuple[SumTerm, ...]]) -> tuple[SumTerm, ...]:
    """Returns the terms of all readers of a value, each once."""
    if len(found) == 1:
        return found[0]
    return tuple(dict.fromkeys(term for terms in found for term in terms))


def note_addend(node: Node, number: int) -> None:
    """Notes on a value that it is the addend with this number, for `needed_of_addends`."""
    note(node, _ADDEND, number)


def note_limit(node: Node, limit: AddendLimit) -> None:
    """Notes the limit of an addend on one of its values, for `needed_of_addends`."""
    interval = limit.by_other_readers
    terms = [
        [number, needs.factor, needs.other_factor, needs.output.low, needs.output.high] for number, needs in limit.terms
    ]
    note(node, _LIMIT, [None if interval is None else [interval.low, interval.high], terms])


def needed_of_addends(converted: GraphModule) -> dict[Node, Interval]:
    """Returns the interval of each addend of a converted module that its readers need, with the final ranges.

    Leaves out values without a limit. Linear in nodes and sums.
    """
    numbers: dict[Node, int] = {}
    ranges: dict[int, Interval] = {}
    limits: dict[int, AddendLimit] = {}
    for quantize in filter(is_quantize, converted.graph.nodes):
        value = first_operand(quantize)
        number = note_of(value, _ADDEND)
        if number is not None and isinstance(scale := arguments(quantize).get("scale"), float):
            args = arguments(quantize)
            numbers[value] = number
            ends = ((args[limit] - args["zero_point"]) * scale for limit in ("quant_min", "quant_max"))
            ranges[number] = Interval(*ends)
            if (found := note_of(value, _LIMIT)) is not None:
                limits[number] = _limit_from_note(*found)
    needed = {
        number: limit.needed([ranges.get(other, EVERYTHING) for other, _ in limit.terms])
        for number, limit in limits.items()
    }
    return {value: needed[number] for value, number in numbers.items() if number in needed}


def _limit_from_note(
    interval: Sequence[float] | None, terms: Sequence[tuple[int, float, float, float, float]]
) -> AddendLimit:
    needs = tuple(
        (number, AddendNeeds(factor, other, Interval(low, high))) for number, factor, other, low, high in terms
    )
    return AddendLimit(None if interval is None else Interval(*interval), needs)
