"""Declarations and lowerings of operators that repeat, flip, shuffle and interleave values."""

from __future__ import annotations

import math
from collections.abc import Callable

from openneutron.core.fx import op_name
from openneutron.ir.graph import Tensor
from openneutron.ops.facts import Facts, Movement
from openneutron.ops.lowering import Lowering
from openneutron.ops.op_instance import OpInstance
from openneutron.ops.shapes import has_rank_for_transpose
from openneutron.ops.slices_and_concats import concat, concat_copies, has_rank_for_kernels, slice_dim
from openneutron.ops.spec import Constraint, OpSpec, OutputRule, constraint, legacy_constraint

__all__ = ["SPECS", "is_of_the_modern_generation"]

MAX_INTERLEAVED_RANK = 5
MAX_FLIPPED = 16


@legacy_constraint
def is_of_the_modern_generation(_: OpInstance) -> bool:
    """The converter is of the modern generation."""
    return False


def lower_repeat(lowering: Lowering) -> Tensor:
    """Emits a CONCATENATION of copies for each dimension that grows."""
    inputs = lowering.tensor("self")
    rank = len(lowering.shape)
    repeated = lowering.reshape(inputs, (1,) * (rank - len(inputs.shape)) + inputs.shape)
    for dim, size in enumerate(lowering.shape):
        repeated = concat_copies(lowering, repeated, dim, size // repeated.shape[dim])
    return repeated


@constraint
def has_rank_for_interleaving(instance: OpInstance) -> bool:
    """The input has at most {MAX_INTERLEAVED_RANK} dimensions."""
    return len(instance.shape_of("self")) <= MAX_INTERLEAVED_RANK


def lower_repeat_interleave(lowering: Lowering) -> Tensor:
    """Emits a CONCATENATION of copies along a new dimension, and merges it with the previous dimension."""
    inputs, dim = lowering.tensor("self"), lowering.args["dim"]
    shape = (inputs.size,) if dim is None else inputs.shape
    position = 1 if dim is None else int(dim) % len(shape) + 1
    spread = lowering.reshape(inputs, (*shape[:position], 1, *shape[position:]))
    return lowering.reshape(concat_copies(lowering, spread, position, int(lowering.args["repeats"])), lowering.shape)


def lower_roll(lowering: Lowering) -> Tensor:
    """Emits two SLICEs and a CONCATENATION for each dimension."""
    inputs, shifts, dims = lowering.tensor("self"), lowering.args["shifts"], lowering.args["dims"]
    rolled = inputs if dims else lowering.reshape(inputs, (inputs.size,))
    for shift, dim in zip(shifts, [dim % len(inputs.shape) for dim in dims] or [0], strict=True):
        size = rolled.shape[dim]
        if shifted := shift % size:
            last = slice_dim(lowering, rolled, dim, size - shifted, shifted)
            rolled = concat(lowering, [last, slice_dim(lowering, rolled, dim, 0, size - shifted)], dim)
    return lowering.reshape(rolled, lowering.shape)


def _flipped_dims(instance: OpInstance) -> list[int]:
    """Returns the flipped dimensions."""
    fixed = {"aten.fliplr.default": [1], "aten.flipud.default": [0]}
    dims = fixed.get(op_name(instance.node)) or instance.args["dims"]
    return [dim % len(instance.shape) for dim in dims]


@constraint
def flips_few_indices(instance: OpInstance) -> bool:
    """The flipped dimensions have at most {MAX_FLIPPED} indices, because each index becomes a SLICE."""
    return all(instance.shape[dim] <= MAX_FLIPPED for dim in _flipped_dims(instance))


def lower_flip(lowering: Lowering) -> Tensor:
    """Emits a SLICE for each index of a flipped dimension and a CONCATENATION in reverse order."""
    flipped = lowering.tensor("self")
    for dim in _flipped_dims(lowering.instance):
        indices = reversed(range(flipped.shape[dim]))
        flipped = concat(lowering, [slice_dim(lowering, flipped, dim, index, 1) for index in indices], dim)
    return flipped


def lower_pixel_shuffle(lowering: Lowering) -> Tensor:
    """Emits a TRANSPOSE between RESHAPEs."""
    inputs, factor = lowering.tensor("self"), int(lowering.args["upscale_factor"])
    channels, height, width = inputs.shape[-3:]
    blocks = (math.prod(inputs.shape[:-3]), channels // factor**2, factor, factor, height, width)
    shuffled = lowering.transpose(lowering.reshape(inputs, blocks), (0, 1, 4, 2, 5, 3))
    return lowering.reshape(shuffled, lowering.shape)


def lower_pixel_unshuffle(lowering: Lowering) -> Tensor:
    """Emits a TRANSPOSE between RESHAPEs."""
    inputs, factor = lowering.tensor("self"), int(lowering.args["downscale_factor"])
    channels, height, width = inputs.shape[-3:]
    blocks = (math.prod(inputs.shape[:-3]), channels, height // factor, factor, width // factor, factor)
    shuffled = lowering.transpose(lowering.reshape(inputs, blocks), (0, 1, 3, 5, 2, 4))
    return lowering.reshape(shuffled, lowering.shape)


def lower_channel_shuffle(lowering: Lowering) -> Tensor:
    """Emits a TRANSPOSE between RESHAPEs."""
    inputs, groups = lowering.tensor("self"), int(lowering.args["groups"])
    batch, channels, *image = inputs.shape
    blocks = (batch, groups, channels // groups, math.prod(image))
    return lowering.reshape(lowering.transpose(lowering.reshape(inputs, blocks), (0, 2, 1, 3)), lowering.shape)


@constraint
def unfolds_without_overlap(instance: OpInstance) -> bool:
    """The step equals the size of the windows."""
    return bool(instance.args["step"] == instance.args["size"])


def lower_unfold(lowering: Lowering) -> Tensor:
    """Emits a SLICE of the elements in whole windows, RESHAPE and TRANSPOSE."""
    inputs, size = lowering.tensor("self"), int(lowering.args["size"])
    dim = int(lowering.args["dimension"]) % len(inputs.shape)
    windows = lowering.shape[dim]
    whole = slice_dim(lowering, inputs, dim, 0, windows * size)
    split = lowering.reshape(whole, (*inputs.shape[:dim], windows, size, *inputs.shape[dim + 1 :]))
    rank = len(split.shape)
    return lowering.transpose(split, [*(other for other in range(rank) if other != dim + 1), dim + 1])


def _move_spec(
    name: str,
    targets: tuple[str, ...],
    lower: Callable[[Lowering], Tensor],
    becomes: str,
    *constraints: Constraint,
    movement: Movement = Movement.REARRANGE,
    notes: str = "",
) -> OpSpec:
    return OpSpec(
        name=name,
        targets=targets,
        inputs=("self",),
        output=OutputRule.SHARED,
        constraints=(*constraints, is_of_the_modern_generation),
        lower=lower,
        facts=Facts(movement=movement),
        becomes=becomes,
        is_compute=False,
        notes=notes,
    )


SHUFFLE = "RESHAPE, TRANSPOSE and RESHAPE"

SPECS = (
    _move_spec(
        "expand",
        ("aten.expand.default", "aten.broadcast_to.default"),
        lower_repeat,
        "CONCATENATION for each dimension that grows, or nothing",
        has_rank_for_kernels,
        movement=Movement.EXPAND,
        notes="It is removed if all its readers are operators that broadcast, such as add, mul and maximum.",
    ),
    _move_spec(
        "repeat",
        ("aten.repeat.default", "aten.tile.default"),
        lower_repeat,
        "CONCATENATION for each dimension that grows, or nothing",
        has_rank_for_kernels,
        notes="More than 8 copies take several CONCATENATIONs.",
    ),
    _move_spec(
        "repeat_interleave",
        ("aten.repeat_interleave.self_int",),
        lower_repeat_interleave,
        "RESHAPE, CONCATENATION and RESHAPE",
        has_rank_for_interleaving,
    ),
    _move_spec(
        "roll",
        ("aten.roll.default",),
        lower_roll,
        "two SLICEs and a CONCATENATION for each dimension",
        has_rank_for_kernels,
    ),
    _move_spec(
        "flip",
        ("aten.flip.default", "aten.fliplr.default", "aten.flipud.default"),
        lower_flip,
        "a SLICE for each index and a CONCATENATION for each dimension",
        has_rank_for_kernels,
        flips_few_indices,
    ),
    _move_spec("pixel_shuffle", ("aten.pixel_shuffle.default",), lower_pixel_shuffle, SHUFFLE),
    _move_spec("pixel_unshuffle", ("aten.pixel_unshuffle.default",), lower_pixel_unshuffle, SHUFFLE),
    _move_spec(
        "channel_shuffle",
        ("aten.channel_shuffle.default", "aten.native_channel_shuffle.default"),
        lower_channel_shuffle,
        SHUFFLE,
    ),
    _move_spec(
        "unfold",
        ("aten.unfold.default",),
        lower_unfold,
        "RESHAPE and TRANSPOSE, with a SLICE if the windows leave a rest",
        has_rank_for_transpose,
        unfolds_without_overlap,
    ),
)
