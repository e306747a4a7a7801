"""Folds batch norms in eval mode into the operator before them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from openneutron.core.constants import constant_of, insert_constant
from openneutron.core.fx import arguments, finish_rewrite, first_operand, note_replaced, op_name, shape_of
from openneutron.ops.convolution import CONVOLUTIONS
from openneutron.ops.declared import is_op, layer_kind
from openneutron.ops.facts import LayerKind
from openneutron.ops.graph_builder import NodeBuilder, add, mul, squeeze, unsqueeze
from openneutron.ops.layers import constant_layer

__all__ = [
    "ChannelAffine",
    "affine",
    "can_fold_batch_norm_into",
    "fold_batch_norm",
    "insert_identity_convolution",
    "is_attribute",
    "is_transposed",
    "scale_for_weight",
]  # fmt: skip


@dataclass(frozen=True)
class ChannelAffine:
    """y = scale * x + shift, per channel."""

    scale: torch.Tensor
    shift: torch.Tensor

    def folded(
        self, producer: Node, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the weight and bias of `producer` followed by this scale and shift."""
        scaled = weight * scale_for_weight(self.scale, weight, transposed=is_transposed(producer))
        return scaled, self.shift if bias is None else bias * self.scale + self.shift


def affine(
    mean: torch.Tensor,
    variance: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> ChannelAffine:
    """Returns the scale and shift of a batch norm with these running statistics in eval mode."""
    scale = torch.rsqrt(variance + eps)
    scale = scale if weight is None else scale * weight
    shift = -mean * scale
    return ChannelAffine(scale, shift if bias is None else shift + bias)


def fold_batch_norm(module: GraphModule, *, training: bool = False) -> bool:
    """Folds batch norms. Linear in nodes. Results differ only by float rounding. Rules:

    1. A batch norm is folded into the weight and bias of the layer before it, if the layer has no other reader. The
       layer is a convolution or transposed convolution with a batch dimension, or a linear of rank 2. It gets new
       constants, so other readers of its old weight and bias are not affected.
    2. Any other batch norm of rank 2 to 5 becomes a depthwise convolution with kernel size 1.
    3. Each remaining batch norm becomes a multiplication and an addition with constants.

    With `training`, new weights and biases are trainable. A batch norm in train mode, or with computed parameters, is
    not changed.
    """
    changed = False
    for node in list(module.graph.nodes):
        if not is_op(node, "batch_norm") or arguments(node)["training"]:
            continue
        scale_and_shift = _constant_affine(module, node)
        if scale_and_shift is None:
            continue
        if can_fold_batch_norm_into(node.args[0]) or insert_identity_convolution(module, node):
            _fold_into_producer(module, node, scale_and_shift, training=training)
        else:
            _replace_by_arithmetic(module, node, scale_and_shift, training=training)
        changed = True
    return finish_rewrite(module, changed=changed)


def is_attribute(node: Node) -> bool:
    """Returns whether `node` is a constant of a graph module."""
    return node.op == "get_attr"


def can_fold_batch_norm_into(producer: Any, is_constant: Callable[[Node], bool] = is_attribute) -> bool:
    """Returns whether a batch norm that reads `producer` can be folded into its weight and bias."""
    if not isinstance(producer, Node) or len(producer.users) != 1:
        return False
    if layer_kind(producer) is None:
        return False
    args = arguments(producer)
    if len(shape_of(producer)) != len(shape_of(args["weight"])):
        return False  # a batch norm scales dimension 1, which does not hold the output channels here
    return all(args[role] is None or is_constant(args[role]) for role in ("weight", "bias"))


def insert_identity_convolution(module: GraphModule, node: Node) -> bool:
    """Inserts an identity depthwise convolution with kernel size 1 before a batch norm. Returns False, and
    changes nothing, if no convolution has the rank of the batch norm's input.
    """
    value, rank = node.args[0], len(shape_of(node))
    dims = max(rank - 2, 1)  # an input of rank 2 is given a length of 1
    if rank < 2 or dims not in CONVOLUTIONS:
        return False
    channels, spatial = shape_of(node)[1], [1] * dims
    ones = torch.ones(channels, 1, *spatial, device=node.meta["val"].device)
    weight = insert_constant(module, node, ones, "identity")
    builder = _Replacement(node, node)
    assert isinstance(value, Node)
    if rank == 2:
        value = unsqueeze(builder, value, 2)
    options = (None, spatial, [0] * dims, spatial, channels)
    convolution = builder.call(CONVOLUTIONS[dims], value, weight, *options)
    node.args = (convolution, *node.args[1:])
    if rank == 2:
        node.meta = {**node.meta, "val": convolution.meta["val"]}
        readers = list(node.users)
        flat = squeeze(_Replacement(node.next, node), node, 2)
        for reader in readers:
            reader.replace_input_with(node, flat)
    return True


def is_transposed(producer: Node) -> bool:
    """Returns whether `producer` is a transposed convolution, whose weight has the output channels in dimension 1."""
    return layer_kind(producer) is LayerKind.TRANSPOSED


def scale_for_weight(scale: torch.Tensor, weight: torch.Tensor, *, transposed: bool) -> torch.Tensor:
    """Returns the scale of each output channel in a shape that broadcasts to the weight."""
    kernel = [1] * (weight.dim() - 2)
    if not transposed:
        return scale.reshape(-1, 1, *kernel)
    inputs, outputs = weight.shape[:2]  # of all groups, of one group
    groups = scale.numel() // outputs
    return scale.reshape(groups, outputs).repeat_interleave(inputs // groups, 0).reshape(inputs, outputs, *kernel)


def _constant_affine(module: GraphModule, node: Node) -> ChannelAffine | None:
    args = arguments(node)
    mean, variance = constant_of(module, args["running_mean"]), constant_of(module, args["running_var"])
    weight, bias = constant_of(module, args["weight"]), constant_of(module, args["bias"])
    computes_weight, computes_bias = (
        args[name] is not None and value is None for name, value in (("weight", weight), ("bias", bias))
    )
    if mean is None or variance is None or computes_weight or computes_bias:
        return None
    return affine(mean, variance, weight, bias, args["eps"])


def _fold_into_producer(module: GraphModule, node: Node, scale_and_shift: ChannelAffine, *, training: bool) -> None:
    layer = constant_layer(module, node.args[0])
    assert layer is not None  # takes_batch_norm holds
    weight, bias = scale_and_shift.folded(layer.node, layer.weight, layer.bias)
    layer.replace(weight=weight, bias=bias, trainable=training)
    node.replace_all_uses_with(layer.node)
    module.graph.erase_node(node)


def _replace_by_arithmetic(module: GraphModule, node: Node, scale_and_shift: ChannelAffine, *, training: bool) -> None:
    per_channel = (1, -1, *[1] * (len(shape_of(node)) - 2))
    value = first_operand(node)
    for role, write in (("scale", mul), ("shift", add)):
        operand = getattr(scale_and_shift, role).reshape(per_channel)
        constant = insert_constant(module, node, operand, role, trainable=training)
        value = write(_Replacement(node, node), value, constant)
    node.replace_all_uses_with(value)
    module.graph.erase_node(node)


class _Replacement(NodeBuilder):
    """Inserts calls that replace `origin`, and notes the name of the replaced operator on each."""

    def call(self, target: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Node:
        """Inserts a call of `target`."""
        written = super().call(target, *args, **kwargs)
        note_replaced(written, op_name(self.origin))
        return written
