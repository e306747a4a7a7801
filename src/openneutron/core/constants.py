"""Reads and inserts constants of a graph module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from openneutron.core.fx import is_pure

__all__ = [
    "attribute", "computed_constants", "constant_of", "constant_value", "free_name", "insert_constant", "number_of",
    "set_attribute",
]  # fmt: skip


def attribute(module: torch.nn.Module, path: str) -> Any:
    """Returns the attribute of a module at a dotted path."""
    value: Any = module
    for name in path.split("."):
        value = getattr(value, name)
    return value


def set_attribute(module: torch.nn.Module, path: str, value: Any) -> None:
    """Sets the attribute of a module at a dotted path. A tensor that is no parameter becomes a buffer.

    Replaces an attribute of that name, and makes the modules on the path that do not exist.
    """
    *owners, name = path.split(".")
    for owner in owners:
        if not isinstance(getattr(module, owner, None), torch.nn.Module):
            module.add_module(owner, torch.nn.Module())
        module = module.get_submodule(owner)
    if hasattr(module, name):
        delattr(module, name)
    if isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter):
        module.register_buffer(name, value)
    else:
        setattr(module, name, value)


def constant_of(module: GraphModule, node: object) -> torch.Tensor | None:
    """Returns the tensor that a get_attr node reads; None for any other node."""
    if not isinstance(node, Node) or node.op != "get_attr":
        return None
    value = attribute(module, str(node.target))
    return value.detach() if isinstance(value, torch.Tensor) else None


def constant_value(node: object) -> torch.Tensor | None:
    """Returns the tensor that a get_attr node reads from the module that owns its graph; None for any other node."""
    module = node.graph.owning_module if isinstance(node, Node) else None
    return None if module is None else constant_of(module, node)


def number_of(value: object, constant: Callable[[object], torch.Tensor | None] = constant_value) -> float | None:
    """Returns the value of a number, or of a real constant whose elements are all equal; None for anything else."""
    if isinstance(value, (int, float)):
        return float(value)
    values = constant(value)
    if values is None or values.numel() == 0 or values.is_complex() or not bool((values == values.flatten()[0]).all()):
        return None
    return float(values.flatten()[0])


def computed_constants(module: GraphModule) -> set[Node]:
    """Returns the constants of a graph module and the nodes computed from constants alone. Linear in nodes."""
    found: set[Node] = set()
    for node in module.graph.nodes:
        computed = is_pure(node) and node.all_input_nodes and found.issuperset(node.all_input_nodes)
        if computed or constant_of(module, node) is not None:
            found.add(node)
    return found


def free_name(module: torch.nn.Module, name: str) -> str:
    """Returns `name`, with underscores appended until the module has no attribute of that name."""
    while hasattr(module, name):
        name += "_"
    return name


def insert_constant(
    module: GraphModule, before: Node, value: torch.Tensor, role: str, *, trainable: bool = False
) -> Node:
    """Inserts a get_attr node before the node `before`, for a new buffer that holds `value`. Returns the get_attr node.

    The buffer's name consists of the name of `before` and `role`. With `trainable`, `value` becomes a parameter.
    """
    name = free_name(module, f"_{before.name}_{role}")
    if trainable:
        module.register_parameter(name, torch.nn.Parameter(value.detach().clone()))
    else:
        module.register_buffer(name, value.detach().clone())
    with module.graph.inserting_before(before):
        constant = module.graph.get_attr(name)
    constant.meta = {key: before.meta[key] for key in ("stack_trace", "nn_module_stack") if key in before.meta}
    fake_mode = getattr(before.meta.get("val"), "fake_mode", None)
    constant.meta["val"] = fake_mode.from_tensor(value.detach(), static_shapes=True) if fake_mode else value
    return constant
