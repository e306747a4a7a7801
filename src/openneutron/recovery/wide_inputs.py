"""Writes an input with a heavy-tailed distribution as two int8 tensors.

One int8 tensor has 255 steps. If the largest value of an input is thousands of times larger than most of its values, as
in a power spectrogram, these values are less than half a step and become zero. Such an input x becomes

    coarse = round(x / s) * s        and        fine = x - coarse,

with the scale s of the whole range. `fine` is within half a step of `coarse`, so its own int8 scale is s / 254. Both
are computed in float where the program quantizes x. Each convolution or linear that reads x becomes two, whose outputs
are added: the second one reads `fine`, with a copy of the weight and without a bias.

Two tensors represent values that differ by a factor of 60000. The channels of x are therefore first multiplied by the
largest weight that reads them, and the weights are divided by it. All channels then use all codes of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from openneutron.core.constants import constant_of, insert_constant
from openneutron.core.evaluation import GraphRun, compute_from
from openneutron.core.fx import arguments, dtype_of, placeholders, set_argument, shape_of
from openneutron.errors import CalibrationError, OptionError
from openneutron.ir.graph import QParams
from openneutron.model.state import sample_nodes
from openneutron.ops.declared import facts_of
from openneutron.ops.graph_builder import NodeBuilder, add, mul, round_, sub
from openneutron.ops.layers import ConstantLayer, constant_layer
from openneutron.quantizer.layer_options import leave_in_float
from openneutron.quantizer.ranges import SMALLEST_SCALE
from openneutron.quantizer.split_inputs import (
    coarse_input,
    given_qparams,
    note_coarse,
    note_qparams,
    note_refined_sum,
    note_scaled_input,
    scaled_input,
)
from openneutron.recovery.layerwise import Samples, evenly_spaced

__all__ = ["MOST_PRICE", "inputs_to_widen", "layers_of_inputs", "widen_as_converted", "widen_inputs"]

LOWEST_CODE, CODES, FINE_CODES = -128, 255, 254
MOST_SAMPLES = 16
# An input is measured if more than this share of its values would become zero in int8, although they are not zero.
LOST_SHARE = 0.25
# Two tensors are used if rounding the input alone reduces the SQNR of an output below this number of decibels.
ENOUGH_DB = 20.0
# The largest share of the model's multiplications that the additional layers may have, unless the user asks for them.
MOST_PRICE = 0.2
# A channel whose largest weight is less than this share of the largest of all gets the factor of this share.
LEAST_FACTOR = 1e-3


@dataclass(frozen=True)
class _Split:
    """The factors of an input's channels, in a shape that broadcasts to it, and the qparams of its coarse tensor."""

    factors: Tensor | None
    qparams: QParams

    @classmethod
    def of(cls, values: Iterable[Tensor], factors: Tensor | None) -> _Split:
        """Returns the split whose range is that of `values` times `factors`, extended to zero."""
        scale, low = _scale(values if factors is None else (value * factors for value in values))
        return cls(factors, QParams.per_tensor(scale, round(LOWEST_CODE - low / scale)))


def layers_of_inputs(module: GraphModule) -> dict[str, list[ConstantLayer]]:
    """Returns the convolutions and linears that read each float input, directly or after moves, by the input's name.

    Leaves out inputs that no such layer reads. Linear in nodes.
    """
    found: dict[str, list[ConstantLayer]] = {}
    owners = {node: str(node.target) for node in placeholders(module.graph) if dtype_of(node) is torch.float32}
    for node in module.graph.nodes:
        layer = constant_layer(module, node)
        if layer is not None and layer.input in owners:
            found.setdefault(owners[layer.input], []).append(layer)
        elif _only_moves(node) and (source := node.all_input_nodes[0]) in owners:
            owners[node] = owners[source]
    return found


def inputs_to_widen(module: GraphModule, samples: Samples, *, most_price: float = MOST_PRICE) -> list[str]:
    """Returns the names of the inputs whose rounding to one int8 tensor is too coarse.

    An input is too coarse if its rounding alone reduces the SQNR of an output below `ENOUGH_DB`. `module` is a float
    graph from `Int8Quantizer.prepare_graph`. It runs on at most `MOST_SAMPLES` of `samples`, if values of an input
    would vanish. Leaves out inputs whose layers have more than `most_price` of the multiplications of the model.
    """
    layers, chosen, nodes = layers_of_inputs(module), evenly_spaced(samples, MOST_SAMPLES), _inputs(module)
    work = sum(_products(layer) for node in module.graph.nodes if (layer := constant_layer(module, node)))
    found = []
    wanted: list[list[Tensor]] = []
    for name, readers in layers.items():
        place, node = nodes[name]
        values = [sample[place] for sample in chosen]
        if not all(value.isfinite().all() for value in values):
            continue
        split = _Split.of(values, None)
        if _lost_share(values, split.qparams) <= LOST_SHARE or sum(map(_products, readers)) > most_price * work:
            continue
        wanted = wanted or [_outputs(module, sample, {}) for sample in chosen]
        rounded = [_outputs(module, sample, {node: _rounded(sample[place], split.qparams)}) for sample in chosen]
        if _sqnr(wanted, rounded) < ENOUGH_DB:
            found.append(name)
    return found


