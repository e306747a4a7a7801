"""Activations move to where the operator in front can fuse them."""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import GraphModule, Node

from openneutron.core.fx import iterate_nodes
from openneutron.ops.declared import is_op
from openneutron.ops.fusion import activation_name, takes_activation
from openneutron.targets import NeutronTarget

__all__ = ["move_activations"]

# One activation behind the concatenation becomes so many in front of it at most.
_MAX_LEFT = 1


def move_activations(
    module: GraphModule, target: NeutronTarget, keeps_float: Callable[[Node], bool] = lambda _: False
) -> bool:
    """Rules, linear in nodes and uses:

    1. An activation that alone reads a concatenation is applied to each of its inputs instead, where it becomes part of
       the operators that compute them: those that the concatenation alone reads and that fuse it on `target`.
    2. An input that the same activation wrote stays as it is.
    3. Where it would not become part of two inputs or more, it stays: that would be more operators than before.

    Inputs that may be negative no longer share the scale of what is only kept where it is positive. An activation that
    is to stay in float is not moved.
    """
    changed = False
    pending = list(module.graph.nodes)
    while pending:
        node = pending.pop()
        concatenation = node.args[0] if node.args else None
        if isinstance(concatenation, Node) and _is_moved(node, concatenation, target) and not keeps_float(node):
            pending.extend(_moved(node, concatenation))
            changed = True
    if changed:
        module.recompile()
    return changed


def _is_moved(node: Node, concatenation: Node, target: NeutronTarget) -> bool:
    if activation_name(node) not in target.fused_activations:
        return False
    if not is_op(concatenation, "cat") or len(concatenation.users) != 1:
        return False
    inputs = dict.fromkeys(iterate_nodes(concatenation.args))
    left = [value for value in inputs if not takes_activation(value) and not _is_same(value, node)]
    return not left or (len(left) <= _MAX_LEFT and any(map(takes_activation, inputs)))


def _is_same(value: Node, activation: Node) -> bool:
    return (value.target, value.args[1:], value.kwargs) == (activation.target, activation.args[1:], activation.kwargs)


def _moved(activation: Node, concatenation: Node) -> list[Node]:
    """Apply `activation` to each input of the concatenation instead; returns the new activations."""
    target, (_, *rest), options = activation.target, activation.args, activation.kwargs
    written = []
    for value in dict.fromkeys(iterate_nodes(concatenation.args)):
        if _is_same(value, activation):
            continue
        with activation.graph.inserting_after(value):
            moved = activation.graph.create_node("call_function", target, (value, *rest), options)
        moved.meta = {**activation.meta, "val": value.meta["val"]}
        concatenation.replace_input_with(value, moved)
        written.append(moved)
    activation.replace_all_uses_with(concatenation)
    activation.graph.erase_node(activation)
    return written
