"""Operators that only move values: their output has the qparams of their inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch.fx import Node

from openneutron.fx import iterate_nodes, op_name, shape_of
from openneutron.ir.graph import Kind, Layout, Tensor
from openneutron.ops.lowering import INT8, Lowering
from openneutron.ops.site import Site
from openneutron.ops.spec import OpSpec, OutputRule, constraint, legacy_constraint
from openneutron.ops.windows import PAD, PADV2

__all__ = [
    "CONCATENATION", "MIRROR_PAD", "SLICE", "SPECS", "concatenates_whole_granules", "copies", "has_rank_for_kernels",
    "has_rank_for_transpose", "joined", "part",
]  # fmt: skip

CONCATENATION = Kind("CONCATENATION", "ConcatenationOptions", Layout.AXES, axes=("axis",))
SLICE = Kind("SLICE", "SliceOptions", Layout.AXES, operands=("begin", "size"), dimensions=("begin", "size"))
MIRROR_PAD = Kind("MIRROR_PAD", "MirrorPadOptions", Layout.AXES, operands=("paddings",), dimensions=("paddings",))

MAX_RESHAPE_RANK = 7
MAX_TRANSPOSE_RANK = 6
MAX_KERNEL_RANK = 6
MAX_COPIES = 8  # that one CONCATENATION makes


def part(lowering: Lowering, tensor: Tensor, dim: int, first: int, count: int) -> Tensor:
    """`count` indices of a dimension from `first` on: a SLICE, or nothing where these are all."""
    size = tuple(count if other == dim else length for other, length in enumerate(tensor.shape))
    if size == tensor.shape:
        return tensor
    begin = tuple(first if other == dim else 0 for other in range(len(size)))
    return lowering.emit(SLICE, [tensor], size, tensor.qparams, begin=begin, size=size)


def joined(lowering: Lowering, tensors: Sequence[Tensor], dim: int) -> Tensor:
    """Tensors one behind the other along a dimension: a CONCATENATION, or nothing where there is one."""
    first = tensors[0]
    if len(tensors) == 1:
        return first
    total = sum(tensor.shape[dim] for tensor in tensors)
    shape = tuple(total if other == dim else length for other, length in enumerate(first.shape))
    return lowering.emit(CONCATENATION, tensors, shape, first.qparams, axis=dim, fused_activation_function="NONE")


def copies(lowering: Lowering, tensor: Tensor, dim: int, count: int) -> Tensor:
    """`tensor` `count` times along a dimension: each CONCATENATION joins eight times what the one before it did."""
    if count <= MAX_COPIES:
        return joined(lowering, [tensor] * count, dim)
    block = copies(lowering, tensor, dim, count // MAX_COPIES)
    return joined(lowering, [block] * MAX_COPIES + [tensor] * (count % MAX_COPIES), dim)


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


@constraint
def has_rank_for_kernels(site: Site) -> bool:
    """There are at most {MAX_KERNEL_RANK} dimensions."""
    return len(site.shape) <= MAX_KERNEL_RANK


def permutation(node: Node) -> tuple[int, ...]:
    """perm of an operator whose dimension i is dimension perm[i] of its input, whatever form its arguments have."""
    inputs, *rest = node.args
    assert isinstance(inputs, Node)
    assert isinstance(node.target, torch._ops.OpOverload)
    # No two dimensions have the same size here, so the output's sizes say where each came from.
    sizes = range(2, 2 + len(shape_of(inputs)))
    permuted = node.target(torch.empty(tuple(sizes), device="meta"), *rest, **node.kwargs)
    return tuple(sizes.index(size) for size in permuted.shape)


@legacy_constraint
def permutes_whole_granules(site: Site) -> bool:
    """Of rank 4: NHWC to NCHW, batch 1, H x W x C and one of C and H x W multiples of the MACs of a pipeline."""
    if len(site.shape) != 4 or permutation(site.node) != (0, 3, 1, 2):
        return False
    (batch, height, width, channels), granularity = site.shape_of("self"), site.target.channel_granularity
    return (
        batch == 1
        and height * width * channels % granularity == 0
        and (channels % granularity == 0 or height * width % granularity == 0)
    )


def lower_permute(lowering: Lowering) -> Tensor:
    """TRANSPOSE."""
    return lowering.transpose(lowering.tensor("self"), permutation(lowering.site.node))


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
    return joined(lowering, lowering.tensors("tensors"), _concatenated_dim(lowering.site))


def _paddings(site: Site) -> tuple[tuple[int, int], ...]:
    """(in front, behind) for each dimension; torch lists them from the last dimension on."""
    flat, rank = list(site.args.get("pad") or site.args.get("padding") or ()), len(site.shape)
    pairs = [(int(flat[i]), int(flat[i + 1])) for i in range(0, len(flat), 2)]
    return tuple(reversed(pairs + [(0, 0)] * (rank - len(pairs))))


def _mode(site: Site) -> str:
    for mode, name in (("reflect", "aten.reflection_pad"), ("replicate", "aten.replication_pad")):
        if op_name(site.node).startswith(name):
            return mode
    return str(site.args.get("mode", "constant"))


def _pad_value(site: Site) -> float:
    value = site.args.get("value")
    return 0.0 if value is None else float(value)


def _keeps_values(site: Site) -> bool:
    """Whether it adds nothing but zero, which int8 has: any other value is rounded."""
    return _mode(site) != "constant" or _pad_value(site) == 0


def _crops(site: Site) -> bool:
    return any(width < 0 for pair in _paddings(site) for width in pair)


@legacy_constraint
def does_not_crop(site: Site) -> bool:
    """No padding is negative."""
    return not _crops(site)


@constraint
def crops_constants_only(site: Site) -> bool:
    """No padding is negative unless the mode is 'constant'."""
    return _mode(site) == "constant" or not _crops(site)


@legacy_constraint
def pads_without_copies(site: Site) -> bool:
    """The mode is 'constant' or 'reflect'."""
    return _mode(site) in ("constant", "reflect")


def _cropped(lowering: Lowering, inputs: Tensor, paddings: Sequence[tuple[int, int]]) -> Tensor:
    """What negative padding leaves of the input."""
    begin = tuple(max(0, -front) for front, _ in paddings)
    size = tuple(
        length + min(0, front) + min(0, behind) for length, (front, behind) in zip(inputs.shape, paddings, strict=True)
    )
    return inputs if size == inputs.shape else lowering.emit(SLICE, [inputs], size, begin=begin, size=size)


def lower_pad(lowering: Lowering) -> Tensor:
    """SLICE for negative padding; PAD with real zero, PADV2 with any other value, MIRROR_PAD for reflection,
    CONCATENATION of slices for the other modes.
    """
    paddings = _paddings(lowering.site)
    inputs = _cropped(lowering, lowering.tensor("self"), paddings)
    paddings = tuple((max(0, front), max(0, behind)) for front, behind in paddings)
    if not any(width for pair in paddings for width in pair):
        return inputs
    mode = _mode(lowering.site)
    if mode == "reflect":
        return lowering.emit(MIRROR_PAD, [inputs], lowering.shape, paddings=paddings, mode="REFLECT")
    if mode != "constant":
        edges = _replicated if mode == "replicate" else _wrapped
        for dim, (front, behind) in enumerate(paddings):
            before, after = edges(lowering, inputs, dim, front, behind)
            inputs = joined(lowering, [*before, inputs, *after], dim)
        return inputs
    code = lowering.output.quantize(_pad_value(lowering.site))
    if code == lowering.output.zero_point[0]:
        return lowering.emit(PAD, [inputs], lowering.shape, paddings=paddings)
    value = lowering.constant(np.array([code], INT8), lowering.output)
    return lowering.emit(PADV2, [inputs, value], lowering.shape, paddings=paddings)


def _replicated(lowering: Lowering, inputs: Tensor, dim: int, front: int, behind: int) -> tuple[list[Tensor], ...]:
    """The first index of a dimension `front` times, and the last one `behind` times."""
    last = inputs.shape[dim] - 1
    before = [copies(lowering, part(lowering, inputs, dim, 0, 1), dim, front)] if front else []
    after = [copies(lowering, part(lowering, inputs, dim, last, 1), dim, behind)] if behind else []
    return before, after


def _wrapped(lowering: Lowering, inputs: Tensor, dim: int, front: int, behind: int) -> tuple[list[Tensor], ...]:
    """The last `front` indices of a dimension, and the first `behind` ones."""
    size = inputs.shape[dim]
    before = [part(lowering, inputs, dim, size - front, front)] if front else []
    after = [part(lowering, inputs, dim, 0, behind)] if behind else []
    return before, after


def _sliced(site: Site) -> tuple[int, int, int]:
    """Dimension, first index and number of indices of a slice, a narrow or a select."""
    args, shape = site.args, site.shape_of("self")
    dim = int(args["dim"]) % len(shape)
    start = args["index"] if "index" in args else args["start"] or 0
    first = min(max(start + shape[dim] if start < 0 else start, 0), shape[dim])
    return dim, first, 1 if "index" in args else site.shape[dim]


@constraint
def slices_without_steps(site: Site) -> bool:
    """The step is 1."""
    return bool(site.args.get("step", 1) == 1)


@legacy_constraint
def slices_whole_granules(site: Site) -> bool:
    """The dimension it slices is a multiple of the MACs of a pipeline."""
    dim, _, _ = _sliced(site)
    return site.shape_of("self")[dim] % site.target.channel_granularity == 0


def lower_slice(lowering: Lowering) -> Tensor:
    """SLICE, or nothing where it takes all; select drops the dimension."""
    return lowering.reshape(part(lowering, lowering.tensor("self"), *_sliced(lowering.site)), lowering.shape)


def _is_eval(site: Site) -> bool:
    return not site.args["train"]


@constraint
def is_in_eval_mode(site: Site) -> bool:
    """The model is in eval mode."""
    return _is_eval(site)


SPECS = (
    OpSpec(
        name="reshape",
        targets=(
            "aten.view.default",
            "aten.reshape.default",
            "aten._unsafe_view.default",
            "aten.flatten.using_ints",
            "aten.ravel.default",
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
        targets=(
            "aten.permute.default",
            "aten.transpose.int",
            "aten.swapaxes.default",
            "aten.swapdims.default",
            "aten.movedim.int",
            "aten.movedim.intlist",
            "aten.moveaxis.int",
            "aten.moveaxis.intlist",
            "aten.t.default",
            "aten.numpy_T.default",
            "aten.mT.default",
            "aten.mH.default",
            "aten.matrix_H.default",
            "aten.adjoint.default",
        ),
        edge_targets=("aten.permute_copy.default", "aten.transpose_copy.int", "aten.t_copy.default"),
        inputs=("self",),
        output=OutputRule.SHARED,
        constraints=(has_rank_for_transpose, permutes_whole_granules),
        lower=lower_permute,
        becomes="TRANSPOSE, or nothing",
        is_compute=False,
    ),
    OpSpec(
        name="cat",
        targets=("aten.cat.default", "aten.concat.default", "aten.concatenate.default"),
        edge_targets=("aten.cat.default",),
        inputs=("tensors",),
        output=OutputRule.SHARED,
        constraints=(
            concatenates_equal_ranks,
            has_rank_for_kernels,
            does_not_concatenate_batches,
            concatenates_whole_granules,
        ),
        lower=lower_cat,
        becomes="CONCATENATION",
        is_compute=False,
    ),
    OpSpec(
        name="pad",
        targets=(
            "aten.pad.default",
            "aten.constant_pad_nd.default",
            "aten.reflection_pad1d.default",
            "aten.reflection_pad2d.default",
            "aten.reflection_pad3d.default",
            "aten.replication_pad1d.default",
            "aten.replication_pad2d.default",
            "aten.replication_pad3d.default",
        ),
        edge_targets=("aten.constant_pad_nd.default",),
        inputs=("self",),
        output=OutputRule.SHARED,
        keeps_values=_keeps_values,
        constraints=(has_rank_for_kernels, crops_constants_only, pads_without_copies, does_not_crop),
        lower=lower_pad,
        becomes="PAD, PADV2 or MIRROR_PAD; negative padding: SLICE; replicate and circular: SLICE and CONCATENATION",
        notes="ExecuTorch's own CPU kernel refuses negative padding, so the legacy generation cannot run it at all.",
        is_compute=False,
    ),
    OpSpec(
        name="slice",
        targets=("aten.slice.Tensor", "aten.narrow.default"),
        edge_targets=("aten.slice_copy.Tensor",),
        inputs=("self",),
        output=OutputRule.SHARED,
        constraints=(slices_without_steps, slices_whole_granules),
        lower=lower_slice,
        becomes="SLICE, or nothing",
        is_compute=False,
    ),
    OpSpec(
        name="select",
        targets=("aten.select.int",),
        edge_targets=("aten.select_copy.int",),
        inputs=("self",),
        output=OutputRule.SHARED,
        constraints=(slices_whole_granules,),
        lower=lower_slice,
        becomes="SLICE and RESHAPE",
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
    OpSpec(
        name="copy",
        targets=(
            "aten.clone.default",
            "aten.contiguous.default",
            "aten.alias.default",
            "aten.detach.default",
            "aten.detach_.default",
            "aten.lift_fresh_copy.default",
        ),
        edge_targets=("dim_order_ops._clone_dim_order.default", "aten.alias_copy.default", "aten.detach_copy.default"),
        inputs=("self",),
        output=OutputRule.SHARED,
        lower=lower_identity,
        becomes="nothing",
        notes="Its memory format counts at the ends of the NPU's part alone.",
        is_compute=False,
    ),
    OpSpec(
        name="to",
        targets=(
            "aten.to.dtype",
            "aten.to.dtype_layout",
            "aten.to.device",
            "aten.to.other",
            "aten.type_as.default",
            "aten._to_copy.default",
        ),
        edge_targets=("dim_order_ops._to_dim_order_copy.default",),
        inputs=("self",),
        output=OutputRule.SHARED,
        lower=lower_identity,
        becomes="nothing",
        notes="From float32 to float32. Its memory format counts at the ends of the NPU's part alone.",
        is_compute=False,
    ),
)
