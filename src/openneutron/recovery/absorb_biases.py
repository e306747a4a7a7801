"""High-bias absorption: moves a constant part of a layer's output into the bias of the next layer.

If the input x of a relu is never below c > 0 in a channel, then relu(x) = relu(x - c) + c. Subtracting c from the bias
of the layer and adding its product with the next layer's weights to the next bias keeps the function, and narrows the
range that int8 has to cover (Nagel et al. 2019, section 4.1.3). Nagel et al. estimate c from batch norms; this module
measures it on the calibration data.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from openneutron.core.constants import constant_of, insert_constant
from openneutron.core.fx import arguments, op_name, set_argument
from openneutron.ops.layers import CONVOLUTION, LINEAR, layer_kind
from openneutron.recovery.channel_ranges import Ranges

__all__ = ["absorb_biases"]


def absorb_biases(module: GraphModule, ranges: Ranges) -> Ranges:
    """Absorbs high biases in place, and returns the new ranges. Keeps the function on the calibration data.

    1. Applies to a convolution or linear that is followed by a relu and another convolution or linear, without other
       readers in between.
    2. Skips a next layer that pads, because its padding stays zero.

    `ranges` comes from `channel_ranges`. Linear in nodes and weights.
    """
    now = dict(ranges)
    for node, (lowest, highest) in ranges.items():
        reader = _only_layer_behind_relu(module, node)
        surplus = _surplus(lowest, highest)
        if reader is not None and bool((surplus > 0).any()):
            _absorb(module, node, reader, surplus)
            now[node] = lowest - surplus, highest - surplus
    module.recompile()
    return now


def _surplus(lowest: torch.Tensor, highest: torch.Tensor) -> torch.Tensor:
    """Returns c of each channel [channels]: its minimum, less the width of its range as a margin; at least 0.

    The margin allows for inputs that calibration has not seen. A channel with a constant value gets c = 0.
    """
    width = highest - lowest
    return torch.where(width > 0, lowest - width, 0.0).clamp(min=0)


def _only_layer_behind_relu(module: GraphModule, node: Node) -> Node | None:
    if not _has_own_constants(module, node) or len(node.users) != 1:
        return None
    (relu,) = node.users
    if op_name(relu) != "aten.relu.default" or len(relu.users) != 1:
        return None
    (reader,) = relu.users
    if not _has_own_constants(module, reader) or arguments(reader)["input"] is not relu:
        return None
    padding = arguments(reader).get("padding", [0])
    pads = padding == "same" or (padding != "valid" and any([padding] if isinstance(padding, int) else padding))
    return None if pads else reader


def _has_own_constants(module: GraphModule, node: Node) -> bool:
    """Whether `node` is a layer with a constant weight and bias that have no other readers."""
    if layer_kind(node) not in (CONVOLUTION, LINEAR):
        return False
    args = arguments(node)
    constants = [args["weight"], args["bias"]]
    return all(constant_of(module, constant) is not None and len(constant.users) == 1 for constant in constants)


def _absorb(module: GraphModule, node: Node, reader: Node, surplus: torch.Tensor) -> None:
    bias = constant_of(module, arguments(node)["bias"])
    args = arguments(reader)
    weight, next_bias = constant_of(module, args["weight"]), constant_of(module, args["bias"])
    assert bias is not None
    assert weight is not None
    assert next_bias is not None
    groups = args.get("groups", 1)
    per_input = weight.double().flatten(2).sum(2) if weight.dim() > 2 else weight.double()
    read = surplus.double().reshape(groups, -1).repeat_interleave(len(weight) // groups, 0)
    set_argument(node, "bias", insert_constant(module, node, bias - surplus, "bias"))
    taken_up = next_bias + (per_input * read).sum(1)
    set_argument(reader, "bias", insert_constant(module, reader, taken_up.float(), "bias"))
