"""Which channels of a float graph may be scaled, and which of them only together.

Every channel of a value gets a number. Channels with the same number are scaled by the same factor; number 0 means not
at all. An operator that scales its output as its input is scaled (`OpSpec.homogeneous`) hands numbers on; one that only
moves values moves the numbers with them: it is run on them. Values that meet in an addition become one. What nothing
is known of pins whatever it touches. So the function of a rescaled graph is the same by construction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch.fx import GraphModule, Node

from openneutron.core.fx import arguments, evaluated, is_operator, iterate_nodes, op_name, shape_of
from openneutron.core.unions import find_root
from openneutron.ops import OPERATORS
from openneutron.ops.declared import facts_of, is_op, layer_kind
from openneutron.ops.facts import LayerKind
from openneutron.ops.layers import ConstantLayer, constant_layer
from openneutron.ops.op_instance import OpInstance
from openneutron.ops.spec import Homogeneous
from openneutron.ops.windows import spatial_dims
from openneutron.targets import TARGETS

__all__ = ["PINNED", "ScalableLayer", "Scaling", "scaling_of"]

PINNED = 0
_ANY_TARGET = next(iter(TARGETS.values()))


@dataclass(frozen=True)
class ScalableLayer:
    """A convolution or linear whose weight is its own.

    `reads` [groups, inputs of a group] and `yields` [outputs] are the numbers of its channels (int64).
    """

    constants: ConstantLayer
    reads: torch.Tensor
    yields: torch.Tensor

    @property
    def node(self) -> Node:
        """The operator."""
        return self.constants.node

    def rows(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight as [groups, outputs of a group, inputs of a group, taps]."""
        groups, inputs = self.reads.shape
        if self.constants.is_transposed:
            return weight.reshape(groups, inputs, -1, weight[0, 0].numel()).transpose(1, 2)
        return weight.reshape(groups, -1, inputs, weight[0, 0].numel())

    def scaled(self, weight: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        """The weight for inputs and outputs that are divided by `factors` [numbers]."""
        groups, inputs = self.reads.shape
        yields = factors[self.yields].reshape(groups, -1, 1, 1)
        rows = self.rows(weight) * factors[self.reads].reshape(groups, 1, inputs, 1) / yields
        return (rows.transpose(1, 2) if self.constants.is_transposed else rows).reshape(weight.shape)


@dataclass(frozen=True)
class Scaling:
    """How a graph may be scaled: numbers run from 0 (`PINNED`) to `count` - 1.

    `clipped` has the numbers of the channels that each clamp from 0 reads: [channels] by its node. `together` [numbers]
    is equal for numbers of channels that one layer yields, and of those that have any of them in common.
    """

    count: int
    layers: tuple[ScalableLayer, ...]
    clipped: dict[Node, torch.Tensor]
    together: torch.Tensor


class _Numbers:
    """Union-find over the numbers of channels."""

    def __init__(self) -> None:
        self.parent = {PINNED: PINNED}

    def fresh(self, count: int) -> torch.Tensor:
        """`count` numbers that nothing has yet."""
        start = len(self.parent)
        self.parent.update((number, number) for number in range(start, start + count))
        return torch.arange(start, start + count)

    def find(self, number: int) -> int:
        """The least number that goes with `number`."""
        return find_root(self.parent, number)

    def join(self, first: torch.Tensor, second: torch.Tensor) -> None:
        """Element by element, over tensors that broadcast."""
        pairs = torch.stack([part.flatten() for part in torch.broadcast_tensors(first, second)], 1)
        for one, other in torch.unique(pairs, dim=0).tolist():
            low, high = sorted((self.find(one), self.find(other)))
            self.parent[high] = low

    def pin(self, numbers: torch.Tensor) -> None:
        """Nothing of this is scaled."""
        self.join(numbers.unique(), torch.tensor(PINNED))

    def compact(self) -> tuple[torch.Tensor, int]:
        """The final number of each, without gaps and with 0 for what is pinned, and how many there are."""
        roots = torch.tensor([self.find(number) for number in range(len(self.parent))])
        kept, final = torch.unique(roots, return_inverse=True)
        return final, len(kept)


def scaling_of(module: GraphModule, keeps_float: Callable[[Node], bool] = lambda _: False) -> Scaling:
    """Number the channels of a float graph whose batch norms are folded. Linear in nodes and values.

    What `keeps_float` says of reads and yields nothing that is scaled.
    """
    numbering = _Numbering(module, keeps_float)
    for node in module.graph.nodes:
        numbering.visit(node)
    return numbering.scaling()


@dataclass
class _Numbering:
    """The numbers of the channels of all values, from the inputs of the graph on."""

    module: GraphModule
    keeps_float: Callable[[Node], bool]
    numbers: _Numbers = field(default_factory=_Numbers)
    known: dict[Node, torch.Tensor] = field(default_factory=dict)
    layers: list[ScalableLayer] = field(default_factory=list)
    clipped: dict[Node, torch.Tensor] = field(default_factory=dict)

    def visit(self, node: Node) -> None:
        """Number what `node` yields, or pin what it reads. Its operands were visited before."""
        result = None
        if is_operator(node) and not self.keeps_float(node):
            result = self._of_layer(node)
            result = self._of_clamp(node) if result is None else result
            result = _handed_on(node, self.numbers, self.known) if result is None else result
        if result is None:
            read = iterate_nodes(list(node.args)) if node.op == "output" else node.all_input_nodes
            _pin(self.numbers, self.known, read)
        else:
            self.known[node] = result

    def _of_layer(self, node: Node) -> torch.Tensor | None:
        layer = _layer(self.module, node, self.numbers, self.known)
        if layer is None:
            return None
        self.layers.append(layer)
        return _in_place(layer.yields, node)

    def _of_clamp(self, node: Node) -> torch.Tensor | None:
        limited = _clip(node)
        channels = _by_channel(self.known[limited]) if limited is not None and limited in self.known else None
        if limited is None or channels is None:
            return None
        self.clipped[node] = channels
        return self.known[limited]

    def scaling(self) -> Scaling:
        """What was found, with final numbers."""
        final, count = self.numbers.compact()
        layers = tuple(ScalableLayer(layer.constants, final[layer.reads], final[layer.yields]) for layer in self.layers)
        clipped = {node: final[channels] for node, channels in self.clipped.items()}
        return Scaling(count, layers, clipped, _together(count, layers))


def _together(count: int, layers: Iterable[ScalableLayer]) -> torch.Tensor:
    numbers = _Numbers()
    numbers.fresh(count - 1)
    for layer in layers:
        scalable = layer.yields[layer.yields != PINNED]
        if len(scalable):
            numbers.join(scalable, scalable[:1])
    return numbers.compact()[0]


def _pin(numbers: _Numbers, known: dict[Node, torch.Tensor], values: Iterable[Node]) -> None:
    for value in values:
        if value in known:
            numbers.pin(known[value])


def _clip(node: Node) -> Node | None:
    """The value that `node` clamps to a range from 0 that has an end; None for any other operator."""
    limits = facts_of(node).clamp_range(node)
    if limits is None or limits[0] != 0 or limits[1] == math.inf:
        return None
    source: Node = arguments(node)["self"]
    return source


def _layer(module: GraphModule, node: Node, numbers: _Numbers, known: dict[Node, torch.Tensor]) -> ScalableLayer | None:
    """What `node` reads and yields, if it is a convolution or linear with constants of its own."""
    layer = constant_layer(module, node)
    if layer is None or not layer.owns_constants or not layer.has_batch:
        return None
    channels = _channels_read(layer, numbers, known)
    if channels is None:
        channels = torch.full((shape_of(layer.input)[-1 if layer.kind is LayerKind.LINEAR else 1],), PINNED)
    return ScalableLayer(layer, channels.reshape(layer.groups, -1), numbers.fresh(layer.outputs))


def _channels_read(layer: ConstantLayer, numbers: _Numbers, known: dict[Node, torch.Tensor]) -> torch.Tensor | None:
    """The numbers [channels] of what a layer reads. Those that differ within a channel are pinned."""
    read = known.get(layer.input)
    if read is None:
        return None
    channels = _by_last(read) if layer.kind is LayerKind.LINEAR else _by_channel(read)
    if channels is None:
        numbers.pin(read)
    return channels


def _in_place(channels: torch.Tensor, node: Node) -> torch.Tensor:
    """[channels] as numbers of the whole value, without storage of their own."""
    shape = shape_of(node)
    if layer_kind(node) is LayerKind.LINEAR:
        return channels.expand(shape)
    return channels.reshape(1, -1, *[1] * (len(shape) - 2)).expand(shape)


def _by_channel(numbers: torch.Tensor) -> torch.Tensor | None:
    """[channels] of numbers that are the same all over dimension 1; None for others."""
    if numbers.dim() < 2 or not numbers.numel():
        return None
    first = numbers.select(0, 0).flatten(1)[:, 0] if numbers.dim() > 2 else numbers[0]
    same = numbers == first.reshape(1, -1, *[1] * (numbers.dim() - 2))
    return first if bool(same.all()) else None


def _by_last(numbers: torch.Tensor) -> torch.Tensor | None:
    """The same for the last dimension."""
    first = numbers.reshape(-1, numbers.shape[-1])[0]
    return first if bool((numbers == first).all()) else None


def _handed_on(node: Node, numbers: _Numbers, known: dict[Node, torch.Tensor]) -> torch.Tensor | None:
    """The numbers of what `node` yields, if it hands on those of what it reads."""
    spec = OPERATORS.get(op_name(node))
    if spec is None or not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    args = arguments(node)
    values = [args["input" if name not in args else name] for name in spec.inputs]
    operands = list(iterate_nodes(values))
    scaled = [operand for operand in operands if operand in known]
    if not scaled:
        return None
    if spec.moves_values:
        return _moved(node, known)
    if is_op(node, "mul"):
        return _multiplied(node, scaled, numbers, known)
    how = spec.scalable(OpInstance(node, _ANY_TARGET))
    if how is None or len(scaled) < len(operands) or any(isinstance(value, (int, float)) for value in values):
        return None
    for operand in operands[1:]:
        numbers.join(known[operands[0]], known[operand])
    if how is Homogeneous.ELEMENT:
        together: torch.Tensor = torch.broadcast_tensors(*map(known.__getitem__, operands))[0]
        return together.expand(shape_of(node))
    return _same_channels(node, known[operands[0]])


def _multiplied(node: Node, scaled: list[Node], numbers: _Numbers, known: dict[Node, torch.Tensor]) -> torch.Tensor:
    """The numbers of a product, in which one operand alone may be scaled: of two, the larger, so that a gate is not."""
    kept, *others = sorted(scaled, key=lambda operand: -known[operand].numel())
    _pin(numbers, known, others)
    return known[kept].expand(shape_of(node))


def _moved(node: Node, known: dict[Node, torch.Tensor]) -> torch.Tensor:
    """What `node` makes of numbers in place of values; a value without numbers is pinned all over."""

    def numbers_of(value: Node) -> torch.Tensor:
        found = known.get(value)
        return torch.full(shape_of(value), PINNED) if found is None else found.contiguous()

    moved = evaluated(node, numbers_of)
    assert isinstance(moved, torch.Tensor)
    return moved.long()


def _same_channels(node: Node, read: torch.Tensor) -> torch.Tensor | None:
    """The numbers where an operator that mixes what has the same channel keeps dimension 1 in its place."""
    channels, shape, args = _by_channel(read), shape_of(node), arguments(node)
    windowed = spatial_dims(node)
    if (
        channels is None
        or (windowed is not None and read.dim() != windowed + 2)
        or len(shape) < 2
        or shape[1] != len(channels)
    ):
        return None
    if "dim" in args:
        dims = [args["dim"]] if isinstance(args["dim"], int) else args["dim"]
        if not dims or {dim % read.dim() for dim in dims} & {0, 1}:
            return None
    return channels.reshape(1, -1, *[1] * (len(shape) - 2)).expand(shape)
