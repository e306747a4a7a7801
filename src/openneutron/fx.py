"""Small questions about torch.fx nodes that every room asks in the same words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Node

__all__ = [
    "arguments",
    "is_dequantize",
    "is_quantize",
    "iterate_nodes",
    "op_name",
    "output_node",
    "shape_of",
    "source_of",
]

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')
# Frames inside these packages are not the user's code.
_LIBRARIES = re.compile(r"[/\\](site-packages|dist-packages)[/\\](torch|torchao|executorch)[/\\]|<eval_with_key>")


def op_name(node: Node) -> str:
    """Qualified name of a call's operator ("aten.conv2d.default"), the same for ATen and edge operators."""
    if node.op != "call_function":
        return node.op
    overload = _overload(node)
    return str(overload) if overload else getattr(node.target, "__name__", str(node.target))


def _overload(node: Node) -> torch._ops.OpOverload | None:
    """The ATen overload of a call; an edge operator wraps one."""
    for target in (node.target, getattr(node.target, "_op", None)):
        if isinstance(target, torch._ops.OpOverload):
            return target
    return None


def source_of(node: Node) -> str | None:
    """The user's "file:line" that made `node`: the innermost frame outside torch, torchao and ExecuTorch."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    own = [f"{file}:{line}" for file, line in frames if not _LIBRARIES.search(file)]
    return own[-1] if own else None


def shape_of(node: Node) -> tuple[int, ...]:
    """Static shape of the tensor that `node` yields, of the first one where it yields several."""
    value = node.meta["val"]
    return tuple((value[0] if isinstance(value, (list, tuple)) else value).shape)


def arguments(node: Node) -> dict[str, Any]:
    """All arguments of a call by the names of its operator's schema, defaults filled in."""
    overload = _overload(node)
    if overload is None:
        return {}
    named: dict[str, Any] = {}
    for index, argument in enumerate(overload._schema.arguments):
        if index < len(node.args):
            named[argument.name] = node.args[index]
        elif argument.name in node.kwargs:
            named[argument.name] = node.kwargs[argument.name]
        else:
            named[argument.name] = argument.default_value if argument.has_default_value() else None
    return named


def iterate_nodes(value: object) -> Iterator[Node]:
    """The nodes in an argument: itself, or those of a list."""
    if isinstance(value, Node):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from iterate_nodes(item)


def is_quantize(node: Node) -> bool:
    """Whether `node` turns float values into integers."""
    return op_name(node).startswith("quantized_decomposed.quantize_per_")


def is_dequantize(node: Node) -> bool:
    """Whether `node` turns integers into float values."""
    return op_name(node).startswith("quantized_decomposed.dequantize_per_")


def output_node(graph: torch.fx.Graph) -> Node:
    """The node that returns."""
    found: Node = next(node for node in reversed(graph.nodes) if node.op == "output")
    return found
