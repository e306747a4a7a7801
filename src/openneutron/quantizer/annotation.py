"""Annotates an exported model: groups of values with equal qparams share one observer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, SharedQuantizationSpec
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

from openneutron.core.boundary import error_at
from openneutron.core.constants import constant_value
from openneutron.core.fx import UNBATCHED, note_of
from openneutron.core.unions import find_root
from openneutron.errors import OptionError
from openneutron.ir.graph import QParams
from openneutron.model.state import next_value, states_of, store_of, write_of
from openneutron.ops.decomposition import RANGE_LIMIT, SHARED_QPARAMS
from openneutron.ops.intervals import EVERYTHING, Interval, representable_range
from openneutron.ops.masks import is_mask_computation, saturates
from openneutron.ops.spec import OutputRule
from openneutron.quantizer import qspecs, training
from openneutron.quantizer.added_masks import AddedMask, MaskedAtRunTime
from openneutron.quantizer.fused_operators import FusedOperator
from openneutron.quantizer.layer_options import PER_CHANNEL, Layers
from openneutron.quantizer.needed_ranges import NEEDED_RANGE, Need, clamp_limits, joined_needs, needed_values
from openneutron.quantizer.observers import RecentRangeObserver
from openneutron.quantizer.output_parts import FloatConcatenation, LinkedParts
from openneutron.quantizer.score_ranges import ScoreRange, score_ranges
from openneutron.quantizer.split_inputs import given_qparams
from openneutron.quantizer.sum_ranges import AddendLimit, note_addend, note_limit
from openneutron.quantizer.trained_modules import WeightFakeQuantize

__all__ = ["Annotation", "AnnotationSettings"]

# A value, or an edge (value, reader) if the value is requantized for this reader.
Value = Node | tuple[Node, Node]


@dataclass(frozen=True)
class AnnotationSettings:
    """The user's options for observers, named as in `NeutronQuantizer`."""

    observer: Any
    observer_of_outputs: Any
    weight_bits: int
    is_qat: bool
    layers: Layers


