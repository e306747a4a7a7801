"""Moves the scaling of attention scores before the mask, so that the mask's numbers do not widen the range.

In `scores.masked_fill(mask, -1e4) / 8`, the masked value -1250 would set the range of the quotient, so few int8 codes
would remain for the scores. `(scores / 8).masked_fill(mask, -1250)` computes the same function, and observers ignore
the number of a masked_fill.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.fx import GraphModule, Node

from openneutron.core.constants import attribute, constant_value, insert_constant, number_of
from openneutron.core.fx import arguments, finish_rewrite, first_operand, set_argument, shape_of
from openneutron.ops.declared import is_op, is_view, overload_of
from openneutron.ops.functions import is_quotient
from openneutron.ops.graph_builder import NodeBuilder, mul
from openneutron.ops.masks import HIDDEN_AT_RUN_TIME, only_softmax_reads

__all__ = ["scale_before_masks"]


def scale_before_masks(
    module: GraphModule, keeps_float: Callable[[Node], bool] = lambda _: False, *, training: bool = False
) -> bool:
    """Moves scalings. Rules, linear in nodes, for a product with a positive number k that only softmaxes read. A
    quotient by a positive number counts as such a product:

    1. masked_fill(x, mask, c) * k becomes masked_fill(x * k, mask, c * k), if c * k hides a value from a softmax.
    2. where(mask, x, c) * k and where(mask, c, x) * k are rewritten in the same way.
    3. (x + mask) * k becomes x * k + mask * k, if the mask has fewer values than the sum, or is a constant with a
       number that hides a value.

    Views between the mask and the scaling are not moved. A mask with another reader is not changed, nor is an operator
    for which `keeps_float` is true. With `training`, a factor that is a trained parameter is not moved.
    """
    changed = False
    for node in list(module.graph.nodes):
        factor = _positive_factor(module, node, training=training)
        mask = _mask_of(node) if factor is not None and only_softmax_reads(node) else None
        if factor is None or mask is None or keeps_float(node) or keeps_float(mask):
            continue
        changed |= _move_scaling(module, node, mask, factor)
    return finish_rewrite(module, changed=changed)


def _positive_factor(module: GraphModule, node: Node, *, training: bool) -> float | None:
    """Returns the positive, finite number by which `node` multiplies its first argument, or None."""
    if not (is_op(node, "mul") or is_quotient(node)) or len(node.args) != 2 or node.kwargs:
        return None
    if training and _is_trained(module, node.args[1]):
        return None
    number = number_of(node.args[1])
    if number is None or not 0 < number < math.inf:
        return None
    return number if is_op(node, "mul") else 1 / number


def _is_trained(module: GraphModule, value: object) -> bool:
    if not isinstance(value, Node) or value.op != "get_attr":
        return False
    return bool(attribute(module, str(value.target)).requires_grad)


def _mask_of(scaling: Node) -> Node | None:
    """Returns the masking operator that `scaling` reads, directly or through views, if no other operator reads them."""
    value = scaling.args[0]
    while isinstance(value, Node) and len(value.users) == 1:
        if not is_view(value):
            return value if is_op(value, "masked_fill", "where", "add") else None
        value = value.args[0]
    return None


def _move_scaling(module: GraphModule, scaling: Node, mask: Node, factor: float) -> bool:
    """Scales the input of `mask` instead of its output, and returns whether a rule holds."""
    scaled = _scaled_arguments(mask, factor)
    if scaled is None:
        return False
    for name, constant in scaled.items():
        value = arguments(mask)[name]
        if constant is None:
            set_argument(mask, name, _insert_product(scaling, mask, value, factor))
        elif isinstance(constant, torch.Tensor) and isinstance(value, Node):
            set_argument(mask, name, insert_constant(module, mask, constant, "scaled"))
        else:
            set_argument(mask, name, float(constant))
    if is_op(mask, "masked_fill") and isinstance(scaled["value"], float):
        mask.target = overload_of("masked_fill")  # the one that takes a number
    source = first_operand(scaling)
    scaling.replace_all_uses_with(source)
    module.graph.erase_node(scaling)
    return True


def _scaled_arguments(mask: Node, factor: float) -> dict[str, float | torch.Tensor | None] | None:
    """Returns the arguments of `mask` to multiply by `factor`, by name; None if no rule holds.

    The value of a constant argument is the product. The value of a computed argument is None: `_move_scaling` inserts
    the product.
    """
    args = arguments(mask)
    if is_op(mask, "masked_fill"):
        number = number_of(args["value"])
        hides = number is not None and number * factor <= HIDDEN_AT_RUN_TIME
        return {"self": None, "value": None if number is None else number * factor} if hides else None
    constants = {name: _constant(args[name]) for name in ("self", "other")}
    known = {name: value * factor for name, value in constants.items() if value is not None}
    if is_op(mask, "where"):
        if len(known) != 1 or bool((next(iter(known.values())) > HIDDEN_AT_RUN_TIME).any()):
            return None
    elif args.get("alpha", 1) != 1 or len(known) == 2 or not _adds_a_mask(mask, known):
        return None
    return {name: known.get(name) for name in ("self", "other")}


def _constant(value: object) -> torch.Tensor | None:
    return torch.tensor(float(value)) if isinstance(value, (int, float)) else constant_value(value)


def _adds_a_mask(node: Node, known: dict[str, torch.Tensor]) -> bool:
    if known:
        return bool((next(iter(known.values())) <= HIDDEN_AT_RUN_TIME).any())
    operands = node.all_input_nodes
    are_floats = all(value.meta["val"].dtype is torch.float32 for value in operands)
    return are_floats and any(math.prod(shape_of(value)) < math.prod(shape_of(node)) for value in operands)


def _insert_product(scaling: Node, mask: Node, value: Node, factor: float) -> Node:
    """Inserts `value` times `factor` before `mask`, and returns it.

    `factor` is a number, because the constant operand of `scaling` may be defined after `mask`.
    """
    return mul(NodeBuilder(mask, scaling), value, factor)
