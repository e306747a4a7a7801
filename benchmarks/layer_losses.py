"""Finds the layer of a quantized network with the largest loss of SQNR to the float network."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from openneutron.core.fx import is_dequantize, is_quantize, op_name, source_of

__all__ = ["LayerLoss", "largest_loss", "sqnr"]

BEST = 60.0  # upper limit of an SQNR in dB, above the SQNRs of int8; exact values have this SQNR


@dataclass(frozen=True)
class LayerLoss:
    """A layer, the lowest SQNR of its inputs, and the SQNR of its output, in dB."""

    node: str
    op: str
    source: str | None
    before: float
    after: float

    @property
    def decibels(self) -> float:
        """The loss of SQNR in dB."""
        return self.before - self.after

    def __str__(self) -> str:
        return f"{self.node} ({self.op}, {self.source}): {self.before:.1f} -> {self.after:.1f} dB"


def sqnr(reference: Tensor, value: Tensor) -> float:
    """Return the signal-to-quantization-noise ratio of `value` in dB; infinite if both are equal."""
    signal, noise = reference.double().square().sum().item(), (value - reference).double().square().sum().item()
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


class _Values(Interpreter):
    """Records the output of each operator under its node's name, after quantization if it is quantized."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self.values: dict[str, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and value.is_floating_point():
            self.values[_origin(n).name] = value
        return value


def _origin(node: Node) -> Node:
    """Return the node whose value a quantize or dequantize represents; any other node itself."""
    while is_dequantize(node) or is_quantize(node):
        node = node.all_input_nodes[0]
    return node


@torch.no_grad()
def largest_loss(reference: GraphModule, converted: GraphModule, inputs: tuple[Tensor, ...]) -> LayerLoss | None:
    """Return the layer with the largest loss of SQNR from its worst input to its output; None without any loss.

    `reference` is the float graph of `converted` before `prepare_pt2e`; nodes with equal names compute the same value.
    Of layers with equal losses, the first is returned.
    """
    expected, found = _Values(reference), _Values(converted)
    expected.run(*inputs)
    found.run(*inputs)
    ratios: dict[Node, float] = {}
    worst: LayerLoss | None = None
    for node in reference.graph.nodes:
        before = min((ratios[read] for read in node.all_input_nodes), default=BEST)
        value, other = expected.values.get(node.name), found.values.get(node.name)
        ratios[node] = before if value is None or other is None else min(BEST, sqnr(value, other))
        loss = LayerLoss(node.name, op_name(node), source_of(node), before, ratios[node])
        if loss.decibels > (worst.decibels if worst else 0) and node.op == "call_function":
            worst = loss
    return worst