class Annotation:
    """Writes the annotations of all quantized operators.

    Values that must have equal qparams form a group. The first annotated value of a group gets the quantization spec,
    and later ones refer to the first, so that torchao gives them one observer.
    """

    def __init__(
        self,
        settings: AnnotationSettings,
        operators: list[FusedOperator],
        joined: Mapping[Node, FloatConcatenation],
        masks: Mapping[Node, AddedMask],
        sums: Mapping[Node, tuple[AddedMask, ...]],
    ) -> None:
        self.settings = settings
        self.operators = operators
        self.joined = joined
        self.joins: dict[Value, list[LinkedParts]] = {}
        self.masks = masks
        self.sums = sums
        self.scores: Mapping[Node, ScoreRange] = {}
        self.wrap_observer: dict[Value, qspecs.ObserverWrapper] = {}
        self.weight_axis = _weight_axes(operators, settings.layers)
        self.parent: dict[Value, Value] = {}
        self.fixed: dict[Value, QParams] = {}
        self.moved: set[Node] = set()
        self.read: set[Value] = set()
        self.symmetric: set[Value] = set()
        self.masked: set[Value] = set()
        self.outputs: set[Value] = set()
        self.unbatched: set[Value] = set()
        self.least_scale: dict[Value, float] = {}
        self.needed: dict[Value, Interval] = {}
        self.clamped: set[Value] = set()
        self.addends: dict[Value, int] = {}
        self.limits: dict[Value, AddendLimit] = {}
        self.annotated: dict[Value, Value] = {}
        self.requantized: dict[Value, Value] = {}
        self.stored: dict[Node, Value] = {}
        """Maps each node that stores the next value of a state to the state."""

    def write(self, model: GraphModule) -> None:
        """Annotates the nodes of `model`. Linear in nodes and uses."""
        self.scores = score_ranges(model, is_qat=self.settings.is_qat)
        self._build_groups(states_of(model.graph))
        self._make_symmetric()
        self.masked = {self._find_group(value) for fused in self.operators for value in fused.inputs if _is_mask(value)}
        self.wrap_observer = self._observer_wrappers()
        by_node = {fused.instance.node: fused for fused in self.operators}
        by_output = {fused.output: fused for fused in self.operators}
        values = {value for fused in self.operators for value in (*fused.inputs, fused.output)}
        self.outputs = {
            self._find_group(value)
            for value in values
            if any(reader.op == "output" or reader in self.joined for reader in value.users)
        }
        self.unbatched = {self._find_group(value) for value in values if note_of(value, UNBATCHED)}
        self._note_least_scales()
        self._note_needed(model)
        self._link_output_parts()
        read_in_float = {node: values.intersection(node.all_input_nodes) - by_output.keys() for node in self.joined}
        # torchao visits nodes in this order too, and needs a group's spec before references to it. An activation may
        # be far after the operator that fuses it.
        for node in list(model.graph.nodes):
            if node in by_node:
                self._annotate_inputs(by_node[node])
            if node in read_in_float:
                given = [value for value in node.all_input_nodes if value in read_in_float[node]]
                edges = {value: self._quantization_spec((value, node), value) for value in given}
                node.meta[Q_ANNOTATION_KEY] = _make_annotation(edges, None)
            if node in by_output:
                self._annotate_output(by_output[node])
            if node in self.stored:
                value, group = next_value(node), self.stored[node]
                node.meta[Q_ANNOTATION_KEY] = _make_annotation(
                    {value: self._quantization_spec((value, node), group)}, None
                )

    def _find_group(self, value: Value) -> Value:
        return find_root(self.parent, value)

    def _build_groups(self, states: list[Node]) -> None:
        """Groups the inputs and outputs of operators that move or concatenate values, and each state with its next
        value.
        """
        self.fixed = {fused.output: fused.rule for fused in self.operators if isinstance(fused.rule, QParams)}
        for value in dict.fromkeys(value for fused in self.operators for value in fused.inputs):
            if (given := given_qparams(value)) is not None:
                self.fixed[value] = given
        moving = [fused for fused in self.operators if fused.rule is OutputRule.SHARED]
        for fused in moving:
            if not fused.has_several_inputs:
                self._group_inputs(fused)
        self._group_by_name()
        self._group_states(states)
        self.moved = {fused.output for fused in moving if not fused.has_several_inputs}
        self.read = self._groups_with_other_readers(set())
        for fused in moving:
            if fused.has_several_inputs:
                self._group_inputs(fused)

    def _group_inputs(self, fused: FusedOperator) -> None:
        groups = [self._find_group(value) for value in fused.inputs]
        demands = {self.fixed.get(group) for group in groups}
        are_one = len(set(groups)) == 1
        for value, group in zip(fused.inputs, groups, strict=True):
            # An input with fixed qparams is requantized unless all inputs have the same ones. Any other input is
            # requantized if other operators compute with it, because a wider common range would cost these operators
            # resolution. Results of moves are not requantized: the MUL would prevent merging these moves with later
            # ones (ShuffleNetV2). Inputs of the model are not requantized either, because they are quantized once.
            if is_mask_computation(value):  # each reader quantizes it separately, so the readers need not share qparams
                self.requantized[(value, fused.instance.node)] = fused.output
                continue
            if group in self.fixed:
                cannot_share = len(demands) > 1
            else:
                is_read = group in self.read and value not in self.moved and value.op != "placeholder"
                cannot_share = is_read and not are_one
            if cannot_share:
                self.requantized[(value, fused.instance.node)] = fused.output
            else:
                self._merge_groups(fused.output, group)

    def _group_by_name(self) -> None:
        """Groups values that a decomposition declares to share qparams, unless their qparams are fixed."""
        named: dict[str, Value] = {}
        for value in dict.fromkeys(value for fused in self.operators for value in (*fused.inputs, fused.output)):
            group, name = self._find_group(value), value.meta.get(SHARED_QPARAMS)
            if name is not None and group not in self.fixed:
                self._merge_groups(value, self._find_group(named.setdefault(name, group)))

    def _group_states(self, states: list[Node]) -> None:
        """Groups each state with the value that is stored in it, because the next call reads the stored codes.

        If the next value has fixed qparams whose range does not contain the initial value, it is requantized.
        """
        read = {value for fused in self.operators for value in fused.inputs}
        for state in states:
            if state not in read:
                continue
            write = write_of(state)
            group, own = self._find_group(next_value(write)), self._find_group(state)
            fixed = self.fixed.get(group)
            if own not in self.fixed and (fixed is None or _range_contains_initial_value(fixed, state)):
                self._merge_groups(state, group)
            elif fixed is None:
                self._merge_groups(next_value(write), own)
            self.stored[write] = state

    def _observer_wrappers(self) -> dict[Value, qspecs.ObserverWrapper]:
        """Returns observer wrappers by group, for groups of run-time masks, masked values, or scores."""
        hidden = {
            self._find_group(fused.output)
            for fused in self.operators
            if fused.rule is OutputRule.SHARED
            and fused.has_several_inputs
            and any(map(is_mask_computation, fused.inputs))
        }
        found = {group: MaskedAtRunTime(hides=True) for group in hidden}
        for node, masks in self.sums.items():
            group = self._find_group(node)
            found[group] = MaskedAtRunTime(sums_with=masks, hides=group in hidden)
        for node, mask in self.masks.items():
            found[self._find_group(node)] = MaskedAtRunTime(mask)
        wrap_observer: dict[Value, qspecs.ObserverWrapper] = {
            group: masked.wrap_observer for group, masked in found.items()
        }
        excluded = self.masked | {  # groups with masks, or with values that are not scores
            self._find_group(value)
            for fused in self.operators
            for value in (*fused.inputs, fused.output)
            if value not in self.scores
        }
        for node, scores in self.scores.items():
            if (group := self._find_group(node)) not in excluded:
                wrap_observer.setdefault(group, scores.wrap_observer)
        return wrap_observer

    def _make_symmetric(self) -> None:
        """Gives zero point 0 to each input that needs it.

        The whole group of the input gets it, unless another reader computes with the group, or the fixed zero point of
        the group is not 0. In these cases, only the input is requantized.
        """
        wanted = [(value, fused.instance.node) for fused in self.operators for value in fused.symmetric]
        shared = self._groups_with_other_readers(set(wanted)) if wanted else set()
        for edge in wanted:
            group = self._find_group(edge[0])
            fixed = self.fixed.get(group)
            cannot_be_symmetric = group in shared if fixed is None else any(fixed.zero_point)
            if cannot_be_symmetric:
                self.requantized[edge] = group = edge
            if group not in self.fixed:
                self.symmetric.add(group)

    def _note_least_scales(self) -> None:
        """Records, per group, the smallest scale with which the biases of the layers that read the group fit int32."""
        for fused in self.operators:
            weight, bias = _weight_and_bias(fused)
            weights, biases = constant_value(weight), constant_value(bias)
            if weights is None or biases is None or not weights.numel():
                continue
            edge = fused.inputs[0], fused.instance.node
            group = self._find_group(self.requantized.get(edge, edge[0]))
            axis = self.weight_axis.get(weight) if isinstance(weight, Node) else None
            least = qspecs.least_scale_of_input(weights, biases, axis, self.settings.weight_bits)
            self.least_scale[group] = max(self.least_scale.get(group, 0.0), least)

    def _note_needed(self, model: GraphModule) -> None:
        """Records, per group, the interval of values that the readers of the group need, and notes it on the values."""
        needs = needed_values(model.graph, self.operators, is_qat=self.settings.is_qat)
        special = self.fixed.keys() | self.masked | self.wrap_observer.keys()
        by_group: dict[Value, list[Need]] = {}
        for value, need in needs.items():
            if (group := self._find_group(value)) not in special:
                by_group.setdefault(group, []).append(need)
        joined = {group: joined_needs(found) for group, found in by_group.items()}
        self.needed = {group: need.as_interval for group, need in joined.items() if need is not None}
        for group, limits in self._range_limits(needs).items():
            if group not in special and group not in self.outputs:
                self.needed[group] = self.needed.get(group, EVERYTHING).clamped(limits)
        self.needed = {group: needed for group, needed in self.needed.items() if needed != EVERYTHING}
        self.clamped = {self._find_group(fused.output) for fused in self.operators if clamp_limits(fused) != EVERYTHING}
        for value in needs:
            if (group := self._find_group(value)) in self.needed:
                NEEDED_RANGE.write(value, self.needed[group])
        for group, merged in joined.items():
            if merged is not None and merged.sums and group not in self.needed and group not in self.symmetric:
                self._note_sums(group, merged)
        self._note_addends(needs)

    def _note_addends(self, values: Iterable[Node]) -> None:
        """Notes on each of `values` the number of its addend, and the limit of an addend on one of its values."""
        unnoted = dict(self.limits)
        for value in values:
            if (group := self._find_group(value)) in self.addends:
                note_addend(value, self.addends[group])
                if (limit := unnoted.pop(group, None)) is not None:
                    note_limit(value, limit)

    def _range_limits(self, values: Iterable[Node]) -> dict[Value, Interval]:
        """Returns the limit that the notes on the values of a group give, for groups that have one.

        A group gets no limit if an operator without a note reads one of its values that has no note, as when the model
        itself computes with an initial cell state. Operators that only move values do not count: their outputs are
        values of the group. If the limits differ, the group gets the smallest interval that contains all. Linear in the
        uses of `values`.
        """
        moves = {fused.instance.node for fused in self.operators if fused.rule is OutputRule.SHARED}
        limits: dict[Value, Interval] = {}
        escaped: set[Value] = set()
        for value in values:
            group, own = self._find_group(value), RANGE_LIMIT.read(value)
            if own.has_limit:
                limits[group] = limits[group].joined(own) if group in limits else own
            elif any(reader not in moves and not RANGE_LIMIT.read(reader).has_limit for reader in value.users):
                escaped.add(group)
        return {group: limit for group, limit in limits.items() if group not in escaped}

    def _note_sums(self, group: Value, need: Need) -> None:
        """Records the limit of a group by the sums that read it, unless the other operand of a sum has no range."""
        interval, terms = need.interval, []
        for term in need.sums:
            other = self._find_group(self.requantized.get((term.other, term.node), term.other))
            if other in self.fixed:
                needed = term.needed.beside(representable_range(self.fixed[other]))
                interval = needed if interval is None else interval.joined(needed)
            elif other is group or other in self.masked or other in self.wrap_observer:
                return
            else:
                terms.append((other, term.needed))
        for addend in (group, *(other for other, _ in terms)):
            self.addends.setdefault(addend, len(self.addends))
        self.limits[group] = AddendLimit(interval, tuple((self.addends[other], needs) for other, needs in terms))

    def _link_output_parts(self) -> None:
        """Links the observers of the inputs of each float concatenation that can share qparams.

        The output of a quantized concatenation of the same inputs is linked too, so that the NPU computes one
        concatenation for both.
        """
        computed_with = {tuple(fused.inputs): fused.output for fused in self.operators if fused.has_several_inputs}
        for node, join in sorted(self.joined.items(), key=lambda item: -len(item[1].values)):
            same = computed_with.get(tuple(node.all_input_nodes))
            groups = dict.fromkeys(map(self._find_group, [*join.values, *([same] if same else [])]))
            observed = [group for group in groups if group not in self.fixed]
            parts = LinkedParts(join.fixed | {self.fixed[group] for group in groups if group in self.fixed})
            special = not self.symmetric.union(self.masked, self.wrap_observer).isdisjoint(observed)
            if join.can_share and not special and len(observed) + len(parts.fixed) > 1:
                for group in observed:
                    self.joins.setdefault(group, []).append(parts)

    def _groups_with_other_readers(self, wanted: set[tuple[Node, Node]]) -> set[Value]:
        """Returns the groups that a reader computes with or requantizes. Edges in `wanted` are not considered."""
        movers = {fused.instance.node for fused in self.operators if fused.rule is OutputRule.SHARED}
        values = {value for fused in self.operators for value in (*fused.inputs, fused.output)}
        edges = {(value, reader) for value in values for reader in value.users if reader.users or reader.op == "output"}
        return {
            self._find_group(edge[0]) for edge in edges - wanted if edge[1] not in movers or edge in self.requantized
        }

    def _merge_groups(self, output: Node, group: Value) -> None:
        # If an operator reads a group twice, the group may already be merged with another one.
        root, group = self._find_group(output), self._find_group(group)
        if root is not group:
            self.parent[root] = group
            if root in self.read:
                self.read.add(group)

    def _annotate_inputs(self, fused: FusedOperator) -> None:
        node = fused.instance.node
        edges: dict[Node, Any] = {}
        for value in fused.inputs:
            reader = training.observing_reader(value, node) if self.settings.is_qat else node
            spec = self._quantization_spec((value, reader), self.requantized.get((value, node), value))
            if reader is node:
                edges[value] = spec
            else:
                reader.meta[Q_ANNOTATION_KEY] = _make_annotation({value: spec}, None)
        weight, bias = _weight_and_bias(fused)
        if weight is not None:
            spec = qspecs.weight(node, self.weight_axis.get(weight), self.settings.weight_bits)
            if self.settings.is_qat:
                training.read_weight_through(node, WeightFakeQuantize(node, spec))
            else:
                edges[weight] = self._weight_spec((weight, node), spec)
                if bias is not None:
                    per_channel = spec.ch_axis is not None
                    edges[bias] = qspecs.bias((fused.inputs[0], node), (weight, node), bias, per_channel=per_channel)
        node.meta[Q_ANNOTATION_KEY] = _make_annotation(edges, None)

    def _annotate_output(self, fused: FusedOperator) -> None:
        annotation = fused.output.meta.setdefault(Q_ANNOTATION_KEY, _make_annotation({}, None))
        annotation.output_qspec = self._quantization_spec(fused.output, fused.output)

    def _quantization_spec(self, key: Value, value: Value) -> Any:
        group = self._find_group(value)
        if group in self.annotated:
            return SharedQuantizationSpec(self.annotated[group])
        self.annotated[group] = key
        if group in self.fixed:
            return qspecs.fixed(self.fixed[group])
        observed = qspecs.ObservedValue(
            value[0] if isinstance(value, tuple) else value,
            symmetric=group in self.symmetric,
            masked=group in self.masked,
            joins=self.joins.get(group, ()),
            wrap_observer=self.wrap_observer.get(group),
            is_unbatched=group in self.unbatched,
            least_scale=self.least_scale.get(group, 0.0),
            needed=self.needed.get(group, EVERYTHING),
            is_clamped=group in self.clamped,
            addend=self.addends.get(group),
            limit=self.limits.get(group),
        )
        observer = self.settings.observer_of_outputs if group in self.outputs else self.settings.observer
        if not self.settings.is_qat:
            return qspecs.activation(observed, observer)
        if group in {self._find_group(mask) for mask in self.masks}:
            # A mask is not fake quantized, because the observers of the sums find hidden scores by its float values.
            return qspecs.activation(observed, RecentRangeObserver)
        return qspecs.trained_activation(observed, observer)

    def _weight_spec(self, edge: tuple[Node, Node], spec: Any) -> Any:
        """Returns `spec` for the first reader of a weight, and a reference to it for other readers."""
        first = self.annotated.setdefault(edge[0], edge)
        return spec if first is edge else SharedQuantizationSpec(first)


