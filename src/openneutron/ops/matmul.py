"""Matrix products of computed values, and decompositions of other products into them."""

from __future__ import annotations

import math

import torch
from torch.fx import Node

from openneutron.core.fx import op_name, shape_of
from openneutron.ir.graph import Tensor
from openneutron.ir.kinds import BATCH_MATMUL
from openneutron.ops import linear
from openneutron.ops.decomposition import Decomposition, Rewriting
from openneutron.ops.facts import Facts, never_negative_if_all
from openneutron.ops.graph_builder import reshape
from openneutron.ops.lowering import Lowering
from openneutron.ops.op_instance import OpInstance
from openneutron.ops.spec import OpSpec, legacy_constraint
from openneutron.targets import Generation

__all__ = ["DECOMPOSED", "SPECS"]

aten = torch.ops.aten


LINEARS = {target: spec for spec in linear.SPECS for target in spec.targets}


@legacy_constraint
def multiplies_aligned_matrices(instance: OpInstance) -> bool:
    """All dimensions of both matrices are multiples of the MACs per pipeline."""
    sizes = (*instance.shape_of("self"), *instance.shape_of("mat2"))
    return all(size % instance.target.channel_granularity == 0 for size in sizes)


def macs(instance: OpInstance) -> int:
    """Returns the multiply-accumulates: one for each column of the left matrix and each output value."""
    return math.prod(instance.shape) * instance.shape_of("self")[-1]


def lower_bmm(lowering: Lowering) -> Tensor:
    """Emits BATCH_MATMUL."""
    operands = [lowering.tensor("self"), lowering.tensor("mat2")]
    return lowering.emit(BATCH_MATMUL, operands, lowering.shape, adj_x=False, adj_y=False)


SPECS = (
    OpSpec(
        name="bmm",
        targets=("aten.bmm.default",),
        inputs=("self", "mat2"),
        symmetric=("self", "mat2"),
        constraints=(multiplies_aligned_matrices,),
        pads={"self": (0, 1, 2), "mat2": (0, 1, 2)},
        lower=lower_bmm,
        macs=macs,
        facts=Facts(channels_last=True, sign=never_negative_if_all, is_continuous=True),
        becomes="BATCH_MATMUL",
        tolerance=2,
        notes="A bmm with one constant matrix for the whole batch becomes a linear. If other operators also read an "
        "operand that comes from a relu, its codes are halved to get zero point 0. torch then rounds ties to even, and "
        "TFLite rounds them up; the sum of products can make two steps of this difference.",
    ),
)


def _transpose_matrix(rewriting: Rewriting, value: Node) -> Node:
    return rewriting.call(aten.transpose.int, value, -2, -1)


def _is_one_matrix(value: Node) -> bool:
    return math.prod(shape_of(value)[:-2]) == 1


def _matmul_or_linear(rewriting: Rewriting, left: Node, right: Node) -> Node:
    """Computes left @ right with the rules of torch.matmul.

    A product with a constant matrix becomes a linear. Any other product becomes one bmm: the last batch dimensions of
    `left` become rows if `right` lacks them, and other batch dimensions that differ are expanded.
    """
    is_constant = rewriting.instance.is_constant
    shape = tuple(aten.matmul.default(left.meta["val"], right.meta["val"]).shape)
    if len(shape_of(left)) == 1:
        left = rewriting.call(aten.unsqueeze.default, left, 0)
    if len(shape_of(right)) == 1:
        right = rewriting.call(aten.unsqueeze.default, right, 1)
    if is_constant(right) and _is_one_matrix(right):
        matrix = reshape(rewriting, right, shape_of(right)[-2:])
        product = rewriting.call(aten.linear.default, left, _transpose_matrix(rewriting, matrix))
    elif is_constant(left) and _is_one_matrix(left):
        matrix = reshape(rewriting, left, shape_of(left)[-2:])
        product = _transpose_matrix(
            rewriting, rewriting.call(aten.linear.default, _transpose_matrix(rewriting, right), matrix)
        )
    else:
        product = _batched_product(rewriting, left, right)
    return reshape(rewriting, product, shape)


def _batched_product(rewriting: Rewriting, left: Node, right: Node) -> Node:
    """Computes left @ right as a bmm. The caller restores the shape of the batch."""
    rank = max(len(shape_of(left)), len(shape_of(right)))
    (*lefts, rows, features), (*rights, _, columns) = (
        (1,) * (rank - len(shape_of(side))) + shape_of(side) for side in (left, right)
    )
    while lefts and rights[-1] == 1:
        rights.pop()
        rows *= lefts.pop()
    batch = list(torch.broadcast_shapes(tuple(lefts), tuple(rights)))
    sides = []
    for side, own_batch, matrix in ((left, lefts, (rows, features)), (right, rights, (features, columns))):
        value = reshape(rewriting, side, (*own_batch, *matrix))
        if own_batch != batch:
            value = rewriting.call(aten.expand.default, value, [*batch, *matrix])
        sides.append(reshape(rewriting, value, (math.prod(batch), *matrix)))
    return rewriting.call(aten.bmm.default, *sides)


def _matmul(rewriting: Rewriting) -> Node:
    left, right = (value for value in rewriting.args.values() if isinstance(value, Node))
    return _matmul_or_linear(rewriting, left, right)


def _has_a_constant_matrix(instance: OpInstance) -> bool:
    sides = (instance.args["self"], instance.args["mat2"])
    return any(instance.is_constant(side) and _is_one_matrix(side) for side in sides)


