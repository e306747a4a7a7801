"""In-place operators become ordinary ones."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from openneutron.fx import note_replaced, op_name

__all__ = ["functionalize", "writes_memory"]

# Their output may be their input itself, though their schema does not say so.
_MAY_RETURN_THEIR_INPUT = {"getitem", "aten.dropout.default", "aten.feature_dropout.default"}


def functionalize(module: GraphModule) -> bool:
    """Rules, linear in nodes and uses:

    1. An in-place operator (relu_) becomes the ordinary one (relu), and later readers of the value it wrote read its
       result.
    2. It stays where another value in the same memory (a view) is read later, or where it writes to a buffer of the
       module.
    """
    position = {node: index for index, node in enumerate(module.graph.nodes)}
    memory: dict[Node, Node] = {}
    sharing: dict[Node, list[Node]] = {}
    changed = False
    for node in list(module.graph.nodes):
        written = node.args[0] if node.args else None
        target = _ordinary_form(node)
        shared = sharing[memory[written]] if isinstance(written, Node) else []
        if target is not None and isinstance(written, Node) and _may_be_replaced(node, shared, position):
            for user in [user for user in written.users if position[user] > position[node]]:
                user.replace_input_with(written, node)
            note_replaced(node, op_name(node))
            node.target = target
            memory[node] = node
            changed = True
        else:
            memory[node] = memory[written] if isinstance(written, Node) and _may_alias(node) else node
        sharing.setdefault(memory[node], []).append(node)
    return changed


def writes_memory(node: Node) -> bool:
    """Whether `node` is an operator that changes one of its arguments."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _may_be_replaced(node: Node, sharing: list[Node], position: dict[Node, int]) -> bool:
    others = [value for value in sharing if value is not node.args[0]]
    read_later = any(position[user] > position[node] for value in others for user in value.users)
    return not read_later and sharing[0].op != "get_attr"


def _may_alias(node: Node) -> bool:
    """Whether the output of `node` may be memory of its first argument."""
    taken = node.target._schema.arguments[:1] if isinstance(node.target, torch._ops.OpOverload) else []
    aliases = any(argument.alias_info is not None for argument in taken)
    return aliases or op_name(node) in _MAY_RETURN_THEIR_INPUT


def _ordinary_form(node: Node) -> torch._ops.OpOverload | None:
    """The out-of-place overload of an in-place ATen operator: the one of equal types, whatever its names are."""
    overload = node.target
    if not isinstance(overload, torch._ops.OpOverload) or overload.namespace != "aten":
        return None
    name = overload._schema.name.removeprefix("aten::")
    if not name.endswith("_") or not overload._schema.is_mutable:
        return None
    packet = getattr(torch.ops.aten, name.removesuffix("_"), None)
    overloads = [getattr(packet, overload_name) for overload_name in packet.overloads()] if packet else []
    return next((other for other in overloads if _types(other) == _types(overload)), None)


def _types(overload: torch._ops.OpOverload) -> list[str]:
    return [str(argument.type) for argument in overload._schema.arguments]
