"""Finds which channels of a float graph may be scaled, and which channels must be scaled by the same factor.

Every channel of a value gets a number. Channels with the same number are scaled by the same factor, and channels with
number 0 are not scaled. An operator whose output scales with its input (`OpSpec.homogeneous`) passes the numbers on. An
operator that only moves values is run on the numbers. Addition makes the numbers of its operands equal. The channels
that any other operator reads are pinned (number 0). A rescaled graph therefore computes the same function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch.fx import GraphModule, Node

from openneutron.core.evaluation import evaluate_call
from openneutron.core.fx import arguments, is_operator, iterate_nodes, op_name, shape_of
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
    """A convolution or linear that is the only reader of its weight.

    `input_numbers` [groups, inputs of a group] are the numbers of its input channels, and `output_numbers` [outputs]
    those of its output channels (int64).
    """

    constants: ConstantLayer
    input_numbers: torch.Tensor
    output_numbers: torch.Tensor

    @property
    def node(self) -> Node:
        """Returns the operator."""
        return self.constants.node

    def rows(self, weight: torch.Tensor) -> torch.Tensor:
        """Returns the weight as [groups, outputs of a group, inputs of a group, taps]."""
        groups, inputs = self.input_numbers.shape
        if self.constants.is_transposed:
            return weight.reshape(groups, inputs, -1, weight[0, 0].numel()).transpose(1, 2)
        return weight.reshape(groups, -1, inputs, weight[0, 0].numel())

    def scaled(self, weight: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        """Returns the weight for inputs and outputs that are divided by `factors` [numbers]."""
        groups, inputs = self.input_numbers.shape
        output_numbers = factors[self.output_numbers].reshape(groups, -1, 1, 1)
        rows = self.rows(weight) * factors[self.input_numbers].reshape(groups, 1, inputs, 1)
        rows /= output_numbers
        return (rows.transpose(1, 2) if self.constants.is_transposed else rows).reshape(weight.shape)


@dataclass(frozen=True)
class Scaling:
    """The channel numbers of a graph, from 0 (`PINNED`) to `count` - 1.

    `clipped` maps each clamp from 0 to the numbers [channels] of its input. `together` [numbers] has the number that
    represents the group: the output channels of one layer are in one group, and groups that share a number are merged.
    """

    count: int
    layers: tuple[ScalableLayer, ...]
    clipped: dict[Node, torch.Tensor]
    together: torch.Tensor


class _ChannelNumbers:
    """Union-find over the numbers of channels."""

    def __init__(self) -> None:
        self.parent = {PINNED: PINNED}

    def allocate(self, count: int) -> torch.Tensor:
        """Returns `count` unused numbers."""
        start = len(self.parent)
        self.parent.update((number, number) for number in range(start, start + count))
        return torch.arange(start, start + count)

    def find(self, number: int) -> int:
        """Returns the least number in the set of `number`."""
        return find_root(self.parent, number)

    def join(self, first: torch.Tensor, second: torch.Tensor) -> None:
        """Merges the set of `first[i]` with the set of `second[i]` for each element i, after broadcasting."""
        parts = torch.broadcast_tensors(_without_repeats(first), _without_repeats(second))
        for one, other in set(zip(*(part.flatten().tolist() for part in parts), strict=True)):
            low, high = sorted((self.find(one), self.find(other)))
            self.parent[high] = low

    def pin(self, numbers: torch.Tensor) -> None:
        """Excludes these numbers from scaling."""
        self.join(_without_repeats(numbers).unique(), torch.tensor(PINNED))

    def renumber(self) -> tuple[torch.Tensor, int]:
        """Returns, for each number, the index of its set (0 for the pinned set), and the count of sets."""
        roots = torch.tensor([*self.parent.values()])  # the keys are 0, 1, 2 and so on
        while not torch.equal(roots, above := roots[roots]):
            roots = above
        kept, final = torch.unique(roots, return_inverse=True)
        return final, len(kept)


def scaling_of(module: GraphModule, keeps_float: Callable[[Node], bool] = lambda _: False) -> Scaling:
    """Numbers the channels of a float graph whose batch norms are folded. Linear in nodes and values.

    The inputs and outputs of operators for which `keeps_float` is true are pinned.
    """
    numbering = _ChannelNumbering(module, keeps_float)
    for node in module.graph.nodes:
        numbering.visit(node)
    return numbering.scaling()


@dataclass
class _ChannelNumbering:
    """The numbers of the channels of all values, computed in graph order."""

    module: GraphModule
    keeps_float: Callable[[Node], bool]
    numbers: _ChannelNumbers = field(default_factory=_ChannelNumbers)
    known: dict[Node, torch.Tensor] = field(default_factory=dict)
    layers: list[ScalableLayer] = field(default_factory=list)
    clipped: dict[Node, torch.Tensor] = field(default_factory=dict)

    def visit(self, node: Node) -> None:
        """Numbers the output of `node`, or pins its inputs. Its operands were visited before."""
        result = None
        if is_operator(node) and not self.keeps_float(node):
            result = self._number_layer(node)
            result = self._number_clamp(node) if result is None else result
            result = _propagate_numbers(node, self.numbers, self.known) if result is None else result
        if result is None:
            read = iterate_nodes(list(node.args)) if node.op == "output" else node.all_input_nodes
            _pin_values(self.numbers, self.known, read)
        else:
            self.known[node] = result

    def _number_layer(self, node: Node) -> torch.Tensor | None:
        layer = _scalable_layer(self.module, node, self.numbers, self.known)
        if layer is None:
            return None
        self.layers.append(layer)
        return _expand_channels(layer.output_numbers, node)

    def _number_clamp(self, node: Node) -> torch.Tensor | None:
        limited = _clamped_value(node)
        channels = _numbers_by_channel(self.known[limited]) if limited is not None and limited in self.known else None
        if limited is None or channels is None:
            return None
        self.clipped[node] = channels
        return self.known[limited]

    def scaling(self) -> Scaling:
        """Returns the `Scaling` of the visited nodes, with the numbers that `renumber` returns."""
        final, count = self.numbers.renumber()
        layers = tuple(
            ScalableLayer(layer.constants, final[layer.input_numbers], final[layer.output_numbers])
            for layer in self.layers
        )
        clipped = {node: final[channels] for node, channels in self.clipped.items()}
        return Scaling(count, layers, clipped, _layer_groups(count, layers))


def _layer_groups(count: int, layers: Sequence[ScalableLayer]) -> torch.Tensor:
    """Returns, for each number, the number that represents its group: itself if no layer writes it. Linear in numbers.

    Joins layers instead of numbers, because a network has hundreds of channels for each layer.
    """
    writers = torch.full((count,), -1)  # the first layer that writes each number
    parents, first_numbers = dict[int, int](), dict[int, int]()
    for index, layer in enumerate(layers):
        written = layer.output_numbers[layer.output_numbers != PINNED]
        if not len(written):
            continue
        first_numbers[index] = int(written[0])
        for writer in writers[written].unique().tolist():
            if writer >= 0:
                parents[find_root(parents, index)] = find_root(parents, writer)
        writers[written] = torch.where(writers[written] < 0, index, writers[written])
    representatives = [first_numbers.get(find_root(parents, index), PINNED) for index in range(len(layers))]
    return torch.where(writers < 0, torch.arange(count), torch.tensor([*representatives, PINNED])[writers])


def _pin_values(numbers: _ChannelNumbers, known: dict[Node, torch.Tensor], values: Iterable[Node]) -> None:
    for value in values:
        if value in known:
            numbers.pin(known[value])


def _clamped_value(node: Node) -> Node | None:
    """Returns the value that `node` clamps to a range from 0 to a finite end, or None for any other operator."""
    limits = facts_of(node).clamp_range(node)
    if limits is None or limits[0] != 0 or limits[1] == math.inf:
        return None
    source: Node = arguments(node)["self"]
    return source


def _scalable_layer(
    module: GraphModule, node: Node, numbers: _ChannelNumbers, known: dict[Node, torch.Tensor]
) -> ScalableLayer | None:
    """Returns `node` as a layer with the numbers of its channels, if it is a convolution or linear that owns its
    constants.
    """
    layer = constant_layer(module, node)
    if layer is None or not layer.owns_constants or not layer.has_batch:
        return None
    channels = _input_channel_numbers(layer, numbers, known)
    if channels is None:
        channels = torch.full((shape_of(layer.input)[-1 if layer.kind is LayerKind.LINEAR else 1],), PINNED)
    return ScalableLayer(layer, channels.reshape(layer.groups, -1), numbers.allocate(layer.outputs))


def _input_channel_numbers(
    layer: ConstantLayer, numbers: _ChannelNumbers, known: dict[Node, torch.Tensor]
) -> torch.Tensor | None:
    """Returns the numbers [channels] of a layer's input. Numbers that differ within a channel are pinned."""
    read = known.get(layer.input)
    if read is None:
        return None
    channels = _numbers_by_last_dim(read) if layer.kind is LayerKind.LINEAR else _numbers_by_channel(read)
    if channels is None:
        numbers.pin(read)
    return channels


