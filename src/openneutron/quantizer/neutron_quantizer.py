"""The quantizer: which values of an exported model become int8, and which of them share their qparams."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, Quantizer, SharedQuantizationSpec
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

from openneutron import passes
from openneutron.core.boundary import typed_errors
from openneutron.core.constants import computed_constants, constant_value, value_of
from openneutron.core.fx import (
    UNBATCHED,
    is_operator,
    is_state,
    iterate_nodes,
    noted,
    op_name,
    place_of,
    shape_of,
    source_of,
)
from openneutron.cpu.kernels import check_cpu_kernels
from openneutron.errors import ModelError, OptionError
from openneutron.ir.graph import QParams
from openneutron.model.state import is_state_write, next_value, states_of, store_of, write_of
from openneutron.ops import DECOMPOSITIONS, OPERATORS, OpSpec
from openneutron.ops.attention import WIDE_SOFTMAX
from openneutron.ops.decomposition import SHARED_QPARAMS
from openneutron.ops.masks import MASK_REASON, SOFTMAX, is_made_for_a_mask, saturates
from openneutron.ops.site import Site
from openneutron.ops.spec import OutputRule
from openneutron.passes.equalize import equalize as equalize_channels
from openneutron.passes.equalize import note_equalized, was_equalized
from openneutron.passes.name_bad_inputs import check_inputs_before_observers
from openneutron.quantizer import qspecs, training
from openneutron.quantizer.added_masks import AddedMask, MaskedAtRunTime, added_masks
from openneutron.quantizer.bias_correction import correct_biases_at_conversion
from openneutron.quantizer.layers import GRANULARITIES, PER_CHANNEL, Key, Layers
from openneutron.quantizer.observers import DistributionObserver, RangeObserver, RecentRangeObserver
from openneutron.quantizer.output_parts import Join, Parts, joined_in_float, note_joined_in_float
from openneutron.quantizer.score_ranges import ScoreRange, score_ranges
from openneutron.quantizer.state_at_conversion import reset_states_at_conversion
from openneutron.quantizer.torchao_folding import protect_from_wrong_folding
from openneutron.quantizer.trained_modules import WeightFakeQuantize, batch_norm_behind
from openneutron.targets import Generation, NeutronTargetSpec

__all__ = ["CoarseSoftmaxWarning", "NeutronQuantizer", "UnquantizedWarning", "quantizable_reason"]

# A value, or what one of its readers reads instead of it.
Value = Node | tuple[Node, Node]


class UnquantizedWarning(UserWarning):
    """Operators that stay in float, each with its reason."""


class CoarseSoftmaxWarning(UserWarning):
    """Softmaxes of so many values that int8 makes zeros of most probabilities."""


@dataclass(frozen=True)
class _Place:
    """An operator to be quantized, with the batch norm that is trained behind it and the activation it fuses."""

    spec: OpSpec
    site: Site
    batch_norm: Node | None
    activation: Node | None

    @property
    def output(self) -> Node:
        return self.activation or self.batch_norm or self.site.node

    @property
    def inputs(self) -> list[Node]:
        return self._operands(self.spec.inputs)

    @property
    def symmetric(self) -> list[Node]:
        """The inputs that need zero point 0."""
        return self._operands(self.spec.symmetric)

    @property
    def rule(self) -> OutputRule | QParams:
        return self.spec.output_rule(self.site.node) if self.activation is None else OutputRule.OBSERVED

    @property
    def brings_together(self) -> bool:
        """Whether its output has the values of several others."""
        return sum(constant_value(value) is None for value in self.inputs) > 1

    def _operands(self, names: tuple[str, ...]) -> list[Node]:
        operands = iterate_nodes([self.site.args[name] for name in names])
        return list(dict.fromkeys(map(training.observed, operands)))


class NeutronQuantizer(Quantizer):
    """Static int8 for the eIQ Neutron NPU: for `prepare_pt2e`, usable for any number of models.

    With `is_qat`, for `prepare_qat_pt2e` and models exported in train mode.

    Activations are affine per tensor, weights symmetric per tensor (`weight_granularity="per_channel"` for
    convolutions: one scale for each output channel), biases int32. `layers` sets that, or "float" for not quantized,
    for parts of the model (see `Layers`). `observer` is a class of torchao's observers or fake quantizers for
    activations, or what its `with_args(...)` returns. Unless given, it is `DistributionObserver` by the
    rule "relative", and `RangeObserver` for values that are outputs of the model, of which the largest count most; with
    `is_qat` it is `RecentRangeObserver`. `weight_bits` below 8 leaves codes of the weights unused; the NPU gains
    nothing by that, but experiments may.

    With `equalize`, channels trade scale between the layers around them before they are annotated, which leaves the
    function as it is (`passes.equalize`). With `correct_bias`, `convert_pt2e` takes out of biases what rounding weights
    shifts outputs by on average (`quantizer.bias_correction`). Neither is done with `is_qat`.

    Operators that cannot be quantized stay in float; an `UnquantizedWarning` says which and why.

    Raises `TargetError` and `OptionError` on construction, `ModelError` from `prepare_pt2e` for a model in train mode,
    with dynamic shapes, or not in float32 (from `prepare_qat_pt2e` for what cannot be trained quantized, and for a
    model of which nothing is quantized), `InputError` from a prepared or converted module for inputs of another shape
    or dtype, and `CalibrationError` from `convert_pt2e`, for values that are not finite also while training.
    """

    def __init__(
        self,
        target: str | NeutronTargetSpec = "imxrt700",
        is_qat: bool = False,
        *,
        weight_granularity: str = "per_tensor",
        layers: Mapping[Key, str] | None = None,
        observer: Any = None,
        weight_bits: int = 8,
        equalize: bool = True,
        correct_bias: bool = True,
        neutron_target_spec: NeutronTargetSpec | None = None,
    ) -> None:
        super().__init__()
        if weight_granularity not in GRANULARITIES:
            raise OptionError(f"weight_granularity is one of {', '.join(GRANULARITIES)}, not {weight_granularity!r}.")
        if weight_bits not in range(2, 9):
            raise OptionError(f"weight_bits is a number from 2 to 8, not {weight_bits!r}.")
        for name, wanted in (("equalize", equalize), ("correct_bias", correct_bias)):
            if not isinstance(wanted, bool):
                raise OptionError(f"{name} takes True or False, not {wanted!r}.")
        observers = (observer, observer)
        if observer is None:
            calibrated = DistributionObserver.with_args(range_by="relative"), RangeObserver
            observers = (RecentRangeObserver,) * 2 if is_qat else calibrated
        for given in dict.fromkeys(observers):
            qspecs.check_observer(given)
        protect_from_wrong_folding()
        self.target = NeutronTargetSpec(neutron_target_spec or target)
        self.is_qat = is_qat
        self.layers = Layers(layers, weight_granularity)
        self.observer, self.observer_of_outputs = observers
        self.weight_bits = weight_bits
        self.equalize = equalize
        self.correct_bias = correct_bias
        self.takes_prepared_graphs = False

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        """The passes that make the graph quantizable; called by `prepare_pt2e`.

        A graph that has a note of `equalize` is not equalized again. Raises `ModelError` for an operator that neither
        the NPU nor ExecuTorch's CPU kernels take.
        """
        if self.takes_prepared_graphs:
            return model
        return self.prepare_graph(model, equalizes=self.equalize and not was_equalized(model))

    def of_prepared_graphs(self, observer: Any = None) -> NeutronQuantizer:
        """A copy of this quantizer for graphs of `prepare_graph`: with it, `prepare_pt2e` does not prepare them again.

        `observer`, where given, takes the place of the quantizer's own for values that are no outputs of the model.
        """
        changed = copy.copy(self)
        changed.takes_prepared_graphs = True
        changed.observer = self.observer if observer is None else observer
        return changed

    @typed_errors("Preparing the model for quantization")
    def prepare_graph(self, model: GraphModule, *, equalizes: bool) -> GraphModule:
        """Run the passes that make the graph quantizable, in place, and equalize its channels if `equalizes` says so.

        Raises `ModelError` as `transform_for_annotation` does.
        """
        stays = self.layers.leave_in_float
        passes.prepare(model, self.target.neutron_target, training=self.is_qat, stays=stays)
        if self.is_qat:
            training.prepare_for_training(model)
        elif equalizes:
            equalize_channels(model, stays=stays)
        note_equalized(model, equalized=bool(was_equalized(model)))
        if not self.is_qat:  # what is trained is not what runs
            self._check_what_stays_in_float(model)
        return model

    def _check_what_stays_in_float(self, model: GraphModule) -> None:
        """Raise `ModelError` for an operator that ExecuTorch's CPU kernels cannot run either. Linear in nodes."""
        operators = [node for node in model.graph.nodes if is_operator(node) and not _is_size(node)]
        asked_for = {node: None for node in operators if self.layers.leave_in_float(node)}
        reasons = {node: quantizable_reason(node, self.target) for node in operators if node not in asked_for}
        check_cpu_kernels([(node, reason) for node, reason in reasons.items() if reason], trusts_table=False)
        check_cpu_kernels([(node, "layers leaves it in float.") for node in asked_for], trusts_table=True)

    @typed_errors("Annotating the model")
    def annotate(self, model: GraphModule) -> GraphModule:
        """Put annotations on what can be quantized; called by `prepare_pt2e`. Linear in nodes.

        Raises `OptionError` for a key of `layers` that means nothing in this model.
        """
        self.layers.check(model)
        masks, sums = added_masks(model)
        places: list[_Place] = []
        left: list[tuple[Node, str]] = []
        fused: set[Node] = set()
        computed = computed_constants(model) if self.is_qat else set()

        def constant_of(node: object) -> torch.Tensor | None:
            return value_of(model, node) if isinstance(node, Node) and node in computed else constant_value(node)

        for node in list(model.graph.nodes):
            if not is_operator(node) or node in fused or node in computed or _is_size(node):
                continue
            if is_state(node) or is_state_write(node):
                continue
            if self.layers.leave_in_float(node):
                self.layers.mark(node)
                continue
            reason = quantizable_reason(node, self.target, constant_of)
            if reason is not None:
                left.append((node, reason))
                continue
            place = self._place(node)
            fused.update(filter(None, [place.activation]))
            places.append(place)
        if self.is_qat and not places:
            raise _nothing_to_train(left)
        joined = joined_in_float(places)
        for node in joined:
            note_joined_in_float(node)
        quantized = [place for place in places if place.site.node not in joined]
        _Annotation(self, quantized, joined, masks, sums).write(model)
        if self.is_qat:
            training.fold_what_stays_in_float(model)
        _warn_of_coarse_softmaxes(places)
        if left:
            warnings.warn("These operators stay in float:\n" + _listed(left), UnquantizedWarning, stacklevel=3)
        return model

    def validate(self, model: GraphModule) -> None:
        """Nothing is left to check; called by `prepare_pt2e`."""

    def prepare_obs_or_fq_callback(self, model: GraphModule, edge_or_node_to_obs_or_fq: dict[Any, Any]) -> None:
        """Let biases be corrected and states be reset when the model is converted, and observers refuse inputs that do
        not fit; called by `prepare_pt2e`.
        """
        if self.correct_bias and not self.is_qat:
            correct_biases_at_conversion(model, edge_or_node_to_obs_or_fq)
        reset_states_at_conversion(model)
        check_inputs_before_observers(edge_or_node_to_obs_or_fq)

    def _place(self, node: Node) -> _Place:
        spec = OPERATORS[op_name(node)]
        batch_norm = batch_norm_behind(node)
        activation = self._fusable_activation(spec, batch_norm or node)
        return _Place(spec, Site(node, self.target.neutron_target), batch_norm, activation)

    def _fusable_activation(self, spec: OpSpec, node: Node) -> Node | None:
        """The activation that alone reads `node`, where the operator and the target can fuse it."""
        if not spec.fuses_activation or len(node.users) != 1:
            return None
        (user,) = node.users
        follower = OPERATORS.get(op_name(user))
        if follower is None or follower.activation is None or self.layers.leave_in_float(user):
            return None
        return user if follower.activation(user) in self.target.neutron_target.fused_activations else None