def _is_not_a_linear(instance: OpInstance) -> bool:
    spec = LINEARS[op_name(instance.node)]
    constants = filter(None, (spec.weight, spec.bias))
    return not instance.reads_constants(*constants) or bool(spec.rejections(instance, Generation.MODERN))


def _linear_by_matmul(rewriting: Rewriting) -> Node:
    bias, weight = rewriting.args["bias"], rewriting.args["weight"]
    columns = weight if len(shape_of(weight)) == 1 else _transpose_matrix(rewriting, weight)
    product = _matmul_or_linear(rewriting, rewriting.args["input"], columns)
    return product if bias is None else rewriting.call(aten.add.Tensor, product, bias)


# Argument names of the two factors in addmm, baddbmm, addbmm and addmv.
_FACTORS = {"mat1": "mat2", "batch1": "batch2", "mat": "vec"}


def _add_product(rewriting: Rewriting) -> Node:
    """Computes beta * self + alpha * product. alpha scales a constant factor if there is one."""
    args = rewriting.args
    left, right = next((args[left], args[right]) for left, right in _FACTORS.items() if left in args)
    beta, alpha, added = args["beta"], args["alpha"], args["self"]
    if alpha != 1:
        if rewriting.instance.is_constant(right):
            right = rewriting.call(aten.mul.Tensor, right, alpha)
        else:
            left = rewriting.call(aten.mul.Tensor, left, alpha)
    product = _matmul_or_linear(rewriting, left, right)
    if len(shape_of(product)) > len(rewriting.shape):  # addbmm adds the products of the batch
        product = rewriting.call(aten.sum.dim_IntList, product, [0])
    if beta == 0:
        return product
    added = added if beta == 1 else rewriting.call(aten.mul.Tensor, added, beta)
    return rewriting.call(aten.add.Tensor, product, added)


def _outer(rewriting: Rewriting) -> Node:
    column, row = (rewriting.args[name] for name in ("self", "vec2"))
    (rows,), (columns,) = shape_of(column), shape_of(row)
    return _matmul_or_linear(rewriting, reshape(rewriting, column, (rows, 1)), reshape(rewriting, row, (1, columns)))


def _bilinear(rewriting: Rewriting) -> Node:
    """Computes first @ weight[k] @ second for each output k, from left to right.

    One product with all matrices of the weight, side by side, gives a row [columns] for each output. A second product
    multiplies these rows by the second input.
    """
    first, second, weight, bias = (rewriting.args[name] for name in ("input1", "input2", "weight", "bias"))
    outputs, rows, columns = shape_of(weight)
    *batch, _ = shape_of(first)
    matrix = reshape(rewriting, _transpose_matrix(rewriting, weight), (outputs * columns, rows))
    product = _matmul_or_linear(rewriting, first, _transpose_matrix(rewriting, matrix))
    matrices = reshape(rewriting, product, (*batch, outputs, columns))
    product = _matmul_or_linear(rewriting, matrices, rewriting.call(aten.unsqueeze.default, second, -1))
    product = reshape(rewriting, product, (*batch, outputs))
    return product if bias is None else rewriting.call(aten.add.Tensor, product, bias)


def _trace_decomposition(rewriting: Rewriting) -> Node:
    return rewriting.trace()


AS_BMM = "bmm; linear if one side is a constant matrix"
AS_SUM = "bmm or linear, and add; mul for alpha and beta other than 1"

DECOMPOSED = (
    Decomposition(
        name="matmul",
        targets=("aten.matmul.default", "aten.mv.default", "aten.dot.default", "aten.vdot.default"),
        rewrite=_matmul,
        facts=Facts(channels_last=True, sign=never_negative_if_all, is_continuous=True),
        becomes=AS_BMM,
        notes="Batch dimensions that only the left side has become rows of its matrices. Others are expanded.",
    ),
    Decomposition(
        name="mm of computed values",
        targets=("aten.mm.default",),
        rewrite=_matmul,
        applies=_is_not_a_linear,
        becomes=AS_BMM,
    ),
    Decomposition(
        name="bmm with a constant matrix",
        targets=("aten.bmm.default",),
        rewrite=_matmul,
        applies=_has_a_constant_matrix,
        becomes="linear",
    ),
    Decomposition(
        name="linear with a computed weight, or with a weight that is not a matrix",
        targets=("aten.linear.default",),
        rewrite=_linear_by_matmul,
        applies=_is_not_a_linear,
        becomes="bmm, add",
    ),
    Decomposition(
        name="addmm with alpha, beta, or computed values",
        targets=("aten.addmm.default",),
        rewrite=_add_product,
        applies=_is_not_a_linear,
        becomes=AS_SUM,
    ),
    Decomposition(
        name="sum with a product",
        targets=("aten.baddbmm.default", "aten.addbmm.default", "aten.addmv.default"),
        rewrite=_add_product,
        becomes=AS_SUM,
    ),
    Decomposition(
        name="outer",
        targets=("aten.outer.default", "aten.ger.default"),
        rewrite=_outer,
        becomes=AS_BMM,
    ),
    Decomposition(
        name="bilinear",
        targets=("aten.bilinear.default",),
        rewrite=_bilinear,
        becomes="linear, bmm, add",
        notes="The product of the weight and the first input is rounded to int8 before the product with the second.",
    ),
    Decomposition(
        name="product by indices",
        targets=(
            "aten.einsum.default",
            "aten.inner.default",
            "aten.tensordot.default",
            "aten.linalg_multi_dot.default",
            "aten.linalg_vecdot.default",
            "aten.chain_matmul.default",
        ),
        rewrite=_trace_decomposition,
        becomes="products, sums and reshapes: torch's own decomposition",
    ),
)
