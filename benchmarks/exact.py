"""A quantized module computed in double precision: what its int8 codes mean, without float32's rounding in between.

`convert_pt2e`'s module computes each operator in float32 on dequantized values. Where a sum falls next to the middle
between two codes, float32 may round to the other one, about once in a million values; a network that quantization has
broken blows that up. A `.pte` sums in integers and makes no such error; it rounds when it scales the sum.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

__all__ = ["exact"]


class _InDouble(Interpreter):
    """Runs quantize and dequantize by their definition, in double, and so all that is between them."""

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
        if value.dtype == torch.float32:  # the network's input: every way to run it rounds that in float32
            return super().run_node(n)
        return (torch.round(value / scale) + zero_point).clamp(low, high).to(dtype)


def exact(module: GraphModule, *inputs: Tensor) -> Tensor:
    """Return the only output of a converted `module` for `inputs`, in double precision throughout."""
    output: Tensor = _InDouble(module).run(*inputs)
    return output.float()
