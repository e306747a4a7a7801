"""Operators that only move values: their output has the qparams of their inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch.fx import Node

from openneutron.fx import iterate_nodes, shape_of
from openneutron.ir.graph import Kind, Layout, Tensor
from openneutron.ir.views import swapped_blocks
from openneutron.ops.lowering import INT8, Lowering
from openneutron.ops.site import Site
from openneutron.ops.spec import OpSpec, OutputRule, PaddedDimensions, constraint, legacy_constraint
from openneutron.ops.windows import PAD, PADV2, pad_behind
from openneutron.targets import Generation, NeutronTarget

__all__ = ["CONCATENATION", "SLICE", "SPECS", "is_legacy_swap", "slice_of"]

CONCATENATION = Kind("CONCATENATION", "ConcatenationOptions", Layout.AXES, axes=("axis",))
SLICE = Kind("SLICE", "SliceOptions", Layout.AXES, operands=("begin", "size"), dimensions=("begin", "size"))
MIRROR_PAD = Kind("MIRROR_PAD", "MirrorPadOptions", Layout.AXES, operands=("paddings",), dimensions=("paddings",))

# Torch's number of each dimension of an image [N, H, W, C].
NHWC = (0, 2, 3, 1)

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
def swaps_two_blocks(site: Site) -> bool:
    """It swaps two runs of dimensions, as NHWC to NCHW does for a batch of 1; dimensions of size 1 do not count."""
    return swapped_blocks(site.shape_of("self"), _permutation(site)) is not None


@legacy_constraint
def swaps_whole_granules(site: Site) -> bool:
    """One of the two runs holds a multiple of the MACs of a pipeline."""
    blocks = swapped_blocks(site.shape_of("self"), _permutation(site))
    return blocks is None or is_legacy_swap(blocks, site.target)


def is_legacy_swap(blocks: tuple[int, int], target: NeutronTarget) -> bool:
    """Whether the legacy generation swaps runs of these sizes."""
    return 1 in blocks or any(size % target.channel_granularity == 0 for size in blocks)


def lower_permute(lowering: Lowering) -> Tensor:
    """TRANSPOSE."""
    return lowering.transpose(lowering.tensor("self"), _permutation(lowering.site))


def _concatenated_dim(site: Site) -> int:
    return int(site.args["dim"]) % len(site.shape)


@legacy_constraint
def does_not_concatenate_batches(site: Site) -> bool:
    """It is not along dimension 0."""
    return _concatenated_dim(site) != 0 or len(site.args["tensors"]) == 1


def _channel_dim(site: Site) -> int:
    return 1 if len(site.shape) >= 3 else len(site.shape) - 1


@legacy_constraint
def concatenates_whole_granules(site: Site) -> bool:
    """The channels of every input are a multiple of the MACs of a pipeline."""
    shapes = [shape_of(node) for node in iterate_nodes(site.args["tensors"])]
    sizes = (shape[_channel_dim(site)] for shape in shapes)
    return len(shapes) == 1 or all(size % site.target.channel_granularity == 0 for size in sizes)


def _padded_channels(site: Site) -> PaddedDimensions:
    """Its channels, unless it is along them: padding would come between the inputs."""
    return {} if _concatenated_dim(site) == _channel_dim(site) else {"tensors": (_channel_dim(site),)}


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
    if lowering.site.generation is Generation.LEGACY and len(lowering.shape) == 4:
        return _cat_of_images(lowering, inputs, axis)
    return lowering.emit(CONCATENATION, inputs, lowering.shape, axis=axis, fused_activation_function="NONE")


def _cat_of_images(lowering: Lowering, inputs: Sequence[Tensor], dim: int) -> Tensor:
    """In NHWC, where the legacy generation counts the channels; `dim` is torch's."""
    images, shape = [lowering.channels_last(tensor) for tensor in inputs], [lowering.shape[i] for i in NHWC]
    kind, axis = replace(CONCATENATION, layout=Layout.FIXED), NHWC.index(dim)
    joined = lowering.emit(kind, images, shape, axis=axis, fused_activation_function="NONE")
    return lowering.channels_first(joined)


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
    return slice_of(lowering, inputs, begin, size)


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


def slice_of(lowering: Lowering, tensor: Tensor, begin: Sequence[int], size: tuple[int, ...]) -> Tensor:
    """SLICE, or nothing where it takes all.

    The legacy generation slices dimensions that are multiples of the MACs of a pipeline: others are padded before.
    """
    if size == tensor.shape:
        return tensor
    if lowering.site.generation is Generation.LEGACY:
        target = lowering.site.target
        sizes = zip(tensor.shape, size, strict=True)
        shape = tuple(length if length == kept else target.whole_granules(length) for length, kept in sizes)
        tensor = pad_behind(lowering, tensor, shape)
    return lowering.emit(SLICE, [tensor], size, tensor.qparams, begin=tuple(begin), size=size)


def lower_slice(lowering: Lowering) -> Tensor:
    """SLICE, or nothing where it takes all."""
    inputs = lowering.tensor("self")
    dim, first, _ = _slice_bounds(lowering.site)
    begin = tuple(first if other == dim else 0 for other in range(len(inputs.shape)))
    return slice_of(lowering, inputs, begin, lowering.shape)


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
        constraints=(has_rank_for_transpose, swaps_two_blocks, swaps_whole_granules),
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
        pads=_padded_channels,
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
        constraints=(pads_by_constant_or_reflection, does_not_crop_a_reflection),
        lower=lower_pad,
        becomes="PAD, PADV2 or MIRROR_PAD; negative padding: SLICE, as that of slice",
        is_compute=False,
    ),
    OpSpec(
        name="slice",
        targets=("aten.slice.Tensor",),
        edge_targets=("aten.slice_copy.Tensor",),
        inputs=("self",),
        output=OutputRule.SHARED,
        constraints=(slices_without_steps,),
        lower=lower_slice,
        becomes="SLICE, or nothing; for the legacy generation a PAD before it where needed",
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
