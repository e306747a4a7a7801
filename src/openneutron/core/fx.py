"""Functions that inspect and change torch.fx nodes, and notes on nodes that survive export and conversion."""

from __future__ import annotations

import operator
import re
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from openneutron.core.sources import FRAME
from openneutron.core.user_code import prefixes_of

__all__ = [
    "STATE",
    "UNBATCHED",
    "arguments",
    "cleaned_once",
    "compiled_once",
    "draws_random_numbers",
    "dtype_of",
    "finish_rewrite",
    "first_operand",
    "have_equal_sizes",
    "is_dequantize",
    "is_library",
    "is_operator",
    "is_pure",
    "is_quantize",
    "is_random",
    "is_state",
    "is_state_write",
    "iterate_nodes",
    "modules_of",
    "note",
    "note_of",
    "note_replaced",
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

# Frames inside these packages are not the user's code.
_LIBRARIES = re.compile(r"(?:^|[/\\])(site-packages|dist-packages)[/\\](torch|torchao|executorch)[/\\]|<eval_with_key>")
_STANDARD_LIBRARY = prefixes_of([Path(sysconfig.get_path("stdlib"))])
_OWN_FOLDER = prefixes_of([Path(__file__).parents[1]])
# The name that a non-strict export gives to a slice of a ModuleList or Sequential.
_SLICE = re.compile(r"\.slice\((?P<start>\w+), \w+, (?P<step>\w+)\)")
# convert_pt2e, torch.export and ExecuTorch's passes copy the metadata under this key to new nodes, and drop other keys.
_NOTES = "custom"
_REPLACED = "openneutron.replaced"
STATE = "openneutron.state"
"""Key of the note on a node that returns a state. The note's value is the name of the state's buffer."""
UNBATCHED = "openneutron.unbatched"
"""Key of the note on a value of one sample that has no batch dimension."""
OPERATORS_OF_A_MODEL = 1024
"""The number of operators whose names and schemas are cached: more than a model has."""


def op_name(node: Node) -> str:
    """Returns the qualified operator name of a call ("aten.conv2d.default").

    ATen and edge operators have equal names.
    """
    return node.op if node.op != "call_function" else _name_of_target(node.target)


@lru_cache(maxsize=OPERATORS_OF_A_MODEL)
def _name_of_target(target: Any) -> str:
    overload = _overload_of_target(target)
    return str(overload) if overload else getattr(target, "__name__", str(target))


def _overload(node: Node) -> torch._ops.OpOverload | None:
    """Returns the ATen overload of a call. An edge operator wraps an ATen overload."""
    return _overload_of_target(node.target)


def _overload_of_target(target: Any) -> torch._ops.OpOverload | None:
    for each in (target, getattr(target, "_op", None)):
        if isinstance(each, torch._ops.OpOverload):
            return each
    return None


def source_of(node: Node) -> str | None:
    """Returns the user's "file:line" that created `node`: the innermost frame outside torch, torchao and ExecuTorch."""
    frames = FRAME.findall(node.meta.get("stack_trace") or "")
    own = [f"{file}:{line}" for file, line in frames if not _LIBRARIES.search(file)]
    return own[-1] if own else None


def is_library(file: str) -> bool:
    """Whether a file of Python code is part of Python, torch, torchao, ExecuTorch or OpenNeutron."""
    is_standard = file.startswith((*_STANDARD_LIBRARY, "<")) and "-packages" not in file
    return is_standard or file.startswith(_OWN_FOLDER) or bool(_LIBRARIES.search(file))


def modules_of(node: Node) -> tuple[tuple[str, str], ...]:
    """Returns name and type of each module whose `forward` called `node`. The first one is the model itself ("").

    Names are those of `named_modules()`. If the model calls a slice of a ModuleList that does not begin with its first
    module, torch.export renumbers the modules, and the returned name contains the slice.
    """
    stack = [entry[:2] for entry in (node.meta.get("nn_module_stack") or {}).values()]
    called = {name for name, _ in stack}
    return tuple((_without_slices(name, called), _type_name(kind)) for name, kind in stack)


def place_of(node: Node) -> str:
    """Returns the origin of `node` for messages: the user's "file:line" if known, else the module that called it."""
    modules = modules_of(node)
    module = "module '{}' ({})".format(*modules[-1]) if modules else "in no module"
    return source_of(node) or module


def _without_slices(name: str, called: set[str]) -> str:
    """Removes slices from a module name where torch.export did not renumber the modules.

    torch.export keeps the numbers if the slice itself was called (it is a Sequential) or begins at the first module.
    """

    def kept(match: re.Match[str]) -> str:
        keeps_names = match["start"] in ("None", "0") and match["step"] in ("None", "1")
        return "" if keeps_names or name[: match.end()] in called else match[0]

    return _SLICE.sub(kept, name)


def _type_name(kind: type | str) -> str:
    return kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"


def note(node: Node, key: str, value: object) -> None:
    """Stores a note on `node` that the node keeps until ExecuTorch's edge program."""
    node.meta[_NOTES] = {**node.meta.get(_NOTES, {}), key: value}


def note_of(node: Node, key: str) -> Any:
    """Returns the note on `node` under `key`; None if there is none."""
    return (node.meta.get(_NOTES) or {}).get(key)


def note_replaced(node: Node, name: str) -> None:
    """Notes on `node`, which a pass inserted, that it replaces the operator `name` of the model."""
    note(node, _REPLACED, [*(note_of(node, _REPLACED) or []), name])


def operator_names(node: Node) -> tuple[str, ...]:
    """Returns the qualified operator name of a call, and the names of the operators that passes replaced by it."""
    return (op_name(node), *(note_of(node, _REPLACED) or []))


def operator_aliases(name: str) -> tuple[str, ...]:
    """Returns the spellings of an operator name: 'aten.conv2d.default' is also written 'aten::conv2d.default',
    'aten.conv2d' and 'aten::conv2d'.
    """
    namespace, _, rest = name.partition(".")
    base, _, overload = rest.partition(".")
    return name, f"{namespace}::{base}.{overload}", f"{namespace}.{base}", f"{namespace}::{base}"


def shape_of(node: Node) -> tuple[int, ...]:
    """Returns the static shape of the tensor that `node` returns, or of the first tensor if it returns several."""
    value = node.meta["val"]
    return tuple((value[0] if isinstance(value, (list, tuple)) else value).shape)


def have_equal_sizes(first: Sequence[int], second: Sequence[int]) -> bool:
    """Returns whether two shapes are equal for every batch size, if their batch size is dynamic.

    Comparing the shapes by == would specialize a dynamic size to the size of the example inputs.
    """
    return len(first) == len(second) and all(statically_known_true(a == b) for a, b in zip(first, second, strict=True))


def dtype_of(value: object) -> torch.dtype | None:
    """Returns the dtype of the tensor that a node returns; None for other nodes and other objects."""
    found = value.meta.get("val") if isinstance(value, Node) else None
    return found.dtype if isinstance(found, torch.Tensor) else None


def arguments(node: Node) -> dict[str, Any]:
    """Returns all arguments of a call by their names in the operator's schema, including defaults."""
    overload = _overload(node)
    if overload is None:
        return {}
    defaults, lists = _defaults_of(overload)
    named = {**defaults, **{name: [*defaults[name]] for name in lists}}
    named.update(zip(defaults, node.args, strict=False))
    named.update(node.kwargs)
    return named


@lru_cache(maxsize=OPERATORS_OF_A_MODEL)
def _defaults_of(overload: torch._ops.OpOverload) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Returns the defaults of all arguments by name, None for an argument without one, and the names of the lists."""
    described = overload._schema.arguments
    defaults = {each.name: each.default_value if each.has_default_value() else None for each in described}
    return defaults, tuple(name for name, value in defaults.items() if isinstance(value, list))


def first_operand(node: Node) -> Node:
    """Returns the first argument of a call whose first argument is a node."""
    operand = node.args[0]
    assert isinstance(operand, Node)
    return operand


def set_argument(node: Node, name: str, value: object) -> None:
    """Sets the argument of a call that has this name in the operator's schema."""
    overload = _overload(node)
    assert overload is not None
    values = {**arguments(node), name: value}
    keywords = {argument.name for argument in overload._schema.arguments if argument.kwarg_only}
    node.args = tuple(value for key, value in values.items() if key not in keywords)
    node.kwargs = {key: value for key, value in values.items() if key in keywords}


def iterate_nodes(value: object) -> Iterator[Node]:
    """Returns the nodes in an argument: the argument itself, or the items of a list or tuple."""
    if isinstance(value, Node):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from iterate_nodes(item)


def is_operator(node: Node) -> bool:
    """Whether `node` calls an operator that returns something. `getitem` does not count."""
    if node.op != "call_function" or node.target is operator.getitem:
        return False
    overload = _overload(node)
    return overload is None or bool(overload._schema.returns)


def is_quantize(node: Node) -> bool:
    """Whether `node` is a quantize operator, per tensor or per channel."""
    return op_name(node).startswith("quantized_decomposed.quantize_per_")


def is_dequantize(node: Node) -> bool:
    """Whether `node` is a dequantize operator, per tensor or per channel."""
    return op_name(node).startswith("quantized_decomposed.dequantize_per_")


def is_random(node: Node) -> bool:
    """Whether `node` is an operator that can draw random numbers."""
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


def draws_random_numbers(node: Node) -> bool:
    """Whether `node` draws random numbers.

    A dropout of probability 0 does not, nor do attention and recurrent nets if their dropout is off.
    """
    if not is_random(node):
        return False
    args = arguments(node)
    switches = ("dropout", "dropout_p", "train", "training", *(("p",) if "train" in args else ()))
    return all(args[name] for name in switches if name in args)


def is_state(node: Node) -> bool:
    """Whether `node` copies the value that a state had before the call (see `openneutron.model.state`)."""
    return note_of(node, STATE) is not None and op_name(node) == "aten.clone.default"


def is_state_write(node: Node) -> bool:
    """Whether `node` writes the next value of a state."""
    if op_name(node) != "aten.copy_.default":
        return False
    store = node.args[0]
    return isinstance(store, Node) and any(map(is_state, store.users))


def is_pure(node: Node) -> bool:
    """Whether `node` is an ATen operator without side effects whose result depends only on its arguments."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "aten" or is_state(node):
        return False
    writes = node.target._schema.is_mutable and node.target is not torch.ops.aten.detach_.default
    return not writes and not is_random(node)


def placeholders(graph: torch.fx.Graph) -> list[Node]:
    """Returns the inputs of a graph, in order."""
    return [node for node in graph.nodes if node.op == "placeholder"]


def output_node(graph: torch.fx.Graph) -> Node:
    """Returns the output node of a graph."""
    found: Node = next(node for node in reversed(graph.nodes) if node.op == "output")
    return found


def finish_rewrite(module: GraphModule, *, changed: bool) -> bool:
    """Ends a pass that `changed` the graph: removes operators without readers, and regenerates the module's code.

    Does nothing for a graph that did not change. Returns `changed`.
    """
    if changed:
        module.graph.eliminate_dead_code()
        module.recompile()
    return changed


@contextmanager
def compiled_once(module: GraphModule) -> Iterator[None]:
    """Generates the code of `module` at the end of the block only, however often the block calls `recompile`.

    The block must not call `module`. If the block raises, `module` keeps the code that it had before the block.
    """
    vars(module)["recompile"] = lambda: None
    try:
        yield
    finally:
        del vars(module)["recompile"]
    module.recompile()


@contextmanager
def cleaned_once(module: GraphModule) -> Iterator[None]:
    """Removes operators without readers at the end of the block only, if the block removes them at least once.

    The block must not replace the graph of `module`.
    """
    calls: list[None] = []
    vars(module.graph)["eliminate_dead_code"] = lambda: calls.append(None)
    try:
        yield
    finally:
        del vars(module.graph)["eliminate_dead_code"]
    if calls:
        module.graph.eliminate_dead_code()