def _listed(left: list[tuple[Node, str]]) -> str:
    """A line for each operator that stays in float, with its reason."""
    return "\n".join(f"  {node.name} ({op_name(node)}, {place_of(node)}): {reason}" for node, reason in left)


def _nothing_to_train(left: list[tuple[Node, str]]) -> ModelError:
    message = "Nothing of this model is quantized, so there is nothing to train quantized."
    if not left:
        return ModelError(f"{message} It has no operators, or `layers` leaves all of them in float.")
    node, _ = left[0]
    message = f"{message} Its operators stay in float:\n{_listed(left)}\n"
    return ModelError(message, node=node.name, op=op_name(node), source=source_of(node))


def _warn_of_coarse_softmaxes(places: list[_Place]) -> None:
    """Warn of each softmax over many values that `divide_after_sums` did not rewrite."""
    for place in places:
        node = place.site.node
        count = shape_of(node)[int(place.site.args["dim"])] if op_name(node) in SOFTMAX else 0
        if count > WIDE_SOFTMAX:
            warnings.warn(
                f"{node.name} ({op_name(node)}, {place_of(node)}) yields {count} probabilities in steps of 1/256: "
                "those below 1/512 become 0. The largest ones stay in order. Where only weighted sums over the last "
                "dimension read them (matmul; sum of a product), the NPU divides after the sum and loses nothing.",
                CoarseSoftmaxWarning,
                stacklevel=4,
            )


