"""Constants of a graph module: reading them and adding new ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node, map_arg

from openneutron.core.fx import is_pure

__all__ = [
    "attribute", "computed_constants", "constant_of", "constant_value", "insert_constant", "number_of", "value_of",
]  # fmt: skip


def attribute(module: torch.nn.Module, path: str) -> Any:
    """The attribute of a module under a dotted path."""
    value: Any = module
    for name in path.split("."):
        value = getattr(value, name)
    return value


def constant_of(module: GraphModule, node: object) -> torch.Tensor | None:
    """The tensor that a get_attr node reads; None for any other node."""
    if not isinstance(node, Node) or node.op != "get_attr":
        return None
    value = attribute(module, str(node.target))
    return value.detach() if isinstance(value, torch.Tensor) else None


def constant_value(node: object) -> torch.Tensor | None:
    """The tensor that a get_attr node reads from the module that has its graph; None for any other node."""
    module = node.graph.owning_module if isinstance(node, Node) else None
    return None if module is None else constant_of(module, node)


def number_of(value: object, constant: Callable[[object], torch.Tensor | None] = constant_value) -> float | None:
    """The number that an argument is, or that all values of a constant are; None for anything else."""
    if isinstance(value, (int, float)):
        return float(value)
    values = constant(value)
    if values is None or values.numel() == 0 or not bool((values == values.flatten()[0]).all()):
        return None
    return float(values.flatten()[0])


def computed_constants(module: GraphModule) -> set[Node]:
    """The constants of a graph module, and what is computed from them alone. Linear in nodes."""
    found: set[Node] = set()
    for node in module.graph.nodes:
        computed = is_pure(node) and node.all_input_nodes and found.issuperset(node.all_input_nodes)
        if computed or constant_of(module, node) is not None:
            found.add(node)
    return found


@torch.no_grad()
def value_of(module: GraphModule, node: Node) -> torch.Tensor:
    """The value of a constant, computed if need be."""
    known: dict[Node, Any] = {}
    waiting = [node]
    while waiting:
        top = waiting[-1]
        missing = [source for source in top.all_input_nodes if source not in known]
        if missing:
            waiting += missing
            continue
        if top.op == "get_attr":
            known[top] = attribute(module, str(top.target))
        else:
            assert callable(top.target)
            known[top] = top.target(*map_arg(top.args, known.__getitem__), **map_arg(top.kwargs, known.__getitem__))
        waiting.pop()
    value = known[node]
    assert isinstance(value, torch.Tensor)
    return value.detach()


def insert_constant(
    module: GraphModule, before: Node, value: torch.Tensor, role: str, *, trainable: bool = False
) -> Node:
    """A get_attr node for a new buffer that holds `value`, placed in front of `before` and named after it.

    `trainable` makes it a parameter.
    """
    name = f"_{before.name}_{role}"
    while hasattr(module, name):
        name += "_"
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
