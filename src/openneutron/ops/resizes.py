"""Declarations and lowerings of resizes of images and sequences that the NPU supports."""

from __future__ import annotations

import math

import torch

from openneutron.core.fx import op_name
from openneutron.ir.graph import Kind, Tensor
from openneutron.ir.kinds import CONCATENATION, RESIZE_BILINEAR, RESIZE_NEAREST_NEIGHBOR
from openneutron.ops.facts import Bounds, Facts, never_negative_if_first
from openneutron.ops.lowering import Lowering
from openneutron.ops.op_instance import OpInstance
from openneutron.ops.spec import Homogeneous, OpSpec, OutputRule, constraint, legacy_constraint
from openneutron.ops.windows import has_aligned_channels, image_shape, spatial_rank

__all__ = ["SPECS", "grows_by_native_factors", "grows_by_whole_factors", "resize_axis", "resize_targets"]

aten = torch.ops.aten


FACTORS = (1, 2, 4, 8)
LARGEST_FACTOR = max(FACTORS)


def resize_axis(instance: OpInstance, values: torch.Tensor, axis: int) -> torch.Tensor:
    """Resizes the last dimension of `values` [C, size] by the rule by which this operator resizes its spatial dimension
    `axis`.

    Runs torch's operator with this dimension as the width, because torch 2.13 computes wrong heights for antialiased
    images of width 1.
    """
    rank = spatial_rank(instance)
    units = [1] * (rank - 1)
    outputs = instance.shape[axis - rank]
    corners = [instance.args["align_corners"]] if "align_corners" in instance.args else []
    resize = getattr(aten, op_name(instance.node).split(".")[1]).default
    image = values.reshape(1, len(values), *units, -1)
    result = resize(image, [*units, outputs], *corners, *[None] * len(units), _scale_factors(instance)[axis])
    return result.reshape(len(values), outputs)  # type: ignore[no-any-return]


def _scale_factors(instance: OpInstance) -> tuple[float | None, ...]:
    """Returns the scale factor argument of each spatial dimension; None where torch computes it from the sizes."""
    rank = spatial_rank(instance)
    if "scale_factors" in instance.args:
        return tuple(instance.args["scale_factors"] or [None] * rank)
    return tuple(instance.args[name] for name in (("scales",) if rank == 1 else ("scales_h", "scales_w")))


def _spatial_sizes(instance: OpInstance) -> list[tuple[int, int]]:
    """Returns the sizes of the input and of the output for each spatial dimension."""
    rank = spatial_rank(instance)
    return list(zip(instance.shape_of("self")[-rank:], instance.shape[-rank:], strict=True))