def _is_size(node: Node) -> bool:
    """Whether `node` computes with sizes, as a model of any batch size does."""
    return isinstance(node.meta.get("val"), (int, torch.SymInt))


def quantizable_reason(
    node: Node, target: NeutronTargetSpec, constant_of: Callable[[object], torch.Tensor | None] = constant_value
) -> str | None:
    """Why the float operator `node` cannot be quantized; None if it can. `constant_of` knows the graph's constants.

    Limits that only the legacy generation has do not count here: the operator is quantized all the same and runs in
    int8 on the CPU there.
    """
    spec, value = OPERATORS.get(op_name(node)), node.meta.get("val")
    site = Site(node, target.neutron_target, constant_of=constant_of)
    if isinstance(value, torch.Tensor) and value.dtype != torch.float32:
        return f"It yields {value.dtype}; only float32 is quantized."
    if spec is None or is_made_for_a_mask(node) or not isinstance(value, torch.Tensor):
        return _undecomposed_reason(site)
    if not value.numel():
        return "It yields a tensor without elements."
    for name in spec.inputs:
        operands = list(iterate_nodes(site.args[name]))
        if not operands:
            return f"Its argument '{name}' is not a tensor."
        for operand in operands:
            if operand.meta["val"].dtype != torch.float32:
                return f"Its argument '{name}' is {operand.meta['val'].dtype}; only float32 is quantized."
            if not operand.meta["val"].numel() and len(operands) == 1:
                return f"Its argument '{name}' has no elements."
    for name in filter(None, (spec.weight, spec.bias)):
        constant = site.args[name]
        if constant is not None and constant_of(constant) is None:
            role = "weight" if name == spec.weight else "bias"
            return f"Its {role} is computed while the model runs, not a constant."
    rejections = spec.rejections(site, Generation.MODERN)
    if not rejections:
        return None
    declared = DECOMPOSITIONS.get(op_name(node))
    if declared is not None and declared.applies(site):
        return _undecomposed_reason(site)
    return f"The NPU takes {spec.name} only if: {' '.join(rejections)}"


