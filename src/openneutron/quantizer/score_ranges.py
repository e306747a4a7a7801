"""Ranges of the scores of softmaxes.

A softmax is one operator, or is written as exp(x - amax(x)). With exp, scores that are more than ln N + 2 below the
largest score of a row of N are negligible: all of them together add less to the sum of the row than e^-2 times the term
of the largest score. In one operator, scores more than ln N + ln 512 below the largest change no int8 probability: all
of them together change a probability by less than half a step, 1/512. The range ends at that distance, and lower scores
saturate. The other scores have finer steps.
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
from openneutron.quantizer.wrapping_observers import WrappingObserver

__all__ = ["ScoreRange", "ScoresObserver", "score_ranges"]

MARGIN = 2.0
MARGIN_OF_SOFTMAX = math.log(512)


@dataclass(frozen=True)
class ScoreRange:
    """Describes a value that holds rows of `count` scores.

    If `is_relative`, the value holds the differences of the scores from the largest score of their row. Scores more
    than `distance` below the largest are negligible.
    """

    count: int
    distance: float
    is_relative: bool = False

    def wrap_observer(self, constructor: Any) -> Any:
        """Returns a constructor of an observer that wraps an observer from `constructor`."""
        return ScoresObserver.with_args(observer=constructor, scores=self)

    def least(self, values: torch.Tensor) -> torch.Tensor | None:
        """Returns the lower limit of the scores of each row, or None if no trailing dimensions hold `count` scores."""
        if self.is_relative:
            return values.new_tensor(-self.distance)
        dims, size = [], 1
        for dim in reversed(range(values.dim())):
            if size == self.count:
                break
            dims.append(dim)
            size *= values.shape[dim]
        return values.amax(dims, keepdim=True) - self.distance if size == self.count else None


class ScoresObserver(WrappingObserver):
    """Clamps scores from below at `ScoreRange.least`, and passes them to the wrapped observer."""

    def __init__(self, *args: Any, scores: ScoreRange, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scores = scores

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Observes `values`, and returns them."""
        seen = values.detach()
        least = self.scores.least(seen)
        self.observe(seen if least is None else torch.maximum(seen, least))
        return values

    def calculate_qparams(self) -> Any:
        """Returns scale (float32) and zero point (int64)."""
        return self.observer.calculate_qparams()


def score_ranges(module: GraphModule, *, is_qat: bool = False) -> dict[Node, ScoreRange]:
    """Finds the scores of softmaxes over the last dimension. Returns their ranges by node. Linear in nodes.

    The nodes are the scores, the values before the scores: those from which views and products with positive numbers
    compute the scores, and the differences of the scores from the largest one, if a softmax is written with exp. With
    `is_qat`, returns the scores of these softmaxes only, because a `ScoresObserver` would replace the fake quantizer
    that the user chose.
    """
    found: dict[Node, ScoreRange] = {}
    for node in module.graph.nodes:
        if is_difference_of_scores(node) and is_op(node, "sub"):
            count = shape_of(node)[-1]
            distance = math.log(count) + MARGIN
            found[node] = ScoreRange(count, distance, is_relative=True)
            _collect_scores(node.args[0], 2, ScoreRange(count, distance), found)
        elif is_op(node, "softmax") and not is_qat and int(arguments(node)["dim"]) in (-1, len(shape_of(node)) - 1):
            count = shape_of(node)[-1]
            _collect_scores(node.args[0], 1, ScoreRange(count, math.log(count) + MARGIN_OF_SOFTMAX), found)
    return found


def _collect_scores(node: object, readers: int, scores: ScoreRange, found: dict[Node, ScoreRange]) -> None:
    """Adds the scores `node` to `found`, and the values from which views and products with positive numbers compute
    them.

    Scores with a number of readers other than `readers` are not added, nor are values that a second operator reads.
    """
    while isinstance(node, Node) and len(node.users) == readers and node not in found:
        found[node] = scores
        if node.op != "call_function":
            return
        args, readers = arguments(node), 1
        if is_op(node, "mul"):
            factor = number_of(args["other"])
            if factor is None or factor <= 0:
                return
            scores = replace(scores, distance=scores.distance / factor)
        elif not is_view(node):
            return
        node = node.args[0]
