"""Folds the weight and bias of a normalization into the linears that read it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx import GraphModule, Node

from openneutron.core.constants import constant_of, insert_constant
from openneutron.core.fx import arguments, finish_rewrite, shape_of
from openneutron.ops.declared import is_op
from openneutron.ops.shapes import permutation

__all__ = ["fold_norm_affine"]


def fold_norm_affine(module: GraphModule) -> bool:
    """Rule: the weight and bias of a layer_norm or rms_norm over the last dimension are folded into its readers, if all
    are linears.

    The linears read the norm directly, or through transposes and reshapes that keep the last dimension. They get new
    weights and biases, so other readers of the old ones are not affected. Linear in nodes, uses and weights.

    The pass saves two operators and improves int8 resolution. Without weight and bias, the output of the norm has about
    the same range in all channels. With them it does not, and the weights of the linears often compensate that
    (`tests/passes/test_arithmetic_passes.py` has the figures).
    """
    changed = False
    for node in list(module.graph.nodes):
        if is_op(node, "layer_norm", "rms_norm") and len(arguments(node)["normalized_shape"]) == 1:
            changed |= _fold_affine(module, node)
    return finish_rewrite(module, changed=changed)


def _fold_affine(module: GraphModule, norm: Node) -> bool:
    args = arguments(norm)
    scale, shift = (constant_of(module, args.get(name)) for name in ("weight", "bias"))
    if (scale is None) != (args["weight"] is None) or (shift is None) != (args.get("bias") is None):
        return False
    readers = list(_readers_through_views(norm))
    if not readers or (scale is None and shift is None):
        return False
    if not all(_is_constant_linear(module, value, reader) for value, reader in readers):
        return False
    for _, linear in readers:
        _scale_linear(module, linear, scale, shift)
    without = {"weight": None, "bias": None}
    norm.args = tuple(args[name] if name not in without else None for name in args)
    norm.kwargs = {}
    return True


def _readers_through_views(value: Node) -> Iterator[tuple[Node, Node]]:
    """Returns pairs (operand, reader): the readers of `value`, and the operand that each of them reads.

    The operand is `value`, or a reshape or permute of `value` that keeps the last dimension.
    """
    for user in value.users:
        if _keeps_last_dimension(user):
            yield from _readers_through_views(user)
        else:
            yield value, user


def _keeps_last_dimension(node: Node) -> bool:
    if is_op(node, "reshape"):
        return shape_of(node)[-1:] == shape_of(arguments(node)["self"])[-1:]
    return is_op(node, "permute") and permutation(node)[-1] == len(shape_of(node)) - 1


def _is_constant_linear(module: GraphModule, value: Node, node: Node) -> bool:
    """Returns whether `node` is a linear of `value` with a constant weight of rank 2 and a constant bias, if any."""
    args = arguments(node)
    if not is_op(node, "linear") or args["input"] is not value:
        return False
    weight, bias = constant_of(module, args["weight"]), constant_of(module, args["bias"])
    return weight is not None and weight.dim() == 2 and (bias is None) == (args["bias"] is None)


def _scale_linear(module: GraphModule, linear: Node, scale: torch.Tensor | None, shift: torch.Tensor | None) -> None:
    """Folds scale and shift into a linear: W (scale * x + shift) + b = (W scale) x + (W shift + b)."""
    args = arguments(linear)
    weight, bias = constant_of(module, args["weight"]), constant_of(module, args["bias"])
    assert weight is not None
    if shift is not None:
        bias = weight @ shift if bias is None else weight @ shift + bias
    weight = weight if scale is None else weight * scale
    constants = [insert_constant(module, linear, weight, "weight")]
    constants += [] if bias is None else [insert_constant(module, linear, bias, "bias")]
    linear.args, linear.kwargs = (args["input"], *constants), {}
