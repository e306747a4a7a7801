"""Channels that no calibration input wakes.

`passes/remove_dead_channels` removes what it can prove to be zero for every input. Real checkpoints hold more: channels
that fire on nothing their network is made for. Weight decay did not touch the weights that read them, and where those
are large they take the resolution from all others. Nobody can tell from the outside whether such a channel is zero.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from openneutron.core.constants import constant_of, insert_constant
from openneutron.core.fx import arguments, set_argument
from openneutron.ops.layers import CONVOLUTION, LINEAR, layer_kind
from openneutron.passes.remove_dead_channels import limits_of_clamp, remove_dead_channels
from openneutron.recovery.channel_ranges import Ranges

__all__ = ["silence_channels"]


def silence_channels(module: GraphModule, ranges: Ranges) -> int:
    """Zero, in place, the channels whose activation was zero on all that calibration saw, with the weights behind them.

    `ranges` comes from `channel_ranges`. The function stays as it is on what calibration saw. Returns the number of
    channels. Linear in nodes and weights.
    """
    count = 0
    for node, (_, highest) in ranges.items():
        silent = highest <= 0
        if _is_cut_off_at_zero(node) and bool(silent.any()) and _zero(module, node, silent):
            count += int(silent.sum())
    if count:
        remove_dead_channels(module)  # the weights that read what is zero now
    return count


def _is_cut_off_at_zero(node: Node) -> bool:
    """Whether only an activation that is zero for all below zero reads `node`."""
    if layer_kind(node) not in (CONVOLUTION, LINEAR) or len(node.users) != 1:
        return False
    (reader,) = node.users
    limits = limits_of_clamp(reader)
    return limits is not None and limits[0] == 0


def _zero(module: GraphModule, node: Node, silent: torch.Tensor) -> bool:
    """Zero the weights and biases of these outputs; False where there is nothing to zero, or others read them too."""
    args = arguments(node)
    constants = {role: args[role] for role in ("weight", "bias") if args[role] is not None}
    values = {role: constant_of(module, constant) for role, constant in constants.items()}
    if any(value is None for value in values.values()) or any(len(node.users) > 1 for node in constants.values()):
        return False
    zeroed = {role: value.clone() for role, value in values.items() if value is not None}
    for value in zeroed.values():
        value[silent] = 0
    if all(torch.equal(value, zeroed[role]) for role, value in values.items() if value is not None):
        return False
    for role, value in zeroed.items():
        set_argument(node, role, insert_constant(module, node, value, role))
    return True
