"""Where a quantized network loses its signal: the layer behind which the SQNR to the float network falls most."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from openneutron.core.fx import is_dequantize, is_quantize, op_name, source_of

__all__ = ["Fall", "sqnr", "steepest_fall"]

BEST = 60.0  # decibels; int8 keeps less of any signal, and what is exact counts as this


@dataclass(frozen=True)
class Fall:
    """A layer, the lowest SQNR among what it reads and that of what it yields, in decibels."""

    node: str
    op: str
    source: str | None
    before: float
    after: float

    @property
    def decibels(self) -> float:
        """How far it falls."""
        return self.before - self.after

    def __str__(self) -> str:
        return f"{self.node} ({self.op}, {self.source}): {self.before:.1f} -> {self.after:.1f} dB"


def sqnr(reference: Tensor, value: Tensor) -> float:
    """Return the signal-to-quantization-noise ratio of `value` in decibels; infinite where both are equal."""
    signal, noise = reference.double().square().sum().item(), (value - reference).double().square().sum().item()
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


class _Values(Interpreter):
    """Keeps what each operator yields under its node's name: behind its quantization, where it is quantized."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self.values: dict[str, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and value.is_floating_point():
            self.values[_origin(n).name] = value
        return value


def _origin(node: Node) -> Node:
    """The node whose value a dequantize restores; any other node itself."""
    while is_dequantize(node) or is_quantize(node):
        node = node.all_input_nodes[0]
    return node


@torch.no_grad()
def steepest_fall(reference: GraphModule, converted: GraphModule, inputs: tuple[Tensor, ...]) -> Fall | None:
    """Return the layer whose output's SQNR is furthest below that of its worst input, the first one of equals.

    `reference` is the float graph that `converted` was made of: the same names stand for the same values. None where no
    layer loses anything.
    """
    expected, found = _Values(reference), _Values(converted)
    expected.run(*inputs)
    found.run(*inputs)
    ratios: dict[Node, float] = {}
    worst: Fall | None = None
    for node in reference.graph.nodes:
        before = min((ratios[read] for read in node.all_input_nodes), default=BEST)
        value, other = expected.values.get(node.name), found.values.get(node.name)
        ratios[node] = before if value is None or other is None else min(BEST, sqnr(value, other))
        fall = Fall(node.name, op_name(node), source_of(node), before, ratios[node])
        if fall.decibels > (worst.decibels if worst else 0) and node.op == "call_function":
            worst = fall
    return worst
