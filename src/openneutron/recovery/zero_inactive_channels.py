"""Zeroes channels that are inactive for all calibration inputs.

`passes/remove_dead_channels` removes channels whose activation is provably zero for every input. Trained networks have
further channels that are inactive for all inputs of their domain. Weights that read such a channel do not matter, but
they may be large, because training did not change them. Large weights cost the other weights resolution, as all share
one scale.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule

from openneutron.ops.declared import facts_of
from openneutron.ops.layers import ConstantLayer, constant_layer
from openneutron.passes.remove_dead_channels import remove_dead_channels
from openneutron.recovery.channel_ranges import Ranges

__all__ = ["zero_inactive_channels"]


def zero_inactive_channels(module: GraphModule, ranges: Ranges) -> int:
    """Zeroes, in place, channels that are inactive for all calibration inputs, and the weights that read them.

    A channel is inactive if the activation after it returns zero. `ranges` comes from `channel_ranges`. The outputs on
    the calibration data do not change. Returns the number of inactive channels in the layers that it changed. Linear in
    nodes and weights.
    """
    count = 0
    for node, (_, highest) in ranges.items():
        layer, inactive = constant_layer(module, node), highest <= 0
        if (
            layer is not None
            and _is_clamped_at_zero(layer)
            and bool(inactive.any())
            and _zero_channels(layer, inactive)
        ):
            count += int(inactive.sum())
    if count:
        remove_dead_channels(module)  # zeroes the weights that read these channels
    return count


def _is_clamped_at_zero(layer: ConstantLayer) -> bool:
    """Whether the only reader of the layer is an activation that returns zero for all inputs below zero."""
    if layer.is_transposed or len(layer.node.users) != 1:
        return False
    (reader,) = layer.node.users
    limits = facts_of(reader).clamp_range(reader)
    return limits is not None and limits[0] == 0


def _zero_channels(layer: ConstantLayer, inactive: torch.Tensor) -> bool:
    """Zeroes the weights and biases of the inactive output channels.

    Returns False if they are zero already, or if another operator reads the weight or the bias.
    """
    if not layer.owns_constants:
        return False
    weight, bias = layer.weight.clone(), None if layer.bias is None else layer.bias.clone()
    weight[inactive] = 0
    if bias is not None:
        bias[inactive] = 0
    return layer.update(weight, bias)
