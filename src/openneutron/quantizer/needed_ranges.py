"""Ranges of values whose readers saturate.

The int8 output of a sigmoid is the same for all inputs above 5.1. If sigmoids are the only readers of a value, codes
for larger values of it would be wasted. The range of the value therefore ends where no int8 output of a reader changes
any more. Operators declare these limits (`Facts.needed_range`). Moves, additions of constants and products with
constants propagate the limits of their output to their operands. Outputs of the model, states, and operands of float
operators have no limit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Graph, Node

from openneutron.core.constants import attribute
from openneutron.ir.graph import QParams
from openneutron.ops.declared import facts_of
from openneutron.ops.intervals import EVERYTHING, Interval, IntervalNote, distinguishable
from openneutron.ops.spec import OutputRule
from openneutron.quantizer.places import Place

__all__ = ["NEEDED_RANGE", "needed_intervals"]

NEEDED_RANGE = IntervalNote("openneutron.needed_range")
"""The interval of a value that its readers need."""


def needed_intervals(graph: Graph, places: Sequence[Place], *, is_qat: bool) -> dict[Node, Interval]:
    """Returns the interval of each value that its readers need, for values that have a limit. Linear in nodes and uses.

    If `is_qat` is set, parameters that training changes do not count as constants.
    """
    reading = {place.instance.node: place for place in places}
    values = {value: None for place in places for value in (*place.inputs, place.output)}
    yielding = {place.output: place for place in places}
    needed: dict[Node, Interval | None] = {}
    for value in reversed(graph.nodes):
        if value in values:
            by_readers = [
                _needed_by_reader(reading.get(reader), value, needed, is_qat=is_qat) for reader in value.users
            ]
            needed[value] = _union([interval for interval in by_readers if interval is not None])
    own = {value: _clamp_limits(yielding.get(value)) for value in needed}
    return {value: interval.clamped(own[value]) for value, interval in needed.items() if interval is not None}


def _union(intervals: Sequence[Interval]) -> Interval | None:
    joined: Interval | None = None
    for interval in intervals:
        joined = interval if joined is None else joined.joined(interval)
    return joined


def _clamp_limits(place: Place | None) -> Interval:
    """Returns the limits of the values of a clamp that shares qparams with its input."""
    if place is None or place.rule is not OutputRule.SHARED:
        return EVERYTHING
    node = place.instance.node
    limits = facts_of(node).clamp_range(node)
    return EVERYTHING if limits is None else Interval(*limits)


def _needed_by_reader(
    place: Place | None, value: Node, needed: dict[Node, Interval | None], *, is_qat: bool
) -> Interval | None:
    """Returns the interval of `value` that its reader at `place` needs; None if nothing needs the reader's output."""
    if place is None or place.batch_norm is not None or (is_qat and _reads_parameters(place)):
        return EVERYTHING
    output = needed[place.output]
    if output is None:
        return None
    if place.activation is not None:
        limits = facts_of(place.activation).clamp_range(place.activation)
        output = EVERYTHING if limits is None else output.clamped(Interval(*limits))
    elif isinstance(place.rule, QParams):
        output = output.clamped(distinguishable(place.rule))
    node = place.instance.node
    if place.spec.commutes_with_quantization(place.instance):
        return output
    rule = facts_of(node).needed_range
    return EVERYTHING if rule is None else rule(node, value, output)


def _reads_parameters(place: Place) -> bool:
    """Returns whether an operand of the operator is a parameter, which training may change."""
    module = place.instance.node.graph.owning_module
    return module is not None and any(
        operand.op == "get_attr" and isinstance(attribute(module, str(operand.target)), torch.nn.Parameter)
        for operand in place.instance.node.all_input_nodes
    )