def _expand_channels(channels: torch.Tensor, node: Node) -> torch.Tensor:
    """Expands [channels] to numbers of the whole value, without allocating memory."""
    shape = shape_of(node)
    if layer_kind(node) is LayerKind.LINEAR:
        return channels.expand(shape)
    return channels.reshape(1, -1, *[1] * (len(shape) - 2)).expand(shape)


def _without_repeats(numbers: torch.Tensor, keeps_dim: int | None = None) -> torch.Tensor:
    """Returns `numbers` with one index of each dimension that repeats its values without memory (`expand`), except for
    `keeps_dim`. The work is therefore linear in channels if all values of a channel have one number.
    """
    for dim, (stride, size) in enumerate(zip(numbers.stride(), numbers.shape, strict=True)):
        if stride == 0 and size > 1 and dim != keeps_dim:
            numbers = numbers.narrow(dim, 0, 1)
    return numbers


def _numbers_by_channel(numbers: torch.Tensor) -> torch.Tensor | None:
    """Returns [channels] if the numbers are constant within each index of dimension 1, else None."""
    if numbers.dim() < 2 or not numbers.numel():
        return None
    numbers = _without_repeats(numbers, keeps_dim=1)
    first = numbers.select(0, 0).flatten(1)[:, 0] if numbers.dim() > 2 else numbers[0]
    same = numbers == first.reshape(1, -1, *[1] * (numbers.dim() - 2))
    return first if bool(same.all()) else None


