"""Lets the layers of a loop share one weight again, after earlier passes gave each of them a copy."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch.fx import GraphModule, Node

from openneutron.core.constants import constant_of
from openneutron.core.fx import arguments, finish_rewrite, modules_of, set_argument
from openneutron.ops.layers import constant_layer

__all__ = ["share_equal_weights"]

# The number of values in the key by which constants are found. Only constants with equal keys are compared wholly.
SAMPLED = 32


def share_equal_weights(module: GraphModule) -> bool:
    """Rules. Linear in nodes and weights:

    1. A layer whose weight equals that of an earlier layer, of the same kind and called by the same module, reads the
       weight of the earlier layer.
    2. Layers with one weight and equal biases read one bias.

    If a loop calls a layer in each step, the passes that fold a batch norm, the weight of a norm or a product with a
    constant write new weights for each step. Recovery finds the steps of a recurrent layer by their common weight, and
    the program has a common weight once. Layers with different weights do not share a bias, because recovery corrects
    a bias only if all layers that read it have one weight.
    """
    known = _KnownConstants(module)
    changed = False
    for node in module.graph.nodes:
        layer = constant_layer(module, node)
        if layer is None:
            continue
        form = layer.kind, layer.groups, modules_of(node)[-1:]
        changed |= known.share(node, "weight", form)
        if layer.bias is not None:
            changed |= known.share(node, "bias", (form, arguments(node)["weight"].target))
    return finish_rewrite(module, changed=changed)


class _KnownConstants:
    """The first constant of each value that layers read, for each group of layers."""

    def __init__(self, module: GraphModule) -> None:
        self._module = module
        self._known: dict[Hashable, list[Node]] = {}

    def share(self, layer: Node, role: str, group: Hashable) -> bool:
        """Replaces a constant of `layer` by an equal one of an earlier layer in `group`. Returns whether it did."""
        own = arguments(layer)[role]
        values = self._values(own)
        known = self._known.setdefault((role, group, values.dtype, values.shape, _sampled(values)), [])
        same = next((one for one in known if torch.equal(self._values(one), values)), None)
        if same is None:
            known.append(own)
        if same is None or same.target == own.target:
            return False
        set_argument(layer, role, same)
        return True

    def _values(self, constant: Node) -> torch.Tensor:
        values = constant_of(self._module, constant)
        assert values is not None
        return values


def _sampled(values: torch.Tensor) -> tuple[float, ...]:
    return tuple(values.flatten()[:: max(values.numel() // SAMPLED, 1)].tolist())