def _weight_and_bias(fused: FusedOperator) -> tuple[Any, Any]:
    """Returns the arguments for the weight and the bias of an operator; None for one that it does not have."""
    weight, bias = (fused.instance.args.get(name) if name else None for name in (fused.spec.weight, fused.spec.bias))
    return weight, bias


def _weight_axes(operators: list[FusedOperator], layers: Layers) -> dict[Node, int]:
    """Returns the output-channel dimension of each per-channel weight.

    All readers of a weight must agree on it. A weight has one scale if a limit of a reader requires that.
    """
    readers: dict[Node, list[FusedOperator]] = {}
    for fused in operators:
        if fused.spec.weight is not None:
            readers.setdefault(fused.instance.args[fused.spec.weight], []).append(fused)
    axes: dict[Node, int] = {}
    for weight, sharing in readers.items():
        granularities = {layers.granularity(fused.instance.node) for fused in sharing}
        if len(granularities) > 1:
            raise _granularity_error(sharing[-1].instance.node)
        (axis, *others) = {fused.spec.per_channel_axis(fused.instance) for fused in sharing}
        if granularities == {PER_CHANNEL} and axis is not None and not others:
            axes[weight] = axis
    return axes


def _granularity_error(node: Node) -> OptionError:
    return error_at(
        node,
        "This operator and another share a weight that would be per channel for one and per tensor for the other. Set "
        "both to the same in layers.",
        OptionError,
    )


def _make_annotation(edges: dict[Node, Any], output: Any) -> QuantizationAnnotation:
    return QuantizationAnnotation(
        input_qspec_map=edges, output_qspec=output, allow_implicit_sharing=False, _annotated=True
    )


def _range_contains_initial_value(qparams: QParams, state: Node) -> bool:
    """Returns whether the initial value of a state is within the range of these qparams."""
    value = constant_value(store_of(state))
    scale, zero_point = qparams.scale[0], qparams.zero_point[0]
    low, high = (scale * (code - zero_point) for code in (-128, 127))
    return value is not None and bool((value >= low - scale).all()) and bool((value <= high + scale).all())


def _is_mask(value: Node) -> bool:
    """Returns whether `value` is a constant with mask values such as -inf, which have no code of their own."""
    constant = constant_value(value)
    return constant is not None and bool(saturates(constant).any())
