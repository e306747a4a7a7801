"""Layers get the dimension of a batch of one where their input has none."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx import GraphModule, Node

from openneutron.core.fx import arguments, op_name, set_argument, shape_of
from openneutron.passes.write_back import Spot

__all__ = ["batch_layers"]

aten = torch.ops.aten
_LINEAR = "aten.linear.default"


def batch_layers(module: GraphModule, stays: Callable[[Node], bool] = lambda _: False) -> bool:
    """Rule, linear in nodes: a convolution, transposed convolution or linear of one sample without a batch dimension
    becomes unsqueeze, the layer, and squeeze.

    The NPU and the methods of recovery want that dimension. Operators that are to stay in float stay as they are.
    """
    changed = False
    for node in list(module.graph.nodes):
        if _lacks_batch(node) and not stays(node):
            _batch(node)
            changed = True
    if changed:
        module.recompile()
    return changed


def _lacks_batch(node: Node) -> bool:
    if not op_name(node).startswith("aten.conv") and op_name(node) != _LINEAR:
        return False
    args = arguments(node)
    read, weight = args.get("input"), args.get("weight")
    if not isinstance(read, Node) or not isinstance(weight, Node):
        return False
    return len(shape_of(weight)) >= 2 and len(shape_of(read)) == (
        1 if op_name(node) == _LINEAR else len(shape_of(weight)) - 1
    )


def _batch(node: Node) -> None:
    source = arguments(node)["input"]
    set_argument(node, "input", Spot(node, node).call(aten.unsqueeze.default, source, 0))
    value = node.meta["val"]
    node.meta["val"] = value.unsqueeze(0)
    users = set(node.users)
    without = Spot(node.next, node).call(aten.squeeze.dim, node, 0)
    node.replace_all_uses_with(without, delete_user_cb=users.__contains__)
