"""Activations that the NPU lacks."""

from __future__ import annotations

import torch
from torch.fx import Node

from openneutron.ops.decomposition import Decomposition, Rewriting

__all__ = ["DECOMPOSED"]

aten = torch.ops.aten


def _silu(rewriting: Rewriting) -> Node:
    inputs = rewriting.args["self"]
    return rewriting.call(aten.mul.Tensor, inputs, rewriting.call(aten.sigmoid.default, inputs))


DECOMPOSED = (
    Decomposition(
        name="silu",
        targets=("aten.silu.default",),
        rewrite=_silu,
        becomes="sigmoid, mul",
    ),
)
