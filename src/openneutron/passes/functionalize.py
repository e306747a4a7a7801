"""Replaces in-place operators by operators that return a new value (functionalization)."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node, map_arg

from openneutron.core.constants import insert_constant
from openneutron.core.evaluation import infer_meta
from openneutron.core.fx import arguments, is_state_write, note_replaced, op_name, shape_of
from openneutron.ops.declared import is_op
from openneutron.ops.graph_builder import MASKED_FILL, NodeBuilder, convert, expand, reshape, zeros_like
from openneutron.passes.write_back import can_be_written_back, write_back

__all__ = ["functionalize", "may_alias", "writes_memory"]

# Operators of Python's augmented assignments, such as |=. The names of all others end with "_".
_OUT_OF_PLACE = {
    "__iand__": "bitwise_and",
    "__ior__": "bitwise_or",
    "__ixor__": "bitwise_xor",
    "__ilshift__": "__lshift__",
    "__irshift__": "__rshift__",
}


def functionalize(module: GraphModule) -> bool:
    """Replaces in-place operators. Rules, linear in nodes and uses:

    1. An in-place operator (relu_) becomes its out-of-place form (relu), and later readers of the written value read
       the result. A copy_ becomes its source, a fill_ a constant.
    2. If it writes to a view (a slice, a reshape, a transpose), its result is written into a new base tensor. Later
       readers of that memory read the new base, through new views.
    3. An in-place operator is kept if it stores a state, or if it writes to a buffer, to a part of an input, or to a
       view in which elements occur several times (expand, overlapping windows of unfold).
    """
    if not any(writes_memory(node) for node in module.graph.nodes):
        return False
    functionalizer = _Functionalizer({node: index for index, node in enumerate(module.graph.nodes)})
    for node in list(module.graph.nodes):
        functionalizer.visit(node)
    for node in reversed(functionalizer.dead):
        module.graph.erase_node(node)
    return functionalizer.changed


def writes_memory(node: Node) -> bool:
    """Returns whether `node` is an operator that changes one of its arguments."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def may_alias(node: Node) -> bool:
    """Returns whether the output of `node` may share the memory of its first argument.

    A dropout may return its input, and an unsafe_split returns parts of it, although their schemas declare no alias.
    """
    taken = node.target._schema.arguments[:1] if isinstance(node.target, torch._ops.OpOverload) else []
    aliases = any(argument.alias_info is not None for argument in taken)
    return aliases or node.target is operator.getitem or is_op(node, "dropout", "split")


@dataclass
class _Functionalizer:
    """Visits the nodes of a graph in order.

    A place is a node that allocates memory, or a view of memory. Nodes that return the same values in the same memory
    (contiguous, detach, an in-place operator) are one place. `place` maps each node to its place, `source` each view to
    the place that it views, and `memory` each place to its base, the node that allocates the memory.

    `writes` counts the writes to each base. `current` maps each place to a count of writes and to the node with the
    values of the place after that many writes. A write updates `current` of the written view, of the base, and of the
    views between them. All other places of that memory become stale: `_current_value` recomputes them from the base.
    """

    position: dict[Node, int]
    place: dict[Node, Node] = field(default_factory=dict)
    source: dict[Node, Node] = field(default_factory=dict)
    memory: dict[Node, Node] = field(default_factory=dict)
    views: dict[Node, list[Node]] = field(default_factory=dict)
    writes: dict[Node, int] = field(default_factory=dict)
    current: dict[Node, tuple[int, Node]] = field(default_factory=dict)
    dead: list[Node] = field(default_factory=list)
    changed: bool = False

    def visit(self, node: Node) -> None:
        """Replaces the operands of `node` by their current values, and records the write of `node`."""
        first = node.args[0] if node.args else None
        target = _out_of_place_form(node)
        if target is not None and isinstance(first, Node) and self._is_writable(self.place[first], node):
            self._record_write(node, self.place[first], target)
            return
        node.args, node.kwargs = map_arg((node.args, node.kwargs), lambda read: self._current_value(read, node))
        if isinstance(first, Node) and may_alias(node) and (writes_memory(node) or _shares_memory(node)):
            self._add_view(node, self.place[first])
        else:
            self._add_place(node)
            self.memory[node] = node
            self.writes[node] = 0

    def _add_place(self, node: Node) -> None:
        self.place[node] = node
        self.current[node] = (0, node)

    def _add_view(self, node: Node, source: Node) -> None:
        memory = self.memory[source]
        if writes_memory(node) or _is_identity_view(node, source):
            self.place[node] = source
            return
        self._add_place(node)
        self.source[node], self.memory[node] = source, memory
        self.current[node] = (self.writes[memory], node)
        self.views.setdefault(memory, []).append(node)

    def _current_value(self, read: Node, before: Node) -> Node:
        """Returns the node that has the current values of the place that `read` reads."""
        place = self.place[read]
        count, node = self.current[place]
        now = self.writes[self.memory[place]]
        if count != now:
            source = self._current_value(self.source[place], before)
            with before.graph.inserting_before(before):
                node = before.graph.node_copy(place, lambda other: source if other is place.args[0] else other)
            node.args = (source, *node.args[1:])
            self.current[place] = (now, node)
        return node

    def _is_writable(self, place: Node, writer: Node) -> bool:
        memory = self.memory[place]
        if memory.op == "get_attr" or not all(can_be_written_back(view) for view in self._views_to_base(place)[:-1]):
            return False
        if memory.op != "placeholder":
            return True
        later = any(self.position[user] > self.position[writer] for view in self.views.get(memory, ())
                    for user in view.users if user in self.position)  # fmt: skip
        return place is memory and not later

    def _views_to_base(self, place: Node) -> list[Node]:
        """Returns the places from `place` to its base. The lists of tensors that splits return are skipped."""
        views = [place]
        while views[-1] in self.source:
            source = self.source[views[-1]]
            views.append(self.source[source] if views[-1].target is operator.getitem else source)
        return views

    def _record_write(self, node: Node, place: Node, target: torch._ops.OpOverload) -> None:
        views = self._views_to_base(place)
        nodes = [self._current_value(each, node) for each in views]
        args, kwargs = map_arg((node.args, node.kwargs), lambda read: self._current_value(read, node))
        note_replaced(node, op_name(node))
        value = _value_after_write(node, nodes[0], target, args, kwargs)
        memory, following = views[-1], node.next
        self.writes[memory] += 1
        self.current[place] = (self.writes[memory], value)
        for view, source, before in zip(views, views[1:], nodes[1:], strict=False):
            value = write_back(view, before, value, NodeBuilder(following, node))
            self.current[source] = (self.writes[memory], value)
        self.place[node] = place
        self.changed = True
        if node.target is not target:
            self.dead.append(node)


