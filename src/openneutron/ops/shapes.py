"""Operators that only move values: their output has the qparams of their inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch.fx import Node

from openneutron.fx import iterate_nodes, shape_of
from openneutron.ir.graph import Kind, Layout, Tensor
from openneutron.ops.lowering import INT8, Lowering
from openneutron.ops.site import Site
from openneutron.ops.spec import OpSpec, OutputRule, constraint, legacy_constraint
from openneutron.ops.windows import PAD, PADV2

__all__ = ["CONCATENATION", "SLICE", "SPECS"]

CONCATENATION = Kind("CONCATENATION", "ConcatenationOptions", Layout.AXES, axes=("axis",))
SLICE = Kind("SLICE", "SliceOptions", Layout.AXES, operands=("begin", "size"), dimensions=("begin", "size"))
MIRROR_PAD = Kind("MIRROR_PAD", "MirrorPadOptions", Layout.AXES, operands=("paddings",), dimensions=("paddings",))

MAX_RESHAPE_RANK = 7
MAX_TRANSPOSE_RANK = 6


def lower_reshape(lowering: Lowering) -> Tensor:
    """RESHAPE, unless the shape stays."""
    return lowering.reshape(lowering.tensor("self"), lowering.shape)


def lower_identity(lowering: Lowering) -> Tensor:
    """Nothing: the input itself."""
    return lowering.tensor("input" if "input" in lowering.args else "self")


@constraint
def has_rank_for_reshape(site: Site) -> bool:
    """Neither shape has more than {MAX_RESHAPE_RANK} dimensions."""
    return max(len(site.shape), len(site.shape_of("self"))) <= MAX_RESHAPE_RANK


@constraint
def has_rank_for_transpose(site: Site) -> bool:
    """There are at most {MAX_TRANSPOSE_RANK} dimensions."""
    return len(site.shape) <= MAX_TRANSPOSE_RANK


def _permutation(site: Site) -> tuple[int, ...]:
    rank = len(site.shape)
    if "dims" in site.args:
        return tuple(dim % rank for dim in site.args["dims"])
    perm = list(range(rank))
    first, second = site.args["dim0"] % rank, site.args["dim1"] % rank
    perm[first], perm[second] = perm[second], perm[first]
    return tuple(perm)


@legacy_constraint
def permutes_whole_granules(site: Site) -> bool:
    """Of rank 4: NHWC to NCHW, batch 1, H x W x C and one of C and H x W multiples of the MACs of a pipeline."""
    if len(site.shape) != 4 or _permutation(site) != (0, 3, 1, 2):
        return False
    (batch, height, width, channels), granularity = site.shape_of("self"), site.target.channel_granularity
    return (
        batch == 1
        and height * width * channels % granularity == 0
        and (channels % granularity == 0 or height * width % granularity == 0)
    )


def lower_permute(lowering: Lowering) -> Tensor:
    """TRANSPOSE."""
    return lowering.transpose(lowering.tensor("self"), _permutation(lowering.site))


def _concatenated_dim(site: Site) -> int:
    return int(site.args["dim"]) % len(site.shape)


@legacy_constraint
def does_not_concatenate_batches(site: Site) -> bool:
    """It concatenates at least two tensors, not along dimension 0."""
    return _concatenated_dim(site) != 0 and len(site.args["tensors"]) >= 2


@legacy_constraint
def concatenates_whole_granules(site: Site) -> bool:
    """The channels of every input are a multiple of the MACs of a pipeline."""
    shapes = [shape_of(node) for node in iterate_nodes(site.args["tensors"])]
    channel = 1 if len(site.shape) >= 3 else -1
    return all(shape[channel] % site.target.channel_granularity == 0 for shape in shapes)


@constraint
def concatenates_equal_ranks(site: Site) -> bool:
    """All inputs have as many dimensions as the output, and elements."""
    shapes = [shape_of(node) for node in iterate_nodes(site.args["tensors"])]
    return all(len(shape) == len(site.shape) and math.prod(shape) > 0 for shape in shapes)


def lower_cat(lowering: Lowering) -> Tensor:
    """CONCATENATION, unless there is one input."""
    inputs = lowering.tensors("tensors")
    if len(inputs) == 1:
        return inputs[0]
    axis = _concatenated_dim(lowering.site)
    return lowering.emit(CONCATENATION, inputs, lowering.shape, axis=axis, fused_activation_function="NONE")


def _paddings(site: Site) -> tuple[tuple[int, int], ...]:
    """(in front, behind) for each dimension; torch lists them from the last dimension on."""
    flat, rank = list(site.args["pad"]), len(site.shape)
    pairs = [(int(flat[i]), int(flat[i + 1])) for i in range(0, len(flat), 2)]
    return tuple(reversed(pairs + [(0, 0)] * (rank - len(pairs))))


def _mode(site: Site) -> str:
    return str(site.args.get("mode", "constant"))


def _pad_value(site: Site) -> float:
    value = site.args.get("value")
    return 0.0 if value is None else float(value)


@constraint
def pads_by_constant_or_reflection(site: Site) -> bool:
    """The mode is 'constant' or 'reflect'."""
    return _mode(site) in ("constant", "reflect")


def _crops(site: Site) -> bool:
    return any(width < 0 for pair in _paddings(site) for width in pair)


@legacy_constraint
def does_not_crop(site: Site) -> bool:
    """No padding is negative."""
    return not _crops(site)


@constraint
def does_not_crop_a_reflection(site: Site) -> bool:
    """No padding is negative where the mode is 'reflect'."""
    return _mode(site) != "reflect" or not _crops(site)


def _cropped(lowering: Lowering, inputs: Tensor, paddings: Sequence[tuple[int, int]]) -> Tensor:
    """What negative padding leaves of the input."""
    begin = tuple(max(0, -front) for front, _ in paddings)
    size = tuple(
        length + min(0, front) + min(0, behind)
        for length, (front, behind) in zip(inputs.shape, paddings, strict=True)
    )
    return inputs if size == inputs.shape else lowering.emit(SLICE, [inputs], size, begin=begin, size=size)


def lower_pad(lowering: Lowering) -> Tensor:
    """SLICE for negative padding; PAD with real zero, PADV2 with any other value, MIRROR_PAD for reflection."""
    paddings = _paddings(lowering.site)
    inputs = _cropped(lowering, lowering.tensor("self"), paddings)
    if inputs.shape == lowering.shape and not any(width > 0 for pair in paddings for width in pair):
        return inputs
    paddings = tuple((max(0, front), max(0, behind)) for front, behind in paddings)
    if _mode(lowering.site) == "reflect":
        return lowering.emit(MIRROR_PAD, [inputs], lowering.shape, paddings=paddings, mode="REFLECT")
    code = lowering.output.quantize(_pad_value(lowering.site))
    if code == lowering.output.zero_point[0]:
        return lowering.emit(PAD, [inputs], lowering.shape, paddings=paddings)
    value = lowering.constant(np.array([code], INT8), lowering.output)
    return lowering.emit(PADV2, [inputs, value], lowering.shape, paddings=paddings)


def _slice_bounds(site: Site) -> tuple[int, int, int]:
    """Dimension, first index and number of elements of a slice."""
    shape = site.shape_of("self")
    dim = int(site.args["dim"]) % len(shape)
    start = site.args["start"] or 0
    first = min(max(start + shape[dim] if start < 0 else start, 0), shape[dim])
    return dim, first, site.shape[dim]


@constraint
def slices_without_steps(site: Site) -> bool:
    """The step is 1."""
    return bool(site.args["step"] == 1)


@legacy_constraint
def slices_whole_granules(site: Site) -> bool:
    """The dimension it slices is a multiple of the MACs of a pipeline."""
    dim, _, _ = _slice_bounds(site)
    return site.shape_of("self")[dim] % site.target.channel_granularity == 0


def lower_slice(lowering: Lowering) -> Tensor:
    """SLICE, or nothing where it takes all."""
    inputs = lowering.tensor("self")
    dim, first, _ = _slice_bounds(lowering.site)
    if inputs.shape == lowering.shape:
        return inputs
    begin = tuple(first if other == dim else 0 for other in range(len(inputs.shape)))
    return lowering.emit(SLICE, [inputs], lowering.shape, begin=begin, size=lowering.shape)


def _is_eval(site: Site) -> bool:
    return not site.args["train"]


@constraint
def is_in_eval_mode(site: Site) -> bool:
    """The model is in eval mode."""
    return _is_eval(site)


def _shared(_: Node) -> OutputRule:
    return OutputRule.SHARED


SPECS = (
    OpSpec(
        name="reshape",
        targets=(
            "aten.view.default",
            "aten.reshape.default",
            "aten._unsafe_view.default",
            "aten.flatten.using_ints",
            "aten.unflatten.int",
            "aten.squeeze.default",
            "aten.squeeze.dim",
            "aten.squeeze.dims",
            "aten.unsqueeze.default",
        ),
        edge_targets=("aten.view_copy.default", "aten.squeeze_copy.dims", "aten.unsqueeze_copy.default"),
        inputs=("self",),
        output=OutputRule.SHARED,
        constraints=(has_rank_for_reshape,),
        lower=lower_reshape,
        becomes="RESHAPE, or nothing",
        is_compute=False,
    ),
    OpSpec(
        name="permute",
        targets=("aten.permute.default", "aten.transpose.int"),
        edge_targets=("aten.permute_copy.default", "aten.transpose_copy.int"),
        inputs=("self",),
        output=OutputRule.SHARED,
        constraints=(has_rank_for_transpose, permutes_whole_granules),
        lower=lower_permute,
        becomes="TRANSPOSE, or nothing",
        is_compute=False,
    ),
    OpSpec(
        name="cat",
        targets=("aten.cat.default", "aten.concat.default"),
        edge_targets=("aten.cat.default",),
        inputs=("tensors",),
        output=OutputRule.SHARED,
        constraints=(concatenates_equal_ranks, does_not_concatenate_batches, concatenates_whole_granules),
        lower=lower_cat,
        becomes="CONCATENATION",
        is_compute=False,
    ),
    OpSpec(
        name="pad",
        targets=("aten.pad.default", "aten.constant_pad_nd.default"),
        edge_targets=("aten.constant_pad_nd.default",),
        inputs=("self",),
        output=OutputRule.SHARED,
        constraints=(pads_by_constant_or_reflection, does_not_crop_a_reflection, does_not_crop),
        lower=lower_pad,
        becomes="PAD, PADV2 or MIRROR_PAD; negative padding: SLICE",
        notes="ExecuTorch's own CPU kernel refuses negative padding, so the legacy generation cannot run it at all.",
        is_compute=False,
    ),
    OpSpec(
        name="slice",
        targets=("aten.slice.Tensor",),
        edge_targets=("aten.slice_copy.Tensor",),
        inputs=("self",),
        output=OutputRule.SHARED,
        constraints=(slices_without_steps, slices_whole_granules),
        lower=lower_slice,
        becomes="SLICE, or nothing",
        is_compute=False,
    ),
    OpSpec(
        name="dropout",
        targets=("aten.dropout.default", "aten.dropout_.default", "aten.feature_dropout.default"),
        inputs=("input",),
        output=OutputRule.SHARED,
        constraints=(is_in_eval_mode,),
        lower=lower_identity,
        becomes="nothing",
        is_compute=False,
    ),
)
