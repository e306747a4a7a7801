"""What a graph says of a value's sign before anything runs."""

from __future__ import annotations

from torch.fx import Node

from openneutron.constants import constant_of
from openneutron.fx import arguments, op_name

__all__ = ["is_never_negative"]

# How far back a value is followed: what is decided near it, and in constant time.
_DEPTH = 8

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
        "slice.Tensor", "select.int",
    )
}  # fmt: skip
_CLAMPS = {"aten.clamp.default": "min", "aten.clamp_min.default": "min", "aten.hardtanh.default": "min_val"}


def is_never_negative(value: object, depth: int = _DEPTH) -> bool:
    """Whether the operators that yield `value`, a node or a number, let nothing below zero through."""
    if not isinstance(value, Node):
        return isinstance(value, (int, float)) and value >= 0
    if value.op == "get_attr" and value.graph.owning_module is not None:
        constant = constant_of(value.graph.owning_module, value)
        return constant is not None and bool((constant >= 0).all())
    name = op_name(value)
    if name in _NEVER_NEGATIVE:
        return True
    if depth == 0 or value.op != "call_function":
        return False
    args = arguments(value)
    if name in _LIKE_THEIR_INPUT:
        return is_never_negative(args["self"], depth - 1)
    if name in _CLAMPS:
        return (args[_CLAMPS[name]] is not None and args[_CLAMPS[name]] >= 0) or is_never_negative(
            args["self"], depth - 1
        )
    if name == "aten.mul.Tensor" and args["self"] is args["other"]:
        return True
    if name in ("aten.add.Tensor", "aten.mul.Tensor"):
        return args.get("alpha", 1) >= 0 and all(is_never_negative(args[end], depth - 1) for end in ("self", "other"))
    if name == "aten.maximum.default":
        return any(is_never_negative(args[end], depth - 1) for end in ("self", "other"))
    return False
