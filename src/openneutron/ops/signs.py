"""What a graph says of a value's sign before anything runs."""

from __future__ import annotations

from torch.fx import Node

from openneutron.core.fx import arguments, is_dequantize, op_name
from openneutron.ops.site import Site

__all__ = ["is_never_negative"]

# The search goes back at most this many operators, so that it takes constant time. Operands of a binary operator count
# as two steps.
_DEPTH = 16

_NEVER_NEGATIVE = {
    f"aten.{name}"
    for name in (
        "abs.default", "exp.default", "relu.default", "relu6.default", "rsqrt.default", "sigmoid.default",
        "softmax.int", "_softmax.default",
    )
}  # fmt: skip
_LIKE_THEIR_INPUT = {
    f"aten.{name}"
    for name in (
        "mean.dim", "sum.dim_IntList", "amax.default", "amin.default", "max_pool2d.default", "avg_pool2d.default",
        "adaptive_avg_pool2d.default", "view.default", "reshape.default", "flatten.using_ints", "permute.default",
        "transpose.int", "squeeze.dim", "squeeze.dims", "unsqueeze.default", "expand.default", "expand_as.default",
        "slice.Tensor", "select.int", "avg_pool1d.default", "avg_pool3d.default", "max_pool1d.default",
        "max_pool3d.default", "clone.default", "contiguous.default",
    )
}  # fmt: skip
_PADS = {"aten.pad.default", "aten.constant_pad_nd.default"}
_PRODUCTS = {f"aten.{name}" for name in ("mul.Tensor", "matmul.default", "bmm.default", "mm.default")}
_CLAMPS = {"aten.clamp.default": "min", "aten.clamp_min.default": "min", "aten.hardtanh.default": "min_val"}


def is_never_negative(site: Site, value: object, depth: int = _DEPTH) -> bool:
    """Whether the operators that yield `value`, a node or a number, let nothing below zero through."""
    if not isinstance(value, Node):
        return isinstance(value, (int, float)) and value >= 0
    if (constant := site.constant_of(value)) is not None:
        return bool((constant >= 0).all())
    name = op_name(value)
    if name in _NEVER_NEGATIVE or (is_dequantize(value) and value.args[2] == value.args[3]):
        return True
    if depth == 0 or value.op != "call_function":
        return False
    args = arguments(value)
    ends = [args[end] for end in ("self", "other", "mat2") if end in args]
    operands = [is_never_negative(site, end, max(0, depth - len(ends))) for end in ends]
    if name in _LIKE_THEIR_INPUT:
        return operands[0]
    if name in _PADS:
        return operands[0] and (args["value"] is None or args["value"] >= 0)
    if name in _CLAMPS:
        least = args[_CLAMPS[name]]
        return operands[0] or (least is not None and least >= 0)
    if name == "aten.maximum.default":
        return any(operands)
    if name in _PRODUCTS:
        return all(operands) or (name == "aten.mul.Tensor" and args["self"] is args["other"])
    return bool(name == "aten.add.Tensor" and args["alpha"] >= 0 and all(operands))
