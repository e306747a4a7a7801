"""Declaration and lowering of pad operators."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Node

from openneutron.core.fx import arguments, op_name
from openneutron.ir.graph import Tensor
from openneutron.ir.kinds import MIRROR_PAD, PAD, PADV2
from openneutron.ops.facts import Facts
from openneutron.ops.lowering import Lowering
from openneutron.ops.op_instance import OpInstance
from openneutron.ops.slices_and_concats import concat, concat_copies, has_rank_for_kernels, slice_dim, slice_tensor
from openneutron.ops.spec import Homogeneous, OpSpec, OutputRule, constraint, legacy_constraint

__all__ = ["SPECS"]


def _paddings(instance: OpInstance) -> tuple[tuple[int, int], ...]:
    """Returns the padding (at the start, at the end) of each dimension; torch starts with the last dimension."""
    flat, rank = list(instance.args.get("pad") or instance.args.get("padding") or ()), len(instance.shape)
    pairs = [(int(flat[i]), int(flat[i + 1])) for i in range(0, len(flat), 2)]
    return tuple(reversed(pairs + [(0, 0)] * (rank - len(pairs))))


def _pad_mode(instance: OpInstance) -> str:
    for mode, name in (("reflect", "aten.reflection_pad"), ("replicate", "aten.replication_pad")):
        if op_name(instance.node).startswith(name):
            return mode
    return str(instance.args.get("mode", "constant"))


def _pad_value(instance: OpInstance) -> float:
    value = instance.args.get("value")
    return 0.0 if value is None else float(value)


def _keeps_values(instance: OpInstance) -> bool:
    """Whether the pad adds copies of input values, or zeros. Quantization rounds any other pad value."""
    return _pad_mode(instance) != "constant" or _pad_value(instance) == 0


def _has_negative_padding(instance: OpInstance) -> bool:
    return any(width < 0 for pair in _paddings(instance) for width in pair)


@constraint
def crops_constants_only(instance: OpInstance) -> bool:
    """No padding is negative unless the mode is 'constant'."""
    return _pad_mode(instance) == "constant" or not _has_negative_padding(instance)


@legacy_constraint
def pads_without_copies(instance: OpInstance) -> bool:
    """The mode is 'constant' or 'reflect'."""
    return _pad_mode(instance) in ("constant", "reflect")


def _crop(lowering: Lowering, inputs: Tensor, paddings: Sequence[tuple[int, int]]) -> Tensor:
    """Emits a SLICE for negative padding."""
    begin = tuple(max(0, -low) for low, _ in paddings)
    size = tuple(
        length + min(0, low) + min(0, high) for length, (low, high) in zip(inputs.shape, paddings, strict=True)
    )
    return slice_tensor(lowering, inputs, begin, size)


def lower_pad(lowering: Lowering) -> Tensor:
    """Emits SLICE for negative padding; PAD for zero, PADV2 for another value, MIRROR_PAD for reflection, and a
    CONCATENATION of slices for the other modes.
    """
    paddings = _paddings(lowering.instance)
    inputs = _crop(lowering, lowering.tensor("self"), paddings)
    paddings = tuple((max(0, low), max(0, high)) for low, high in paddings)
    if not any(width for pair in paddings for width in pair):
        return inputs
    mode = _pad_mode(lowering.instance)
    if mode == "reflect":
        return lowering.emit(MIRROR_PAD, [inputs], lowering.shape, paddings=paddings, mode="REFLECT")
    if mode != "constant":
        edges = _replicated_edges if mode == "replicate" else _wrapped_edges
        for dim, (low, high) in enumerate(paddings):
            before, after = edges(lowering, inputs, dim, low, high)
            inputs = concat(lowering, [*before, inputs, *after], dim)
        return inputs
    code = lowering.output.quantize(_pad_value(lowering.instance))
    if code == lowering.output.zero_point[0]:
        return lowering.emit(PAD, [inputs], lowering.shape, paddings=paddings)
    value = lowering.number(code, lowering.output)
    return lowering.emit(PADV2, [inputs, value], lowering.shape, paddings=paddings)


def _replicated_edges(lowering: Lowering, inputs: Tensor, dim: int, low: int, high: int) -> tuple[list[Tensor], ...]:
    """Returns the first index of a dimension `low` times, and the last index `high` times."""
    last = inputs.shape[dim] - 1
    before = [concat_copies(lowering, slice_dim(lowering, inputs, dim, 0, 1), dim, low)] if low else []
    after = [concat_copies(lowering, slice_dim(lowering, inputs, dim, last, 1), dim, high)] if high else []
    return before, after


def _wrapped_edges(lowering: Lowering, inputs: Tensor, dim: int, low: int, high: int) -> tuple[list[Tensor], ...]:
    """Returns the last `low` indices of a dimension, and the first `high` ones."""
    size = inputs.shape[dim]
    before = [slice_dim(lowering, inputs, dim, size - low, low)] if low else []
    after = [slice_dim(lowering, inputs, dim, 0, high)] if high else []
    return before, after


def _sign_of_pad(node: Node, operands: Sequence[bool]) -> bool:
    value = arguments(node).get("value")
    return operands[0] and (value is None or bool(value >= 0))


SPECS = (
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
        constraints=(has_rank_for_kernels, crops_constants_only, pads_without_copies),
        lower=lower_pad,
        homogeneous=lambda instance: Homogeneous.CHANNEL if _keeps_values(instance) else None,
        facts=Facts(sign=_sign_of_pad),
        becomes="PAD, PADV2 or MIRROR_PAD; SLICE (see slice) for negative padding; SLICE and CONCATENATION for the "
        "modes replicate and circular",
        is_compute=False,
    ),
)
