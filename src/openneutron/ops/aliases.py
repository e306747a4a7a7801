"""Operators of torch that are another operator under a second name."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from openneutron.core.fx import shape_of

__all__ = ["ALIASES", "canonical_call", "canonical_overload"]

aten = torch.ops.aten

ALIASES: dict[str, str] = {
    "absolute": "abs", "arccos": "acos", "arccosh": "acosh", "arcsin": "asin", "arcsinh": "asinh", "arctan": "atan",
    "arctan2": "atan2", "arctanh": "atanh", "clip": "clamp", "concat": "cat", "concatenate": "cat", "divide": "div",
    "fix": "trunc", "ger": "outer", "greater": "gt", "greater_equal": "ge", "less": "lt", "less_equal": "le",
    "linalg_matmul": "matmul", "multiply": "mul",
    "native_channel_shuffle": "channel_shuffle", "negative": "neg", "not_equal": "ne", "row_stack": "vstack",
    "special_digamma": "digamma", "special_erf": "erf", "special_erfc": "erfc", "special_erfinv": "erfinv",
    "special_exp2": "exp2", "special_expit": "sigmoid", "special_expm1": "expm1", "special_gammainc": "igamma",
    "special_gammaincc": "igammac", "special_gammaln": "lgamma", "special_i0": "i0", "special_log1p": "log1p",
    "special_log_softmax": "log_softmax", "special_logit": "logit", "special_logsumexp": "logsumexp",
    "special_multigammaln": "mvlgamma", "special_polygamma": "polygamma", "special_psi": "digamma",
    "special_sinc": "sinc", "special_softmax": "softmax", "special_xlogy": "xlogy",
    "subtract": "sub", "true_divide": "div",
    **{
        f"{name}_copy": name
        for name in (
            "alias", "as_strided", "detach", "diagonal", "expand", "narrow", "permute", "select", "slice", "split",
            "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unfold", "unsqueeze", "view",
        )
    },
}  # fmt: skip
"""The canonical name of each second name. Both are names of ATen operators without overload.

A copy of a view (select_copy) computes the same values as the view, in a graph without writes in place.
"""


# Operators that read only the shape of their second operand, and the operator with this shape as its argument.
_LIKE_ANOTHER = {
    aten.expand_as.default: aten.expand.default,
    aten.reshape_as.default: aten.reshape.default,
    aten.view_as.default: aten.reshape.default,
}


def canonical_overload(overload: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    """Returns the operator with the canonical name and the same arguments; None if `overload` is not an alias."""
    name = overload._schema.name.removeprefix("aten::")
    if overload.namespace != "aten" or name not in ALIASES:
        return None
    packet = getattr(aten, ALIASES[name])
    others = [getattr(packet, other) for other in packet.overloads()]
    return next((other for other in others if _arguments(other) == _arguments(overload)), None)


def _arguments(overload: torch._ops.OpOverload) -> list[tuple[str, str]]:
    return [(argument.name, str(argument.type)) for argument in overload._schema.arguments]


def canonical_call(node: Node) -> tuple[torch._ops.OpOverload, tuple[Any, ...], dict[str, Any]] | None:
    """Returns the operator and arguments of the same call under its canonical name; None for a call without alias.

    signbit, and logical_not of floats, are written as comparisons with 0. signbit differs for -0.0, which int8
    values do not have. expand_as and the like of integers get the shape, so that constant indices stay constants.
    """
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    if node.target is aten.signbit.default:
        return aten.lt.Scalar, (node.args[0], 0), {}
    if node.target is aten.logical_not.default and _reads_floats(node):
        return aten.eq.Scalar, (node.args[0], 0), {}
    if node.target in _LIKE_ANOTHER and not _reads_floats(node) and _has_fixed_shape(node):
        return _LIKE_ANOTHER[node.target], (node.args[0], list(shape_of(node))), {}
    if node.target is aten.special_round.default:
        return _round_call(node)
    overload = canonical_overload(node.target)
    return None if overload is None else (overload, node.args, dict(node.kwargs))


def _round_call(node: Node) -> tuple[torch._ops.OpOverload, tuple[Any, ...], dict[str, Any]]:
    """Returns the call of round. The number of decimals is another overload there."""
    decimals = node.kwargs.get("decimals", 0)
    return (aten.round.decimals, node.args, {"decimals": decimals}) if decimals else (aten.round.default, node.args, {})


def _reads_floats(node: Node) -> bool:
    value = node.all_input_nodes[0].meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _has_fixed_shape(node: Node) -> bool:
    return all(isinstance(size, int) for size in shape_of(node))
