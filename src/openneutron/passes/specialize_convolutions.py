"""Replaces the general convolution by conv1d, conv2d or conv3d."""

from __future__ import annotations

from torch.fx import GraphModule

from openneutron.core.fx import arguments
from openneutron.ops.convolution import CONVOLUTIONS
from openneutron.ops.declared import is_op
from openneutron.ops.transposed import TRANSPOSED_CONVOLUTIONS

__all__ = ["specialize_convolutions"]


def specialize_convolutions(module: GraphModule) -> bool:
    """Rule: `aten.convolution`, which traced modules and core ATen contain, becomes conv1d, conv2d and so on.

    Linear in nodes.
    """
    changed = False
    for node in module.graph.nodes:
        if not is_op(node, "convolution of any dimensions"):
            continue
        args = arguments(node)
        kinds = TRANSPOSED_CONVOLUTIONS if args["transposed"] else CONVOLUTIONS
        node.target = kinds[node.args[1].meta["val"].dim() - 2]
        own = ("output_padding", "groups", "dilation") if args["transposed"] else ("dilation", "groups")
        names = ("input", "weight", "bias", "stride", "padding", *own)
        node.args, node.kwargs = tuple(args[name] for name in names), {}
        changed = True
    if changed:
        module.recompile()
    return changed
