"""Runs a quantized module in double precision, as a reference without float32 rounding errors.

The module of `convert_pt2e` computes each operator in float32 on dequantized values. If a sum is near the middle
between two codes, float32 may round to the other code, about once in a million values. A network with large
quantization errors amplifies this. A `.pte` has no such error, because it sums in integers and rounds only when it
scales the sum.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

__all__ = ["run_in_float64"]


class _InDouble(Interpreter):
    """Computes quantize and dequantize in double. The operators between them therefore run in double, too."""

    def run_node(self, n: Node) -> Any:
        name = str(n.target)
        if n.op != "call_function" or "quantized_decomposed" not in name:
            return super().run_node(n)
        value, scale, zero_point, *rest = self.fetch_args_kwargs_from_env(n)[0]
        if "per_channel" in name:
            axis, *rest = rest
            shape = [-1 if dim == axis else 1 for dim in range(value.dim())]
            scale, zero_point = scale.double().view(shape), zero_point.view(shape)
        low, high, dtype = rest[:3]
        if "dequantize" in name:
            return (value.double() - zero_point) * scale
        if value.dtype == torch.float32:  # the network's input, which every runtime quantizes in float32
            return super().run_node(n)
        return (torch.round(value / scale) + zero_point).clamp(low, high).to(dtype)


def run_in_float64(module: GraphModule, *inputs: Tensor) -> Tensor:
    """Run a converted `module` in double precision, and return its only output."""
    output: Tensor = _InDouble(module).run(*inputs)
    return output.float()
