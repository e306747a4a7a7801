"""Decompositions of normalizations by statistics of the input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.fx import Node

from openneutron.core.constants import number_of
from openneutron.ops.decomposition import Decomposition, Rewriting
from openneutron.ops.facts import Facts
from openneutron.ops.graph_builder import add, mean, mul, rsqrt, sub
from openneutron.ops.op_instance import OpInstance
from openneutron.ops.spec import constraint

__all__ = ["DECOMPOSED", "DimNormGroups", "standardize"]

aten = torch.ops.aten

# Added to the variance of values of magnitude about 1. It is small enough to leave normal variances unchanged. For
# constant values it limits 1 / sqrt(variance) to 32, and so the int8 range of the inverse root.
VARIANCE_FLOOR = 1e-3
# The error that `VARIANCE_FLOOR` causes, relative to the largest value.
APPROXIMATION = 2e-3


class NormGroups(Protocol):
    """Sets of values that are normalized together."""

    @property
    def rewriting(self) -> Rewriting:
        """The rewriting that adds the operators."""

    def mean(self, value: Node) -> Node:
        """Computes one mean for each group."""

    def broadcast(self, statistic: Node) -> Node:
        """Reshapes one statistic for each group so that it broadcasts over the values."""


@dataclass(frozen=True)
class DimNormGroups:
    """Groups of all values along some dimensions."""

    rewriting: Rewriting
    dims: Sequence[int]

    def mean(self, value: Node) -> Node:
        """Computes the mean over the dimensions, and keeps them with size 1."""
        return mean(self.rewriting, value, self.dims)

    def broadcast(self, statistic: Node) -> Node:
        """Returns `statistic`, which already broadcasts."""
        return statistic


@dataclass(frozen=True)
class ChannelNormGroups:
    """Groups of consecutive channels. Images are not reshaped, because this would cost transposes."""

    rewriting: Rewriting
    groups: int

    @property
    def _shape(self) -> list[int]:
        batch, channels = self.rewriting.shape[:2]
        return [batch, self.groups, channels // self.groups]

    def mean(self, value: Node) -> Node:
        """Computes the mean of the means of each group's channels: [batch, groups, 1]."""
        spatial = range(2, len(self.rewriting.shape))
        channel_means = mean(self.rewriting, value, spatial) if spatial else value
        grouped = self.rewriting.call(aten.reshape.default, channel_means, self._shape)
        return mean(self.rewriting, grouped, [2])

    def broadcast(self, statistic: Node) -> Node:
        """Repeats the statistic of each group for its channels, by a product with ones."""
        rows, *grouped = self._shape
        ones = self.rewriting.constant(torch.ones(1 if isinstance(rows, torch.SymInt) else rows, *grouped))
        batch, channels, *spatial = self.rewriting.shape
        shape = [batch, channels, *[1] * len(spatial)]
        return self.rewriting.call(aten.reshape.default, mul(self.rewriting, statistic, ones), shape)


def standardize(groups: NormGroups, value: Node, eps: float) -> Node:
    """Divides `value`, whose means are zero, by sqrt(variance + eps).

    The division has two steps, so that int8 is precise enough. A division by the mean of |value| first brings all
    groups to a magnitude of about 1, so the squares of each group use the full int8 range. Without this step, the
    variance of a group with a tenth of the largest group's range would have about two and a half int8 steps.
    """
    rewriting = groups.rewriting
    magnitude = groups.mean(rewriting.call(aten.abs.default, value))
    root = rsqrt(rewriting, add(rewriting, magnitude, math.sqrt(eps / VARIANCE_FLOOR)))
    value = mul(rewriting, value, groups.broadcast(mul(rewriting, root, root)))
    variance = groups.mean(mul(rewriting, value, value))
    return mul(rewriting, value, groups.broadcast(rsqrt(rewriting, add(rewriting, variance, VARIANCE_FLOOR))))


def _normalize(groups: NormGroups, value: Node, scale: Node | None, shift: Node | None) -> Node:
    """Computes (value - mean) / sqrt(variance + eps) * scale + shift."""
    rewriting = groups.rewriting
    centered = sub(rewriting, value, groups.broadcast(groups.mean(value)))
    return _scale_and_shift(rewriting, standardize(groups, centered, rewriting.args["eps"]), scale, shift)


def _scale_and_shift(rewriting: Rewriting, value: Node, scale: Node | None, shift: Node | None) -> Node:
    if scale is not None and (rewriting.training or number_of(scale) != 1):
        value = mul(rewriting, value, scale)
    if shift is not None and (rewriting.training or number_of(shift) != 0):
        value = add(rewriting, value, shift)
    return value


def _last_dims(rewriting: Rewriting) -> list[int]:
    rank = len(rewriting.shape)
    return list(range(rank - len(rewriting.args["normalized_shape"]), rank))


def _layer_norm(rewriting: Rewriting) -> Node:
    args = rewriting.args
    return _normalize(DimNormGroups(rewriting, _last_dims(rewriting)), args["input"], args["weight"], args["bias"])


