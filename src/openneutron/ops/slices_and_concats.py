"""Helpers that emit SLICE and CONCATENATION."""

from __future__ import annotations

from collections.abc import Sequence

from openneutron.ir.graph import Tensor
from openneutron.ir.kinds import CONCATENATION, SLICE
from openneutron.ops.lowering import Lowering
from openneutron.ops.op_instance import OpInstance
from openneutron.ops.spec import constraint
from openneutron.ops.windows import pad_at_end
from openneutron.targets import Generation

__all__ = [
    "MAX_KERNEL_RANK", "concat", "concat_copies", "count_of_concats", "has_rank_for_kernels", "slice_dim",
    "slice_tensor",
]  # fmt: skip


MAX_KERNEL_RANK = 6
MAX_COPIES = 8  # of one CONCATENATION


@constraint
def has_rank_for_kernels(instance: OpInstance) -> bool:
    """The output has at most {MAX_KERNEL_RANK} dimensions."""
    return len(instance.shape) <= MAX_KERNEL_RANK


def slice_tensor(lowering: Lowering, tensor: Tensor, begin: Sequence[int], size: tuple[int, ...]) -> Tensor:
    """Emits SLICE; returns `tensor` itself if the slice covers the whole tensor.

    The legacy generation can only slice dimensions that are multiples of the MACs per pipeline. Other dimensions are
    padded before the slice.
    """
    if size == tensor.shape:
        return tensor
    if lowering.instance.generation is Generation.LEGACY:
        target = lowering.instance.target
        sizes = zip(tensor.shape, size, strict=True)
        shape = tuple(length if length == kept else target.align_channels(length) for length, kept in sizes)
        tensor = pad_at_end(lowering, tensor, shape)
    return lowering.emit(SLICE, [tensor], size, tensor.qparams, begin=tuple(begin), size=size)


def slice_dim(lowering: Lowering, tensor: Tensor, dim: int, first: int, count: int) -> Tensor:
    """Emits a slice of `count` indices of a dimension, starting at `first`; see `slice_tensor`."""
    size = tuple(count if other == dim else length for other, length in enumerate(tensor.shape))
    begin = tuple(first if other == dim else 0 for other in range(len(size)))
    return slice_tensor(lowering, tensor, begin, size)


def concat(lowering: Lowering, tensors: Sequence[Tensor], dim: int) -> Tensor:
    """Emits a CONCATENATION of tensors along a dimension; returns the tensor itself if there is only one."""
    first = tensors[0]
    if len(tensors) == 1:
        return first
    total = sum(tensor.shape[dim] for tensor in tensors)
    shape = tuple(total if other == dim else length for other, length in enumerate(first.shape))
    return lowering.emit(CONCATENATION, tensors, shape, first.qparams, axis=dim, fused_activation_function="NONE")


def concat_copies(lowering: Lowering, tensor: Tensor, dim: int, count: int) -> Tensor:
    """Concatenates `count` copies of `tensor` along a dimension.

    For more than `MAX_COPIES` copies, it first concatenates a block of count // MAX_COPIES copies, then `MAX_COPIES`
    such blocks and the remaining copies.
    """
    if count <= MAX_COPIES:
        return concat(lowering, [tensor] * count, dim)
    block = concat_copies(lowering, tensor, dim, count // MAX_COPIES)
    return concat(lowering, [block] * MAX_COPIES + [tensor] * (count % MAX_COPIES), dim)


def count_of_concats(count: int) -> int:
    """Returns the number of CONCATENATIONs that make `count` copies."""
    if count == 1:
        return 0
    return 1 if count <= MAX_COPIES else 1 + count_of_concats(count // MAX_COPIES)
