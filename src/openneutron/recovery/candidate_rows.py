"""Scales the rows of the weights of LSTM candidates, so that one int8 scale for each weight suits more rows.

The rows of a trained weight often differ in range by a factor of ten or more. With one scale for all rows, the rows of
most units then have few of the 255 codes, and a recurrent layer repeats their rounding errors at each step. The
candidate

    tanh(W x + U h + b)    becomes    tanh((W' x + U' h + b') / 2^d),

where the rows of unit u in W', U' and b' are those of W, U and b times 2^d[u]. This costs one product with a constant
at each step.

The range of the sum grows by the largest factor, so units with the factor 1 have coarser steps. This costs more than
it gains if many sums are large. Only layers whose candidate has a limit are scaled (see `candidate_limits`): a narrow
range is best for them, because large sums are rare.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from openneutron.core.constants import insert_constant
from openneutron.core.fx import arguments, set_argument, shape_of
from openneutron.core.recurrence import recurrent_groups
from openneutron.ops.declared import is_op
from openneutron.ops.decomposition import RANGE_LIMIT
from openneutron.ops.graph_builder import NodeBuilder, mul
from openneutron.ops.layers import ConstantLayer, constant_layer
from openneutron.quantizer.cell_scales import factors_of
from openneutron.quantizer.split_inputs import is_refined_sum
from openneutron.recovery.candidates import Candidate, limit_candidate, lstm_candidates, moves, readers_after_moves

__all__ = ["scale_candidate_rows", "scale_rows_as_converted"]

# Rows get factors up to 2^MOST_DOUBLINGS. Larger factors would widen the range of the sum, and with it the steps of the
# units whose rows are not scaled.
MOST_DOUBLINGS = 2
# Rows are scaled if a scale for each row would reduce the energy of the rounding errors to less than this share.
WORTHWHILE = 0.1


@dataclass(frozen=True)
class _ScalableLayer:
    """The candidates of one LSTM layer, and the linears whose products are added.

    In the first step, whose state is zero, a tanh reads the moved product of the input. `sources` are the products
    before their moves; some are sums of two products (see `split_inputs`).
    """

    candidates: list[Candidate]
    sources: list[Node]
    linears: list[ConstantLayer]

    @property
    def tanhs(self) -> list[Node]:
        """The tanhs that read the products of a first step, then those that read the sums."""
        first = [reader for source in self.sources for reader in readers_after_moves(source) if is_op(reader, "tanh")]
        return list(dict.fromkeys([*first, *(tanh for one in self.candidates for tanh in one.total.users)]))

    @property
    def is_limited(self) -> bool:
        """Whether the candidates have a limit."""
        return all(RANGE_LIMIT.read(candidate.total).has_limit for candidate in self.candidates)

    def doublings(self, recurrent: Iterable[str]) -> Tensor | None:
        """Returns the exponents d [units] for the rows of the weights named `recurrent`; None if not worthwhile."""
        weights = {_weight_name(linear): linear.weight for linear in self.linears}
        chosen = [weight.abs().amax(1) for name, weight in weights.items() if name in recurrent]
        if not chosen or not all(bool(rows.any()) for rows in chosen):
            return None
        rows = torch.stack([each / each.max() for each in chosen]).amax(0)
        if float(rows.square().mean()) > WORTHWHILE:
            return None
        return rows.clamp(min=2.0**-MOST_DOUBLINGS).log2().neg().floor()


def scale_candidate_rows(module: GraphModule, has_one_scale: Callable[[Node], bool] = lambda _: True) -> None:
    """Scales the rows of the candidates of LSTMs in `module`, in place, if they have a limit and it is worthwhile.

    `module` is a float graph from `Int8Quantizer.prepare_graph`, after `select_candidate_limits` and before
    `select_cell_limits`. The outputs do not change, except for float rounding. `has_one_scale` says whether the weight
    of a linear gets one scale for all rows; layers with other linears are not changed. Linear in nodes and weights.
    """
    layers = _scalable_layers(module)
    uses: dict[str, list[Node]] = {}
    for layer in layers.values():
        for linear in layer.linears:
            uses.setdefault(_weight_name(linear), []).append(linear.node)
    recurrent, order = recurrent_groups(module.graph, uses), _positions(module)
    for layer in layers.values():
        doublings = layer.doublings(recurrent) if layer.is_limited else None
        if doublings is not None and all(has_one_scale(linear.node) for linear in layer.linears):
            _scale(module, layer, doublings, order)
    module.recompile()


def scale_rows_as_converted(reference: GraphModule, converted: GraphModule) -> None:
    """Scales those rows of the float graph `reference`, in place, that are scaled in `converted`. Linear in nodes."""
    names, order = {node.name: node for node in converted.graph.nodes}, _positions(reference)
    for layer in _scalable_layers(reference).values():
        product = names.get(_divided_name(layer.tanhs[0].all_input_nodes[0]))
        if product is not None:
            _scale(reference, layer, factors_of(converted, product).log2().neg().round(), order)
    reference.recompile()


def _positions(module: GraphModule) -> dict[Node, int]:
    return {node: position for position, node in enumerate(module.graph.nodes)}


def _divided_name(value: Node) -> str:
    """Returns the name of the product that divides a sum by the factors of its rows."""
    return f"{value.name}_by_row_factors"


def _weight_name(linear: ConstantLayer) -> str:
    return str(arguments(linear.node)["weight"].target)


def _scalable_layers(module: GraphModule) -> dict[str, _ScalableLayer]:
    """Returns by name the layers whose sums consist of products with one row for each unit. Linear in nodes."""
    by_layer: dict[str, list[Candidate]] = {}
    for candidate in lstm_candidates(module):
        by_layer.setdefault(candidate.step.layer, []).append(candidate)
    found = {name: _scalable_layer(module, candidates) for name, candidates in by_layer.items()}
    return {name: layer for name, layer in found.items() if layer is not None}


def _scalable_layer(module: GraphModule, candidates: list[Candidate]) -> _ScalableLayer | None:
    """Returns the products of `candidates`, and those of first steps with the same weights; None for other forms."""
    units = shape_of(candidates[0].total)[-1]
    sources = list(dict.fromkeys(source for candidate in candidates for source in candidate.sources))
    by_source = [_linears(module, source, units) for source in sources]
    if not all(by_source):
        return None
    linears = [linear for found in by_source for linear in found]
    known = {*sources, *(linear.node for linear in linears)}
    weights = dict.fromkeys(arguments(linear.node)["weight"] for linear in linears)
    for other in dict.fromkeys(user for weight in weights for user in weight.users if user not in known):
        of_first_step = _linears(module, other, units)
        if of_first_step and all(is_op(reader, "tanh") for reader in readers_after_moves(other)):
            sources.append(other)
            linears += of_first_step
    return _ScalableLayer(candidates, sources, linears)


def _linears(module: GraphModule, source: Node, units: object) -> list[ConstantLayer]:
    """Returns the linears whose outputs `source` consists of; none if it has another form."""
    parts = source.all_input_nodes if is_refined_sum(source) else [source]
    layers = [layer for part in parts if (layer := constant_layer(module, part)) and _has_rows(layer, units)]
    keeps_units = all(_keeps_units(move, units) for move in _moves_of(source))
    return layers if keeps_units and len(layers) == len(parts) else []


def _has_rows(layer: ConstantLayer, units: object) -> bool:
    return not layer.kind.is_convolution and not layer.is_transposed and layer.outputs == units


def _keeps_units(move: Node, units: object) -> bool:
    """Returns whether the last dimension of `move` is that of its operand. `units` is the size of the operand's."""
    return is_op(move, "slice", "select", "reshape") and shape_of(move)[-1] == units


