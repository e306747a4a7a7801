"""High-bias absorption: moves a constant part of a layer's output into the bias of the next layer.

If the input x of a relu is never below c > 0 in a channel, then relu(x) = relu(x - c) + c. The method subtracts c from
the bias of the layer before the relu, and adds the product of c and the next layer's weights to the next layer's bias.
The outputs do not change, but int8 has to cover a narrower range (Nagel et al. 2019, section 4.1.3). Nagel et al.
estimate c from batch norms; this module measures it on the calibration data.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from openneutron.core.fx import arguments
from openneutron.ops.declared import is_op
from openneutron.ops.layers import ConstantLayer, constant_layer
from openneutron.recovery.channel_ranges import Ranges

__all__ = ["absorb_biases"]


def absorb_biases(module: GraphModule, ranges: Ranges) -> Ranges:
    """Absorbs high biases in place, and returns the new ranges. The outputs on the calibration data do not change.

    1. Applies to a convolution or linear that is followed by a relu and another convolution or linear, without other
       readers in between.
    2. Skips a next layer that pads, because its padding stays zero.

    `ranges` comes from `channel_ranges`. Linear in nodes and weights.
    """
    now = dict(ranges)
    for node, (lowest, highest) in ranges.items():
        layers = _layers_around_relu(module, node)
        constant_part = _constant_part(lowest, highest)
        if layers is not None and bool((constant_part > 0).any()):
            _absorb_constant_part(*layers, constant_part)
            now[node] = lowest - constant_part, highest - constant_part
    module.recompile()
    return now


def _constant_part(lowest: torch.Tensor, highest: torch.Tensor) -> torch.Tensor:
    """Returns c of each channel [channels]: its minimum, less the width of its range as a margin; at least 0.

    The margin allows for inputs that calibration has not seen. A channel with a constant value gets c = 0.
    """
    width = highest - lowest
    return torch.where(width > 0, lowest - width, 0.0).clamp(min=0)


def _layers_around_relu(module: GraphModule, node: Node) -> tuple[ConstantLayer, ConstantLayer] | None:
    """Returns the layer of `node`, and the layer after it, which reads the relu of the first layer.

    Returns None if `node` is not followed by a relu and a second layer, if another operator reads `node` or the relu,
    or if the second layer pads its input.
    """
    layer = _adjustable_layer(module, node)
    relu = _only_reader(node)
    if layer is None or not is_op(relu, "relu"):
        return None
    reader = _adjustable_layer(module, _only_reader(relu))
    if reader is None or reader.input is not relu:
        return None
    padding = arguments(reader.node).get("padding", [0])
    pads = padding == "same" or (padding != "valid" and any([padding] if isinstance(padding, int) else padding))
    return None if pads else (layer, reader)


def _only_reader(node: Node | None) -> Node | None:
    return next(iter(node.users)) if node is not None and len(node.users) == 1 else None


def _adjustable_layer(module: GraphModule, node: Node | None) -> ConstantLayer | None:
    """Returns `node` as a layer.

    Returns None if `node` is not a convolution or linear, is a transposed convolution, has no bias, or if another
    operator reads its weight or bias.
    """
    layer = constant_layer(module, node)
    if layer is None or layer.is_transposed or layer.bias is None or not layer.owns_constants:
        return None
    return layer


def _absorb_constant_part(layer: ConstantLayer, reader: ConstantLayer, constant_part: torch.Tensor) -> None:
    weight, bias, next_bias = reader.weight, layer.bias, reader.bias
    assert bias is not None
    assert next_bias is not None
    per_input = weight.double().flatten(2).sum(2) if weight.dim() > 2 else weight.double()
    read = constant_part.double().reshape(reader.groups, -1).repeat_interleave(len(weight) // reader.groups, 0)
    layer.replace(bias=bias - constant_part)
    reader.replace(bias=(next_bias + (per_input * read).sum(1)).float())
