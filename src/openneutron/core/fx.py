"""Small questions about torch.fx nodes that every room asks in the same words."""

from __future__ import annotations

import operator
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.fx import Node

__all__ = [
    "STATE",
    "UNBATCHED",
    "arguments",
    "is_dequantize",
    "is_library",
    "is_operator",
    "is_pure",
    "is_quantize",
    "is_random",
    "is_state",
    "iterate_nodes",
    "modules_of",
    "note",
    "note_replaced",
    "noted",
    "op_name",
    "operator_aliases",
    "operator_names",
    "output_node",
    "place_of",
    "placeholders",
    "set_argument",
    "shape_of",
    "source_of",
]

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')
# Frames inside these packages are not the user's code.
_LIBRARIES = re.compile(r"[/\\](site-packages|dist-packages)[/\\](torch|torchao|executorch)[/\\]|<eval_with_key>")
_STANDARD_LIBRARY = sysconfig.get_paths()["stdlib"]
_OWN_FOLDER = str(Path(__file__).parents[1])
# How a non-strict export names a part of a ModuleList or of a Sequential.
_SLICE = re.compile(r"\.slice\((?P<start>\w+), \w+, (?P<step>\w+)\)")
# Metadata under this key, and no other, come through convert_pt2e, torch.export and ExecuTorch's passes.
_NOTES = "custom"
_REPLACED = "openneutron.replaced"
STATE = "openneutron.state"
"""The note on a node that yields a state: the name of its buffer."""
UNBATCHED = "openneutron.unbatched"
"""The note on a value of one sample that has no batch dimension."""


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


def is_library(file: str) -> bool:
    """Whether a file of Python code is part of Python, torch, torchao, ExecuTorch or OpenNeutron."""
    is_standard = file.startswith((_STANDARD_LIBRARY, "<")) and "-packages" not in file
    return is_standard or file.startswith(_OWN_FOLDER) or bool(_LIBRARIES.search(file))


def modules_of(node: Node) -> tuple[tuple[str, str], ...]:
    """Name and type of each module whose `forward` called `node`, the model itself ("") first.

    Names are those of `named_modules()`. Where the model calls a slice of a ModuleList that does not begin with its
    first module, torch.export numbers the modules anew, and the slice stays in the name.
    """
    stack = [entry[:2] for entry in (node.meta.get("nn_module_stack") or {}).values()]
    called = {name for name, _ in stack}
    return tuple((_without_slices(name, called), _type_name(kind)) for name, kind in stack)


def place_of(node: Node) -> str:
    """Where `node` comes from, in words: the user's "file:line", or else the module that called it."""
    modules = modules_of(node)
    module = "module '{}' ({})".format(*modules[-1]) if modules else "in no module"
    return source_of(node) or module


def _without_slices(name: str, called: set[str]) -> str:
    """A slice that was called itself is a Sequential, whose modules keep their names; so do those from the start."""

    def kept(match: re.Match[str]) -> str:
        keeps_names = match["start"] in ("None", "0") and match["step"] in ("None", "1")
        return "" if keeps_names or name[: match.end()] in called else match[0]

    return _SLICE.sub(kept, name)


def _type_name(kind: type | str) -> str:
    return kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"


def note(node: Node, key: str, value: object) -> None:
    """Put a note on `node` that it keeps on its way from the exported model to ExecuTorch's edge program."""
    node.meta[_NOTES] = {**node.meta.get(_NOTES, {}), key: value}


def noted(node: Node, key: str) -> Any:
    """What was noted on `node`; None for nothing."""
    return (node.meta.get(_NOTES) or {}).get(key)


def note_replaced(node: Node, name: str) -> None:
    """Note that `node` stands for an operator `name` of the model, as a pass wrote it."""
    note(node, _REPLACED, [*(noted(node, _REPLACED) or []), name])


def operator_names(node: Node) -> tuple[str, ...]:
    """The qualified name of a call's operator, and those of the operators that passes replaced by it."""
    return (op_name(node), *(noted(node, _REPLACED) or []))


def operator_aliases(name: str) -> tuple[str, ...]:
    """'aten.conv2d.default' also goes as 'aten::conv2d.default', 'aten.conv2d' and 'aten::conv2d'."""
    namespace, _, rest = name.partition(".")
    base, _, overload = rest.partition(".")
    return name, f"{namespace}::{base}.{overload}", f"{namespace}.{base}", f"{namespace}::{base}"


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


def set_argument(node: Node, name: str, value: object) -> None:
    """Give a call another argument, by its name in the operator's schema."""
    overload = _overload(node)
    assert overload is not None
    values = {**arguments(node), name: value}
    keywords = {argument.name for argument in overload._schema.arguments if argument.kwarg_only}
    node.args = tuple(value for key, value in values.items() if key not in keywords)
    node.kwargs = {key: value for key, value in values.items() if key in keywords}


def iterate_nodes(value: object) -> Iterator[Node]:
    """The nodes in an argument: itself, or those of a list."""
    if isinstance(value, Node):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from iterate_nodes(item)


def is_operator(node: Node) -> bool:
    """Whether `node` computes something: a call, but none that picks an output of another or only checks something."""
    if node.op != "call_function" or node.target is operator.getitem:
        return False
    overload = _overload(node)
    return overload is None or bool(overload._schema.returns)


def is_quantize(node: Node) -> bool:
    """Whether `node` turns float values into integers."""
    return op_name(node).startswith("quantized_decomposed.quantize_per_")


def is_dequantize(node: Node) -> bool:
    """Whether `node` turns integers into float values."""
    return op_name(node).startswith("quantized_decomposed.dequantize_per_")


def is_random(node: Node) -> bool:
    """Whether `node` is an operator that can draw random numbers."""
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


def is_state(node: Node) -> bool:
    """Whether `node` is the copy of a state's value before the call (see `openneutron.model.state`)."""
    return noted(node, STATE) is not None and op_name(node) == "aten.clone.default"


def is_pure(node: Node) -> bool:
    """Whether `node` is an ATen operator whose result depends on its arguments alone, and that writes nothing."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "aten" or is_state(node):
        return False
    writes = node.target._schema.is_mutable and node.target is not torch.ops.aten.detach_.default
    return not writes and not is_random(node)


def placeholders(graph: torch.fx.Graph) -> list[Node]:
    """The graph's inputs, in order."""
    return [node for node in graph.nodes if node.op == "placeholder"]


def output_node(graph: torch.fx.Graph) -> Node:
    """The node that returns."""
    found: Node = next(node for node in reversed(graph.nodes) if node.op == "output")
    return found
