"""Runs a float graph and its converted module together, operator by operator, on all samples.

All samples run through an operator, in batches, before the next operator runs. A method can therefore correct each
layer with the error that remains after the corrections of all earlier layers, in one pass over the graph. A pass for
each layer would take quadratic time.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.fx import GraphModule, Node

from openneutron.calibration.bare_graph import SINGLE, Batches
from openneutron.core.evaluation import GraphRun, last_uses, value_of
from openneutron.core.fx import arguments, first_operand, is_dequantize, is_quantize, op_name
from openneutron.core.progress import progress_bar
from openneutron.errors import ModelError
from openneutron.model.state import sample_nodes
from openneutron.ops.declared import layer_kind
from openneutron.ops.fusion import is_activation, takes_activation
from openneutron.recovery.batches import Batch, batches_of, run_in_batch
from openneutron.recovery.shared_layers import SharedLayer, layers_by_weight, look_aheads
from openneutron.recovery.weighted_layers import WeightedLayer

__all__ = [
    "LayerIO",
    "Samples",
    "SamplesRun",
    "SharedMeasurement",
    "evenly_spaced",
    "fake_quantized",
    "run_layerwise",
    "samples_within_memory",
]

Samples = Sequence[tuple[torch.Tensor, ...]]
_LOGGER = logging.getLogger(__name__)
MEMORY = 3 << 30
"""Limit in bytes of the values of all samples. If the samples need more, fewer samples are used."""


@dataclass(frozen=True)
class LayerIO:
    """Inputs and wanted outputs of a layer, one tensor for each batch, and its float weight.

    `quantized` are its inputs in the converted module (dequantized), `real` are its inputs in the float graph, and
    `wanted` are its outputs in the float graph, before a fused activation. `counts` are the samples of each batch.
    """

    weight: torch.Tensor
    quantized: list[torch.Tensor]
    real: list[torch.Tensor]
    wanted: list[torch.Tensor]
    counts: list[int]

    def of_samples(self, batches: Sequence[Batch]) -> LayerIO:
        """Returns the same values, one tensor for each sample."""

        def split(values: list[torch.Tensor]) -> list[torch.Tensor]:
            return [one for batch, value in zip(batches, values, strict=True) for one in batch.samples_in(value)]

        counts = [1] * sum(self.counts)
        return LayerIO(self.weight, split(self.quantized), split(self.real), split(self.wanted), counts)


class SharedMeasurement(Protocol):
    """A measurement of layers that share a weight. A method changes their constants afterwards."""

    def add(self, layer: WeightedLayer, layer_io: LayerIO) -> None:
        """Adds the inputs and outputs of one of the layers. Does not keep them."""

    def apply(self) -> None:
        """Changes the constants that the layers share. Is called once, when all layers were added."""


class SamplesRun(GraphRun):
    """A run of one graph on all samples. The value of a node is a list with one item for each of `batches`.

    Constants, and values computed from constants, are read when an operator needs them. They may change until then.
    With `overwrites`, activations and roundings overwrite their operands; such a run must not be forked.
    """

    def __init__(self, module: GraphModule, batches: Sequence[Batch], *, overwrites: bool = False) -> None:
        inputs = enumerate(sample_nodes(module.graph))
        given = {node: [batch.inputs[index] for batch in batches] for index, node in inputs}
        super().__init__(module, given, only_dependents=True)
        self.batches = batches
        self.overwrites = overwrites

    def of_batches(self, node: Node) -> list[Any]:
        """Returns the values of `node` for all batches."""
        return self.values[node] if node in self.values else [value_of(self.module, node)] * len(self.batches)

    def compute(self, node: Node) -> list[Any]:
        """Computes `node` for all batches. Values are rounded where they are dequantized, and not where quantized."""
        if is_quantize(node):
            return self.of_batches(first_operand(node))
        if is_dequantize(node):
            return fake_quantized(node, self.of_batches(first_operand(node)), overwrites=self._overwrites_operand(node))
        operands = {operand: self.of_batches(operand) for operand in node.all_input_nodes}
        found = []
        for index, batch in enumerate(self.batches):
            row = {operand: values[index] for operand, values in operands.items()}
            found.append(run_in_batch(self.module, node, row.__getitem__, batch.count, overwrites=self.overwrites))
        return found

    def _overwrites_operand(self, dequantize: Node) -> bool:
        """Whether only `dequantize` reads the value that it rounds, and the value shares its memory with no other."""
        quantize = first_operand(dequantize)
        if not self.overwrites or not is_quantize(quantize) or len(quantize.users) != 1:
            return False
        source = first_operand(quantize)
        return len(source.users) == 1 and (takes_activation(source) or is_activation(source))


def fake_quantized(dequantize: Node, values: Iterable[torch.Tensor], *, overwrites: bool = False) -> list[torch.Tensor]:
    """Quantizes and dequantizes float32 values per tensor, with the qparams of `dequantize`.

    Returns the same bits as `torch.fake_quantize_per_tensor_affine`, which is not vectorized. `overwrites` says whether
    the results replace the values in their memory.
    """
    args = arguments(dequantize)
    scale, zero_point = torch.tensor(args["scale"], dtype=torch.float32), int(args["zero_point"])
    factor, step = float(scale.reciprocal()), float(scale)
    low, high = int(args["quant_min"]) - zero_point, int(args["quant_max"]) - zero_point
    scaled = (value.mul_(factor) if overwrites else value * factor for value in values)
    zero = torch.zeros(())  # the sum with it has no negative zeros, and costs as much as the product alone
    return [torch.add(zero, value.round_().clamp_(low, high), alpha=step, out=value) for value in scaled]


def samples_within_memory(reference: GraphModule, samples: Samples, memory: int = MEMORY) -> Samples:
    """Returns evenly spaced samples. A layerwise run of two graphs on these samples needs at most `memory` bytes.

    Returns at least one sample, even if it needs more. A graph with shared weights counts twice, because a look-ahead
    keeps the values at which it began. The log says if not all samples are used.
    """
    last, live, most = last_uses(reference.graph), 0, 1
    for node in reference.graph.nodes:
        live += 0 if node.op == "get_attr" else _value_bytes(node)
        most = max(most, live)
        live -= sum(0 if value.op == "get_attr" else _value_bytes(value) for value in last.get(node, ()))
    graphs = 4 if any(map(_is_shared_weight, reference.graph.nodes)) else 2
    used = evenly_spaced(samples, max(1, memory // (graphs * most)))
    if len(used) < len(samples):
        _LOGGER.info(
            "Recovery uses %d of %d samples, so that it keeps at most %.1f GiB of values.",
            len(used), len(samples), memory / 2**30,
        )  # fmt: skip
    return used


def _is_shared_weight(node: Node) -> bool:
    return node.op == "get_attr" and sum(layer_kind(user) is not None for user in node.users) > 1


def evenly_spaced(samples: Samples, most: int) -> Samples:
    """Returns at most `most` of `samples`, evenly spaced."""
    count = min(len(samples), most)
    return [samples[index * len(samples) // count] for index in range(count)]


def _value_bytes(node: Node) -> int:
    value = node.meta.get("val")
    return math.prod(value.shape) * value.element_size() if isinstance(value, torch.Tensor) else 0


@torch.no_grad()
def run_layerwise(
    reference: GraphModule,
    converted: GraphModule,
    samples: Samples,
    visit: Callable[[WeightedLayer, LayerIO], list[torch.Tensor] | None],
    pool: Callable[[SharedLayer], SharedMeasurement] | None = None,
    *,
    form: Batches = SINGLE,
    progress: bool | None = False,
) -> tuple[list[Any], list[Any]]:
    """Runs both graphs, and calls `visit` before each layer of `converted`. `visit` may change the layer's constants.

    `visit` may return the outputs of the layer with the changed constants, which are then not computed again. `form`
    says how many samples run at once; `pool` gets the values of single samples.

    Layers that share a weight are added to a `pool` by a look-ahead, which runs before the first of them. Without
    `pool`, they are left out. `reference` is the float graph of `converted` before `prepare_pt2e`; its layers have the
    same names. Returns the outputs of each graph for each batch. `progress` shows a progress bar; None shows it if
    stderr is a terminal. Linear in nodes and samples: look-aheads run at most `shared_layers.LOOK_AHEADS` times the
    nodes of the graph, unless the moments exceed `shared_layers.MEMORY`. Raises `ModelError` if the graphs are not of
    the same model.
    """
    batches = batches_of(samples, form)
    reference_nodes = {node.name: node for node in reference.graph.nodes}
    alone, shared = layers_by_weight(converted)
    layers = {layer.node: layer for layer in alone}
    order = {node: index for index, node in enumerate(converted.graph.nodes)}
    ahead = look_aheads(shared, order) if pool is not None else {}
    real, quantized = (SamplesRun(module, batches, overwrites=not ahead) for module in (reference, converted))
    with progress_bar("Recovering layers", len(layers) + sum(map(len, ahead.values())), progress) as advance:
        for node in converted.graph.nodes:
            if node in ahead and pool is not None:
                _look_ahead(real.fork(), quantized.fork(), reference_nodes, {it: pool(it) for it in ahead[node]})
                advance(len(ahead[node]))
            if node in layers:
                reference_node = _reference_node(reference_nodes, node)
                real.run_until(reference_node)
                outputs = visit(layers[node], _collect_layer_io(real, quantized, layers[node], reference_node))
                if outputs is not None:
                    quantized.values[node] = outputs
                advance(1)
            quantized.advance()
    return real.run(), quantized.run()


def _look_ahead(
    real: SamplesRun,
    quantized: SamplesRun,
    reference_nodes: Mapping[str, Node],
    pools: Mapping[SharedLayer, SharedMeasurement],
) -> None:
    """Runs both graphs from the current nodes to the last of the layers in `pools`, and then applies the pools."""
    uses = {layer.node: (layer, pool) for shared, pool in pools.items() for layer in shared.uses}
    while uses:
        node = quantized.coming
        if node in uses:
            layer, pool = uses.pop(node)
            reference_node = _reference_node(reference_nodes, node)
            real.run_until(reference_node)
            pool.add(layer, _collect_layer_io(real, quantized, layer, reference_node).of_samples(real.batches))
        quantized.advance()
    for pool in pools.values():
        pool.apply()


def _reference_node(reference_nodes: Mapping[str, Node], node: Node) -> Node:
    reference_node = reference_nodes.get(node.name)
    if reference_node is None or op_name(reference_node) != op_name(node):
        raise ModelError(
            "The float graph has no such layer. Give the graph that was prepared: the result of "
            "transform_for_annotation.",
            node=node.name,
            op=op_name(node),
        )
    return reference_node


def _collect_layer_io(real: SamplesRun, quantized: SamplesRun, layer: WeightedLayer, reference_node: Node) -> LayerIO:
    args, own = arguments(reference_node), arguments(layer.node)["input"]
    weight = value_of(real.module, args["weight"])
    counts = [batch.count for batch in real.batches]
    wanted = real.of_batches(reference_node)
    return LayerIO(weight, quantized.of_batches(own), real.of_batches(args["input"]), wanted, counts)
