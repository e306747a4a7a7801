"""Batch norm in eval mode is a scale and a shift, which the operator before it can take."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from openneutron.constants import constant_of, insert_constant
from openneutron.fx import arguments, note_replaced, op_name, shape_of

__all__ = ["CONVOLUTIONS", "TRANSPOSED_CONVOLUTIONS", "fold_batch_norm", "scale_of_weight"]

CONVOLUTIONS = {
    "aten.conv1d.default",
    "aten.conv1d.padding",
    "aten.conv2d.default",
    "aten.conv2d.padding",
    "aten.conv3d.default",
}
TRANSPOSED_CONVOLUTIONS = {"aten.conv_transpose1d.default", "aten.conv_transpose2d.input"}


@dataclass(frozen=True)
class _Affine:
    """y = scale * x + shift, for each channel."""

    scale: torch.Tensor
    shift: torch.Tensor


def fold_batch_norm(module: GraphModule) -> bool:
    """Rules, linear in nodes; the function stays the same up to float rounding:

    1. A batch norm that alone reads a convolution, a transposed one, or a linear of rank 2, goes into its weight and
       bias, which are new: another operator that shares the old ones keeps them.
    2. Any other batch norm becomes a multiplication and an addition with constants.
    """
    changed = False
    for node in list(module.graph.nodes):
        if op_name(node) != "aten.batch_norm.default" or arguments(node)["training"]:
            continue
        affine = _affine(module, node)
        if affine is None:
            continue
        producer = node.args[0]
        if isinstance(producer, Node) and _takes_affine(module, producer):
            _fold(module, producer, affine)
            node.replace_all_uses_with(producer)
            module.graph.erase_node(node)
        else:
            _as_arithmetic(module, node, affine)
        changed = True
    if changed:
        module.graph.eliminate_dead_code()
        module.recompile()
    return changed


def _affine(module: GraphModule, node: Node) -> _Affine | None:
    args = arguments(node)
    mean, variance = constant_of(module, args["running_mean"]), constant_of(module, args["running_var"])
    if mean is None or variance is None:
        return None
    weight, bias = constant_of(module, args["weight"]), constant_of(module, args["bias"])
    scale = torch.rsqrt(variance + args["eps"])
    scale = scale if weight is None else scale * weight
    shift = -mean * scale
    return _Affine(scale, shift if bias is None else shift + bias)


def _takes_affine(module: GraphModule, producer: Node) -> bool:
    name = op_name(producer)
    linear = name == "aten.linear.default" and len(shape_of(producer)) == 2
    if name not in CONVOLUTIONS | TRANSPOSED_CONVOLUTIONS and not linear:
        return False
    args = arguments(producer)
    constant_bias = args["bias"] is None or constant_of(module, args["bias"]) is not None
    return len(producer.users) == 1 and constant_bias and constant_of(module, args["weight"]) is not None


def _fold(module: GraphModule, producer: Node, affine: _Affine) -> None:
    args = arguments(producer)
    weight, bias = constant_of(module, args["weight"]), constant_of(module, args["bias"])
    assert weight is not None
    scaled = weight * scale_of_weight(affine.scale, producer, weight)
    shifted = affine.shift if bias is None else bias * affine.scale + affine.shift
    operands = (
        insert_constant(module, producer, scaled, "weight"),
        insert_constant(module, producer, shifted, "bias"),
    )
    producer.args = (producer.args[0], *operands, *producer.args[3:])
    producer.kwargs = {name: value for name, value in producer.kwargs.items() if name not in ("weight", "bias")}


def scale_of_weight(scale: torch.Tensor, producer: Node, weight: torch.Tensor) -> torch.Tensor:
    """The scale of each output channel in a shape that multiplies the weight."""
    kernel = [1] * (weight.dim() - 2)
    if op_name(producer) not in TRANSPOSED_CONVOLUTIONS:
        return scale.reshape(-1, 1, *kernel)
    inputs, outputs = weight.shape[:2]  # of all groups, of one group
    groups = scale.numel() // outputs
    return scale.reshape(groups, outputs).repeat_interleave(inputs // groups, 0).reshape(inputs, outputs, *kernel)


def _as_arithmetic(module: GraphModule, node: Node, affine: _Affine) -> None:
    per_channel = (1, -1, *[1] * (len(shape_of(node)) - 2))
    value = node.args[0]
    steps = (("scale", torch.ops.aten.mul.Tensor, affine.scale), ("shift", torch.ops.aten.add.Tensor, affine.shift))
    for role, operator, operand in steps:
        constant = insert_constant(module, node, operand.reshape(per_channel), role)
        with module.graph.inserting_before(node):
            value = module.graph.call_function(operator, (value, constant))
        value.meta = dict(node.meta)
        note_replaced(value, op_name(node))
    assert isinstance(value, Node)
    node.replace_all_uses_with(value)
    module.graph.erase_node(node)
