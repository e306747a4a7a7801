"""Cross-layer equalization: scales channels between layers so that one int8 scale per tensor fits all channels.

With one scale per tensor, a weight's row of small values loses resolution if another row has large values. Where a
channel may be scaled (see `scalable_channels`), dividing the producer's row and multiplying the consumer's column by
one factor does not change the function. The factors bring the range of the row near the range of the column. Nagel et
al. 2019 do this for pairs of layers. Here it is done for all layers that share a channel through residual additions,
concatenations and depthwise convolutions.
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
# The factor on each step. A step of 1 would equalize one channel if no other channel were scaled in the same round.
STEP = 0.5
LARGEST_FACTOR = 2.0**20
# A channel counts as dead if its range divided by the largest range in its tensor is smaller than this.
SMALLEST_SHARE = 2.0**-24
_NOTE = "openneutron_equalized"


def note_equalized(module: GraphModule, *, equalized: bool) -> None:
    """Notes in `module.meta` whether its channels are equalized. Modules prepared and converted from it keep the note.

    `quantize` does not read the note. It is for users who call `transform_for_annotation`, `recover_exported`,
    `prepare_pt2e` and `analyze` one by one, because only the module is passed between these calls.
    """
    module.meta[_NOTE] = equalized


def was_equalized(module: GraphModule) -> bool | None:
    """Returns the note that `note_equalized` wrote, or None if the module has no note."""
    found: bool | None = module.meta.get(_NOTE)
    return found


def equalize(
    module: GraphModule,
    ranges: Mapping[Node, tuple[torch.Tensor, torch.Tensor]] | None = None,
    *,
    keeps_float: Callable[[Node], bool] = lambda _: False,
) -> bool:
    """Equalizes the channels of a float graph whose batch norms are folded, and notes that they are equalized. Returns
    whether it changed anything.

    The model computes the same function except for float rounding. Without `ranges`, the input channels of a relu6 or
    of another clamp from 0 to a finite number are not scaled.

    `ranges` maps nodes to the minima and maxima ([channels]) of their values in calibration. With `ranges`, the input
    channels of such a clamp are scaled if their calibration maximum is below the upper limit of the clamp, but not
    beyond that limit. The model then computes the same function on the calibration data. The ranges of activations are
    equalized too.

    The inputs, outputs and weights of operators for which `keeps_float` is true are not scaled.

    Linear in nodes, and in weights for each of `ROUNDS` rounds.
    """
    note_equalized(module, equalized=True)
    scaling = scaling_of(module, keeps_float)
    if not scaling.layers or scaling.count == 1:
        return False
    lowest, highest = _factor_limits(scaling, ranges or {})
    factors = _equalization_factors(scaling, ranges or {}, lowest, highest)
    if bool((factors == 1).all()):
        return False
    for layer in scaling.layers:
        _rescale_layer(layer, factors)
    module.graph.eliminate_dead_code()
    module.recompile()
    return True


def _factor_limits(
    scaling: Scaling, ranges: Mapping[Node, tuple[torch.Tensor, torch.Tensor]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the logarithms of the smallest and the largest factor of each channel number."""
    lowest = torch.full((scaling.count,), -math.log(LARGEST_FACTOR))
    highest = -lowest
    for node, numbers in scaling.clipped.items():
        end = _clamp_limit(node)
        seen = ranges.get(_clamp_input(node))
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


def _clamp_input(clamp: Node) -> Node:
    source = arguments(clamp)["self"]
    assert isinstance(source, Node)
    return source


def _clamp_limit(clamp: Node) -> float:
    limits = facts_of(clamp).clamp_range(clamp)
    assert limits is not None
    return limits[1]


def _equalization_factors(
    scaling: Scaling,
    ranges: Mapping[Node, tuple[torch.Tensor, torch.Tensor]],
    lowest: torch.Tensor,
    highest: torch.Tensor,
) -> torch.Tensor:
    """Returns the divisor of each channel's values, [numbers]."""
    weights = [layer.rows(layer.constants.weight).abs().amax(3).cpu() for layer in scaling.layers]
    activations = [
        torch.maximum(high, -low).clamp(min=0).cpu()
        for low, high in (ranges[layer.node] for layer in scaling.layers if layer.node in ranges)
    ]
    observed = [layer.output_numbers for layer in scaling.layers if layer.node in ranges]
    logs = torch.zeros(scaling.count)
    for _ in range(ROUNDS):
        written, read = _MeanLogRange(scaling.count), _MeanLogRange(scaling.count)
        for layer, weight in zip(scaling.layers, weights, strict=True):
            groups, inputs = layer.input_numbers.shape
            now = weight * (logs[layer.input_numbers].reshape(groups, 1, inputs)).exp()
            now = _relative_ranges(now / logs[layer.output_numbers].reshape(groups, -1, 1).exp())
            written.add(layer.output_numbers, now.amax(2).flatten())
            read.add(layer.input_numbers.flatten(), now.amax(1).flatten())
        for numbers, row in zip(observed, activations, strict=True):
            written.add(numbers, _relative_ranges(row / logs[numbers].exp()))
        known = written.seen & read.seen
        logs += STEP / 2 * _center_by_group((written.value - read.value) * known, known, scaling.together)
        logs = logs.clamp(lowest, highest)
    return logs.exp()


def _relative_ranges(ranges: torch.Tensor) -> torch.Tensor:
    """Returns `ranges` as shares of the largest range, which sets the scale of their tensor. Dead channels get 0."""
    largest = ranges.max()
    shares = ranges / largest if largest > 0 else ranges
    return torch.where(shares < SMALLEST_SHARE, 0, shares)


def _center_by_group(steps: torch.Tensor, known: torch.Tensor, together: torch.Tensor) -> torch.Tensor:
    """Subtracts from the `steps` of each group in `together` their mean over `known` channel numbers.

    Without this, a factor common to all channels of a tensor could grow without limit, because it does not change the
    ratios of their ranges.
    """
    total, count = (torch.zeros(len(steps)).index_add_(0, together, values) for values in (steps, known.float()))
    return steps - (total / count.clamp(min=1))[together] * known


class _MeanLogRange:
    """The mean logarithm of the ranges of each channel number."""

    def __init__(self, count: int) -> None:
        self.sum, self.count = torch.zeros(count), torch.zeros(count)

    def add(self, numbers: torch.Tensor, ranges: torch.Tensor) -> None:
        """Adds the nonzero `ranges` to the means of their channel `numbers`."""
        some = ranges > 0
        self.sum.index_add_(0, numbers[some], ranges[some].log())
        self.count.index_add_(0, numbers[some], torch.ones(int(some.sum())))

    @property
    def seen(self) -> torch.Tensor:
        return self.count > 0

    @property
    def value(self) -> torch.Tensor:
        return self.sum / self.count.clamp(min=1)


def _rescale_layer(layer: ScalableLayer, factors: torch.Tensor) -> None:
    weight, bias = layer.constants.weight, layer.constants.bias
    factors = factors.to(weight.device)
    scaled_bias = None if bias is None else bias / factors[layer.output_numbers]
    layer.constants.replace(weight=layer.scaled(weight, factors), bias=scaled_bias)