def _value_after_write(
    node: Node, place: Node, target: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Node:
    """Returns the new value of `place` after the in-place operator `node`, whose out-of-place form is `target`."""
    if is_op(node, "copy_", "fill_") and isinstance(args[1], Node):
        return _expand_like(args[1], place, NodeBuilder(node, node))
    if is_op(node, "fill_diagonal_"):
        return _fill_diagonal(node, place)
    if is_op(node, "zero_"):
        return zeros_like(NodeBuilder(node, node), place)
    node.target, node.args, node.kwargs = target, args, kwargs
    return _cast_to_dtype_of(place, node)


def _cast_to_dtype_of(place: Node, written: Node) -> Node:
    """Returns `written` in the dtype of `place`. A comparison in place (gt_) writes ones and zeros to floats."""
    dtype, value = place.meta["val"].dtype, infer_meta(written)
    if not isinstance(value, torch.Tensor) or value.dtype == dtype:
        return written
    written.meta["val"] = value
    return convert(NodeBuilder(written.next, written), written, dtype)


def _fill_diagonal(node: Node, place: Node) -> Node:
    args, module = arguments(node), node.graph.owning_module
    assert module is not None
    on_diagonal = torch.zeros(shape_of(place)).fill_diagonal_(1.0, args["wrap"]) == 1
    mask = insert_constant(module, node, on_diagonal, "diagonal")
    return NodeBuilder(node, node).call(MASKED_FILL, place, mask, args["fill_value"])


def _expand_like(value: Node, place: Node, builder: NodeBuilder) -> Node:
    """Returns `value` in the dtype and shape of `place`."""
    if value.meta["val"].dtype != place.meta["val"].dtype:
        value = convert(builder, value, place.meta["val"].dtype)
    shape = shape_of(place)
    if len(shape_of(value)) > len(shape):  # by leading dimensions of size 1
        value = reshape(builder, value, shape_of(value)[-len(shape) :] if shape else ())
    return expand(builder, value, shape)


def _shares_memory(node: Node) -> bool:
    """Returns whether the output of `node` shares the memory of its first argument, or True if that is unknown."""
    read = [source.meta.get("val") for source in node.all_input_nodes]
    if node.target is operator.getitem or any(value is None for value in read) or not isinstance(read[0], torch.Tensor):
        return True
    result = infer_meta(node)
    storages = [value.untyped_storage()._cdata for value in (result if isinstance(result, (list, tuple)) else [result])]
    return read[0].untyped_storage()._cdata in storages


def _is_identity_view(node: Node, source: Node) -> bool:
    """Returns whether a view has the dtype, shape and strides of its source.

    The view is computed, because `remove_stride_dependence` replaces the strides in the metadata by those of contiguous
    tensors.
    """
    other = source.meta.get("val")
    if not isinstance(other, torch.Tensor) or any(read.meta.get("val") is None for read in node.all_input_nodes):
        return False
    value = infer_meta(node)
    if not isinstance(value, torch.Tensor):
        return False
    return (value.dtype, value.shape, value.stride()) == (other.dtype, other.shape, other.stride())


def _out_of_place_form(node: Node) -> torch._ops.OpOverload | None:
    """Returns the out-of-place overload of an in-place ATen operator with the same argument types, or None."""
    overload = node.target
    if not isinstance(overload, torch._ops.OpOverload) or overload.namespace != "aten" or is_state_write(node):
        return None
    if is_op(node, "fill_diagonal_") and all(isinstance(size, int) for size in shape_of(node)):
        return MASKED_FILL
    name = overload._schema.name.removeprefix("aten::")
    if not name.endswith("_") or not overload._schema.is_mutable:
        return None
    packet = getattr(torch.ops.aten, _OUT_OF_PLACE.get(name, name.removesuffix("_")), None)
    overloads = [getattr(packet, overload_name) for overload_name in packet.overloads()] if packet else []
    return next((other for other in overloads if _argument_types(other) == _argument_types(overload)), None)


def _argument_types(overload: torch._ops.OpOverload) -> list[str]:
    return [str(argument.type) for argument in overload._schema.arguments]
