"""Converts example inputs of any form to positional and keyword arguments of a model."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from openneutron.core.fx import placeholders
from openneutron.core.messages import did_you_mean
from openneutron.errors import InputError
from openneutron.model.arguments import Leaf, Path

__all__ = [
    "Examples",
    "arguments_of",
    "call_with_leaves",
    "examples_of",
    "leaves_of",
    "register_dataclasses",
    "register_dataclasses_of",
    "to_tensors",
]

_SCALARS = (int, float, bool, str, type(None))


@dataclass(frozen=True)
class Examples:
    """Positional and keyword arguments of a call of a model."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def leaves(self) -> list[Any]:
        """All leaves (tensors, numbers, text and None) in the order of the inputs of an exported program."""
        return pytree.tree_leaves((self.args, dict(self.kwargs)))


def examples_of(given: Any, model: object) -> Examples:
    """Converts `given` to arguments of `model`.

    `given` is a tensor, a dataclass, a tuple or list of forward's arguments, or a mapping from their names.

    1. Converts numpy arrays to tensors.
    2. Clones a tensor that occurs twice, because torch.export would merge both occurrences into one input.
    3. Makes tensors contiguous or channels-last, because ExecuTorch supports no other memory format.
    4. Registers dataclasses with torch, because torch.export requires it.

    Raises `InputError` for any other value.
    """
    register_dataclasses(given)
    if isinstance(given, Mapping):
        args, kwargs = _split_by_name(given, model)
    elif isinstance(given, (tuple, list)) and not hasattr(given, "_fields"):
        args, kwargs = tuple(given), {}
    elif isinstance(given, (Tensor, np.ndarray)) or dataclasses.is_dataclass(given):
        args, kwargs = (given,), {}
    else:
        raise InputError(
            "example_inputs must be a tuple of forward's arguments, or a mapping from their names, not "
            f"{type(given).__name__}."
        )
    leaves, structure = pytree.tree_flatten((args, kwargs))
    wrong = [type(leaf).__name__ for leaf in leaves if not isinstance(leaf, (Tensor, np.ndarray, *_SCALARS))]
    if wrong:
        raise InputError(
            "example_inputs may contain tensors, numpy arrays, numbers, text and None, also in tuples, lists, dicts "
            f"and dataclasses; got {', '.join(wrong)}."
        )
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            _check_tensor(leaf)
    args, kwargs = pytree.tree_unflatten(_clone_repeated(map(to_tensors, leaves)), structure)
    return Examples(args, kwargs)


def _check_tensor(value: Tensor) -> None:
    """Raises `InputError` for a tensor that is not a dense array of values."""
    if value.is_nested:
        raise InputError("example_inputs have a nested tensor. Give a padded tensor: torch.nested.to_padded_tensor.")
    if value.layout is not torch.strided:
        raise InputError("example_inputs have a sparse tensor. Programs take dense tensors: give to_dense() of it.")
    if value.is_quantized:
        raise InputError("example_inputs have a quantized tensor. Give dequantize() of it; the program quantizes it.")
    if value.is_meta:
        raise InputError("example_inputs have a tensor on the device 'meta', which holds no values. Give real inputs.")


def to_tensors(value: Any) -> Any:
    """Converts a numpy array to a tensor; returns any other value unchanged.

    Raises `InputError` for an array whose dtype torch does not have.
    """
    if not isinstance(value, (np.ndarray, np.generic)):
        return value
    try:
        return torch.from_numpy(np.require(value, requirements=["C", "W"]))
    except (TypeError, ValueError) as error:
        raise InputError(f"A numpy array of the inputs cannot be converted to a tensor: {error}") from error


def _clone_repeated(leaves: Iterator[Any]) -> Iterator[Any]:
    seen: set[int] = set()
    for leaf in leaves:
        value = _contiguous_or_channels_last(leaf) if isinstance(leaf, Tensor) else leaf
        yield value.clone() if isinstance(leaf, Tensor) and id(value) in seen else value
        seen.add(id(value))


def _contiguous_or_channels_last(value: Tensor) -> Tensor:
    """Returns `value` if it is contiguous or channels-last, else a contiguous copy."""
    if value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last):
        return value
    return value.contiguous()


