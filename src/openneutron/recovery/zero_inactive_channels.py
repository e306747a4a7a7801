"""Zeroes channels that are inactive for all calibration inputs.

`passes/remove_dead_channels` removes channels whose activation is provably zero for every input. Trained networks have
further channels that are inactive for all inputs of their domain. Weights that read such a channel do not matter, but
they may be large, because training did not change them. Large weights cost the other weights resolution, as all share
one scale.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from openneutron.core.constants import constant_of, insert_constant
from openneutron.core.fx import arguments, set_argument
from openneutron.ops.layers import CONVOLUTION, LINEAR, layer_kind
from openneutron.passes.remove_dead_channels import limits_of_clamp, remove_dead_channels
from openneutron.recovery.channel_ranges import Ranges

__all__ = ["zero_inactive_channels"]


def zero_inactive_channels(module: GraphModule, ranges: Ranges) -> int:
    """Zeroes, in place, channels that are inactive for all calibration inputs, and the weights that read them.

    A channel is inactive if the activation after it returns zero. `ranges` comes from `channel_ranges`. The function
    stays equal on the calibration data. Returns the number of channels. Linear in nodes and weights.
    """
    count = 0
    for node, (_, highest) in ranges.items():
        inactive = highest <= 0
        if _is_cut_off_at_zero(node) and bool(inactive.any()) and _zero(module, node, inactive):
            count += int(inactive.sum())
    if count:
        remove_dead_channels(module)  # zeroes the weights that read these channels
    return count


def _is_cut_off_at_zero(node: Node) -> bool:
    """Whether the only reader of `node` is an activation that returns zero for all inputs below zero."""
    if layer_kind(node) not in (CONVOLUTION, LINEAR) or len(node.users) != 1:
        return False
    (reader,) = node.users
    limits = limits_of_clamp(reader)
    return limits is not None and limits[0] == 0


def _zero(module: GraphModule, node: Node, inactive: torch.Tensor) -> bool:
    """Zeroes the weights and biases of the inactive output channels.

    Returns False if they are zero already, or if another operator reads the weight or the bias.
    """
    args = arguments(node)
    constants = {role: args[role] for role in ("weight", "bias") if args[role] is not None}
    values = {role: constant_of(module, constant) for role, constant in constants.items()}
    if any(value is None for value in values.values()) or any(len(node.users) > 1 for node in constants.values()):
        return False
    zeroed = {role: value.clone() for role, value in values.items() if value is not None}
    for value in zeroed.values():
        value[inactive] = 0
    if all(torch.equal(value, zeroed[role]) for role, value in values.items() if value is not None):
        return False
    for role, value in zeroed.items():
        set_argument(node, role, insert_constant(module, node, value, role))
    return True
