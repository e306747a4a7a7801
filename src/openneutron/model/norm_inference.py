"""Faster export of batch norms: the shape of the output is that of the input."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch._prims_common import make_channels_last_strides_for, make_contiguous_strides_for

__all__ = ["infer_norms_without_arithmetic"]

_NORM = torch.ops.aten._native_batch_norm_legit_no_training.default


@contextmanager
def infer_norms_without_arithmetic() -> Iterator[None]:
    """Lets torch infer the output of a batch norm in eval mode from its input, while a model is traced in the block.

    torch writes the norm as arithmetic and infers the shape of each of its ten results, which takes a fifth of the
    time of the export of a convolutional network. A release of torch without this decomposition infers the shapes in
    its own way. Not for two threads at once.
    """
    decompose: Any = decomposition_table.get(_NORM)
    if decompose is None:
        yield
        return

    @functools.wraps(decompose)  # torch prefers C++ to functions of other modules than that of its decompositions
    def infer(value: Tensor, *rest: Any) -> Any:  # weight, bias, mean, variance, momentum, eps
        if not _has_output_like(value, *rest[:4]):
            return decompose(value, *rest)
        return torch.empty_like(value), value.new_zeros(0), value.new_zeros(0)

    decomposition_table[_NORM] = infer
    try:
        yield
    finally:
        decomposition_table[_NORM] = decompose


def _has_output_like(value: Tensor, *rows: Tensor | None) -> bool:
    """Whether the norm of `value` has its shape, strides and dtype. `rows` are the weights and the statistics.

    That holds for contiguous and for channels-last float32 tensors on the CPU with static shapes, if all rows have a
    value for each channel.
    """
    sizes = value.shape
    if value.dtype != torch.float32 or value.device.type != "cpu" or not all(type(size) is int for size in sizes):
        return False
    is_image = len(sizes) == 4 and min(sizes[1:]) > 1
    if value.stride() != make_contiguous_strides_for(sizes) and not (
        is_image and value.stride() == make_channels_last_strides_for(sizes)
    ):
        return False
    return all(row is None or (row.dtype == torch.float32 and row.shape == sizes[1:2]) for row in rows)
