"""Calls of operators that a limit rejects, of all tables `tests/*_cases.py`."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from tests import (
    attention_cases,
    blend_cases,
    constant_write_cases,
    embedding_cases,
    indexing_cases,
    matmul_cases,
    pointwise_cases,
    pooling_cases,
    recurrent_cases,
    reduction_cases,
    resize_cases,
    rounding_cases,
    scan_cases,
    scatter_cases,
    shape_cases,
    transposed_cases,
    volume_cases,
)
from tests.case import Rejected, move, moved, of
from tests.legacy_cases import LEGACY_REJECTED
from tests.operator_cases import conv
from torch import nn


def cat(dim: int) -> Callable[[], nn.Module]:
    return of(lambda x, y: torch.cat([move(x), move(y)], dim))


def permute(*dims: int) -> Callable[[], nn.Module]:
    return moved(lambda x: x.permute(dims))


IMAGE = (1, 8, 6, 6)


def _int8_convolution(codes: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Returns a convolution as another quantizer leaves it, with an int8 weight."""
    dequantize = torch.ops.quantized_decomposed.dequantize_per_tensor.default
    return F.conv2d(values, dequantize(codes, 0.02, 0, -127, 127, torch.int8))


REJECTED: tuple[Rejected, ...] = (
    *matmul_cases.REJECTED,
    *attention_cases.REJECTED,
    *recurrent_cases.REJECTED,
    Rejected("convolution", "has_a_batch", "2d", of(_int8_convolution, torch.ones(5, 3, 3, 3, dtype=torch.int8)),
             ((3, 7, 7),), quantized_elsewhere=True),
    Rejected("convolution", "has_supported_geometry", "kernel", conv(2, 1, 2, (1, 4097)), ((1, 1, 1, 4100),)),
    Rejected("convolution", "has_supported_geometry", "stride", conv(2, 1, 2, 1, stride=(1, 4097)), ((1, 1, 2, 4100),)),
    Rejected("convolution", "has_supported_geometry", "dilation", conv(1, 1, 2, 2, dilation=4097), ((1, 1, 4100),)),
    Rejected("convolution", "fits_accumulation", "", conv(2, 8192, 2, 3), ((1, 8192, 3, 3),)),
    Rejected("softmax", "has_few_softmax_channels", "channels", of(lambda x: x.softmax(1)), ((1, 2041),)),
    Rejected("softmax", "has_few_softmax_channels", "positions", of(lambda x: x.softmax(1)), ((4097, 2),),
             quantized_elsewhere=True),
    Rejected("softmax", "has_few_softmax_channels", "elements", of(lambda x: x.softmax(1)), ((1025, 512),),
             quantized_elsewhere=True),
    Rejected("reshape", "has_rank_for_reshape", "", moved(lambda x: x.view(1, 2, 1, 3, 2, 1, 2, 1)), ((2, 12),)),
    Rejected("permute", "has_rank_for_transpose", "", permute(6, 5, 4, 3, 2, 1, 0), ((1, 2, 1, 3, 2, 1, 2),)),
    *pointwise_cases.REJECTED,
    *transposed_cases.REJECTED,
    *pooling_cases.REJECTED,
    *reduction_cases.REJECTED,
    *resize_cases.REJECTED,
    *rounding_cases.REJECTED,
    *shape_cases.REJECTED,
    *scatter_cases.REJECTED,
    *scan_cases.REJECTED,
    *constant_write_cases.REJECTED,
    *embedding_cases.REJECTED,
    *blend_cases.REJECTED,
    *indexing_cases.REJECTED,
    *volume_cases.REJECTED,
    *LEGACY_REJECTED,
)  # fmt: skip
