"""Adds a batch dimension of 1 to layers whose input has none, and to the operators between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.fx import GraphModule, Node, map_arg

from openneutron.core.fx import UNBATCHED, arguments, dtype_of, iterate_nodes, note, set_argument, shape_of
from openneutron.ops.declared import facts_of, is_op, layer_kind
from openneutron.ops.facts import LayerKind
from openneutron.ops.graph_builder import NodeBuilder, squeeze, unsqueeze
from openneutron.ops.windows import spatial_dims

__all__ = ["add_batch_dimension"]

_POOLS = tuple(f"{pool}{dims}" for pool in ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool")
               for dims in ("", " of volumes"))  # fmt: skip


def add_batch_dimension(module: GraphModule, keeps_float: Callable[[Node], bool] = lambda _: False) -> bool:
    """Adds the missing batch dimension. Rules, linear in nodes and uses:

    1. A convolution, transposed convolution or linear of one sample without a batch dimension becomes unsqueeze, the
       layer, and squeeze.
    2. An elementwise operator, concatenation, pool or reduction that reads such a squeeze reads the input of the
       squeeze instead, and gets a squeeze after it.

    The NPU and the recovery methods require a batch dimension. Rule 2 removes squeezes between two layers, and between
    a layer and the activation that it fuses. Values without a batch dimension get the note `UNBATCHED`, so that
    observers do not take their first dimension for samples. Operators for which `keeps_float` is true are not changed.
    """
    batched = _BatchInsertion()
    for node in list(module.graph.nodes):
        if node.op == "call_function" and not keeps_float(node) and (_lacks_batch(node) or batched.can_extend_to(node)):
            batched.add(node)
    for value in batched.with_dimension:
        note(value, UNBATCHED, True)
    for squeezed in reversed(batched.squeezes):
        if not squeezed.users:
            module.graph.erase_node(squeezed)
    if batched.squeezes:
        module.recompile()
    return bool(batched.squeezes)


class _BatchInsertion:
    """Values that have been given a batch dimension. `with_dimension` maps each old value to the new one."""

    def __init__(self) -> None:
        self.with_dimension: dict[Node, Node] = {}
        self.squeezes: list[Node] = []

    def can_extend_to(self, node: Node) -> bool:
        """Returns whether rule 2 holds for `node`."""
        read = list(_tensor_operands(node))
        if any(dtype_of(value) != torch.float32 for value in (node, *read)):
            return False
        rank = max((len(shape_of(operand)) for operand in read), default=0)
        if not any(operand in self.with_dimension and len(shape_of(operand)) == rank for operand in read):
            return False
        if _has_dim_argument(node):
            varying = all(operand.op != "get_attr" and len(shape_of(operand)) == rank for operand in read)
            return varying and arguments(node)["dim"] not in (None, [])
        if is_op(node, *_POOLS):
            dims = spatial_dims(node)
            return dims is not None and rank == dims + 1
        return _is_elementwise(node)

    def add(self, node: Node) -> None:
        """Adds the dimension to `node`, and a squeeze that its readers read."""
        broadcasts = _is_elementwise(node)
        for value in dict.fromkeys(_tensor_operands(node)):
            if not broadcasts or (value.op != "get_attr" and len(shape_of(value)) == len(shape_of(node))):
                self._use_batched_operand(node, value)
        if _has_dim_argument(node):
            set_argument(node, "dim", _shift_dims(arguments(node)["dim"]))
        node.meta["val"] = node.meta["val"].unsqueeze(0)
        users = set(node.users)
        squeezed = squeeze(NodeBuilder(node.next, node), node, 0)
        node.replace_all_uses_with(squeezed, delete_user_cb=users.__contains__)
        self.with_dimension[squeezed] = node
        self.squeezes.append(squeezed)

    def _use_batched_operand(self, node: Node, value: Node) -> None:
        if value not in self.with_dimension:
            self.with_dimension[value] = unsqueeze(NodeBuilder(node, node), value, 0)
        batched = self.with_dimension[value]
        node.args = map_arg(node.args, lambda read: batched if read is value else read)
        node.kwargs = map_arg(node.kwargs, lambda read: batched if read is value else read)


def _tensor_operands(node: Node) -> Iterator[Node]:
    """Returns the tensors that `node` reads. For a layer, these are the multiplied tensors only."""
    if layer_kind(node) is not None:
        return iterate_nodes(arguments(node)["input"])
    return iterate_nodes([*node.args, *node.kwargs.values()])


def _is_elementwise(node: Node) -> bool:
    if facts_of(node).is_elementwise:
        return True
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags


def _has_dim_argument(node: Node) -> bool:
    """Returns whether an argument of `node` names dimensions of its input."""
    return is_op(node, "cat", "mean", "sum", "amax", "amin") and "dim" in arguments(node)


def _shift_dims(dim: int | list[int]) -> int | list[int]:
    """Returns the numbers of dimensions after a new dimension 0 is inserted."""
    if isinstance(dim, int):
        return dim + 1 if dim >= 0 else dim
    return [one + 1 if one >= 0 else one for one in dim]


def _lacks_batch(node: Node) -> bool:
    kind = layer_kind(node)
    if kind is None:
        return False
    args = arguments(node)
    read, weight = args.get("input"), args.get("weight")
    if not isinstance(read, Node) or not isinstance(weight, Node):
        return False
    rank = 1 if kind is LayerKind.LINEAR else len(shape_of(weight)) - 1
    return len(shape_of(weight)) >= 2 and len(shape_of(read)) == rank
