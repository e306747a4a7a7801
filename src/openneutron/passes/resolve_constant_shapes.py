"""Computes shapes that depend on constants alone, but are unknown to torch.export, such as that of `x[:, mask]`."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import has_free_unbacked_symbols
from torch.utils._pytree import tree_leaves

from openneutron.core.boundary import error_at
from openneutron.core.constants import constant_of, insert_constant
from openneutron.core.evaluation import compute_from, infer_meta
from openneutron.core.fx import arguments, finish_rewrite, is_pure, op_name, shape_of
from openneutron.ops.declared import is_op
from openneutron.ops.graph_builder import NodeBuilder, expand, replace_with_index
from openneutron.ops.sizes_from_tensors import SIZED_BY_TENSORS, SizedByTensor
from openneutron.passes.functionalize import may_alias, writes_memory

__all__ = ["resolve_constant_shapes"]


def resolve_constant_shapes(module: GraphModule) -> bool:
    """Computes unknown shapes and numbers. Rules, linear in nodes and uses:

    1. An operator on constants becomes a constant if its shape is unknown, as the shape of nonzero is.
    2. A selection by a constant mask (x[:, mask], masked_select) becomes a selection by the indices of the true values.
    3. The shapes of all later operators are computed again. A number that is then known replaces its node.
    4. An operator that takes sizes from a constant tensor (`ops/sizes_from_tensors.py`) takes numbers instead.

    A buffer that the model writes to does not count as a constant. A graph without unknown shapes, and without
    operators of rule 4, is not changed. Raises `ModelError` for an operator of rule 4 whose sizes are computed.
    """
    if not any(_is_symbolic(node.meta.get("val")) or op_name(node) in SIZED_BY_TENSORS for node in module.graph.nodes):
        return False
    return _ShapeResolver(module, _written_buffers(module)).run()


def _is_symbolic(value: object) -> bool:
    """Whether the shape of a tensor, or a number, is a symbol that stands for a value computed at run time.

    `value` is a tensor, a number, or a list of these.
    """
    numbers = [
        number
        for leaf in tree_leaves(value)
        for number in (leaf.shape if isinstance(leaf, torch.Tensor) else [leaf])
        if isinstance(number, (torch.SymInt, torch.SymFloat, torch.SymBool))
    ]
    return any(has_free_unbacked_symbols(number) or not number.node.expr.free_symbols for number in numbers)


def _written_buffers(module: GraphModule) -> set[Node]:
    """Returns the buffers that an in-place operator writes to, directly or through views."""
    found: set[Node] = set()
    for node in module.graph.nodes:
        place = node.args[0] if writes_memory(node) and node.args else None
        while isinstance(place, Node) and place.op == "call_function" and may_alias(place):
            place = place.args[0]
        if isinstance(place, Node):
            found.add(place)
    return found


class _ShapeResolver:
    """Visits the nodes of one graph in order."""

    def __init__(self, module: GraphModule, written: set[Node]) -> None:
        self._module, self._written = module, written
        self._constant: set[Node] = set()
        self._values: dict[Node, Any] = {}
        self._changed = False

    def run(self) -> bool:
        """Changes the graph, and returns whether anything changed."""
        for node in list(self._module.graph.nodes):
            self._visit(node)
        return finish_rewrite(self._module, changed=self._changed)

    def _visit(self, node: Node) -> None:
        if node not in self._written and constant_of(self._module, node) is not None:
            self._constant.add(node)
        if node.op != "call_function":
            return
        if is_op(node, "assertion of a number") and node.args[0] is True:
            self._erase(node)
            return
        computes = is_pure(node) or node.target is operator.getitem
        if computes and self._constant.issuperset(node.all_input_nodes):
            self._constant.add(node)
            if _is_symbolic(node.meta.get("val")) and not isinstance(node.meta["val"], (list, tuple)):
                self._replace_by_constant(node)
            return
        if (sized := SIZED_BY_TENSORS.get(op_name(node))) is not None:
            self._take_sizes_as_numbers(node, sized)
        if is_op(node, "selection by truth values") and _is_symbolic(node.meta["val"]):
            self._select_by_indices(node)
        if _is_symbolic(node.meta.get("val")):
            self._recompute_metadata(node)

    def _replace_by_constant(self, node: Node) -> None:
        value = compute_from(self._values, self._module, node)
        if isinstance(value, torch.Tensor):
            constant = insert_constant(self._module, node, value, "constant")
            self._constant.add(constant)
            value = constant
        node.replace_all_uses_with(value)
        self._erase(node)

    def _select_by_indices(self, node: Node) -> None:
        """Applies rule 2 if all masks are constants."""
        args = arguments(node)
        value, masks = args["self"], [args["mask"]] if "mask" in args else list(args["indices"])
        if not all(mask in self._constant for mask in masks if isinstance(mask, Node) and _is_mask(mask)):
            return
        if "mask" in args:
            shape = torch.broadcast_shapes(shape_of(value), shape_of(args["mask"]))
            value = expand(NodeBuilder(node, node), value, shape)
        indices: list[Node | None] = []
        for mask in masks:
            if not isinstance(mask, Node) or not _is_mask(mask):
                indices.append(mask)
                continue
            truths = compute_from(self._values, self._module, mask).bool()
            truths = truths.expand(shape_of(value)) if "mask" in args else truths
            true = truths.nonzero(as_tuple=True)
            indices += [insert_constant(self._module, node, each, "indices") for each in true]
        replace_with_index(node, value, indices)
        self._changed = True

    def _take_sizes_as_numbers(self, node: Node, sized: SizedByTensor) -> None:
        """Applies rule 4."""
        sizes = arguments(node)[sized.argument]
        if sizes not in self._constant:
            raise error_at(
                node,
                f"The argument '{sized.argument}' is computed from the inputs, so shapes would depend on their values. "
                f"The NPU runs static shapes only. {sized.advice}",
            )
        sized.write(self._module, node, compute_from(self._values, self._module, sizes))
        node.meta["val"] = infer_meta(node)
        self._changed = True

    def _recompute_metadata(self, node: Node) -> None:
        """Applies rule 3."""
        read = [source.meta.get("val") for source in node.all_input_nodes]
        if any(value is None or _is_symbolic(value) for value in read):
            return
        value = node.meta["val"] = infer_meta(node)
        self._changed = True
        if isinstance(value, (bool, int, float)):
            node.replace_all_uses_with(value)  # type: ignore[arg-type]
            self._erase(node)

    def _erase(self, node: Node) -> None:
        self._module.graph.erase_node(node)
        self._changed = True


def _is_mask(node: Node) -> bool:
    return node.meta["val"].dtype in (torch.bool, torch.uint8)
