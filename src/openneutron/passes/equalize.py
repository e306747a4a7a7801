"""Cross-layer equalization: channels trade scale between the layers around them, so that one int8 scale fits all.

A weight's row of small values next to a row of large ones loses its bits to a scale per tensor. Where a channel's
values may be scaled (see `scalable_channels`), dividing the row that yields it and multiplying the column that reads it
by one factor leaves the function as it is. The factors bring, for each channel, the range of what yields it near that
of what reads it (Nagel et al. 2019, who do it for pairs; here all layers that share a channel, across residual
additions, concatenations and depthwise convolutions, are one channel's rows and columns).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch.fx import GraphModule, Node

from openneutron.core.fx import arguments
from openneutron.ops.declared import facts_of
from openneutron.passes.scalable_channels import PINNED, ScalableLayer, Scaling, scaling_of

__all__ = ["equalize", "note_equalized", "was_equalized"]

ROUNDS = 60
# Of the step that would even out one channel alone: its neighbours move at the same time.
STEP = 0.5
LARGEST_FACTOR = 2.0**20
# A range that is a smaller share of the largest in its tensor is as good as none: training has left such channels dead.
SMALLEST_SHARE = 2.0**-24
_NOTE = "openneutron_equalized"


def note_equalized(module: GraphModule, *, equalized: bool) -> None:
    """Note in `module.meta` whether its channels are equalized; what is prepared and converted of it has the note.

    `quantize` does not read the note. It serves users who call `transform_for_annotation`, `recover_exported`,
    `prepare_pt2e` and `analyze` one by one: nothing but the module passes from one of these calls to the next.
    """
    module.meta[_NOTE] = equalized


def was_equalized(module: GraphModule) -> bool | None:
    """Whether the channels of this graph, or of that which it was made of, were equalized; None without a note."""
    found: bool | None = module.meta.get(_NOTE)
    return found


def equalize(
    module: GraphModule,
    ranges: Mapping[Node, tuple[torch.Tensor, torch.Tensor]] | None = None,
    *,
    keeps_float: Callable[[Node], bool] = lambda _: False,
) -> bool:
    """Equalize a float graph whose batch norms are folded, and note that it is; True if it changed anything.

    The function stays the same up to float rounding. Without `ranges`, channels that a relu6 or another clamp from 0
    clips stay as they are. `ranges` has what calibration saw of values ([channels] minima and maxima, by node): a
    channel that never reached the end of its clamp is then scaled as far as it still does not reach it, which leaves
    the function as it is on all that calibration saw; and the ranges of activations are evened out as well. Operators
    that are to stay in float, by `keeps_float`, read and yield what they did, and keep their weights.

    Linear in nodes, and in weights for each of `ROUNDS` rounds.
    """
    note_equalized(module, equalized=True)
    scaling = scaling_of(module, keeps_float)
    if not scaling.layers or scaling.count == 1:
        return False
    lowest, highest = _limits(scaling, ranges or {})
    factors = _factors(scaling, ranges or {}, lowest, highest)
    if bool((factors == 1).all()):
        return False
    for layer in scaling.layers:
        _rescale(layer, factors)
    module.graph.eliminate_dead_code()
    module.recompile()
    return True


def _limits(
    scaling: Scaling, ranges: Mapping[Node, tuple[torch.Tensor, torch.Tensor]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The logarithms of the smallest and the largest factor of each number."""
    lowest = torch.full((scaling.count,), -math.log(LARGEST_FACTOR))
    highest = -lowest
    for node, numbers in scaling.clipped.items():
        end = _end(node)
        seen = ranges.get(_source(node))
        if seen is None:
            lowest[numbers] = highest[numbers] = 0
            continue
        reached = seen[1].clamp(min=end / LARGEST_FACTOR)
        reaches = reached >= end
        room = torch.log(reached / end).clamp(max=0)
        lowest.scatter_reduce_(0, numbers, room, "amax")
        highest[numbers[reaches]] = 0
        lowest[numbers[reaches]] = 0
    lowest[PINNED] = highest[PINNED] = 0
    return lowest, highest


def _source(clamp: Node) -> Node:
    source = arguments(clamp)["self"]
    assert isinstance(source, Node)
    return source


def _end(clamp: Node) -> float:
    limits = facts_of(clamp).clamp_range(clamp)
    assert limits is not None
    return limits[1]


def _factors(
    scaling: Scaling,
    ranges: Mapping[Node, tuple[torch.Tensor, torch.Tensor]],
    lowest: torch.Tensor,
    highest: torch.Tensor,
) -> torch.Tensor:
    """[numbers]: what each channel's values are divided by."""
    weights = [layer.rows(layer.constants.weight).abs().amax(3).cpu() for layer in scaling.layers]
    activations = [
        torch.maximum(high, -low).clamp(min=0).cpu()
        for low, high in (ranges[layer.node] for layer in scaling.layers if layer.node in ranges)
    ]
    observed = [layer.yields for layer in scaling.layers if layer.node in ranges]
    logs = torch.zeros(scaling.count)
    for _ in range(ROUNDS):
        yielded, read = _Mean(scaling.count), _Mean(scaling.count)
        for layer, weight in zip(scaling.layers, weights, strict=True):
            groups, inputs = layer.reads.shape
            now = weight * (logs[layer.reads].reshape(groups, 1, inputs)).exp()
            now = _shares(now / logs[layer.yields].reshape(groups, -1, 1).exp())
            yielded.add(layer.yields, now.amax(2).flatten())
            read.add(layer.reads.flatten(), now.amax(1).flatten())
        for numbers, row in zip(observed, activations, strict=True):
            yielded.add(numbers, _shares(row / logs[numbers].exp()))
        known = yielded.seen & read.seen
        logs += STEP / 2 * _centred((yielded.value - read.value) * known, known, scaling.together)
        logs = logs.clamp(lowest, highest)
    return logs.exp()


def _shares(ranges: torch.Tensor) -> torch.Tensor:
    """`ranges` as shares of the largest, which decides the scale of their tensor; 0 for what is as good as nothing."""
    largest = ranges.max()
    shares = ranges / largest if largest > 0 else ranges
    return torch.where(shares < SMALLEST_SHARE, 0, shares)


def _centred(steps: torch.Tensor, known: torch.Tensor, together: torch.Tensor) -> torch.Tensor:
    """`steps` without what numbers have in common that go `together`.

    A factor of all channels of a tensor changes none of their shares of it: nothing would keep it from growing.
    """
    total, count = (torch.zeros(len(steps)).index_add_(0, together, values) for values in (steps, known.float()))
    return steps - (total / count.clamp(min=1))[together] * known


class _Mean:
    """The mean logarithm of the ranges of each number."""

    def __init__(self, count: int) -> None:
        self.sum, self.count = torch.zeros(count), torch.zeros(count)

    def add(self, numbers: torch.Tensor, ranges: torch.Tensor) -> None:
        """Take in `ranges` of channels; a range of nothing says nothing."""
        some = ranges > 0
        self.sum.index_add_(0, numbers[some], ranges[some].log())
        self.count.index_add_(0, numbers[some], torch.ones(int(some.sum())))

    @property
    def seen(self) -> torch.Tensor:
        return self.count > 0

    @property
    def value(self) -> torch.Tensor:
        return self.sum / self.count.clamp(min=1)


def _rescale(layer: ScalableLayer, factors: torch.Tensor) -> None:
    weight, bias = layer.constants.weight, layer.constants.bias
    factors = factors.to(weight.device)
    scaled_bias = None if bias is None else bias / factors[layer.yields]
    layer.constants.replace(weight=layer.scaled(weight, factors), bias=scaled_bias)
