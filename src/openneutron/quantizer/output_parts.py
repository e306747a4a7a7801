"""Keeps a concatenation in float if it is only an output of the model, so that each input keeps its own qparams.

One scale for boxes in pixels and scores from 0 to 1 would leave two or three codes to the scores. A concatenation that
no operator on the NPU reads is therefore not quantized: the CPU dequantizes the inputs and concatenates them in float.
If calibration finds nearly equal ranges, the inputs get the same qparams, and the NPU concatenates them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from openneutron.core.constants import constant_value
from openneutron.core.fx import note, note_of
from openneutron.ir.graph import QParams
from openneutron.ops.spec import OutputRule
from openneutron.quantizer.wrapping_observers import WrappingObserver

if TYPE_CHECKING:
    from openneutron.quantizer.fused_operators import FusedOperator

__all__ = [
    "NEARLY_EQUAL",
    "FloatConcatenation",
    "LinkedParts",
    "PartObserver",
    "float_concatenations",
    "is_float_concatenation",
    "note_float_concatenation",
]  # fmt: skip

_JOINED = "openneutron.joined_in_float"

NEARLY_EQUAL = 2.0
"""The largest ratio of a shared scale to the scale of each part. A ratio of 2 costs a part one bit (6 dB)."""


@dataclass(frozen=True)
class FloatConcatenation:
    """The parts (inputs) of one concatenation.

    `values` are the parts whose qparams are observed. `fixed` are the qparams of the other parts. `can_share` is True
    if no part is in float or constant, so that the NPU can concatenate the parts if they get equal qparams.
    """

    values: tuple[Node, ...]
    fixed: frozenset[QParams]
    can_share: bool


@dataclass(eq=False)
class LinkedParts:
    """The fixed qparams of the parts of one concatenation, and the observers of its other parts.

    Each `PartObserver` adds itself to `observers`.
    """

    fixed: frozenset[QParams] = frozenset()
    observers: list[PartObserver] = field(default_factory=list)

    def shared_qparams(self) -> tuple[float, int] | None:
        """Returns scale and zero point for all parts, or None if the scale exceeds `NEARLY_EQUAL` times a part's scale.

        The first part's observer gives the lowest and the highest code.
        """
        if len(self.fixed) > 1 or not all(observer.has_seen for observer in self.observers):
            return None
        low, high = self.observers[0].quant_min, self.observers[0].quant_max
        found = [observer.own_qparams() for observer in self.observers]
        ranges = [((low - zero_point) * scale, (high - zero_point) * scale) for scale, zero_point in found]
        finest = min(scale for scale, _ in found)
        for fixed in self.fixed:
            scale, zero_point = fixed.scale[0], fixed.zero_point[0]
            ends = (low - zero_point - 1) * scale, (high - zero_point + 1) * scale
            within = all(ends[0] <= start and end <= ends[1] for start, end in ranges)
            return (scale, zero_point) if within and scale <= NEARLY_EQUAL * finest else None
        start, end = min(start for start, _ in ranges), max(end for _, end in ranges)
        scale = (end - start) / (high - low)
        return (scale, low - round(start / scale)) if scale <= NEARLY_EQUAL * finest else None


class PartObserver(WrappingObserver):
    """Wraps the observer of a part. `calculate_qparams` returns qparams that all parts share, if they can share any.

    `joins` are the concatenations that read the value, the one with the most parts first.
    """

    def __init__(self, *args: Any, joins: Sequence[LinkedParts], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.joins = tuple(joins)
        for parts in self.joins:
            parts.observers.append(self)

    def own_qparams(self) -> tuple[float, int]:
        """Returns scale and zero point of this part alone."""
        scale, zero_point = self.observer.calculate_qparams()
        return float(scale), int(zero_point)

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns scale (float32) and zero point (int64)."""
        scale, zero_point = self.observer.calculate_qparams()
        for parts in self.joins:
            if shared := parts.shared_qparams():
                return torch.full_like(scale, shared[0]), torch.full_like(zero_point, shared[1])
        return scale, zero_point


def float_concatenations(operators: Sequence[FusedOperator]) -> dict[Node, FloatConcatenation]:
    """Maps each concatenation among `operators` that is kept in float to its parts, in graph order.

    Rule: a concatenation is kept in float if its inputs have different qparams and no quantized operator computes with
    its output. The moves that read the output are kept in float too. Linear in operators and uses.
    """
    only_to_outputs = _moves_to_outputs(operators)
    quantized = {fused.output for fused in operators}
    quantized |= {value for fused in operators if fused.instance.node not in only_to_outputs for value in fused.inputs}
    # Maps a value to its fixed qparams, or to the value whose observer finds its qparams.
    key: dict[Node, object] = {}
    joined: dict[Node, FloatConcatenation] = {}
    for fused in operators:
        node, rule = fused.instance.node, fused.rule
        if isinstance(rule, QParams):
            key[fused.output] = rule
        elif rule is not OutputRule.SHARED or (len(fused.inputs) > 1 and node not in only_to_outputs):
            continue
        elif node in only_to_outputs and (join := _parts_of(fused, key, joined, quantized)) is not None:
            joined[node] = join
        else:
            key[fused.output] = next(
                (key.get(value, value) for value in fused.inputs if _is_not_constant(value)), fused.output
            )
    return joined


def _moves_to_outputs(operators: Sequence[FusedOperator]) -> set[Node]:
    """Returns the operators that only move values, and only to outputs of the model and to operators in float."""
    quantized = {fused.instance.node for fused in operators}
    only_to_outputs: set[Node] = set()
    for fused in reversed(operators):
        moves = fused.rule is OutputRule.SHARED and not fused.spec.is_compute
        if moves and all(reader in only_to_outputs or reader not in quantized for reader in fused.output.users):
            only_to_outputs.add(fused.instance.node)
    return only_to_outputs


def _parts_of(
    fused: FusedOperator, key: dict[Node, object], joined: dict[Node, FloatConcatenation], quantized: set[Node]
) -> FloatConcatenation | None:
    """Returns the parts of `fused`; None if they have equal qparams and the operator adds no values to them."""
    inputs = [value for value in fused.inputs if _is_not_constant(value) or not _is_zero_constant(value)]
    keys = {key.get(value, value) if _is_not_constant(value) else value for value in inputs}
    adds = not (fused.spec.keeps_values is None or fused.spec.keeps_values(fused.instance))
    if len(keys) < 2 and not adds and joined.keys().isdisjoint(inputs):
        return None
    values: dict[Node, None] = {}
    fixed: set[QParams] = set()
    can_share = not adds and quantized.issuperset(fused.inputs)
    for value in inputs:
        if value in joined:
            values.update(dict.fromkeys(joined[value].values))
            fixed |= joined[value].fixed
            can_share = can_share and joined[value].can_share
        elif isinstance(found := key.get(value), QParams):
            fixed.add(found)
        else:
            values[value] = None
    return FloatConcatenation(tuple(values), frozenset(fixed), can_share)


def _is_not_constant(value: Node) -> bool:
    return constant_value(value) is None


def _is_zero_constant(value: Node) -> bool:
    constant = constant_value(value)
    return constant is not None and not constant.any()


def note_float_concatenation(node: Node) -> None:
    """Notes on `node` that it stays in float so that its parts keep their qparams."""
    note(node, _JOINED, True)


def is_float_concatenation(node: Node) -> bool:
    """Returns whether `note_float_concatenation` marked `node`."""
    return bool(note_of(node, _JOINED))
