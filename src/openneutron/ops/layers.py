"""Layers: the operators that multiply channels by a weight."""

from __future__ import annotations

from torch.fx import Node

from openneutron.core.fx import op_name
from openneutron.ops import OPERATORS

__all__ = ["CONVOLUTION", "LINEAR", "TRANSPOSED", "layer_kind"]

CONVOLUTION, TRANSPOSED, LINEAR = "convolution", "transposed convolution", "linear"
_KINDS = {
    CONVOLUTION: CONVOLUTION,
    "convolution of volumes": CONVOLUTION,
    TRANSPOSED: TRANSPOSED,
    LINEAR: LINEAR,
}  # fmt: skip


def layer_kind(node: Node) -> str | None:
    """`CONVOLUTION` (of volumes too), `TRANSPOSED` or `LINEAR`; None for any other operator."""
    spec = OPERATORS.get(op_name(node))
    return None if spec is None else _KINDS.get(spec.name)
