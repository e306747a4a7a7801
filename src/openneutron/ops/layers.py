"""Layers: the operators that multiply channels by a weight."""

from __future__ import annotations

from torch.fx import Node

from openneutron.core.fx import op_name
from openneutron.ops import OPERATORS

__all__ = ["CONVOLUTION", "LINEAR", "TRANSPOSED", "layer_kind"]

CONVOLUTION, TRANSPOSED, LINEAR = "convolution", "transposed convolution", "linear"


def layer_kind(node: Node) -> str | None:
    """`CONVOLUTION`, `TRANSPOSED` or `LINEAR`; None for any other operator."""
    spec = OPERATORS.get(op_name(node))
    return spec.name if spec is not None and spec.name in (CONVOLUTION, TRANSPOSED, LINEAR) else None
