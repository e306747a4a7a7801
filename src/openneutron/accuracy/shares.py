"""Measures the share of the final error that a layer causes: the share that disappears if it alone is in float."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from openneutron.accuracy.quantized_layers import QuantizedLayer, QuantizedLayers, Weight
from openneutron.accuracy.replay import record, replay
from openneutron.accuracy.statistics import Noise
from openneutron.core.fx import is_dequantize, is_quantize, output_node
from openneutron.ops import is_op

__all__ = [
    "Treatment", "add_noise_of_ends", "float_outputs", "noise_ratio", "rounded_per_channel", "shares_of", "to_float",
    "weight_per_channel",
]  # fmt: skip

Recorded = Mapping[Node, Any]
Treatment = Callable[[QuantizedLayers, QuantizedLayer, Recorded], dict[Node, Any]]
"""A function that computes a changed output of a layer for one sample. It returns the output for each node that
dequantizes it."""


def to_float(found: QuantizedLayers, layer: QuantizedLayer, recorded: Recorded) -> dict[Node, Any]:
    """Computes the layer in float: with its float weight and bias, and without quantizing its output."""
    value = layer.in_float(found.module, recorded)
    return dict.fromkeys(layer.readers, value)


def weight_per_channel(found: QuantizedLayers, layer: QuantizedLayer, recorded: Recorded) -> dict[Node, Any]:
    """Computes the layer with a weight scale for each output channel, its bias in float, and its output quantized."""
    assert layer.weight is not None
    rounded = rounded_per_channel(layer.weight)
    value = layer.in_float(found.module, recorded, rounded.movedim(0, layer.weight.axis))
    qparams = layer.qparams
    codes = torch.round(value / qparams.scale) + qparams.zero_point
    kept = (codes.clamp(qparams.low_code, qparams.high_code) - qparams.zero_point) * qparams.scale
    return dict.fromkeys(layer.readers, kept)


def rounded_per_channel(weight: Weight) -> torch.Tensor:
    """Returns the float weight quantized to 255 codes per channel and dequantized. Channels are the first dimension."""
    shape = (-1, *[1] * (weight.values.dim() - 1))
    scales = weight.values.flatten(1).abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny).view(shape) / 127
    return torch.round(weight.values / scales) * scales


def shares_of(
    found: QuantizedLayers,
    treated: Sequence[tuple[QuantizedLayer, Treatment]],
    samples: Iterable[tuple[torch.Tensor, ...]],
    step: Callable[[], None] = lambda: None,
) -> list[float | None]:
    """Returns the share of the final error that disappears with each treatment of a layer, everything else quantized.

    The share is (e - e') / e, where e and e' are the energies of the final noise, over all samples, without and with
    the treatment. It is below 0 if errors cancel each other. Shares of several layers need not add up to 1. It is None
    if there is no error.

    The final noise is the noise of the outputs. For a final softmax or sigmoid, it is the noise of its input, because a
    saturated output shows no noise. `step` is called after each treatment of a sample. Time is samples x (nodes + the
    sum, over treatments, of the nodes after the layer).
    """
    before: list[Noise] = []
    after: list[list[Noise]] = [[] for _ in treated]
    for inputs in samples:
        wanted, recorded = record(found.reference, inputs), record(found.module, inputs)
        add_noise_of_ends(before, found, wanted, recorded.__getitem__)
        for (layer, treatment), sums in zip(treated, after, strict=True):
            changed = treatment(found, layer, recorded)
            replayed = replay(found.module, found.order, recorded, changed, found.identities)
            add_noise_of_ends(sums, found, wanted, replayed)
            step()
    error = noise_ratio(before)
    return [None if error == 0.0 else (error - noise_ratio(sums)) / error for sums in after]


def _final_nodes(module: GraphModule) -> list[Node]:
    """Returns the nodes of a module's outputs, or the operand of a final softmax or sigmoid."""
    leaves = tree_leaves(output_node(module.graph).args[0])
    return [_final_node(leaf) for leaf in leaves if isinstance(leaf, Node)]


def _final_node(returned: Node) -> Node:
    node: Any = returned
    while is_dequantize(node) or is_quantize(node):
        node = node.args[0]
    return node.args[0] if is_op(node, "softmax", "sigmoid") else returned


def add_noise_of_ends(
    sums: list[Noise], found: QuantizedLayers, wanted: Recorded, value_of: Callable[[Node], Any]
) -> None:
    """Adds the noise of one sample to `sums`, one for each output. `sums` is empty before the first sample.

    `wanted` are the values of the float graph, and `value_of` returns those of the module. The noise of a final softmax
    or sigmoid is that of its input.
    """
    ends = list(zip(_final_nodes(found.reference), _final_nodes(found.module), strict=True))
    if not sums:
        sums += [Noise() for _ in ends]
    for one, (reference, node) in zip(sums, ends, strict=True):
        if wanted[reference].is_floating_point():
            one.add(wanted[reference], value_of(node))


def float_outputs(value: Any) -> list[torch.Tensor]:
    """Returns the float tensors among the outputs of a module, in order."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def noise_ratio(outputs: Sequence[Noise]) -> float:
    """Returns the sum over outputs of noise energy / signal energy, so that all outputs count equally."""
    return sum(one.ratio for one in outputs)
