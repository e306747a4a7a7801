"""Layers, and operators between them, get the dimension of a batch of one where their input has none."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.fx import GraphModule, Node, map_arg

from openneutron.core.fx import UNBATCHED, arguments, iterate_nodes, note, op_name, set_argument, shape_of
from openneutron.passes.write_back import Spot

__all__ = ["batch_layers"]

aten = torch.ops.aten
_LINEAR = "aten.linear.default"
# Operators with an argument 'dim' whose dimensions have the numbers of their input's.
_WITH_DIM = {"aten.cat.default", "aten.mean.dim", "aten.sum.dim_IntList", "aten.amax.default", "aten.amin.default"}
# Elementwise operators without torch's tag of such.
_UNTAGGED = {"aten.hardswish.default", "aten.dropout.default"}
_POOLS = ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool")
# By the end of a pool's name, the rank of its input without a batch dimension.
_RANKS = {"1d": 2, "2d": 3, "3d": 4}


def batch_layers(module: GraphModule, stays: Callable[[Node], bool] = lambda _: False) -> bool:
    """Rules, linear in nodes and uses:

    1. A convolution, transposed convolution or linear of one sample without a batch dimension becomes unsqueeze, the
       layer, and squeeze.
    2. An elementwise operator, concatenation, pool or reduction that reads such a squeeze reads its input instead,
       and is squeezed itself.

    The NPU and the methods of recovery want that dimension. By rule 2, no squeeze is between a layer and the activation
    that it fuses, nor between two layers. Values that lack the dimension get the note `UNBATCHED`, so that observers do
    not take their first dimension for samples. Operators that are to stay in float stay as they are.
    """
    batched = _Batched()
    for node in list(module.graph.nodes):
        if node.op == "call_function" and not stays(node) and (_lacks_batch(node) or batched.reaches(node)):
            batched.add(node)
    for value in batched.with_dimension:
        note(value, UNBATCHED, True)
    for squeeze in reversed(batched.squeezes):
        if not squeeze.users:
            module.graph.erase_node(squeeze)
    if batched.squeezes:
        module.recompile()
    return bool(batched.squeezes)


class _Batched:
    """What has been given a batch dimension: `with_dimension` has the values that have it by those that do not."""

    def __init__(self) -> None:
        self.with_dimension: dict[Node, Node] = {}
        self.squeezes: list[Node] = []

    def reaches(self, node: Node) -> bool:
        """Whether rule 2 holds for `node`."""
        read, name = list(_tensors(node)), op_name(node)
        if not all(map(_is_float, [node, *read])):
            return False
        rank = max((len(shape_of(operand)) for operand in read), default=0)
        if not any(operand in self.with_dimension and len(shape_of(operand)) == rank for operand in read):
            return False
        if name in _WITH_DIM:
            varying = all(operand.op != "get_attr" and len(shape_of(operand)) == rank for operand in read)
            return varying and arguments(node)["dim"] not in (None, [])
        if name.removeprefix("aten.").startswith(_POOLS):
            return _RANKS.get(name.split(".")[1][-2:]) == rank
        return _is_elementwise(node)

    def add(self, node: Node) -> None:
        """Give `node` the dimension, and squeeze it for all who read it."""
        broadcasts = _is_elementwise(node)
        for value in dict.fromkeys(_tensors(node)):
            if not broadcasts or (value.op != "get_attr" and len(shape_of(value)) == len(shape_of(node))):
                self._read_batched(node, value)
        if op_name(node) in _WITH_DIM:
            set_argument(node, "dim", _moved_by_one(arguments(node)["dim"]))
        node.meta["val"] = node.meta["val"].unsqueeze(0)
        users = set(node.users)
        squeeze = Spot(node.next, node).call(aten.squeeze.dim, node, 0)
        node.replace_all_uses_with(squeeze, delete_user_cb=users.__contains__)
        self.with_dimension[squeeze] = node
        self.squeezes.append(squeeze)

    def _read_batched(self, node: Node, value: Node) -> None:
        if value not in self.with_dimension:
            self.with_dimension[value] = Spot(node, node).call(aten.unsqueeze.default, value, 0)
        batched = self.with_dimension[value]
        node.args = map_arg(node.args, lambda read: batched if read is value else read)
        node.kwargs = map_arg(node.kwargs, lambda read: batched if read is value else read)


def _tensors(node: Node) -> Iterator[Node]:
    """The tensors that `node` reads; of a layer, what it multiplies."""
    if op_name(node).startswith("aten.conv") or op_name(node) == _LINEAR:
        return iterate_nodes(arguments(node)["input"])
    return iterate_nodes([*node.args, *node.kwargs.values()])


def _is_float(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32


def _is_elementwise(node: Node) -> bool:
    if op_name(node) in _UNTAGGED:
        return True
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags


def _moved_by_one(dim: int | list[int]) -> int | list[int]:
    """Dimensions of a value behind a new dimension 0."""
    if isinstance(dim, int):
        return dim + 1 if dim >= 0 else dim
    return [one + 1 if one >= 0 else one for one in dim]


def _lacks_batch(node: Node) -> bool:
    if not op_name(node).startswith("aten.conv") and op_name(node) != _LINEAR:
        return False
    args = arguments(node)
    read, weight = args.get("input"), args.get("weight")
    if not isinstance(read, Node) or not isinstance(weight, Node):
        return False
    return len(shape_of(weight)) >= 2 and len(shape_of(read)) == (
        1 if op_name(node) == _LINEAR else len(shape_of(weight)) - 1
    )
