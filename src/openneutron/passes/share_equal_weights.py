"""Lets the steps of a loop share one weight again, after earlier passes gave each of them a copy."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence

import torch
from torch.fx import GraphModule, Node

from openneutron.core.constants import attribute
from openneutron.core.fx import arguments, finish_rewrite, modules_of, set_argument
from openneutron.core.recurrence import recurrent_groups
from openneutron.ops.layers import constant_layer

__all__ = ["share_equal_weights"]


def share_equal_weights(module: GraphModule) -> bool:
    """Rules. Linear in nodes and weights:

    1. Layers with equal weights, of which one depends on another, read one weight. They are of one kind, and one module
       called them. At most one of their weights is a parameter of the model, because training may change equal
       parameters differently.
    2. Among these layers, those with equal biases read one bias.

    If a loop calls a layer in each step, the passes that fold a batch norm, the weight of a norm or a product with a
    constant write a new weight for each step. Recovery finds the steps of a recurrent layer by their common weight, and
    the program has a common weight once. Layers that do not depend on each other, such as a head that reads several
    feature maps, keep their weights, so that each is rounded for its own inputs.
    """
    layers = _layers_by_weight(module)
    changed = False
    for key in recurrent_groups(module.graph, layers):
        weights = {str(arguments(node)["weight"].target) for node in layers[key]}
        if sum(isinstance(attribute(module, name), torch.nn.Parameter) for name in weights) > 1:
            continue
        changed |= _share(layers[key], "weight")
        for equal in _by_value(module, layers[key], "bias").values():
            changed |= _share(equal, "bias")
    return finish_rewrite(module, changed=changed)


def _layers_by_weight(module: GraphModule) -> dict[Hashable, list[Node]]:
    """Returns the layers of equal kind, module and weight. Leaves out layers that differ in kind or module from all
    others.
    """
    alike: dict[Hashable, list[Node]] = {}
    for node in module.graph.nodes:
        layer = constant_layer(module, node)
        if layer is not None:
            alike.setdefault((layer.kind, layer.groups, modules_of(node)[-1:], layer.weight.shape), []).append(node)
    return {
        (form, value): equal
        for form, nodes in alike.items()
        if len({arguments(node)["weight"].target for node in nodes}) > 1
        for value, equal in _by_value(module, nodes, "weight").items()
    }


def _by_value(module: GraphModule, layers: Sequence[Node], role: str) -> dict[Hashable, list[Node]]:
    """Returns the layers with equal constants in `role`. Leaves out layers without one."""
    digests: dict[str, Hashable] = {}
    found: dict[Hashable, list[Node]] = {}
    for layer in layers:
        constant = arguments(layer)[role]
        if constant is None:
            continue
        name = str(constant.target)
        if name not in digests:
            digests[name] = _digest(attribute(module, name).detach())
        found.setdefault(digests[name], []).append(layer)
    return found


def _digest(values: torch.Tensor) -> Hashable:
    """Returns a key that only equal values have."""
    in_bytes = values.contiguous().flatten().view(torch.uint8).numpy().data
    return values.dtype, values.shape, hashlib.sha256(in_bytes).digest()


def _share(layers: Sequence[Node], role: str) -> bool:
    """Lets all layers read the constant of the first one. Returns whether one of them read another constant."""
    first, *others = (arguments(layer)[role] for layer in layers)
    for layer in layers[1:]:
        set_argument(layer, role, first)
    return any(other.target != first.target for other in others)
