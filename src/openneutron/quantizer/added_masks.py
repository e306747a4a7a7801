"""Ranges of masks that arrive at run time and are added to the scores of a softmax.

Such a mask is 0 for visible scores and a large negative number, -1e4 or less, for hidden scores. With one scale for
both, almost no codes would be left for the visible scores. The mask's range therefore ends at minus the width of the
sum's range. If a mask value that hides no score is lower, the range ends at that value. The sum of any score and the
lower end of the mask's range saturates to the sum's lowest code. The range of the sum is the range of the visible
scores, extended below by `MASKED_DISTANCE` (`MaskedObserver`). Zero and the lowest value of the mask are exact. Other
values of the mask, such as a position bias, are rounded to the same scale.

Operators that compute a mask from the model's inputs, such as (1 - mask) * -1e4, run in float on the CPU. If no mask in
the calibration data hides a score, observed ranges of these operators would have no codes for hidden values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node

from openneutron.core.constants import constant_value
from openneutron.core.fx import arguments, is_operator, shape_of
from openneutron.ops.declared import facts_of, is_op, is_view
from openneutron.ops.facts import Movement
from openneutron.ops.masks import (
    HIDDEN,
    HIDDEN_AT_RUN_TIME,
    HIDDEN_SUM,
    is_mask_computation,
    mark_mask_computation,
)
from openneutron.quantizer.wrapping_observers import MaskedObserver

__all__ = ["AddedMask", "AddedMaskObserver", "MaskedAtRunTime", "MaskedSumObserver", "added_masks"]

# A score more than this below the largest of its row counts as hidden: its softmax probability is below 2e-28.
OUT_OF_SIGHT = 64.0


@dataclass(eq=False)
class AddedMask:
    """A mask that is added to scores, with the observers of the mask and of its sums. An observer adds itself to its
    list.

    `is_made` is True if a constant of -100 or less is used to compute the mask. Such a mask can hide scores, even if
    none does in the calibration data.
    """

    is_made: bool = False
    mask_observers: list[AddedMaskObserver] = field(default_factory=list)
    sum_observers: list[MaskedSumObserver] = field(default_factory=list)

    @property
    def can_hide_scores(self) -> bool:
        """Returns whether the mask can hide scores. Returns True for a mask that is 0 in all calibration data."""
        return self.is_made or any(observer.hides or not observer.has_numbers for observer in self.mask_observers)

    def width(self) -> float:
        """Returns the width of the widest range among the sums."""
        qparams = [(sums, sums.calculate_qparams()[0]) for sums in self.sum_observers]
        return max(
            (float(scale) * (observer.quant_max - observer.quant_min) for observer, scale in qparams), default=0.0
        )


class AddedMaskObserver(MaskedObserver):
    """Observer of an added mask. The wrapped observer finds the range of the values that hide no score.

    Values that hide scores get the lowest code. If the mask can hide scores, the value of this code is at most minus
    the width of the widest range of the sums.
    """

    def __init__(self, *args: Any, mask: AddedMask, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("has_numbers", torch.tensor(False))
        self.mask = mask
        mask.mask_observers.append(self)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Observes `values`, and returns them."""
        hidden = values.detach() <= HIDDEN_AT_RUN_TIME
        seen = values.detach().masked_fill(hidden, 0.0)
        self.observe(seen)
        self.hides |= hidden.any()
        self.has_numbers |= (seen != 0).any()
        return values

    def state(self) -> dict[str, torch.Tensor]:
        """Returns the observed statistics, for `merge`."""
        return {**super().state(), "has_numbers": self.has_numbers.cpu().clone()}

    def merge(self, later: Mapping[str, torch.Tensor]) -> None:
        """Adds the `state` of an observer that saw the next part of the stream."""
        super().merge(later)
        self.has_numbers |= later["has_numbers"].to(self.has_numbers.device)

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns scale (float32) and zero point (int64)."""
        scale, zero_point = self.observer.calculate_qparams()
        if not self.mask.can_hide_scores:
            return scale, zero_point
        low = (self.quant_min - zero_point) * scale if self.has_numbers else scale * 0
        high = (self.quant_max - zero_point) * scale if self.has_numbers else scale * 0
        low = torch.minimum(low, -torch.full_like(low, self.mask.width()))
        wider = (high - low) / (self.quant_max - self.quant_min)
        return wider, (self.quant_min - torch.round(low / wider)).to(zero_point.dtype)


class MaskedSumObserver(MaskedObserver):
    """Observer of scores plus a mask. The wrapped observer finds the range of the visible scores."""

    def __init__(self, *args: Any, masks: tuple[AddedMask, ...], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.masks = masks
        for mask in masks:
            mask.sum_observers.append(self)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Observes `values`, rows of scores along the last dimension, and returns them."""
        scores = values.detach()
        visible = scores.masked_fill(scores >= -HIDDEN, -torch.inf)
        hidden = (scores <= HIDDEN_SUM) | (scores < visible.amax(-1, keepdim=True) - OUT_OF_SIGHT)
        seen = scores[~hidden & (scores < -HIDDEN)]
        if seen.numel():
            self.observe(seen)
        self.hides |= hidden.any()
        return values

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns scale (float32) and zero point (int64)."""
        return (
            self.qparams_with_hidden_code()
            if self.hides or any(mask.can_hide_scores for mask in self.masks)
            else self.observer.calculate_qparams()
        )


@dataclass(frozen=True)
class MaskedAtRunTime:
    """How the quantizer observes a mask that is computed at run time, or a value that it masks."""

    added: AddedMask | None = None
    """The mask, if the value itself is an added mask."""
    sums_with: tuple[AddedMask, ...] = ()
    """The masks that were added to the value."""
    hides: bool = False
    """True if a boolean mask hides parts of the value."""

    def wrap_observer(self, constructor: Any) -> Any:
        """Returns a constructor of an observer that wraps an observer from `constructor`."""
        if self.added is not None:
            return AddedMaskObserver.with_args(observer=constructor, mask=self.added)
        if self.sums_with:
            return MaskedSumObserver.with_args(observer=constructor, masks=self.sums_with, hides=self.hides)
        return MaskedObserver.with_args(observer=constructor, hides=self.hides)


def added_masks(module: GraphModule) -> tuple[dict[Node, AddedMask], dict[Node, tuple[AddedMask, ...]]]:
    """Returns the masks that are added to scores of softmaxes, by node, and the masks of each sum. Linear in the graph.

    Marks the operators that compute a mask from inputs and numbers of -100 or less to stay in float.
    """
    light = _computed_from_inputs(module)
    masks: dict[Node, AddedMask] = {}
    sums: dict[Node, list[AddedMask]] = {}
    visited: set[Node] = set()
    for node in module.graph.nodes:
        if is_op(node, "softmax") and int(arguments(node)["dim"]) in (-1, len(shape_of(node)) - 1):
            _collect_masks(node.args[0], light, masks, sums, visited)
    _pass_on_masks(module, visited, sums)
    elsewhere = {mask for mask in masks if any(_reads_numbers(user) and user not in sums for user in mask.users)}
    found = {mask: added for mask, added in masks.items() if mask not in elsewhere}
    theirs = {node: tuple(added for added in those if added in found.values()) for node, those in sums.items()}
    return found, {node: those for node, those in theirs.items() if those}


def _pass_on_masks(module: GraphModule, between: set[Node], sums: dict[Node, list[AddedMask]]) -> None:
    """Adds to each sum the masks of the sums that it reads. `between` are the nodes between the sums and softmaxes."""
    passed: dict[Node, list[AddedMask]] = {}
    for node in module.graph.nodes:
        if node in between:
            own = sums.get(node, [])
            earlier = [mask for operand in node.all_input_nodes for mask in passed.get(operand, []) if mask not in own]
            passed[node] = [*own, *dict.fromkeys(earlier)]
            if earlier and is_op(node, "add"):
                sums[node] = passed[node]


def _moves_one_tensor(node: Node) -> bool:
    """Returns whether `node` moves the values of one tensor."""
    movement = facts_of(node).movement
    return movement not in (None, Movement.JOIN)


def _reads_numbers(user: Node) -> bool:
    return user.op == "output" or (user.op == "call_function" and not _moves_one_tensor(user))


def _collect_masks(
    scores: Node, light: set[Node], masks: dict[Node, AddedMask], sums: dict[Node, list[AddedMask]], visited: set[Node]
) -> None:
    """Collects the masks that are added to `scores`. Searches backwards through additions, clamps and views."""
    node: Node | None = scores
    while node is not None and node.op == "call_function" and node not in visited:
        visited.add(node)
        operands = node.all_input_nodes
        if is_view(node) or is_op(node, "minimum", "maximum", "clamp"):
            node = next((operand for operand in operands if operand not in light and operand.op != "get_attr"), None)
        elif is_op(node, "add") and len(operands) == 2 and arguments(node)["alpha"] == 1:
            mask = _mask_operand(node, operands, light)
            if mask is not None:
                sums.setdefault(node, []).append(masks.setdefault(mask, AddedMask(_mark_mask_operators(mask, light))))
            node = next((operand for operand in operands if operand is not mask and operand.op != "get_attr"), None)
        else:
            return


def _mask_operand(node: Node, operands: list[Node], light: set[Node]) -> Node | None:
    """Returns the operand of a sum that is a mask: the one that is computed from inputs alone (in `light`).

    If both are, returns the operand that is smaller than the sum.
    """
    found = [operand for operand in operands if operand in light]
    if len(found) == 2:
        found = [operand for operand in found if operand.meta["val"].numel() < node.meta["val"].numel()]
    return found[0] if len(found) == 1 else None


def _computed_from_inputs(module: GraphModule) -> set[Node]:
    """Returns the inputs, and values computed from inputs and constants by moves, comparisons and elementwise
    arithmetic.
    """
    light: set[Node] = set()
    for node in module.graph.nodes:
        is_made = _moves_one_tensor(node) or facts_of(node).computes_masks or is_mask_computation(node)
        sources = [source for source in node.all_input_nodes if source.op != "get_attr"]
        if node.op == "placeholder" or (is_made and sources and light.issuperset(sources)):
            light.add(node)
    return light


def _mark_mask_operators(mask: Node, light: set[Node]) -> bool:
    """Marks the operators that compute `mask` as float operators, if one of them has a constant that hides scores.

    Returns whether there is such a constant. Operators at the end that only move values of the mask are not marked.
    """
    end = mask
    while _moves_one_tensor(end):
        end = end.all_input_nodes[0]
    region: dict[Node, None] = {}
    waiting = [end]
    while waiting:
        node = waiting.pop()
        if node in light and node.op == "call_function" and node not in region:
            region[node] = None
            waiting += node.all_input_nodes
    if not any(map(_has_hiding_number, region)):
        return False
    for node in region:
        if is_operator(node):
            mark_mask_computation(node)
    return True


def _has_hiding_number(node: Node) -> bool:
    """Returns whether `node` computes a mask with a constant that is at most `HIDDEN_AT_RUN_TIME`.

    The sign of a factor is ignored, because the mask may be multiplied by a positive or by a negative constant.
    """
    if not facts_of(node).computes_masks:
        return False
    scales = is_op(node, "mul")
    for value in arguments(node).values():
        constant = torch.tensor(float(value)) if isinstance(value, (int, float)) else constant_value(value)
        if constant is not None and constant.numel() and constant.dtype is not torch.bool:
            least = -constant.abs().max() if scales else constant.min()
            if bool(least <= HIDDEN_AT_RUN_TIME):
                return True
    return False
