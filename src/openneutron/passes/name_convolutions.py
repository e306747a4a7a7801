"""Replaces the general convolution by the convolution of its dimensions."""

from __future__ import annotations

import torch
from torch.fx import GraphModule

from openneutron.core.fx import arguments, op_name

__all__ = ["name_convolutions"]

aten = torch.ops.aten
_PLAIN = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}
_TRANSPOSED = {1: aten.conv_transpose1d.default, 2: aten.conv_transpose2d.input, 3: aten.conv_transpose3d.input}


def name_convolutions(module: GraphModule) -> bool:
    """Rule: `aten.convolution`, which traced modules and core ATen contain, becomes conv1d, conv2d and so on.

    Linear in nodes.
    """
    changed = False
    for node in module.graph.nodes:
        if op_name(node) != "aten.convolution.default":
            continue
        args = arguments(node)
        kinds = _TRANSPOSED if args["transposed"] else _PLAIN
        node.target = kinds[node.args[1].meta["val"].dim() - 2]
        own = ("output_padding", "groups", "dilation") if args["transposed"] else ("dilation", "groups")
        names = ("input", "weight", "bias", "stride", "padding", *own)
        node.args, node.kwargs = tuple(args[name] for name in names), {}
        changed = True
    if changed:
        module.recompile()
    return changed
