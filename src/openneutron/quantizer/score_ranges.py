"""Ranges of the scores of a softmax that is written as exp(x - amax(x)).

In a row of N scores, all scores more than ln N + 2 below the largest together add less than e^-2 of its weight to the
sum. The range ends there, and lower scores saturate. That wins 3 dB and more of resolution for the others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from openneutron.core.constants import number_of
from openneutron.core.fx import arguments, shape_of
from openneutron.ops.attention import is_difference_of_scores
from openneutron.ops.declared import is_op, is_view
from openneutron.quantizer.observers import ObserverOfAnother

__all__ = ["ScoreRange", "ScoresObserver", "score_ranges"]

MARGIN = 2.0


@dataclass(frozen=True)
class ScoreRange:
    """A value that holds scores, `count` in a row, or their differences from the largest of the row (`is_relative`).

    Scores more than `distance` below the largest are negligible.
    """

    count: int
    distance: float
    is_relative: bool = False

    def wrap_observer(self, constructor: Any) -> Any:
        """Returns a constructor of an observer that wraps the one from `constructor`."""
        return ScoresObserver.with_args(observer=constructor, scores=self)

    def least(self, values: torch.Tensor) -> torch.Tensor | None:
        """Returns the least score of each row that is not negligible, or None if no trailing dimensions form a row."""
        if self.is_relative:
            return values.new_tensor(-self.distance)
        dims, size = [], 1
        for dim in reversed(range(values.dim())):
            if size == self.count:
                break
            dims.append(dim)
            size *= values.shape[dim]
        return values.amax(dims, keepdim=True) - self.distance if size == self.count else None


class ScoresObserver(ObserverOfAnother):
    """Passes scores to the wrapped observer, clamped from below at the least score that is not negligible."""

    def __init__(self, *args: Any, scores: ScoreRange, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scores = scores

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Observes `values`, and returns them."""
        seen = values.detach()
        least = self.scores.least(seen)
        self.observer(seen if least is None else torch.maximum(seen, least))
        return values

    def calculate_qparams(self) -> Any:
        """Returns scale (float32) and zero point (int64)."""
        return self.observer.calculate_qparams()


def score_ranges(module: GraphModule) -> dict[Node, ScoreRange]:
    """Returns scores of softmaxes written with exp, and values that are multiples or views of them. Linear in nodes."""
    found: dict[Node, ScoreRange] = {}
    for node in module.graph.nodes:
        if is_difference_of_scores(node) and is_op(node, "sub"):
            count = shape_of(node)[-1]
            distance = math.log(count) + MARGIN
            found[node] = ScoreRange(count, distance, is_relative=True)
            _follow(node, ScoreRange(count, distance), found)
    return found


def _follow(differences: Node, scores: ScoreRange, found: dict[Node, ScoreRange]) -> None:
    """Collects the values from which views and factors compute the scores, if they have no other readers."""
    node, readers = differences.args[0], 2
    while isinstance(node, Node) and len(node.users) == readers and node not in found:
        found[node] = scores
        args, readers = arguments(node), 1
        if is_op(node, "mul"):
            factor = number_of(args["other"])
            if factor is None or factor <= 0:
                return
            scores = replace(scores, distance=scores.distance / factor)
        elif not is_view(node):
            return
        node = node.args[0]
