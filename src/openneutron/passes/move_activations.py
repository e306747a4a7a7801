"""Moves activations before a concatenation, where the producers of its inputs can fuse them."""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import GraphModule, Node

from openneutron.core.fx import iterate_nodes
from openneutron.ops.declared import is_op
from openneutron.ops.fusion import activation_name, takes_activation
from openneutron.targets import NeutronTarget

__all__ = ["move_activations"]

# An activation is moved if at most this many inputs of the concatenation have a producer that cannot fuse it.
_MAX_LEFT = 1


def move_activations(
    module: GraphModule, target: NeutronTarget, keeps_float: Callable[[Node], bool] = lambda _: False
) -> bool:
    """Moves activations. Rules, linear in nodes and uses:

    1. An activation that is the only reader of a concatenation is applied to each input of the concatenation instead.
       An input can fuse the activation if its producer can on `target` and the input has no other reader.
    2. An input that already is the result of the same activation is not changed.
    3. If two or more inputs cannot fuse the activation, it is not moved, because the graph would get more operators. If
       one cannot, the activation is moved if at least one other input can.

    After the move, the scale of the concatenation does not need to cover values that the activation clips. An
    activation for which `keeps_float` is true is not moved.
    """
    changed = False
    pending = list(module.graph.nodes)
    while pending:
        node = pending.pop()
        concatenation = node.args[0] if node.args else None
        if isinstance(concatenation, Node) and _can_move(node, concatenation, target) and not keeps_float(node):
            pending.extend(_apply_to_inputs(node, concatenation))
            changed = True
    if changed:
        module.recompile()
    return changed


def _can_move(node: Node, concatenation: Node, target: NeutronTarget) -> bool:
    if activation_name(node) not in target.fused_activations:
        return False
    if not is_op(concatenation, "cat") or len(concatenation.users) != 1:
        return False
    inputs = dict.fromkeys(iterate_nodes(concatenation.args))
    left = [value for value in inputs if not takes_activation(value) and not _is_same_activation(value, node)]
    return not left or (len(left) <= _MAX_LEFT and any(map(takes_activation, inputs)))


def _is_same_activation(value: Node, activation: Node) -> bool:
    return (value.target, value.args[1:], value.kwargs) == (activation.target, activation.args[1:], activation.kwargs)


def _apply_to_inputs(activation: Node, concatenation: Node) -> list[Node]:
    """Applies `activation` to each input of the concatenation, and returns the new activations."""
    target, (_, *rest), options = activation.target, activation.args, activation.kwargs
    written = []
    for value in dict.fromkeys(iterate_nodes(concatenation.args)):
        if _is_same_activation(value, activation):
            continue
        with activation.graph.inserting_after(value):
            moved = activation.graph.create_node("call_function", target, (value, *rest), options)
        moved.meta = {**activation.meta, "val": value.meta["val"]}
        concatenation.replace_input_with(value, moved)
        written.append(moved)
    activation.replace_all_uses_with(concatenation)
    activation.graph.erase_node(activation)
    return written