def widen_inputs(module: GraphModule, samples: Samples, names: Iterable[str]) -> None:
    """Writes the inputs `names` of `module` as two tensors each, in place. The outputs do not change.

    Their ranges are those of `samples`. `module` is a float graph from `Int8Quantizer.prepare_graph`. Linear in
    nodes and weights. Raises `OptionError` for an input that no layer of `layers_of_inputs` reads.
    """
    nodes = _inputs(module)
    for name in names:
        layers, (place, node) = layers_of_inputs(module).get(name, []), nodes[name]
        if not layers:
            raise OptionError(
                f"wide['{name}'] is an input that no convolution and no linear reads directly or after moves. Leave it "
                "out, or scale this input in the model."
            )
        if not all(sample[place].isfinite().all() for sample in samples):
            raise CalibrationError(
                f"The calibration data have NaN or infinite values for the input '{name}'. Check the data for NaN and "
                "overflow."
            )
        dim = _channel_dim(module, node, layers)
        factors = None if dim is None else _factors(node, layers, dim)
        split = _Split.of((sample[place] for sample in samples), factors)
        _widen(module, node, layers, split)


def widen_as_converted(reference: GraphModule, converted: GraphModule) -> None:
    """Writes those inputs of the float graph `reference` as two tensors that are two tensors in `converted`, in place.

    Linear in nodes and weights.
    """
    coarse = {name: node for node in converted.graph.nodes if (name := coarse_input(node)) is not None}
    scaled = {name: node for node in converted.graph.nodes if (name := scaled_input(node)) is not None}
    for name, (_, node) in _inputs(reference).items():
        layers = layers_of_inputs(reference).get(name)
        qparams = given_qparams(coarse[name]) if name in coarse else None
        if layers and qparams is not None:
            factors = constant_of(converted, arguments(scaled[name])["other"]) if name in scaled else None
            _widen(reference, node, layers, _Split(factors, qparams))


def _inputs(module: GraphModule) -> dict[str, tuple[int, Node]]:
    """Returns the number and the node of each input by its name."""
    return {str(node.target): (place, node) for place, node in enumerate(placeholders(module.graph))}


def _only_moves(node: Node) -> bool:
    movement = facts_of(node).movement if node.op == "call_function" else None
    return movement is not None and movement.is_strided and len(node.all_input_nodes) == 1


def _products(layer: ConstantLayer) -> int:
    """Returns the number of multiplications of a layer."""
    positions = shape_of(layer.input if layer.is_transposed else layer.node)
    return math.prod(positions) * layer.weight[0].numel()


def _scale(values: Iterable[Tensor]) -> tuple[float, float]:
    """Returns the int8 scale of the range of `values`, which includes 0, and the low end of the range."""
    low = high = 0.0
    for value in values:
        ends = value.aminmax()
        low, high = min(low, float(ends.min)), max(high, float(ends.max))
    return max((high - low) / CODES, SMALLEST_SCALE), low


def _lost_share(values: Sequence[Tensor], qparams: QParams) -> float:
    """Returns the share of the values that are not zero, but less than half a step."""
    half = qparams.scale[0] / 2
    lost = sum(int(((value != 0) & (value.abs() < half)).sum()) for value in values)
    return lost / max(1, sum(value.numel() for value in values))


def _rounded(value: Tensor, qparams: QParams) -> Tensor:
    codes = LOWEST_CODE, LOWEST_CODE + CODES
    return torch.fake_quantize_per_tensor_affine(value, qparams.scale[0], qparams.zero_point[0], *codes)


@torch.no_grad()
def _outputs(module: GraphModule, sample: Sequence[Tensor], changed: Mapping[Node, Tensor]) -> list[Tensor]:
    given = {**dict(zip(sample_nodes(module.graph), sample, strict=True)), **changed}
    outputs = tree_leaves(GraphRun(module, given).run())
    return [value for value in outputs if isinstance(value, Tensor) and value.is_floating_point()]


def _sqnr(wanted: Sequence[Sequence[Tensor]], found: Sequence[Sequence[Tensor]]) -> float:
    """Returns the least SQNR of the outputs in dB over all samples."""
    worst = math.inf
    for ours, theirs in zip(zip(*wanted, strict=True), zip(*found, strict=True), strict=True):
        energy = sum(float(value.double().square().sum()) for value in ours)
        error = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(ours, theirs, strict=True))
        if energy > 0 and error > 0:
            worst = min(worst, 10 * math.log10(energy / error))
    return worst


