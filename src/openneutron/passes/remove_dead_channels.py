"""Zeroes the weights of channels whose activation is provably zero for every input.

Training with weight decay leaves channels with weights of about 1e-20 and a negative bias, so their activation is zero
for every input. The weights that read such a channel are not trained. If one of them is a hundred times larger than the
others, it costs all of them resolution in per-tensor int8 (Nagel et al. 2019 describe the effect; the proof by interval
arithmetic is ours).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from openneutron.core.fx import arguments, finish_rewrite, shape_of
from openneutron.ops.declared import facts_of, is_op
from openneutron.ops.facts import Bounds
from openneutron.ops.layers import ConstantLayer, constant_layer
from openneutron.ops.windows import spatial_dims

__all__ = ["LARGEST_INPUT", "remove_dead_channels"]

# The assumed bound of values whose range is unknown. Values of float32 networks are smaller.
LARGEST_INPUT = 1e6


@dataclass(frozen=True)
class _Interval:
    """Bounds of a value for each channel (dimension 1)."""

    low: torch.Tensor
    high: torch.Tensor

    @property
    def is_zero(self) -> torch.Tensor:
        return (self.low == 0) & (self.high == 0)


def remove_dead_channels(module: GraphModule) -> bool:
    """Zeroes the weights of dead channels. The model's results do not change for inputs up to `LARGEST_INPUT`. Rules,
    linear in nodes and weights:

    1. The weights and bias of a channel whose activation (relu, relu6, hardtanh from 0) is zero for every input become
       zero.
    2. A weight that reads a channel that is zero for every input becomes zero.

    Interval arithmetic, starting from the inputs, proves that a channel is zero for every input. Weights that several
    operators share are not changed.
    """
    intervals: dict[Node, _Interval] = {}
    changed = False
    for node in module.graph.nodes:
        interval = _output_interval(module, node, intervals)
        if interval is not None:
            intervals[node] = interval
    for node in list(module.graph.nodes):
        if (layer := _batched_layer(module, node)) is not None:
            changed |= _zero_dead_weights(layer, intervals)
    return finish_rewrite(module, changed=changed)


def _output_interval(module: GraphModule, node: Node, known: dict[Node, _Interval]) -> _Interval | None:
    """Returns the bounds of each channel of the output of `node`, or None for a value without channels."""
    value = node.meta.get("val")
    if node.op not in ("placeholder", "call_function") or not isinstance(value, torch.Tensor) or value.dim() < 2:
        return None
    channels = value.shape[1]
    found = _interval_from_operands(module, node, known)
    if found is None or found.low.numel() != channels:
        return _Interval(torch.full((channels,), -LARGEST_INPUT), torch.full((channels,), LARGEST_INPUT))
    return _Interval(found.low.clamp(min=-LARGEST_INPUT), found.high.clamp(max=LARGEST_INPUT))


def _interval_from_operands(module: GraphModule, node: Node, known: dict[Node, _Interval]) -> _Interval | None:
    """Returns the bounds that follow from the bounds of the operands, or None if they are unknown."""
    if is_op(node, "add"):
        return _interval_of_sum(node, known)
    source = node.args[0] if node.args else None
    reads = known.get(source) if isinstance(source, Node) else None
    return None if reads is None else _interval_from_input(module, node, reads)


def _interval_from_input(module: GraphModule, node: Node, reads: _Interval) -> _Interval | None:
    """Returns the bounds that follow from `reads`, the bounds of the first operand, or None if they are unknown."""
    layer = _batched_layer(module, node)
    if layer is not None:
        return _interval_of_layer(layer, reads)
    limits = facts_of(node).clamp_range(node)
    if limits is not None:
        return _Interval(reads.low.clamp(*limits), reads.high.clamp(*limits))
    bounds = _channel_bounds(node)
    if is_op(node, "dropout") or bounds is Bounds.WITHIN:
        return reads
    if bounds is Bounds.WITHIN_OR_ZERO:
        return _Interval(reads.low.clamp(max=0), reads.high.clamp(min=0))
    return None


def _channel_bounds(node: Node) -> Bounds | None:
    """Returns how the output's bounds follow from those of the same channel (dimension 1) of the input, or None if
    unknown.
    """
    dims = spatial_dims(node)
    return facts_of(node).bounds_of(node) if dims is not None and len(shape_of(node)) == dims + 2 else None


def _interval_of_sum(node: Node, known: dict[Node, _Interval]) -> _Interval | None:
    """Returns the bounds of a sum of two values with the same number of dimensions and channels."""
    args = arguments(node)
    operands = [args[name] for name in ("self", "other")]
    left, right = (known.get(value) if isinstance(value, Node) else None for value in operands)
    if left is None or right is None or args["alpha"] != 1 or left.low.shape != right.low.shape:
        return None
    if len({len(shape_of(value)) for value in operands}) > 1:  # dimension 1 of one is another dimension of the sum
        return None
    return _Interval(left.low + right.low, left.high + right.high)


def _batched_layer(module: GraphModule, node: Node) -> ConstantLayer | None:
    """Returns `node` as a batched convolution, or a linear of a matrix, with a constant weight, or None for any other
    node.
    """
    layer = constant_layer(module, node)
    if layer is None or layer.is_transposed or layer.weight.dim() < 2:
        return None
    return layer if layer.weight.dim() == len(shape_of(layer.input)) else None


def _interval_of_layer(layer: ConstantLayer, reads: _Interval) -> _Interval:
    """Returns the bounds of a convolution or linear. For the upper bound, positive weights are multiplied by the upper
    bounds of the inputs and negative weights by the lower bounds; for the lower bound, vice versa.
    """
    low, high = reads.low.clamp(max=0).double(), reads.high.clamp(min=0).double()  # padding is zero
    taps = layer.weight.reshape(layer.groups, layer.outputs // layer.groups, layer.weight.shape[1], -1)
    rising, falling = (_sum_of_taps(part) for part in (taps.clamp(min=0), taps.clamp(max=0)))
    ends = torch.stack([high, low], 1).reshape(layer.groups, -1, 2)
    upper, lower = (rising @ ends + falling @ ends.flip(2)).reshape(-1, 2).unbind(1)
    shift = 0.0 if layer.bias is None else layer.bias.double()
    return _Interval((lower + shift).float(), (upper + shift).float())


def _sum_of_taps(taps: torch.Tensor) -> torch.Tensor:
    """Returns the float64 sums over dimension 3. torch's sum of a single tap takes twice the time of a conversion."""
    return taps.squeeze(3).double() if taps.shape[3] == 1 else taps.sum(3, dtype=torch.float64)


