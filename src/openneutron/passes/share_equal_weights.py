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
       called them.
    2. Among these layers, those with equal biases read one bias.

    Several parameters of the model stay apart, because training may change equal parameters differently.

    If a loop calls a layer in each step, the passes that fold a batch norm, the weight of a norm or a product with a
    constant write a new weight for each step. Recovery finds the steps of a recurrent layer by their common weight, and
    the program has a common weight once. Layers that do not depend on each other, such as a head that reads several
    feature maps, keep their weights, so that each is rounded for its own inputs.
    """
    layers = _layers_by_weight(module)
    changed = False
    for key in recurrent_groups(module.graph, layers):
        changed |= _share(module, layers[key], "weight")
        if len(_constants(layers[key], "weight")) == 1:
            for equal in _by_value(module, layers[key], "bias").values():
                changed |= _share(module, equal, "bias")
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
        if len(_constants(nodes, "weight")) > 1
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


def _constants(layers: Sequence[Node], role: str) -> set[str]:
    """Returns the names of the constants that layers read in `role`."""
    return {str(arguments(layer)[role].target) for layer in layers}


def _share(module: GraphModule, layers: Sequence[Node], role: str) -> bool:
    """Lets all layers read the constant of the first one, unless several of their constants are parameters.

    Returns whether one of them read another constant before.
    """
    names = _constants(layers, role)
    if len(names) == 1 or sum(isinstance(attribute(module, name), torch.nn.Parameter) for name in names) > 1:
        return False
    for layer in layers[1:]:
        set_argument(layer, role, arguments(layers[0])[role])
    return True
