"""Decompositions of resizes and uneven average pools into products with constant interpolation matrices.

These operators are linear along height and along width. The operator's results for unit vectors are the columns of the
matrix. This covers all resizes that the NPU lacks, and adaptive average pools with uneven windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.fx import Node

from openneutron.ops.decomposition import Decomposition, Rewriting
from openneutron.ops.op_instance import OpInstance
from openneutron.ops.pooling import has_even_windows
from openneutron.ops.resizes import grows_by_native_factors, grows_by_whole_factors, resize_axis, resize_targets
from openneutron.ops.spec import constraint
from openneutron.ops.windows import spatial_rank

__all__ = ["DECOMPOSED"]

aten = torch.ops.aten

# The product with a matrix reads all elements of an axis for each output; the CPU would read a few neighbors only.
MAX_AXIS = 512
# One joint matrix for height and width is more exact than two, and cheap up to this number of weights.
MAX_JOINT_WEIGHTS = 16384

# A function that takes an operator, a matrix [n, size], and a spatial axis of the operator. It returns the matrix
# [n, outputs]: the operator's result along this axis for each row.
_AlongAxis = Callable[[OpInstance, torch.Tensor, int], torch.Tensor]


def _average_axis(instance: OpInstance, values: torch.Tensor, axis: int) -> torch.Tensor:
    return F.adaptive_avg_pool1d(values, instance.shape[axis - spatial_rank(instance)])


@constraint
def has_short_axes(instance: OpInstance) -> bool:
    """The resized axes have at most {MAX_AXIS} elements."""
    rank = spatial_rank(instance)
    sizes = zip(instance.shape_of("self")[-rank:], instance.shape[-rank:], strict=True)
    return all(size <= MAX_AXIS for size, outputs in sizes if size != outputs)


def _interpolate_by(along: _AlongAxis) -> Callable[[Rewriting], Node]:
    def rewrite(rewriting: Rewriting) -> Node:
        instance, values = rewriting.instance, rewriting.args["self"]
        sizes = instance.shape_of("self")[-spatial_rank(instance) :]
        matrices = [along(instance, torch.eye(size), axis).T for axis, size in enumerate(sizes)]
        if len(matrices) == 1:
            return _multiply_last_dim(rewriting, values, matrices[0])
        if math.prod(matrix.numel() for matrix in matrices) <= MAX_JOINT_WEIGHTS:
            pixels = rewriting.call(aten.flatten.using_ints, values, -2, -1)
            joint = torch.einsum("ij,kl->ikjl", *matrices).flatten(2).flatten(0, 1)
            product = _multiply_last_dim(rewriting, pixels, joint)
            return rewriting.call(aten.reshape.default, product, list(rewriting.shape))
        wide = rewriting.call(aten.transpose.int, _multiply_last_dim(rewriting, values, matrices[1]), -2, -1)
        return rewriting.call(aten.transpose.int, _multiply_last_dim(rewriting, wide, matrices[0]), -2, -1)

    return rewrite


def _multiply_last_dim(rewriting: Rewriting, values: Node, matrix: torch.Tensor) -> Node:
    """Adds a linear over the last dimension; returns `values` for the identity matrix."""
    if matrix.shape[0] == matrix.shape[1] and torch.equal(matrix, torch.eye(len(matrix))):
        return values
    return rewriting.call(aten.linear.default, values, rewriting.constant(matrix.contiguous()))


BECOMES = "linear with one constant matrix for height and width if that is small, else linear for each of both"

DECOMPOSED = (
    Decomposition(
        name="upsample_nearest by other factors",
        targets=resize_targets(
            "upsample_nearest2d", "upsample_nearest1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact1d"
        ),
        rewrite=_interpolate_by(resize_axis),
        applies=lambda instance: not grows_by_whole_factors.holds(instance),
        constraints=(has_short_axes,),
        becomes=BECOMES,
    ),
    Decomposition(
        name="upsample_bilinear by other factors",
        targets=resize_targets("upsample_bilinear2d", "upsample_linear1d"),
        rewrite=_interpolate_by(resize_axis),
        applies=lambda instance: not grows_by_native_factors.holds(instance),
        constraints=(has_short_axes,),
        becomes=BECOMES,
    ),
    Decomposition(
        name="upsample_bicubic",
        targets=resize_targets("upsample_bicubic2d"),
        rewrite=_interpolate_by(resize_axis),
        constraints=(has_short_axes,),
        becomes=BECOMES,
    ),
    Decomposition(
        name="upsample with antialiasing",
        targets=resize_targets("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"),
        rewrite=_interpolate_by(resize_axis),
        constraints=(has_short_axes,),
        becomes=BECOMES,
    ),
    Decomposition(
        name="adaptive_avg_pool with uneven windows",
        targets=("aten.adaptive_avg_pool1d.default", "aten.adaptive_avg_pool2d.default"),
        rewrite=_interpolate_by(_average_axis),
        applies=lambda instance: not has_even_windows.holds(instance),
        constraints=(has_short_axes,),
        becomes=BECOMES,
    ),
)