def _channel_dim(module: GraphModule, node: Node, layers: Sequence[ConstantLayer]) -> int | None:
    """Returns the dimension of an input that is the dimension of input channels of all `layers`; None if there is none.

    Moves the indices of each dimension as the graph moves the input. Returns None if a layer has groups, is transposed,
    or has no batch dimension.
    """
    shape = shape_of(node)
    if any(layer.groups > 1 or layer.is_transposed or not layer.has_batch for layer in layers):
        return None
    for dim, size in enumerate(shape):
        sizes = [size if other == dim else 1 for other in range(len(shape))]
        known: dict[Node, Any] = {node: torch.arange(size).reshape(sizes).expand(shape)}
        moved = [compute_from(known, module, layer.input).movedim(_input_dim(layer), -1) for layer in layers]
        if size > 1 and all(each.shape[-1] == size and bool((each == torch.arange(size)).all()) for each in moved):
            return dim
    return None


def _input_dim(layer: ConstantLayer) -> int:
    return 1 if layer.kind.is_convolution else -1


def _factors(node: Node, layers: Sequence[ConstantLayer], dim: int) -> Tensor:
    """Returns the factors of the channels: their largest weights relative to the largest of all.

    Divided by them, all channels have equal largest weights, which makes the error by rounding the weights least. The
    shape broadcasts to the input.
    """
    largest = torch.stack([_largest_of_inputs(layer.weight) for layer in layers]).amax(0)
    sizes = [-1 if other == dim else 1 for other in range(len(shape_of(node)))]
    return largest.clamp(min=LEAST_FACTOR).reshape(sizes)


def _largest_of_inputs(weight: Tensor) -> Tensor:
    """Returns the largest magnitude of the weights of each input channel, relative to the largest of all."""
    largest = weight.abs().movedim(1, 0).flatten(1).amax(1)
    return largest / largest.max().clamp(min=torch.finfo(weight.dtype).tiny)


def _widen(module: GraphModule, node: Node, layers: Sequence[ConstantLayer], split: _Split) -> None:
    copies = {node: _two_tensors(module, node, split)}
    for layer in layers:
        _double(layer, *_moved(layer.input, copies), split.factors)
    module.graph.eliminate_dead_code()
    module.recompile()


def _two_tensors(module: GraphModule, node: Node, split: _Split) -> tuple[Node, Node]:
    """Inserts the coarse and the fine tensor of the input `node`. They are computed in float and have given qparams."""
    following, scale = node.next, split.qparams.scale[0]
    builder, whole = NodeBuilder(following, node), node
    if split.factors is not None:
        whole = mul(builder, node, insert_constant(module, following, split.factors, "factors"))
        whole._rename(f"{node.name}_scaled")
        note_scaled_input(whole, str(node.target))
    in_steps = mul(builder, whole, 1 / scale)
    steps = round_(builder, in_steps)
    coarse = mul(builder, steps, scale)
    fine = sub(builder, whole, coarse)
    for value in (in_steps, steps, coarse, fine, *([] if whole is node else [whole])):
        leave_in_float(value, f"wide['{node.target}']")
    coarse._rename(f"{node.name}_coarse")
    fine._rename(f"{node.name}_fine")
    note_qparams(coarse, split.qparams)
    note_coarse(coarse, str(node.target))
    note_qparams(fine, QParams.per_tensor(scale / FINE_CODES, 0))
    return coarse, fine


def _moved(value: Node, copies: dict[Node, tuple[Node, Node]]) -> tuple[Node, Node]:
    """Returns the coarse and the fine tensor of `value`, a move of an input. Copies moves that have no copies yet."""
    path = []
    while value not in copies:
        path.append(value)
        value = value.all_input_nodes[0]
    for move in reversed(path):
        parts = []
        for part in copies[value]:
            with move.graph.inserting_before(move):
                parts.append(move.graph.node_copy(move, lambda _, part=part: part))  # type: ignore[misc]
        copies[move] = parts[0], parts[1]
        value = move
    return copies[value]


def _double(layer: ConstantLayer, coarse: Node, fine: Node, factors: Tensor | None) -> None:
    """Lets `layer` read `coarse`, and adds the output of a copy of it, without a bias, that reads `fine`.

    Divides the weights of each input channel by its factor.
    """
    node, weight = layer.node, layer.weight
    if factors is not None:
        weight = weight / factors.reshape(-1, *[1] * (weight.dim() - 2))
        layer.replace(weight=weight)
    set_argument(node, "input", coarse)
    readers = list(node.users)
    builder = NodeBuilder(node.next, node)
    twin = builder.call(node.target, *node.args, **node.kwargs)  # type: ignore[arg-type]
    set_argument(twin, "input", fine)
    set_argument(twin, "bias", None)
    ConstantLayer(layer.module, twin, layer.kind, weight, None).replace(weight=weight)
    total = add(builder, node, twin)
    for reader in readers:
        reader.replace_input_with(node, total)
    note_refined_sum(total)