def _whole_factors(instance: OpInstance) -> tuple[int, int]:
    """Returns the whole factors of height and width."""
    height, width = (1, *(outputs // size for size, outputs in _spatial_sizes(instance)))[-2:]
    return height, width


@constraint
def grows_by_whole_factors(instance: OpInstance) -> bool:
    """Height and width grow by whole factors."""
    for axis, (size, outputs) in enumerate(_spatial_sizes(instance)):
        elements = torch.arange(size, dtype=torch.float32)
        repeated = elements.repeat_interleave(max(1, outputs // size))
        if not torch.equal(resize_axis(instance, elements[None], axis)[0], repeated):
            return False
    return True


def _grows_by_native_factor(size: int, outputs: int, scale: float | None, *, align_corners: bool) -> bool:
    if align_corners:
        return size == outputs or (size > 1 and (outputs - 1) / (size - 1) in FACTORS)
    return outputs / size in FACTORS and scale in (None, outputs / size)


@constraint
def grows_by_native_factors(instance: OpInstance) -> bool:
    """Height and width grow by factors of 1, 2, 4 or 8; with align_corners the factor is (output - 1) / (input - 1)."""
    corners = bool(instance.args["align_corners"])
    return all(
        _grows_by_native_factor(*sizes, scale, align_corners=corners)
        for sizes, scale in zip(_spatial_sizes(instance), _scale_factors(instance), strict=True)
    )


@legacy_constraint
def grows_by_legacy_factors(instance: OpInstance) -> bool:
    """Height and width grow by factors of 1, 2, 4 or 8."""
    return all(factor in FACTORS for factor in _whole_factors(instance))


def lower_nearest(lowering: Lowering) -> Tensor:
    """Emits a CONCATENATION of copies for the odd part of a factor, and RESIZE_NEAREST_NEIGHBOR for its power of 2."""
    inputs = lowering.tensor("self")
    nhwc = lowering.channels_last(lowering.reshape(inputs, image_shape(lowering.instance, inputs.shape)))
    powers = [factor & -factor for factor in _whole_factors(lowering.instance)]
    for axis, (factor, power) in enumerate(zip(_whole_factors(lowering.instance), powers, strict=True), start=1):
        nhwc = _repeat_indices(lowering, nhwc, axis, factor // power)
    while max(powers) > 1:
        step = [min(power, LARGEST_FACTOR) for power in powers]
        powers = [power // taken for power, taken in zip(powers, step, strict=True)]
        nhwc = _emit_resize(lowering, RESIZE_NEAREST_NEIGHBOR, nhwc, step[0] * nhwc.shape[1], step[1] * nhwc.shape[2])
    return lowering.reshape(lowering.channels_first(nhwc), lowering.shape)


def _repeat_indices(lowering: Lowering, nhwc: Tensor, axis: int, times: int) -> Tensor:
    """Repeats each index of an axis `times` times."""
    if times == 1:
        return nhwc
    outer, inner = math.prod(nhwc.shape[: axis + 1]), math.prod(nhwc.shape[axis + 1 :])
    rows = lowering.reshape(nhwc, (outer, 1, inner))
    repeated = lowering.emit(
        CONCATENATION, [rows] * times, (outer, times, inner), axis=1, fused_activation_function="NONE"
    )
    shape = [size * (times if dim == axis else 1) for dim, size in enumerate(nhwc.shape)]
    return lowering.reshape(repeated, shape)


def _emit_resize(
    lowering: Lowering, kind: Kind, nhwc: Tensor, height: int, width: int, *, align_corners: bool = False
) -> Tensor:
    return lowering.emit(
        kind,
        [nhwc],
        (nhwc.shape[0], height, width, nhwc.shape[3]),
        size=(height, width),
        align_corners=align_corners,
        half_pixel_centers=kind is RESIZE_BILINEAR and not align_corners,
    )


def lower_bilinear(lowering: Lowering) -> Tensor:
    """Emits RESIZE_BILINEAR."""
    inputs = lowering.tensor("self")
    nhwc = lowering.channels_last(lowering.reshape(inputs, image_shape(lowering.instance, inputs.shape)))
    _, _, height, width = image_shape(lowering.instance, lowering.shape)
    corners = bool(lowering.args["align_corners"])
    output = _emit_resize(lowering, RESIZE_BILINEAR, nhwc, height, width, align_corners=corners)
    return lowering.reshape(lowering.channels_first(output), lowering.shape)


def resize_targets(*names: str) -> tuple[str, ...]:
    """Returns the overloads of each operator, which take sizes, factors or both."""
    return tuple(f"aten.{name}.{overload}" for name in names for overload in ("vec", "default"))


SPECS = (
    OpSpec(
        name="upsample_nearest",
        targets=resize_targets(
            "upsample_nearest2d", "upsample_nearest1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact1d"
        ),
        edge_targets=("aten.upsample_nearest2d.vec",),
        inputs=("self",),
        output=OutputRule.SHARED,
        constraints=(grows_by_whole_factors, grows_by_legacy_factors, has_aligned_channels),
        pads={"self": (1,)},
        lower=lower_nearest,
        homogeneous=Homogeneous.CHANNEL,
        facts=Facts(sign=never_negative_if_first, bounds=Bounds.WITHIN),
        becomes="RESIZE_NEAREST_NEIGHBOR, several for factors above 8; CONCATENATION for an odd part of a factor",
    ),
    OpSpec(
        name="upsample_bilinear",
        targets=resize_targets("upsample_bilinear2d", "upsample_linear1d"),
        edge_targets=("aten.upsample_bilinear2d.vec",),
        inputs=("self",),
        output=OutputRule.SHARED,
        constraints=(grows_by_native_factors, has_aligned_channels),
        pads={"self": (1,)},
        lower=lower_bilinear,
        homogeneous=Homogeneous.CHANNEL,
        facts=Facts(sign=never_negative_if_first, bounds=Bounds.WITHIN),
        becomes="RESIZE_BILINEAR",
    ),
)
