"""Cross-layer equalization: scales channels between layers so that one int8 scale per tensor fits all channels.

With one scale per tensor, a weight's row of small values loses resolution if another row has large values. Where a
channel may be scaled (see `scalable_channels`), dividing the producer's row and multiplying the consumer's column by
one factor does not change the function. The factors bring the range of the row near the range of the column. Nagel et
al. 2019 do this for pairs of layers. Here it is done for all layers that share a channel through residual additions,
concatenations and depthwise convolutions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from openneutron.core.fx import arguments
from openneutron.ops.declared import facts_of
from openneutron.passes.scalable_channels import PINNED, ScalableLayer, Scaling, scaling_of

__all__ = ["equalize", "note_equalized", "was_equalized"]

ROUNDS = 60
# The factor on each step. A step of 1 would equalize one channel if no other channel were scaled in the same round.
STEP = 0.5
# The rounds end when no logarithm of a factor changes by more. Most networks need 10 to 20 rounds.
CONVERGED_STEP = 1e-6
LARGEST_FACTOR = 2.0**20
# The number of weights whose products are computed at once, which fit into the caches.
BLOCK = 2**18
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

    Linear in nodes, and in weights for each of at most `ROUNDS` rounds.
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
    tensors = _Tensors.from_layers(scaling.layers, ranges)
    logs = torch.zeros(scaling.count)
    for _ in range(ROUNDS):
        rows, columns = tensors.relative_ranges(logs)
        written = _MeanLogRange.from_ranges(tensors.written, rows, scaling.count)
        read = _MeanLogRange.from_ranges(tensors.read, columns, scaling.count)
        known = written.seen & read.seen
        steps = STEP / 2 * _center_by_group((written.value - read.value) * known, known, scaling.together)
        before, logs = logs, (logs + steps).clamp(lowest, highest)
        if float((logs - before).abs().max()) <= CONVERGED_STEP:
            break
    return logs.exp()


@dataclass(frozen=True)
class _Tensors:
    """The largest magnitudes of the weights and of the observed activations of a graph.

    The numbers of the channels that the tensors write and read are concatenated, so that each step on them is one
    operator for all tensors.
    """

    weights: tuple[torch.Tensor, ...]
    """The largest magnitude over the taps of each weight, [groups, outputs of a group, inputs of a group]."""
    activations: torch.Tensor
    """The largest magnitude of each channel of each observed activation."""
    written: torch.Tensor
    """The numbers of the outputs of all weights, then those of the activations."""
    read: torch.Tensor
    """The numbers of the inputs of all weights."""
    writers: torch.Tensor
    """The index of the tensor that each of `written` belongs to. The weights come first."""
    readers: torch.Tensor
    """The index of the weight that each of `read` belongs to."""

    @classmethod
    def from_layers(
        cls, layers: Iterable[ScalableLayer], ranges: Mapping[Node, tuple[torch.Tensor, torch.Tensor]]
    ) -> _Tensors:
        """Returns the tensors of the layers that have a channel that may be scaled, and their outputs in `ranges`."""
        layers = [layer for layer in layers if layer.output_numbers.any() or layer.input_numbers.any()]
        weights, outputs, inputs = [], [], []
        for layer in layers:
            weight = layer.rows(layer.constants.weight).abs().amax(3).cpu()
            output_numbers = layer.output_numbers.reshape(weight.shape[0], -1)
            input_numbers = layer.input_numbers
            # Pinned channels keep the factor 1, so their largest weight represents them.
            if not output_numbers.any():
                weight, output_numbers = weight.amax(1, keepdim=True), output_numbers[:, :1]
            elif not input_numbers.any():
                weight, input_numbers = weight.amax(2, keepdim=True), input_numbers[:, :1]
            weights.append(weight)
            outputs.append(output_numbers.flatten())
            inputs.append(input_numbers.flatten())
        observed = [layer for layer in layers if layer.node in ranges]
        extremes = [ranges[layer.node] for layer in observed]
        activations = [torch.maximum(high, -low).clamp(min=0).cpu() for low, high in extremes]
        outputs += [layer.output_numbers for layer in observed]
        return cls(
            tuple(weights),
            torch.cat([torch.empty(0), *activations]),
            torch.cat(outputs),
            torch.cat(inputs),
            _part_indices(outputs),
            _part_indices(inputs),
        )

    def relative_ranges(self, logs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the ranges of `written` and of `read`, for channels whose values are divided by exp(`logs`).

        The ranges are shares of the largest range in their tensor, which sets its scale. Dead channels get 0.
        """
        divided, multiplied = (-logs).exp()[self.written], logs.exp()[self.read]
        count = len(divided) - len(self.activations)
        output_factors = divided[:count].split([weight.shape[0] * weight.shape[1] for weight in self.weights])
        input_factors = multiplied.split([weight.shape[0] * weight.shape[2] for weight in self.weights])
        rows, columns = [], []
        for weight, outputs, inputs in zip(self.weights, output_factors, input_factors, strict=True):
            row, column = _largest_products(weight, outputs, inputs)
            rows.append(row)
            columns.append(column)
        written, read = torch.cat([*rows, self.activations]) * divided, torch.cat(columns) * multiplied
        largest = torch.zeros(len(self.weights) + len(written)).scatter_reduce(0, self.writers, written, "amax")
        return _shares(written, largest[self.writers]), _shares(read, largest[self.readers])


