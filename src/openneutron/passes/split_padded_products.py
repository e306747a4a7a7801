"""Splits the product of a matrix with a padded row of ones into a product and a sum, each with its own scale.

Linear attention contains such products: the last row of `(pad(v, value=1) @ k.T) @ q` holds the sum of the weights, the
other rows the weighted values. Without the split, both share one scale, and the quantizer cannot tell that the sum, a
divisor, is not negative.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from openneutron.core.fx import arguments, finish_rewrite, shape_of
from openneutron.ops.declared import is_op
from openneutron.ops.decomposition import Rewriting
from openneutron.ops.graph_builder import mul, slice_, sum_
from openneutron.ops.op_instance import OpInstance
from openneutron.ops.shapes import read_indices
from openneutron.targets import NeutronTarget

__all__ = ["split_padded_products"]

_OPERAND_AND_AXIS_OF_A_PAD = {(0, 0, 0, 1): (0, -2), (0, 1): (1, -1), (0, 1, 0, 0): (1, -1)}


@dataclass(frozen=True)
class _PaddedProducts:
    """A padded matrix, and a chain of products with it."""

    pad: Node
    """The pad, which adds one row or one column."""
    operand: int
    """The position of the padded matrix in each product: 0 (left) for a padded row, 1 (right) for a padded column."""
    axis: int
    """The padded axis: -2 for a row, -1 for a column."""
    products: list[Node]
    """The first product reads `pad`, each other one reads the product before it."""
    slices: dict[Node, bool]
    """The readers of the last product. True for a slice of the padded row or column, False for a slice of the rest."""


def split_padded_products(
    module: GraphModule, target: NeutronTarget, keeps_float: Callable[[Node], bool] = lambda _: False
) -> bool:
    """Rule, linear in nodes: matmul(pad(x), y), with x padded by one row at its end, becomes matmul(x, y) and sum(y)
    times the constant of the padding.

    Only slices that separate the padded row from the others may read the product. The rule also holds for matmul(y,
    pad(x)) with one padded column, and for chains of such products. Operators for which `keeps_float` is true are not
    changed.
    """
    changed = False
    for node in list(module.graph.nodes):
        found = _padded_products(node)
        if found is not None and not any(map(keeps_float, (node, *found.products))):
            _split_products(module, target, found)
            changed = True
    return finish_rewrite(module, changed=changed)


def _padded_products(node: Node) -> _PaddedProducts | None:
    if not is_op(node, "pad") or node.meta["val"].dtype is not torch.float32:
        return None
    args = arguments(node)
    way = _OPERAND_AND_AXIS_OF_A_PAD.get(tuple(args.get("pad") or ()))
    if way is None or args.get("mode", "constant") != "constant":
        return None
    operand, axis = way
    products = _product_chain(node, operand)
    if not products:
        return None
    slices = {reader: _reads_padding(reader, axis) for reader in products[-1].users}
    if None in slices.values():
        return None
    known = {reader: bool(is_of_padding) for reader, is_of_padding in slices.items()}
    return _PaddedProducts(node, operand, axis, products, known) if any(known.values()) else None


def _product_chain(pad: Node, operand: int) -> list[Node]:
    """Returns the chain of matrix products that starts at `pad`. No product broadcasts.

    Only the next product reads each product of the chain except the last one.
    """
    products, value = [], pad
    while len(value.users) == 1:
        (reader,) = value.users
        is_product = is_op(reader, "matmul", "bmm", "mm") and reader.args[operand] is value
        if not is_product or reader.args[1 - operand] is value:
            break
        if len({shape_of(factor)[:-2] for factor in reader.all_input_nodes}) != 1 or len(shape_of(reader)) < 2:
            break
        products.append(reader)
        value = reader
    return products


def _reads_padding(reader: Node, axis: int) -> bool | None:
    """Returns True if a slice reads only the last index of `axis`, False if it reads only other indices, and None for
    any other slice or operator.
    """
    if not is_op(reader, "slice"):
        return None
    shape = shape_of(reader.all_input_nodes[0])
    if arguments(reader)["dim"] % len(shape) != len(shape) + axis or not isinstance(shape[axis], int):
        return None
    indices = read_indices(reader, shape[axis])
    if not indices:
        return None
    has_last = indices[-1] == shape[axis] - 1
    return has_last if not has_last or len(indices) == 1 else None


def _split_products(module: GraphModule, target: NeutronTarget, found: _PaddedProducts) -> None:
    args = arguments(found.pad)
    first, *rest = found.products
    values, sums = (
        args["self"],
        _insert_padding_product(Rewriting(module, OpInstance(first, target)), found, float(args["value"] or 0.0)),
    )
    values = _insert_product(Rewriting(module, OpInstance(first, target)), found, first, values)
    for product in rest:
        rewriting = Rewriting(module, OpInstance(product, target))
        values, sums = (_insert_product(rewriting, found, product, value) for value in (values, sums))
    for reader, is_of_padding in found.slices.items():
        reader.replace_all_uses_with(
            sums if is_of_padding else _insert_slice(module, target, found.axis, reader, values)
        )


def _insert_padding_product(rewriting: Rewriting, found: _PaddedProducts, constant: float) -> Node:
    """Returns the product of the padding, `constant`, with the other operand."""
    other = rewriting.instance.node.args[1 - found.operand]
    assert isinstance(other, Node)
    summed = sum_(rewriting, other, [found.axis])
    return summed if constant == 1 else mul(rewriting, summed, constant)


def _insert_product(rewriting: Rewriting, found: _PaddedProducts, product: Node, value: Node) -> Node:
    operands = list(product.args)
    operands[found.operand] = value
    return rewriting.call(product.target, *operands)  # type: ignore[arg-type]


def _insert_slice(module: GraphModule, target: NeutronTarget, axis: int, reader: Node, values: Node) -> Node:
    """Inserts the slice of `values`, the product without padding, that replaces the slice `reader`."""
    if shape_of(reader) == shape_of(values):
        return values
    indices = read_indices(reader, shape_of(reader.all_input_nodes[0])[axis])
    assert indices is not None
    rewriting = Rewriting(module, OpInstance(reader, target))
    return slice_(rewriting, values, arguments(reader)["dim"], indices)
