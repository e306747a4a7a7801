"""Declarations and lowerings of operators that only move values. Output and inputs have the same qparams."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch.fx import Node

from openneutron.core.fx import arguments, iterate_nodes, op_name, shape_of
from openneutron.ir.graph import Layout, Tensor
from openneutron.ir.kinds import CONCATENATION
from openneutron.ir.views import swapped_blocks
from openneutron.ops.facts import Facts, Movement
from openneutron.ops.lowering import Lowering
from openneutron.ops.op_instance import OpInstance
from openneutron.ops.slices_and_concats import concat, has_rank_for_kernels, slice_dim
from openneutron.ops.spec import HandledOperator, OpSpec, OutputRule, PaddedDimensions, constraint, legacy_constraint
from openneutron.targets import Generation, NeutronTarget

__all__ = [
    "HANDLED",
    "SPECS",
    "has_rank_for_transpose",
    "is_legacy_swap",
    "needs_strides",
    "permutation",
    "read_indices",
    "takes_sizes",
]

# For each dimension of an image [N, H, W, C], the number of that dimension in torch's order.
NHWC = (0, 2, 3, 1)

MAX_RESHAPE_RANK = 7
MAX_TRANSPOSE_RANK = 6


def lower_reshape(lowering: Lowering) -> Tensor:
    """Emits RESHAPE, or nothing for the same shape."""
    return lowering.reshape(lowering.tensor("self"), lowering.shape)


def lower_identity(lowering: Lowering) -> Tensor:
    """Returns the input itself."""
    return lowering.tensor("input" if "input" in lowering.args else "self")


@constraint
def has_rank_for_reshape(instance: OpInstance) -> bool:
    """The input and the output have at most {MAX_RESHAPE_RANK} dimensions."""
    return max(len(instance.shape), len(instance.shape_of("self"))) <= MAX_RESHAPE_RANK


@constraint
def has_rank_for_transpose(instance: OpInstance) -> bool:
    """The output has at most {MAX_TRANSPOSE_RANK} dimensions."""
    return len(instance.shape) <= MAX_TRANSPOSE_RANK


def permutation(node: Node) -> tuple[int, ...]:
    """Returns perm for a transpose in any form: dimension i of the output is dimension perm[i] of the input."""
    inputs, *rest = node.args
    assert isinstance(inputs, Node)
    assert isinstance(node.target, torch._ops.OpOverload)
    # Each dimension has a different size here, so a size of the output identifies the dimension of the input.
    sizes = range(2, 2 + len(shape_of(inputs)))
    permuted = node.target(torch.empty(tuple(sizes), device="meta"), *rest, **node.kwargs)
    return tuple(sizes.index(size) for size in permuted.shape)


@legacy_constraint
def swaps_two_blocks(instance: OpInstance) -> bool:
    """It swaps two blocks of consecutive dimensions, such as NHWC to NCHW for a batch of 1. Dimensions of size 1 do not
    count.
    """
    return swapped_blocks(instance.shape_of("self"), permutation(instance.node)) is not None


@legacy_constraint
def swaps_aligned_dimensions(instance: OpInstance) -> bool:
    """The number of elements of one of the two swapped blocks is a multiple of the MACs per pipeline."""
    blocks = swapped_blocks(instance.shape_of("self"), permutation(instance.node))
    return blocks is None or is_legacy_swap(blocks, instance.target)


def is_legacy_swap(blocks: tuple[int, int], target: NeutronTarget) -> bool:
    """Whether the legacy generation can swap blocks of these sizes."""
    return 1 in blocks or any(size % target.channel_granularity == 0 for size in blocks)


def lower_permute(lowering: Lowering) -> Tensor:
    """Emits TRANSPOSE."""
    return lowering.transpose(lowering.tensor("self"), permutation(lowering.instance.node))


def _concatenated_dim(instance: OpInstance) -> int:
    return int(instance.args["dim"]) % len(instance.shape)


@legacy_constraint
def does_not_concatenate_batches(instance: OpInstance) -> bool:
    """The concatenated dimension is not dimension 0."""
    return _concatenated_dim(instance) != 0 or len(instance.args["tensors"]) == 1


def _channel_dim(instance: OpInstance) -> int:
    return 1 if len(instance.shape) >= 3 else len(instance.shape) - 1


@legacy_constraint
def concatenates_aligned_channels(instance: OpInstance) -> bool:
    """The channels of every input are a multiple of the MACs per pipeline."""
    shapes = [shape_of(node) for node in iterate_nodes(instance.args["tensors"])]
    sizes = (shape[_channel_dim(instance)] for shape in shapes)
    return len(shapes) == 1 or all(size % instance.target.channel_granularity == 0 for size in sizes)


def _padded_channels(instance: OpInstance) -> PaddedDimensions:
    """Its channels, unless they are the concatenated dimension, where padding would come between the inputs."""
    return {} if _concatenated_dim(instance) == _channel_dim(instance) else {"tensors": (_channel_dim(instance),)}


@constraint
def concatenates_equal_ranks(instance: OpInstance) -> bool:
    """All inputs have as many dimensions as the output, and none is empty."""
    shapes = [shape_of(node) for node in iterate_nodes(instance.args["tensors"])]
    return all(len(shape) == len(instance.shape) and math.prod(shape) > 0 for shape in shapes)


def lower_cat(lowering: Lowering) -> Tensor:
    """Emits CONCATENATION, or nothing for a single input."""
    inputs, dim = lowering.tensors("tensors"), _concatenated_dim(lowering.instance)
    if lowering.instance.generation is Generation.LEGACY and len(lowering.shape) == 4 and len(inputs) > 1:
        return _cat_of_images(lowering, inputs, dim)
    return concat(lowering, inputs, dim)


def _cat_of_images(lowering: Lowering, inputs: Sequence[Tensor], dim: int) -> Tensor:
    """Emits a CONCATENATION of NHWC images, the layout of the legacy generation; `dim` is torch's dimension."""
    images, shape = [lowering.channels_last(tensor) for tensor in inputs], [lowering.shape[i] for i in NHWC]
    kind, axis = replace(CONCATENATION, layout=Layout.FIXED), NHWC.index(dim)
    output = lowering.emit(kind, images, shape, axis=axis, fused_activation_function="NONE")
    return lowering.channels_first(output)


