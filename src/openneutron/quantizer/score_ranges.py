"""Ranges of the scores of a softmax that is written as exp(x - amax(x)): what has no weight in a row needs no codes.

Of N scores, those that are ln N + 2 below the largest add less than e^-2 of its weight to the sum, all of them
together. The range ends there, and lower scores take its lowest code: 3 dB and more of resolution for the others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from openneutron.constants import number_of
from openneutron.fx import arguments, op_name, shape_of
from openneutron.ops.attention import is_difference_of_scores
from openneutron.ops.masks import VIEWS
from openneutron.quantizer.observers import ObserverOfAnother

__all__ = ["ScoreRange", "ScoresObserver", "score_ranges"]

MARGIN = 2.0


@dataclass(frozen=True)
class ScoreRange:
    """That a value is scores, `count` of them in a row, or their differences from the largest (`is_relative`).

    What is `distance` below the largest has no weight.
    """

    count: int
    distance: float
    is_relative: bool = False

    def around(self, constructor: Any) -> Any:
        """What makes an observer around the one that `constructor` makes."""
        return ScoresObserver.with_args(observer=constructor, scores=self)

    def least(self, values: torch.Tensor) -> torch.Tensor | None:
        """What has a weight in each row of `values`, at least; None where no dimensions make up the rows."""
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
    """Hands another observer the scores, with those that have no weight in their row as low as those that just have."""

    def __init__(self, *args: Any, scores: ScoreRange, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scores = scores

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Observe `values`, and return them."""
        seen = values.detach()
        least = self.scores.least(seen)
        self.observer(seen if least is None else torch.maximum(seen, least))
        return values

    def calculate_qparams(self) -> Any:
        """Scale (float32) and zero point (int64)."""
        return self.observer.calculate_qparams()


def score_ranges(module: GraphModule) -> dict[Node, ScoreRange]:
    """The scores of softmaxes that are written out, and what these are multiples and views of. Linear in the graph."""
    found: dict[Node, ScoreRange] = {}
    for node in module.graph.nodes:
        if is_difference_of_scores(node) and op_name(node) == "aten.sub.Tensor":
            count = shape_of(node)[-1]
            distance = math.log(count) + MARGIN
            found[node] = ScoreRange(count, distance, is_relative=True)
            _follow(node, ScoreRange(count, distance), found)
    return found


def _follow(differences: Node, scores: ScoreRange, found: dict[Node, ScoreRange]) -> None:
    """Note where the scores come from, as far as nothing else reads that."""
    node, readers = differences.args[0], 2
    while isinstance(node, Node) and len(node.users) == readers and node not in found:
        found[node] = scores
        args, readers = arguments(node), 1
        if op_name(node) == "aten.mul.Tensor":
            factor = number_of(args["other"])
            if factor is None or factor <= 0:
                return
            scores = replace(scores, distance=scores.distance / factor)
        elif op_name(node) not in VIEWS:
            return
        node = node.args[0]