def _inputs_of_each_output(channels: torch.Tensor, groups: int, weight_shape: torch.Size) -> torch.Tensor:
    """Returns `channels`, one value per input channel, as [outputs, inputs of a group]: row o has the channels that
    output o reads.
    """
    outputs, inputs = weight_shape[:2]
    return channels.reshape(groups, inputs).repeat_interleave(outputs // groups, 0)


def _zero_dead_weights(layer: ConstantLayer, intervals: dict[Node, _Interval]) -> bool:
    """Applies rules 1 and 2 to the constants of one operator."""
    if not layer.owns_constants:
        return False
    reads = intervals.get(layer.input)
    unread = None if reads is None or not reads.is_zero.any() else reads.is_zero
    inactive = _inactive_channels(layer.node, intervals)
    if unread is None and (inactive is None or not inactive.any()):
        return False
    weight, bias = layer.weight.clone(), None if layer.bias is None else layer.bias.clone()
    if unread is not None:
        weight[_inputs_of_each_output(unread, layer.groups, weight.shape)] = 0
    if inactive is not None:
        weight[inactive] = 0
        if bias is not None:
            bias[inactive] = 0
    return layer.update(weight, bias)


def _inactive_channels(node: Node, intervals: dict[Node, _Interval]) -> torch.Tensor | None:
    """Returns a bool for each output channel of `node`: whether the activation after it returns zero for every input.

    Returns None if `node` has other readers, or no activation that starts at zero.
    """
    if len(node.users) != 1:
        return None
    (reader,) = node.users
    limits = facts_of(reader).clamp_range(reader)
    interval = intervals.get(node)
    if limits is None or limits[0] != 0 or interval is None or len(shape_of(node)) < 2:
        return None
    return interval.high <= 0