def _undecomposed_reason(site: Site) -> str:
    declared = DECOMPOSITIONS.get(op_name(site.node))
    if is_made_for_a_mask(site.node):
        return MASK_REASON
    if declared is None:
        return "OpenNeutron has no such operator; docs/operators.md lists those it has."
    rejections = declared.rejections(site)
    if not rejections:
        return f"{declared.name} becomes {declared.becomes} for float32 values only, when the model is quantized."
    return f"{declared.name} becomes {declared.becomes} only if: {' '.join(rejections)}"


class _Annotation:
    """Writes the annotations of all places.

    Values that must have equal qparams are one group. The first place a group is met gets the quantization spec, each
    later one refers to it; torchao then gives them one observer.
    """

    def __init__(
        self,
        quantizer: NeutronQuantizer,
        places: list[_Place],
        joined: Mapping[Node, Join],
        masks: Mapping[Node, AddedMask],
        sums: Mapping[Node, tuple[AddedMask, ...]],
    ) -> None:
        self.quantizer = quantizer
        self.places = places
        self.joined = joined
        self.joins: dict[Value, list[Parts]] = {}
        self.masks = masks
        self.sums = sums
        self.scores: Mapping[Node, ScoreRange] = {}
        self.around: dict[Value, qspecs.Around] = {}
        self.weight_axis = _weight_axes(places, quantizer.layers)
        self.parent: dict[Value, Value] = {}
        self.fixed: dict[Value, QParams] = {}
        self.moved: set[Node] = set()
        self.read: set[Value] = set()
        self.symmetric: set[Value] = set()
        self.masked: set[Value] = set()
        self.outputs: set[Value] = set()
        self.unbatched: set[Value] = set()
        self.met: dict[Value, Value] = {}
        self.requantized: dict[Value, Value] = {}
        self.stored: dict[Node, Value] = {}
        """The qparams of the states that operators read, by the nodes that store their next values."""

    def write(self, model: GraphModule) -> None:
        self.scores = score_ranges(model)
        self._group(states_of(model.graph))
        self._make_symmetric()
        self.masked = {self._find(value) for place in self.places for value in place.inputs if _is_mask(value)}
        self.around = self._special_observers()
        reading = {place.site.node: place for place in self.places}
        yielding = {place.output: place for place in self.places}
        values = {value for place in self.places for value in (*place.inputs, place.output)}
        self.outputs = {
            self._find(value)
            for value in values
            if any(reader.op == "output" or reader in self.joined for reader in value.users)
        }
        self.unbatched = {self._find(value) for value in values if noted(value, UNBATCHED)}
        self._note_joins()
        read_in_float = {node: values.intersection(node.all_input_nodes) - yielding.keys() for node in self.joined}
        # torchao walks the graph in this order too, and wants a group's spec before what refers to it: an activation
        # may come long after the operator that it is fused into.
        for node in list(model.graph.nodes):
            if node in reading:
                self._annotate_inputs(reading[node])
            if node in read_in_float:
                given = [value for value in node.all_input_nodes if value in read_in_float[node]]
                edges = {value: self._spec((value, node), value) for value in given}
                node.meta[Q_ANNOTATION_KEY] = _annotation(edges, None)
            if node in yielding:
                self._annotate_output(yielding[node])
            if node in self.stored:
                value, group = next_value(node), self.stored[node]
                node.meta[Q_ANNOTATION_KEY] = _annotation({value: self._spec((value, node), group)}, None)

    def _find(self, value: Value) -> Value:
        root = value
        while (above := self.parent.get(root, root)) is not root:
            root = above
        while value is not root:
            self.parent[value], value = root, self.parent[value]
        return root

    def _group(self, states: list[Node]) -> None:
        """An operator that moves or joins values shares qparams with its inputs, and a state with its next value."""
        self.fixed = {place.output: place.rule for place in self.places if isinstance(place.rule, QParams)}
        moving = [place for place in self.places if place.rule is OutputRule.SHARED]
        for place in moving:
            if not place.brings_together:
                self._join_inputs(place)
        self._join_named()
        self._join_states(states)
        self.moved = {place.output for place in moving if not place.brings_together}
        self.read = self._read_otherwise(set())
        for place in moving:
            if place.brings_together:
                self._join_inputs(place)

    def _join_inputs(self, place: _Place) -> None:
        groups = [self._find(value) for value in place.inputs]
        demands = {self.fixed.get(group) for group in groups}
        are_one = len(set(groups)) == 1
        for value, group in zip(place.inputs, groups, strict=True):
            # Fixed qparams that not all inputs have cannot be shared, and a value that others compute with would lose
            # resolution where the values it meets have a wider range: that input alone is requantized. Not so one that
            # comes by moves alone, which a MUL would keep from being merged with those behind (ShuffleNetV2), nor an
            # input of the model, which is quantized once.
            if is_made_for_a_mask(value):  # each reader quantizes it separately, so the readers need not share qparams
                self.requantized[(value, place.site.node)] = place.output
                continue
            is_read = group in self.read and value not in self.moved and value.op != "placeholder"
            if len(demands) > 1 if group in self.fixed else is_read and not are_one:
                self.requantized[(value, place.site.node)] = place.output
            else:
                self._join(place.output, group)

    def _join_named(self) -> None:
        """Values that a decomposition wants to have equal qparams, unless fixed ones."""
        named: dict[str, Value] = {}
        for value in dict.fromkeys(value for place in self.places for value in (*place.inputs, place.output)):
            group, name = self._find(value), value.meta.get(SHARED_QPARAMS)
            if name is not None and group not in self.fixed:
                self._join(value, self._find(named.setdefault(name, group)))

    def _join_states(self, states: list[Node]) -> None:
        """A state and the value that is stored in it share qparams, as the next call reads the stored codes.

        Where the next value has qparams of its own, which the initial one does not fit, it is requantized.
        """
        read = {value for place in self.places for value in place.inputs}
        for state in states:
            if state not in read:
                continue
            write = write_of(state)
            group, own = self._find(next_value(write)), self._find(state)
            fixed = self.fixed.get(group)
            if own not in self.fixed and (fixed is None or _holds(fixed, state)):
                self._join(state, group)
            elif fixed is None:
                self._join(next_value(write), own)
            self.stored[write] = state

    def _special_observers(self) -> dict[Value, qspecs.Around]:
        """Wrapping observers by group: those of run-time masks, of masked values, and of scores."""
        hidden = {
            self._find(place.output)
            for place in self.places
            if place.rule is OutputRule.SHARED and place.brings_together and any(map(is_made_for_a_mask, place.inputs))
        }
        found = {group: MaskedAtRunTime(hides=True) for group in hidden}
        for node, masks in self.sums.items():
            group = self._find(node)
            found[group] = MaskedAtRunTime(sums_with=masks, hides=group in hidden)
        for node, mask in self.masks.items():
            found[self._find(node)] = MaskedAtRunTime(mask)
        around: dict[Value, qspecs.Around] = {group: masked.around for group, masked in found.items()}
        for node, scores in self.scores.items():
            if (group := self._find(node)) not in self.masked:
                around.setdefault(group, scores.around)
        return around

    def _make_symmetric(self) -> None:
        """Where only inputs that need zero point 0 read a group, it is symmetric; else those inputs are requantized."""
        wanted = [(value, place.site.node) for place in self.places for value in place.symmetric]
        shared = self._read_otherwise(set(wanted)) if wanted else set()
        for edge in wanted:
            group = self._find(edge[0])
            fixed = self.fixed.get(group)
            if group in shared if fixed is None else any(fixed.zero_point):
                self.requantized[edge] = group = edge
            if group not in self.fixed:
                self.symmetric.add(group)

    def _note_joins(self) -> None:
        """Link the observers of the parts of each concatenation in float that can share qparams.

        So does what is computed with the same concatenation, which then is the same on the NPU.
        """
        computed_with = {tuple(place.inputs): place.output for place in self.places if place.brings_together}
        for node, join in sorted(self.joined.items(), key=lambda item: -len(item[1].values)):
            same = computed_with.get(tuple(node.all_input_nodes))
            groups = dict.fromkeys(map(self._find, [*join.values, *([same] if same else [])]))
            observed = [group for group in groups if group not in self.fixed]
            parts = Parts(join.fixed | {self.fixed[group] for group in groups if group in self.fixed})
            special = not self.symmetric.union(self.masked, self.around).isdisjoint(observed)
            if join.can_share and not special and len(observed) + len(parts.fixed) > 1:
                for group in observed:
                    self.joins.setdefault(group, []).append(parts)

    def _read_otherwise(self, wanted: set[tuple[Node, Node]]) -> set[Value]:
        """The groups that something reads which neither moves their values nor is in `wanted`."""
        movers = {place.site.node for place in self.places if place.rule is OutputRule.SHARED}
        values = {value for place in self.places for value in (*place.inputs, place.output)}
        edges = {(value, reader) for value in values for reader in value.users if reader.users or reader.op == "output"}
        return {self._find(edge[0]) for edge in edges - wanted if edge[1] not in movers or edge in self.requantized}

    def _join(self, output: Node, group: Value) -> None:
        # A group that an operator reads twice may have been joined to another one in between.
        root, group = self._find(output), self._find(group)
        if root is not group:
            self.parent[root] = group
            if root in self.read:
                self.read.add(group)

    def _annotate_inputs(self, place: _Place) -> None:
        node = place.site.node
        edges = {value: self._spec((value, node), self.requantized.get((value, node), value)) for value in place.inputs}
        weight, bias = (place.site.args.get(name) if name else None for name in (place.spec.weight, place.spec.bias))
        if weight is not None:
            spec = qspecs.weight(node, self.weight_axis.get(weight), self.quantizer.weight_bits)
            if self.quantizer.is_qat:
                training.read_weight_through(node, WeightFakeQuantize(node, spec))
            else:
                edges[weight] = self._first_or_shared((weight, node), spec)
                if bias is not None:
                    per_channel = spec.ch_axis is not None
                    edges[bias] = qspecs.bias((place.inputs[0], node), (weight, node), bias, per_channel=per_channel)
        node.meta[Q_ANNOTATION_KEY] = _annotation(edges, None)

    def _annotate_output(self, place: _Place) -> None:
        annotation = place.output.meta.setdefault(Q_ANNOTATION_KEY, _annotation({}, None))
        annotation.output_qspec = self._spec(place.output, place.output)

    def _spec(self, key: Value, value: Value) -> Any:
        group = self._find(value)
        if group in self.met:
            return SharedQuantizationSpec(self.met[group])
        self.met[group] = key
        if group in self.fixed:
            return qspecs.fixed(self.fixed[group])
        node = value[0] if isinstance(value, tuple) else value
        spec = qspecs.trained_activation if self.quantizer.is_qat else qspecs.activation
        symmetric, masked = group in self.symmetric, group in self.masked
        observer = self.quantizer.observer_of_outputs if group in self.outputs else self.quantizer.observer
        joins, around = self.joins.get(group, ()), self.around.get(group)
        if self.quantizer.is_qat and group in {self._find(mask) for mask in self.masks}:
            # Not fake quantized: the sums tell hidden scores from visible ones by the float values of the mask.
            spec, observer = qspecs.activation, RecentRangeObserver
        return spec(
            node, observer, symmetric=symmetric, masked=masked, joins=joins, around=around,
            is_unbatched=group in self.unbatched,
        )  # fmt: skip

    def _first_or_shared(self, edge: tuple[Node, Node], spec: Any) -> Any:
        """`spec` for the first reader of a weight; the others share what it gets."""
        first = self.met.setdefault(edge[0], edge)
        return spec if first is edge else SharedQuantizationSpec(first)


