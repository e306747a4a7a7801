"""Finds the layer of a quantized network with the largest loss of SQNR to the float network."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from openneutron.core.evaluation import GraphRun
from openneutron.core.fx import is_dequantize, is_quantize, op_name, placeholders, source_of

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


def _values(module: GraphModule, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Return the output of each operator by its node's name, after quantization if it is quantized."""
    run = GraphRun(module, dict(zip(placeholders(module.graph), inputs, strict=True)), keeps_values=True)
    run.run()
    tensors = [(node, value) for node, value in run.values.items() if isinstance(value, Tensor)]
    return {_origin(node).name: value for node, value in tensors if value.is_floating_point()}


def _origin(node: Node) -> Node:
    """Return the node whose value a quantize or dequantize represents; any other node itself."""
    while is_dequantize(node) or is_quantize(node):
        node = node.all_input_nodes[0]
    return node


@torch.no_grad()
def largest_loss(reference: GraphModule, converted: GraphModule, inputs: tuple[Tensor, ...]) -> LayerLoss | None:
    """Return the layer with the largest loss of SQNR from its worst input to its output; None without any loss.

    `reference` is the float graph of `converted` before `prepare_pt2e`; nodes with equal names compute the same value.
    On a tie, the first layer is returned.
    """
    expected, found = _values(reference, inputs), _values(converted, inputs)
    ratios: dict[Node, float] = {}
    worst: LayerLoss | None = None
    for node in reference.graph.nodes:
        before = min((ratios[read] for read in node.all_input_nodes), default=BEST)
        value, other = expected.get(node.name), found.get(node.name)
        ratios[node] = before if value is None or other is None else min(BEST, sqnr(value, other))
        loss = LayerLoss(node.name, op_name(node), source_of(node), before, ratios[node])
        if loss.decibels > (worst.decibels if worst else 0) and node.op == "call_function":
            worst = loss
    return worst