def _moves_of(source: Node) -> list[Node]:
    """Returns the moves of `source`, of these moves, and so on."""
    found: list[Node] = []
    values = [source]
    while values:
        values = [user for value in values for user in value.users if moves(user)]
        found += values
    return found


def _scale(module: GraphModule, layer: _ScalableLayer, doublings: Tensor, order: Mapping[Node, int]) -> None:
    """Multiplies the rows of all linears of a layer by 2^`doublings` [units], and divides their sums before the tanh.

    `order` has the positions of the nodes in the graph. The limit of the sums is multiplied by the largest factor.
    """
    factors = 2.0**doublings
    first = min((linear.node for linear in layer.linears), key=order.__getitem__)
    for role, wide in (("weight", factors[:, None]), ("bias", factors)):
        _replace_constants(module, first, layer.linears, role, wide)
    divisor = insert_constant(module, first, 1 / factors, "row_factors")
    divided: dict[Node, Node] = {}
    for tanh in layer.tanhs:
        (value,) = tanh.all_input_nodes
        if value not in divided:
            divided[value] = mul(NodeBuilder(tanh, value), value, divisor)  # with the limit of the sum
            divided[value]._rename(_divided_name(value))
        tanh.replace_input_with(value, divided[value])
    for candidate in layer.candidates if layer.is_limited else ():
        limit_candidate(candidate, RANGE_LIMIT.read(candidate.total).high * float(factors.max()))


def _replace_constants(
    module: GraphModule, first: Node, linears: Iterable[ConstantLayer], role: str, factors: Tensor
) -> None:
    """Multiplies the weights or biases of `linears` by `factors`. Linears that share a constant share the new one."""
    scaled: dict[str, Node] = {}
    for linear in linears:
        constant, value = arguments(linear.node)[role], linear.weight if role == "weight" else linear.bias
        if value is None:
            continue
        name = str(constant.target)
        if name not in scaled:
            scaled[name] = insert_constant(module, first, value * factors, role)
        set_argument(linear.node, role, scaled[name])