def _split_by_name(given: Mapping[str, Any], model: object) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Splits a mapping into positional arguments, up to the first missing one, and keyword arguments."""
    parameters = _forward_parameters(model)
    if parameters is None:
        return (), dict(given)
    known = {parameter.name for parameter in parameters}
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    if len(parameters) == 1 and not takes_any and not known.intersection(given) and _may_be_a_mapping(model):
        return (given,), {}  # the only argument of forward is itself a mapping
    unknown = [name for name in given if name not in known]
    if unknown and not takes_any:
        raise InputError(
            f"example_inputs have the name '{unknown[0]}', but forward takes only {', '.join(sorted(known))}."
            f"{did_you_mean(unknown[0], known)} Use the names of the arguments of forward."
        )
    rest = dict(given)
    positional = []
    for parameter in parameters:
        if parameter.kind not in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            break
        if parameter.name not in rest:
            break
        positional.append(rest.pop(parameter.name))
    return tuple(positional), rest


def _forward_parameters(model: object) -> list[inspect.Parameter] | None:
    function = getattr(model, "forward", model)
    try:
        parameters = list(inspect.signature(function).parameters.values())  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    structure = _structure_of(model) if isinstance(model, GraphModule) else None
    if structure is None:
        return parameters
    count = structure.child(0).num_children
    return [
        parameter.replace(kind=parameter.POSITIONAL_OR_KEYWORD if index < count else parameter.KEYWORD_ONLY)
        for index, parameter in enumerate(parameters)
    ]


def _may_be_a_mapping(model: object) -> bool:
    """Whether the first argument of `model` may be a mapping. True for a module that is not exported."""
    structure = _structure_of(model) if isinstance(model, GraphModule) else None
    return structure is None or not structure.child(0).num_children or not structure.child(0).child(0).is_leaf()


def register_dataclasses(value: Any) -> None:
    """Registers the dataclasses in `value` with torch.export, unless they are registered already."""
    for item in pytree.tree_leaves(value):
        if dataclasses.is_dataclass(item) and not isinstance(item, type):
            _register_dataclass(type(item))
            register_dataclasses(item)


def register_dataclasses_of(structure: pytree.TreeSpec) -> None:
    """Registers the dataclasses in a structure that comes from another process, unless they are registered already."""
    if dataclasses.is_dataclass(structure.type) and structure.type not in pytree.SUPPORTED_NODES:
        _register_dataclass(structure.type)
    for child in structure.children():
        register_dataclasses_of(child)


def _register_dataclass(kind: Any) -> None:
    torch.export.register_dataclass(kind, serialized_type_name=f"{kind.__module__}.{kind.__qualname__}")


def _structure_of(module: GraphModule) -> pytree.TreeSpec | None:
    """Returns the pytree structure of an exported module's arguments; None for a graph with flat inputs."""
    info = getattr(module.graph._codegen, "pytree_info", None)
    return None if info is None else info.in_spec


def arguments_of(module: GraphModule, leaves: Sequence[Any]) -> Examples:
    """Builds the arguments of an exported module from their leaves."""
    structure = _structure_of(module)
    if structure is None:
        return Examples(tuple(leaves))
    args, kwargs = pytree.tree_unflatten(leaves, structure)
    return Examples(args, kwargs)


def call_with_leaves(module: GraphModule, leaves: Sequence[Any]) -> Any:
    """Calls an exported module with the arguments that have these leaves. Returns its outputs."""
    arguments = arguments_of(module, leaves)
    return module(*arguments.args, **arguments.kwargs)


def leaves_of(module: GraphModule) -> tuple[Leaf, ...]:
    """Returns the leaves of an exported module's inputs, in order."""
    nodes = placeholders(module.graph)
    structure = _structure_of(module)
    paths: Sequence[Path] = [(str(node.target),) for node in nodes]
    if structure is not None and structure.num_leaves == len(nodes):
        paths = _leaf_paths(structure, module.graph._codegen.pytree_info.orig_args)  # type: ignore[attr-defined]
    return tuple(map(_leaf_of, nodes, paths))


def _leaf_of(node: Node, path: Path) -> Leaf:
    value = node.meta.get("val")
    is_constant = isinstance(value, _SCALARS) and "val" in node.meta
    return Leaf(path, not is_constant, value if is_constant else None)


def _leaf_paths(structure: pytree.TreeSpec, names: Sequence[str]) -> list[Path]:
    """Returns the path of each leaf. `names` lists the names of the arguments, positional ones first."""
    positional = structure.child(0).num_children
    numbered = pytree.tree_unflatten(range(structure.num_leaves), structure)
    return [_leaf_path(keys, names, positional) for keys, _ in pytree.tree_flatten_with_path(numbered)[0]]


def _leaf_path(keys: Sequence[Any], names: Sequence[str], positional: int) -> Path:
    kind, argument, *rest = map(_key_value, keys)
    is_named = kind == 0 and int(argument) < min(positional, len(names))
    return (names[int(argument)] if is_named else str(argument), *rest)


def _key_value(key: Any) -> str | int:
    for name in ("idx", "key", "name"):
        if hasattr(key, name):
            value = getattr(key, name)
            return value if isinstance(value, (str, int)) else str(value)
    return str(key)
