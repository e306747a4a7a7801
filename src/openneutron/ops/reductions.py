"""Means, sums, maxima and minima over dimensions, and decompositions into them: variances and norms."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch.fx import Node

from openneutron.ir.graph import Kind, Layout, Tensor
from openneutron.ir.kinds import MEAN, REDUCE_MAX, REDUCE_MIN, SUM
from openneutron.ops.decomposition import Decomposition, Rewriting
from openneutron.ops.facts import Facts, never_negative_if_first
from openneutron.ops.lowering import Lowering
from openneutron.ops.op_instance import OpInstance
from openneutron.ops.spec import Homogeneous, OpSpec, OutputRule, constraint, legacy_constraint
from openneutron.targets import Generation

__all__ = ["DECOMPOSED", "SIMPLE_ORDERS", "SPECS", "has_unused_indices", "input_macs", "mean_of_image"]

aten = torch.ops.aten

SIMPLE_ORDERS = (1.0, 2.0, math.inf, -math.inf)
"""Orders of the vector norms that are decomposed."""

IMAGE_MEAN = replace(MEAN, layout=Layout.FIXED)


def _reduced_dims(instance: OpInstance) -> tuple[int, ...]:
    """Returns the reduced dimensions. All dimensions are reduced if none is given."""
    rank = len(instance.shape_of("self"))
    dims = instance.args.get("dim")
    dims = [dims] if isinstance(dims, int) else dims
    return tuple(sorted(dim % rank for dim in dims)) if dims else tuple(range(rank))


def mean_of_image(lowering: Lowering, shape: Sequence[int]) -> Tensor:
    """Emits the only MEAN of the legacy generation: over height and width of an NHWC image.

    `shape` is the shape of the input as [N, C, H, W].
    """
    nhwc = lowering.channels_last(lowering.reshape(lowering.tensor("self"), shape))
    batch, _, _, channels = nhwc.shape
    mean = lowering.emit(IMAGE_MEAN, [nhwc], (batch, 1, 1, channels), axes=(1, 2), keep_dims=True)
    return lowering.reshape(lowering.channels_first(mean), lowering.shape)


def lower_mean(lowering: Lowering) -> Tensor:
    """Emits MEAN."""
    if lowering.instance.generation is Generation.LEGACY:
        batch, channels, *sizes = lowering.tensor("self").shape
        return mean_of_image(lowering, (batch, channels, *(1, *sizes)[-2:]))
    return _reduction_lowering(MEAN)(lowering)


def _reduction_lowering(kind: Kind) -> Callable[[Lowering], Tensor]:
    def lower(lowering: Lowering) -> Tensor:
        keep = bool(lowering.args.get("keepdim", False))
        axes = _reduced_dims(lowering.instance)
        return lowering.emit(kind, [lowering.tensor("self")], lowering.shape, axes=axes, keep_dims=keep)

    return lower


@legacy_constraint
def means_over_an_image(instance: OpInstance) -> bool:
    """The mean is over height and width of an image [N, C, H, W], or over the length of a sequence [N, C, L]."""
    return (len(instance.shape_of("self")), _reduced_dims(instance)) in ((4, (2, 3)), (3, (2,)))


@legacy_constraint
def means_aligned_channels(instance: OpInstance) -> bool:
    """Dimension 1, the channels, is a multiple of the MACs per pipeline."""
    return all(size % instance.target.channel_granularity == 0 for size in instance.shape_of("self")[1:2])


def input_macs(instance: OpInstance) -> int:
    """Returns the number of input elements: one addition per element counts as a multiply-accumulate."""
    return math.prod(instance.shape_of("self"))


@constraint
def has_unused_indices(instance: OpInstance) -> bool:
    """No operator reads its indices."""
    return all(user.target is operator.getitem and user.args[1] == 0 for user in instance.node.users if user.users)


def _extreme_over_dim(over_dims: torch._ops.OpOverload) -> Callable[[Rewriting], list[Node]]:
    def rewrite(rewriting: Rewriting) -> list[Node]:
        args = rewriting.args
        return [rewriting.call(over_dims, args["self"], [args["dim"]], args["keepdim"])]

    return rewrite


def _reduced_count(instance: OpInstance) -> int:
    shape = instance.shape_of("self")
    return math.prod(shape[axis] for axis in _reduced_dims(instance))


def _variance_correction(instance: OpInstance) -> float:
    correction = instance.args.get("correction", instance.args.get("unbiased"))
    return 1.0 if correction is None else float(correction)


def _variance(rewriting: Rewriting) -> tuple[Node, Node]:
    """Returns the corrected mean of the squared differences from the mean, and the mean with its dimensions kept."""
    instance, values = rewriting.instance, rewriting.args["self"]
    axes = list(_reduced_dims(instance))
    mean = rewriting.call(aten.mean.dim, values, axes, True)
    differences = rewriting.call(aten.sub.Tensor, values, mean)
    squares = rewriting.call(aten.mul.Tensor, differences, differences)
    variance = rewriting.call(aten.mean.dim, squares, axes, bool(instance.args.get("keepdim", False)))
    divisor = max(0.0, _reduced_count(instance) - _variance_correction(instance))
    corrected = _reduced_count(instance) / divisor if divisor else math.inf
    return (variance if corrected == 1 else rewriting.call(aten.mul.Tensor, variance, corrected)), mean


def _var(rewriting: Rewriting) -> Node:
    return _variance(rewriting)[0]


def _std(rewriting: Rewriting) -> Node:
    return rewriting.call(aten.sqrt.default, _var(rewriting))


def _var_mean(rewriting: Rewriting) -> list[Node]:
    variance, mean = _variance(rewriting)
    return [variance, rewriting.call(aten.reshape.default, mean, list(rewriting.shape))]


def _std_mean(rewriting: Rewriting) -> list[Node]:
    variance, mean = _var_mean(rewriting)
    return [rewriting.call(aten.sqrt.default, variance), mean]


@constraint
def is_a_simple_norm(instance: OpInstance) -> bool:
    """The order of the norm is 1, 2, inf or -inf."""
    return float(instance.args["ord"]) in SIMPLE_ORDERS


def _norm(rewriting: Rewriting) -> Node:
    instance, values = rewriting.instance, rewriting.args["self"]
    over = (list(_reduced_dims(instance)), instance.args["keepdim"])
    order = float(instance.args["ord"])
    if order == 2:
        squares = rewriting.call(aten.mul.Tensor, values, values)
        return rewriting.call(aten.sqrt.default, rewriting.call(aten.sum.dim_IntList, squares, *over))
    magnitudes = rewriting.call(aten.abs.default, values)
    reduce = {1.0: aten.sum.dim_IntList, math.inf: aten.amax.default, -math.inf: aten.amin.default}[order]
    return rewriting.call(reduce, magnitudes, *over)


def _overloads_of(name: str) -> tuple[str, ...]:
    return tuple(f"aten.{name}.{overload}" for overload in ("default", "dim", "correction"))


SPECS = (
    OpSpec(
        name="mean",
        targets=("aten.mean.dim", "aten.mean.default"),
        edge_targets=("aten.mean.dim",),
        inputs=("self",),
        constraints=(means_over_an_image, means_aligned_channels),
        pads={"self": (1,)},
        lower=lower_mean,
        macs=input_macs,
        homogeneous=Homogeneous.CHANNEL,
        facts=Facts(sign=never_negative_if_first, is_continuous=True),
        becomes="MEAN",
    ),
    OpSpec(
        name="sum",
        targets=("aten.sum.dim_IntList", "aten.sum.default"),
        edge_targets=("aten.sum.dim_IntList",),
        inputs=("self",),
        lower=_reduction_lowering(SUM),
        macs=input_macs,
        homogeneous=Homogeneous.CHANNEL,
        facts=Facts(sign=never_negative_if_first, computes_masks=True),
        becomes="SUM",
    ),
    OpSpec(
        name="amax",
        targets=("aten.amax.default", "aten.max.default"),
        inputs=("self",),
        output=OutputRule.SHARED,
        lower=_reduction_lowering(REDUCE_MAX),
        macs=input_macs,
        homogeneous=Homogeneous.CHANNEL,
        facts=Facts(sign=never_negative_if_first),
        becomes="REDUCE_MAX",
    ),
    OpSpec(
        name="amin",
        targets=("aten.amin.default", "aten.min.default"),
        inputs=("self",),
        output=OutputRule.SHARED,
        lower=_reduction_lowering(REDUCE_MIN),
        macs=input_macs,
        homogeneous=Homogeneous.CHANNEL,
        facts=Facts(sign=never_negative_if_first),
        becomes="REDUCE_MIN",
    ),
)

DECOMPOSED = (
    Decomposition(
        name="max over a dimension",
        targets=("aten.max.dim",),
        rewrite=_extreme_over_dim(aten.amax.default),
        constraints=(has_unused_indices,),
        becomes="amax",
    ),
    Decomposition(
        name="min over a dimension",
        targets=("aten.min.dim",),
        rewrite=_extreme_over_dim(aten.amin.default),
        constraints=(has_unused_indices,),
        becomes="amin",
    ),
    Decomposition(
        name="var",
        targets=_overloads_of("var"),
        rewrite=_var,
        becomes="mean, sub, mul, mean, mul for the correction",
    ),
    Decomposition(
        name="var_mean",
        targets=_overloads_of("var_mean"),
        rewrite=_var_mean,
        becomes="mean, sub, mul, mean, mul for the correction",
    ),
    Decomposition(
        name="std",
        targets=_overloads_of("std"),
        rewrite=_std,
        becomes="mean, sub, mul, mean, mul for the correction, sqrt",
    ),
    Decomposition(
        name="std_mean",
        targets=_overloads_of("std_mean"),
        rewrite=_std_mean,
        becomes="mean, sub, mul, mean, mul for the correction, sqrt",
    ),
    Decomposition(
        name="vector_norm",
        targets=("aten.linalg_vector_norm.default",),
        rewrite=_norm,
        constraints=(is_a_simple_norm,),
        becomes="order 1: abs, sum; order 2: mul, sum, sqrt; order inf: abs, amax; order -inf: abs, amin",
    ),
)