def _numbers_by_last_dim(numbers: torch.Tensor) -> torch.Tensor | None:
    """Returns [channels] if the numbers are constant within each index of the last dimension, else None."""
    numbers = _without_repeats(numbers, keeps_dim=numbers.dim() - 1)
    first = numbers.reshape(-1, numbers.shape[-1])[0]
    return first if bool((numbers == first).all()) else None


def _propagate_numbers(node: Node, numbers: _ChannelNumbers, known: dict[Node, torch.Tensor]) -> torch.Tensor | None:
    """Returns the numbers of the output of `node` if it passes on those of its inputs, else None."""
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
        return _move_numbers(node, known)
    if is_op(node, "mul"):
        return _number_product(node, scaled, numbers, known)
    how = spec.scalable(OpInstance(node, _ANY_TARGET))
    if how is None or len(scaled) < len(operands) or any(isinstance(value, (int, float)) for value in values):
        return None
    for operand in operands[1:]:
        numbers.join(known[operands[0]], known[operand])
    if how is Homogeneous.ELEMENT:
        together: torch.Tensor = torch.broadcast_tensors(*map(known.__getitem__, operands))[0]
        return together.expand(shape_of(node))
    return _keep_channel_numbers(node, known[operands[0]])


def _number_product(
    node: Node, scaled: list[Node], numbers: _ChannelNumbers, known: dict[Node, torch.Tensor]
) -> torch.Tensor:
    """Returns the numbers of a product. One operand may be scaled: the one with more elements. The other, such as a
    gate, is pinned.
    """
    kept, *others = sorted(scaled, key=lambda operand: -known[operand].numel())
    _pin_values(numbers, known, others)
    return known[kept].expand(shape_of(node))


def _move_numbers(node: Node, known: dict[Node, torch.Tensor]) -> torch.Tensor:
    """Runs `node` on numbers in place of values. A value without numbers is pinned."""

    def numbers_of(value: Node) -> torch.Tensor:
        found = known.get(value)
        return torch.full(shape_of(value), PINNED) if found is None else found.contiguous()

    moved = evaluate_call(node, numbers_of)
    assert isinstance(moved, torch.Tensor)
    return moved.long()


def _keep_channel_numbers(node: Node, read: torch.Tensor) -> torch.Tensor | None:
    """Returns the numbers of an operator that keeps dimension 1 and mixes only values of the same channel."""
    channels, shape, args = _numbers_by_channel(read), shape_of(node), arguments(node)
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