def _weight_axes(places: list[_Place], layers: Layers) -> dict[Node, int]:
    """The dimension of output channels of each weight that is per channel: all its readers must agree on one."""
    readers: dict[Node, list[_Place]] = {}
    for place in places:
        if place.spec.weight is not None:
            readers.setdefault(place.site.args[place.spec.weight], []).append(place)
    axes: dict[Node, int] = {}
    for weight, sharing in readers.items():
        granularities = {layers.granularity(place.site.node) for place in sharing}
        if len(granularities) > 1:
            raise _disagreement(sharing[-1].site.node)
        (axis, *others) = {place.spec.weight_axis for place in sharing}
        if granularities == {PER_CHANNEL} and axis is not None and not others:
            axes[weight] = axis
    return axes


def _disagreement(node: Node) -> OptionError:
    return OptionError(
        "This operator and another share a weight that would be per channel for one and per tensor for the other. Set "
        "both to the same in layers.",
        node=node.name,
        op=op_name(node),
        source=source_of(node),
    )


def _annotation(edges: dict[Node, Any], output: Any) -> QuantizationAnnotation:
    return QuantizationAnnotation(
        input_qspec_map=edges, output_qspec=output, allow_implicit_sharing=False, _annotated=True
    )


def _holds(qparams: QParams, state: Node) -> bool:
    """Whether the initial value of a state is within the range of these qparams."""
    value = constant_value(store_of(state))
    scale, zero_point = qparams.scale[0], qparams.zero_point[0]
    low, high = (scale * (code - zero_point) for code in (-128, 127))
    return value is not None and bool((value >= low - scale).all()) and bool((value <= high + scale).all())


def _is_mask(value: Node) -> bool:
    """Whether `value` is a constant with values that stand for no number."""
    constant = constant_value(value)
    return constant is not None and bool(saturates(constant).any())


def annotated(model: GraphModule) -> Iterator[Node]:
    """The nodes that carry an annotation."""
    return (node for node in model.graph.nodes if Q_ANNOTATION_KEY in node.meta)
