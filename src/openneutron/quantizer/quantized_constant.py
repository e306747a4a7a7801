"""Constants that are quantized when a model is converted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from openneutron.core.constants import insert_constant

__all__ = ["BIAS_RANGE", "QuantizedConstant"]

BIAS_RANGE = (-(2**31), 2**31 - 1)
"""The codes of a quantized bias, which is int32."""


@dataclass(frozen=True)
class QuantizedConstant:
    """A float constant with its qparams: one scale, or one for each index of `axis`."""

    value: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor
    axis: int | None
    codes: tuple[int, int]
    dtype: torch.dtype

    def write(self, model: GraphModule, before: Node, role: str) -> Node:
        """Inserts the constant before `before`, and quantize and dequantize operators that read it. Returns the
        dequantize operator. torchao folds constant operators afterwards.
        """
        node = insert_constant(model, before, self.value, role)
        qparams: tuple[Any, ...]
        if self.axis is None:
            kind, qparams = "tensor", (float(self.scale), int(self.zero_point))
        else:
            device = self.value.device
            scale = insert_constant(model, before, self.scale.to(device), f"{role}_scale")
            zero_point = insert_constant(model, before, self.zero_point.to(device), f"{role}_zero_point")
            kind, qparams = "channel", (scale, zero_point, self.axis)
        for step in ("quantize", "dequantize"):
            target = getattr(torch.ops.quantized_decomposed, f"{step}_per_{kind}").default
            with model.graph.inserting_before(before):
                node = model.graph.call_function(target, (node, *qparams, *self.codes, self.dtype))
        return node
