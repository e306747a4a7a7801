"""Channels that no input can wake say nothing, but their neighbours' weights set the scale for all.

Training with weight decay leaves channels whose weights are about 1e-20 behind a negative bias: their activation is
zero whatever comes in. Nothing trained the weights that read them, and one that is a hundred times larger than the
others takes the resolution of per-tensor int8 from all of them (Nagel et al. 2019 name the effect; the proof by
intervals is ours).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from openneutron.core.constants import constant_of, insert_constant
from openneutron.core.fx import arguments, op_name, shape_of

__all__ = ["LARGEST_INPUT", "limits_of_clamp", "remove_dead_channels"]

# What is known of a value of which nothing is known: no float32 network means anything by larger ones.
LARGEST_INPUT = 1e6

_CONVOLUTIONS = {f"aten.conv{rank}d.{overload}" for rank in (1, 2, 3) for overload in ("default", "padding")}
# By the rank at which dimension 1 is the channels.
_WITHIN_THE_RANGE = {
    "aten.max_pool1d.default": 3,
    "aten.max_pool2d.default": 4,
    "aten.adaptive_avg_pool1d.default": 3,
    "aten.adaptive_avg_pool2d.default": 4,
    "aten.upsample_nearest1d.vec": 3,
    "aten.upsample_nearest2d.vec": 4,
    "aten.upsample_bilinear2d.vec": 4,
}
_MAYBE_PADDED_WITH_ZERO = {"aten.avg_pool1d.default": 3, "aten.avg_pool2d.default": 4}


@dataclass(frozen=True)
class _Interval:
    """Bounds of a value for each channel (dimension 1)."""

    low: torch.Tensor
    high: torch.Tensor

    @property
    def is_zero(self) -> torch.Tensor:
        return (self.low == 0) & (self.high == 0)


def remove_dead_channels(module: GraphModule) -> bool:
    """The function stays the same for all inputs up to `LARGEST_INPUT`. Rules, linear in nodes and weights:

    1. The weights and bias of a channel whose activation (relu, relu6, hardtanh from 0) is zero for every input become
       zero.
    2. A weight that reads a channel that is zero for every input becomes zero.

    "For every input" is proved by interval arithmetic from the inputs on. Weights that several operators share stay.
    """
    intervals: dict[Node, _Interval] = {}
    changed = False
    for node in module.graph.nodes:
        interval = _interval(module, node, intervals)
        if interval is not None:
            intervals[node] = interval
    for node in list(module.graph.nodes):
        if _multiplies_channels(module, node):
            changed |= _clear(module, node, intervals)
    if changed:
        module.graph.eliminate_dead_code()
        module.recompile()
    return changed


def _interval(module: GraphModule, node: Node, known: dict[Node, _Interval]) -> _Interval | None:
    """Bounds of what `node` yields; None for what has no channels."""
    value = node.meta.get("val")
    if node.op not in ("placeholder", "call_function") or not isinstance(value, torch.Tensor) or value.dim() < 2:
        return None
    channels, name = value.shape[1], op_name(node)
    anything = _Interval(torch.full((channels,), -LARGEST_INPUT), torch.full((channels,), LARGEST_INPUT))
    source = node.args[0] if node.args else None
    reads = known.get(source) if isinstance(source, Node) else None
    result: _Interval | None = None
    if _multiplies_channels(module, node) and reads is not None:
        result = _product(module, node, reads)
    elif (limits := limits_of_clamp(node)) is not None and reads is not None:
        result = _Interval(reads.low.clamp(*limits), reads.high.clamp(*limits))
    elif name == "aten.dropout.default" or _WITHIN_THE_RANGE.get(name) == value.dim():
        result = reads
    elif reads is not None and _MAYBE_PADDED_WITH_ZERO.get(name) == value.dim() and not _divides_otherwise(node):
        result = _Interval(reads.low.clamp(max=0), reads.high.clamp(min=0))
    elif name == "aten.add.Tensor":
        result = _sum(node, known)
    if result is None or result.low.numel() != channels:
        return anything
    return _Interval(result.low.clamp(min=-LARGEST_INPUT), result.high.clamp(max=LARGEST_INPUT))


def _divides_otherwise(node: Node) -> bool:
    """Whether an average pool does not average."""
    return arguments(node).get("divisor_override") is not None


def limits_of_clamp(node: Node) -> tuple[float, float] | None:
    """The ends of the range to which `node`, a relu, relu6 or hardtanh, clamps; None for any other operator."""
    name = op_name(node)
    if name == "aten.relu.default":
        return 0.0, math.inf
    if name == "aten.relu6.default":
        return 0.0, 6.0
    if name == "aten.hardtanh.default":
        args = arguments(node)
        return float(args["min_val"]), float(args["max_val"])
    return None


def _sum(node: Node, known: dict[Node, _Interval]) -> _Interval | None:
    args = arguments(node)
    left, right = (known.get(args[name]) if isinstance(args[name], Node) else None for name in ("self", "other"))
    if left is None or right is None or args["alpha"] != 1 or left.low.shape != right.low.shape:
        return None
    return _Interval(left.low + right.low, left.high + right.high)


def _multiplies_channels(module: GraphModule, node: Node) -> bool:
    """Whether `node` is a convolution with a batch, or a linear of a matrix, with a constant weight."""
    name = op_name(node)
    if name not in _CONVOLUTIONS and name != "aten.linear.default":
        return False
    args = arguments(node)
    weight = constant_of(module, args["weight"])
    return weight is not None and weight.dim() >= 2 and weight.dim() == len(shape_of(args["input"]))


def _product(module: GraphModule, node: Node, reads: _Interval) -> _Interval | None:
    """Bounds of a convolution or linear: each weight meets the end of the interval that takes it furthest."""
    args = arguments(node)
    weight, bias = constant_of(module, args["weight"]), constant_of(module, args["bias"])
    if weight is None or (args["bias"] is not None and bias is None):
        return None
    low, high = reads.low.clamp(max=0), reads.high.clamp(min=0)  # padding is zero
    taps = weight.double().reshape(*weight.shape[:2], -1)
    rising, falling = taps.clamp(min=0).sum(2), taps.clamp(max=0).sum(2)
    groups = args.get("groups", 1)
    low, high = (_of_each_output(end, groups, weight.shape).double() for end in (low, high))
    shift = 0.0 if bias is None else bias.double()
    upper = (rising * high + falling * low).sum(1) + shift
    lower = (rising * low + falling * high).sum(1) + shift
    return _Interval(lower.float(), upper.float())


def _of_each_output(channels: torch.Tensor, groups: int, weight_shape: torch.Size) -> torch.Tensor:
    """[outputs, inputs of a group]: what each output channel reads."""
    outputs, inputs = weight_shape[:2]
    return channels.reshape(groups, inputs).repeat_interleave(outputs // groups, 0)


def _clear(module: GraphModule, node: Node, intervals: dict[Node, _Interval]) -> bool:
    """Rules 1 and 2 on the constants of one operator."""
    args = arguments(node)
    weight, bias = constant_of(module, args["weight"]), constant_of(module, args["bias"])
    reads = intervals.get(args["input"])
    shared = any(isinstance(args[name], Node) and len(args[name].users) > 1 for name in ("weight", "bias"))
    if weight is None or shared:
        return False
    cleared = {"weight": weight.clone()} | ({} if bias is None else {"bias": bias.clone()})
    if reads is not None:
        cleared["weight"][_of_each_output(reads.is_zero, args.get("groups", 1), weight.shape)] = 0
    silent = _silent(node, intervals)
    if silent is not None:
        for constant in cleared.values():
            constant[silent] = 0
    if torch.equal(cleared["weight"], weight) and (bias is None or torch.equal(cleared["bias"], bias)):
        return False
    for name, constant in cleared.items():
        node.replace_input_with(args[name], insert_constant(module, node, constant, name))
    return True


def _silent(node: Node, intervals: dict[Node, _Interval]) -> torch.Tensor | None:
    """The output channels that the activation behind `node`, its only reader, makes zero for every input."""
    if len(node.users) != 1:
        return None
    (reader,) = node.users
    limits = limits_of_clamp(reader)
    interval = intervals.get(node)
    if limits is None or limits[0] != 0 or interval is None or len(shape_of(node)) < 2:
        return None
    return interval.high <= 0