_NEED_STRIDES = {"aten.view.default", "aten._unsafe_view.default", "aten._reshape_alias.default"}
_TAKE_SIZES = {*_NEED_STRIDES, "aten.reshape.default", "aten.expand.default"}


def needs_strides(node: Node) -> bool:
    """Whether `node` is a reshape that rejects some strides of its input; `aten.reshape` accepts any."""
    return op_name(node) in _NEED_STRIDES


def takes_sizes(node: Node) -> bool:
    """Whether the second argument of `node` is the shape of its output."""
    return op_name(node) in _TAKE_SIZES


def read_indices(node: Node, size: int) -> range | None:
    """Returns the indices that a slice, narrow or select reads from a dimension of `size`; None for dynamic indices."""
    args = arguments(node)
    if "index" in args:
        index = args["index"]
        return range(index % size, index % size + 1) if isinstance(index, int) else None
    if "length" in args:
        start, length = args["start"], args["length"]
        is_fixed = isinstance(start, int) and isinstance(length, int)
        return range(start % size, start % size + length) if is_fixed else None
    bounds = args["start"], args["end"], args["step"]
    if not all(bound is None or isinstance(bound, int) for bound in bounds):
        return None
    return range(*slice(*bounds).indices(size))


def _slice_bounds(instance: OpInstance) -> tuple[int, int, int]:
    """Returns the dimension, first index and number of indices of a slice, narrow or select."""
    args, shape = instance.args, instance.shape_of("self")
    dim = int(args["dim"]) % len(shape)
    start = args["index"] if "index" in args else args["start"] or 0
    first = min(max(start + shape[dim] if start < 0 else start, 0), shape[dim])
    return dim, first, 1 if "index" in args else instance.shape[dim]


@constraint
def slices_without_steps(instance: OpInstance) -> bool:
    """The step is 1."""
    return bool(instance.args.get("step", 1) == 1)


def lower_slice(lowering: Lowering) -> Tensor:
    """Emits SLICE, or nothing for a slice of all indices; select also removes the dimension."""
    return lowering.reshape(
        slice_dim(lowering, lowering.tensor("self"), *_slice_bounds(lowering.instance)), lowering.shape
    )


def _is_in_eval(instance: OpInstance) -> bool:
    return not instance.args["train"]


@constraint
def is_in_eval_mode(instance: OpInstance) -> bool:
    """The model is in eval mode."""
    return _is_in_eval(instance)


# A pass removes these operators. They remain only in graphs that another quantizer annotated.
_ALIASES = ("aten.alias.default", "aten.lift_fresh_copy.default")
_DETACHES = ("aten.detach.default", "aten.detach_.default")

HANDLED = (HandledOperator("alias", _ALIASES), HandledOperator("detach", _DETACHES))

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
        facts=Facts(movement=Movement.RESHAPE),
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
        constraints=(has_rank_for_transpose, swaps_two_blocks, swaps_aligned_dimensions),
        lower=lower_permute,
        facts=Facts(movement=Movement.PERMUTE),
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
            concatenates_aligned_channels,
        ),
        pads=_padded_channels,
        lower=lower_cat,
        facts=Facts(movement=Movement.JOIN, computes_masks=True),
        becomes="CONCATENATION",
        is_compute=False,
    ),
    OpSpec(
        name="slice",
        targets=("aten.slice.Tensor", "aten.narrow.default"),
        edge_targets=("aten.slice_copy.Tensor",),
        inputs=("self",),
        output=OutputRule.SHARED,
        constraints=(slices_without_steps,),
        lower=lower_slice,
        facts=Facts(movement=Movement.PART),
        becomes="SLICE, or nothing; for the legacy generation with a PAD before it if needed",
        is_compute=False,
    ),
    OpSpec(
        name="select",
        targets=("aten.select.int",),
        edge_targets=("aten.select_copy.int",),
        inputs=("self",),
        output=OutputRule.SHARED,
        lower=lower_slice,
        facts=Facts(movement=Movement.PART),
        becomes="SLICE (see slice) and RESHAPE",
        is_compute=False,
    ),
    OpSpec(
        name="dropout",
        targets=("aten.dropout.default", "aten.dropout_.default", "aten.feature_dropout.default"),
        inputs=("input",),
        output=OutputRule.SHARED,
        constraints=(is_in_eval_mode,),
        lower=lower_identity,
        facts=Facts(training_argument="train", is_elementwise=True),
        becomes="nothing",
        is_compute=False,
    ),
    OpSpec(
        name="copy",
        targets=("aten.clone.default", "aten.contiguous.default", *_ALIASES, *_DETACHES),
        edge_targets=("dim_order_ops._clone_dim_order.default", "aten.alias_copy.default", "aten.detach_copy.default"),
        inputs=("self",),
        output=OutputRule.SHARED,
        lower=lower_identity,
        facts=Facts(movement=Movement.COPY),
        becomes="nothing",
        notes="Its memory format has an effect at inputs and outputs of a partition only.",
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
        facts=Facts(computes_masks=True),
        becomes="nothing",
        notes="It converts float32 to float32. Its memory format has an effect at inputs and outputs of a partition "
        "only.",
        is_compute=False,
    ),
)
