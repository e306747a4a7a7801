"""In-place operators become ordinary ones."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from openneutron.fx import note_replaced, op_name, shape_of
from openneutron.state import is_state_write

__all__ = ["functionalize", "may_alias", "writes_memory"]

aten = torch.ops.aten

# Their output may be their input itself, though their schema does not say so.
_MAY_RETURN_THEIR_INPUT = {"getitem", "aten.dropout.default", "aten.feature_dropout.default"}


def functionalize(module: GraphModule) -> bool:
    """Rules, linear in nodes and uses:

    1. An in-place operator (relu_) becomes the ordinary one (relu), and later readers of the value it wrote read its
       result.
    2. It stays where another value in the same memory (a view) is read later, or where it writes to a buffer of the
       module. What stores a state stays, too.
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
            if target is aten.copy.default:
                _write_as_clone(node)
            memory[node] = node
            changed = True
        else:
            memory[node] = memory[written] if isinstance(written, Node) and may_alias(node) else node
        sharing.setdefault(memory[node], []).append(node)
    return changed


def writes_memory(node: Node) -> bool:
    """Whether `node` is an operator that changes one of its arguments."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _may_be_replaced(node: Node, sharing: list[Node], position: dict[Node, int]) -> bool:
    others = [value for value in sharing if value is not node.args[0]]
    read_later = any(position[user] > position[node] for value in others for user in value.users)
    return not read_later and sharing[0].op != "get_attr"


def _write_as_clone(copy: Node) -> None:
    """Write a whole value that is overwritten by another as a copy of that one, in its shape and dtype."""
    written, value = copy.args[:2]
    assert isinstance(written, Node)
    if not isinstance(value, Node):
        return
    with copy.graph.inserting_before(copy):
        if value.meta["val"].dtype != written.meta["val"].dtype:
            value = _call(aten.to.dtype, value, written.meta["val"].dtype)
        if shape_of(value) != shape_of(written):
            value = _call(aten.expand.default, value, list(shape_of(written)))
    copy.target, copy.args, copy.kwargs = aten.clone.default, (value,), {}


def _call(target: torch._ops.OpOverload, value: Node, argument: Any) -> Node:
    call = value.graph.call_function(target, (value, argument))
    call.meta = {**value.meta, "val": target(value.meta["val"], argument)}
    return call


def may_alias(node: Node) -> bool:
    """Whether the output of `node` may be memory of its first argument."""
    taken = node.target._schema.arguments[:1] if isinstance(node.target, torch._ops.OpOverload) else []
    aliases = any(argument.alias_info is not None for argument in taken)
    return aliases or op_name(node) in _MAY_RETURN_THEIR_INPUT


def _ordinary_form(node: Node) -> torch._ops.OpOverload | None:
    """The out-of-place overload of an in-place ATen operator: the one of equal types, whatever its names are."""
    overload = node.target
    if not isinstance(overload, torch._ops.OpOverload) or overload.namespace != "aten" or is_state_write(node):
        return None
    name = overload._schema.name.removeprefix("aten::")
    if not name.endswith("_") or not overload._schema.is_mutable:
        return None
    packet = getattr(torch.ops.aten, name.removesuffix("_"), None)
    overloads = [getattr(packet, overload_name) for overload_name in packet.overloads()] if packet else []
    return next((other for other in overloads if _types(other) == _types(overload)), None)


def _types(overload: torch._ops.OpOverload) -> list[str]:
    return [str(argument.type) for argument in overload._schema.arguments]