def _largest_products(
    weight: torch.Tensor, outputs: torch.Tensor, inputs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the largest `weight` * `inputs` of each output, and the largest `weight` * `outputs` of each input.

    `weight` is [groups, outputs of a group, inputs of a group]; `outputs` and `inputs` have a factor for each channel.
    The products of a block of outputs stay in the caches.
    """
    outputs, inputs = outputs.view(len(weight), -1, 1), inputs.view(len(weight), 1, -1)
    if weight.numel() <= BLOCK:
        return (weight * inputs).amax(2).flatten(), (weight * outputs).amax(1).flatten()
    size = max(1, BLOCK // (len(weight) * weight.shape[2]))
    buffer = torch.empty_like(weight[:, :size])  # the system clears new memory for each large tensor
    rows, columns = [], []
    for part, factors in zip(weight.split(size, 1), outputs.split(size, 1), strict=True):
        products = buffer[:, : part.shape[1]]
        rows.append(torch.mul(part, inputs, out=products).amax(2))
        columns.append(torch.mul(part, factors, out=products).amax(1))
    return torch.cat(rows, 1).flatten(), torch.stack(columns).amax(0).flatten()


def _part_indices(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Returns the index of the part of each element of the concatenated `parts`."""
    return torch.arange(len(parts)).repeat_interleave(torch.tensor([len(part) for part in parts]))


def _shares(ranges: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    shares = ranges / torch.where(largest > 0, largest, 1)
    return torch.where(shares < SMALLEST_SHARE, 0, shares)


def _center_by_group(steps: torch.Tensor, known: torch.Tensor, together: torch.Tensor) -> torch.Tensor:
    """Subtracts from the `steps` of each group in `together` their mean over `known` channel numbers.

    Without this, a factor common to all channels of a tensor could grow without limit, because it does not change the
    ratios of their ranges.
    """
    total, count = (torch.zeros(len(steps)).index_add_(0, together, values) for values in (steps, known.float()))
    return steps - (total / count.clamp(min=1))[together] * known


@dataclass(frozen=True)
class _MeanLogRange:
    """The sum of the logarithms of the nonzero ranges of each channel number, and the count of these ranges."""

    sum: torch.Tensor
    count: torch.Tensor

    @classmethod
    def from_ranges(cls, numbers: torch.Tensor, ranges: torch.Tensor, count: int) -> _MeanLogRange:
        """Returns the sums for `ranges` of the channel `numbers`, which are below `count`."""
        some = ranges > 0
        logs = torch.where(some, ranges, 1).log()
        return cls(*(torch.zeros(count).index_add_(0, numbers, values) for values in (logs, some.float())))

    @property
    def seen(self) -> torch.Tensor:
        """Whether each channel number has a range."""
        return self.count > 0

    @property
    def value(self) -> torch.Tensor:
        """The mean logarithm of each channel number, 0 without a range."""
        return self.sum / self.count.clamp(min=1)


def _rescale_layer(layer: ScalableLayer, factors: torch.Tensor) -> None:
    weight, bias = layer.constants.weight, layer.constants.bias
    factors = factors.to(weight.device)
    scaled_bias = None if bias is None else bias / factors[layer.output_numbers]
    layer.constants.replace(weight=layer.scaled(weight, factors), bias=scaled_bias)