def _rms_norm(rewriting: Rewriting) -> Node:
    args = rewriting.args
    eps = torch.finfo(torch.float32).eps if args["eps"] is None else args["eps"]
    value = standardize(DimNormGroups(rewriting, _last_dims(rewriting)), args["input"], eps)
    return _scale_and_shift(rewriting, value, args["weight"], None)


def _per_channel(rewriting: Rewriting, name: str) -> Node | None:
    """Reshapes a constant with one value for each channel so that it broadcasts along dimension 1."""
    constant = rewriting.args[name]
    spatial = [1] * (len(rewriting.shape) - 2)
    return None if constant is None else rewriting.call(aten.reshape.default, constant, [-1, *spatial])


@constraint
def has_constant_affine(instance: OpInstance) -> bool:
    """Weight and bias, if given, are constants."""
    return all(instance.args[name] is None or instance.constant(name) is not None for name in ("weight", "bias"))


def _image_norm(rewriting: Rewriting, groups: int) -> Node:
    rank, channels = len(rewriting.shape), rewriting.shape[1]
    together: NormGroups = ChannelNormGroups(rewriting, groups)
    if groups == 1 or (groups == channels and rank > 2):
        together = DimNormGroups(rewriting, range(1 if groups == 1 else 2, rank))
    scale, shift = (_per_channel(rewriting, name) for name in ("weight", "bias"))
    return _normalize(together, rewriting.args["input"], scale, shift)


def _instance_norm(rewriting: Rewriting) -> Node:
    args = rewriting.args
    if args["use_input_stats"]:
        return _image_norm(rewriting, rewriting.shape[1])
    statistics = (args[name] for name in ("weight", "bias", "running_mean", "running_var"))
    options = (args["momentum"], args["eps"], args["cudnn_enabled"])
    return rewriting.call(aten.batch_norm.default, args["input"], *statistics, False, *options)


def _group_norm(rewriting: Rewriting) -> Node:
    return _image_norm(rewriting, rewriting.args["num_groups"])


def _has_computed_parameters(instance: OpInstance) -> bool:
    has_statistics = instance.args["running_mean"] is not None and not instance.args["training"]
    return has_statistics and not instance.reads_constants("weight", "bias", "running_mean", "running_var")


def _computed_batch_norm(rewriting: Rewriting) -> Node:
    mean_of, variance, scale, shift = (
        _per_channel(rewriting, name) for name in ("running_mean", "running_var", "weight", "bias")
    )
    assert mean_of is not None
    assert variance is not None
    root = rsqrt(rewriting, add(rewriting, variance, rewriting.args["eps"]))
    factor = root if scale is None else mul(rewriting, root, scale)
    return _scale_and_shift(
        rewriting, mul(rewriting, sub(rewriting, rewriting.args["input"], mean_of), factor), None, shift
    )


_STANDARDIZED = "abs, mean, add, rsqrt, mul, mul, mul, mean, add, rsqrt, mul"
_TWO_STEPS = (
    "The input is divided by the mean of abs(x) first, and then by the root of the mean of the squares. The variance "
    "of groups with a small range is therefore precise enough in int8."
)
_ROOT_OF_A_TIE = "A difference of one step before the inverse root can become two steps after the division."

DECOMPOSED = (
    Decomposition(
        name="layer_norm",
        targets=("aten.layer_norm.default",),
        rewrite=_layer_norm,
        facts=Facts(is_continuous=True),
        becomes=f"mean, sub, {_STANDARDIZED}; mul for the weight, add for the bias",
        approximation=APPROXIMATION,
        tolerance=2,
        notes=f"{_TWO_STEPS} {_ROOT_OF_A_TIE}",
    ),
    Decomposition(
        name="rms_norm",
        targets=("aten.rms_norm.default",),
        rewrite=_rms_norm,
        facts=Facts(is_continuous=True),
        becomes=f"{_STANDARDIZED}; mul for the weight",
        approximation=APPROXIMATION,
        tolerance=2,
        notes=f"See layer_norm. {_ROOT_OF_A_TIE}",
    ),
    Decomposition(
        name="group_norm",
        targets=("aten.group_norm.default",),
        rewrite=_group_norm,
        facts=Facts(is_continuous=True),
        becomes="as layer_norm, with means over channels and then over groups",
        constraints=(has_constant_affine,),
        approximation=APPROXIMATION,
        notes="See layer_norm. A mul with ones repeats the mean of each group for its channels.",
    ),
    Decomposition(
        name="instance_norm",
        targets=("aten.instance_norm.default",),
        rewrite=_instance_norm,
        facts=Facts(is_continuous=True),
        becomes="as layer_norm; as batch_norm with running statistics",
        constraints=(has_constant_affine,),
        approximation=APPROXIMATION,
        notes="See layer_norm.",
    ),
    Decomposition(
        name="batch_norm with computed parameters",
        targets=("aten.batch_norm.default",),
        rewrite=_computed_batch_norm,
        applies=_has_computed_parameters,
        becomes="sub, add, rsqrt, mul; mul for the weight, add for the bias",
        tolerance=2,
        notes="Any other batch norm in eval mode is folded into the operator before it, or becomes a depthwise "
        "convolution.",
    ),
)
