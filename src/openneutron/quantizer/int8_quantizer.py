"""The quantizer: selects the values of an exported model that become int8, and those that share qparams."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantizer import Quantizer
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

from openneutron import passes
from openneutron.core.boundary import error_at, typed_errors
from openneutron.core.constants import computed_constants, constant_value
from openneutron.core.evaluation import value_of
from openneutron.core.fx import compiled_once, is_operator, is_state, is_state_write, op_name, place_of, shape_of
from openneutron.cpu.kernels import check_cpu_kernels
from openneutron.errors import ModelError, OptionError
from openneutron.model.exporting import is_prepared, is_quantized
from openneutron.ops import OPERATORS, OpSpec
from openneutron.ops.attention import WIDE_SOFTMAX
from openneutron.ops.declared import is_op
from openneutron.ops.fusion import activation_after
from openneutron.ops.op_instance import OpInstance
from openneutron.passes.add_input_guards import check_inputs_before_observers
from openneutron.passes.equalize import equalize as equalize_channels
from openneutron.passes.equalize import note_equalized, was_equalized
from openneutron.quantizer import qspecs, training
from openneutron.quantizer.added_masks import added_masks
from openneutron.quantizer.annotation import Annotation, AnnotationSettings
from openneutron.quantizer.bias_correction import correct_biases_at_conversion
from openneutron.quantizer.cell_ranges import select_cell_ranges_at_conversion
from openneutron.quantizer.fused_operators import FusedOperator
from openneutron.quantizer.layer_options import GRANULARITIES, Key, Layers, WideStates, left_in_float
from openneutron.quantizer.observers import DistributionObserver, RangeObserver, RecentRangeObserver
from openneutron.quantizer.output_parts import float_concatenations, note_float_concatenation
from openneutron.quantizer.quantizable import is_size, quantizable_reason
from openneutron.quantizer.state_at_conversion import reset_states_at_conversion
from openneutron.quantizer.sum_ranges import link_addends
from openneutron.quantizer.torchao_folding import protect_from_wrong_folding
from openneutron.quantizer.trained_modules import batch_norm_after
from openneutron.targets import NeutronTargetSpec, Target

__all__ = ["CoarseSoftmaxWarning", "Int8Quantizer", "UnquantizedWarning", "annotated"]


class UnquantizedWarning(UserWarning):
    """Lists operators that stay in float, each with the reason."""


class CoarseSoftmaxWarning(UserWarning):
    """Names a softmax over many values, most of whose probabilities int8 rounds to zero."""


class Int8Quantizer(Quantizer):
    """Static int8 quantizer for the eIQ Neutron NPU, for `prepare_pt2e`. One instance can quantize several models.

    With `is_qat`, it is for `prepare_qat_pt2e` and for models exported in train mode.

    Activations are affine per tensor, weights symmetric per tensor (with `weight_granularity="per_channel"`, one scale
    per output channel), biases int32. `layers` sets the granularity for parts of the model, or "float" for parts that
    are not quantized (see `Layers`).

    `observer` is a class of torchao's observers or fake quantizers for activations, or the result of its
    `with_args(...)`. The default is `DistributionObserver` with the rule "relative", and `RangeObserver` for outputs of
    the model, whose largest values matter most. With `is_qat` the default is `RecentRangeObserver`. With `weight_bits`
    below 8, weights use fewer codes of int8. This is for experiments only, because it does not make the NPU faster.

    `wide` selects recurrent operators, by keys as in `layers`. The cell state of these operators consists of two int8
    tensors: the state limited to -1..1, with a fine scale, and the excess (see docs/accuracy.md).

    With `equalize`, cross-layer equalization scales channels before annotation, which does not change the function
    (`passes.equalize`). With `correct_bias`, `convert_pt2e` corrects biases by the mean output shift of weight rounding
    (`quantizer.bias_correction`). Neither is done with `is_qat`.

    Operators that cannot be quantized stay in float. An `UnquantizedWarning` lists them with reasons.

    The constructor raises `TargetError` and `OptionError`. `prepare_pt2e` raises `ModelError` for a model in train
    mode, with dynamic shapes, or not in float32, and `prepare_qat_pt2e` raises it for operators that cannot be trained
    quantized and for a model in which nothing is quantized. A prepared or converted module raises `InputError` for
    inputs of another shape or dtype. `convert_pt2e` raises `CalibrationError` for a value that calibration never
    reached or that is not finite. Training raises it for values that are not finite.
    """

    def __init__(
        self,
        target: Target = "imxrt700",
        is_qat: bool = False,
        *,
        weight_granularity: str = "per_tensor",
        layers: Mapping[Key, str] | None = None,
        observer: Any = None,
        weight_bits: int = 8,
        equalize: bool = True,
        correct_bias: bool = True,
        wide: Iterable[Key] | None = None,
        neutron_target_spec: Target | None = None,
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
        self.target = NeutronTargetSpec(neutron_target_spec or target).chip
        self.is_qat = is_qat
        self.layers = Layers(layers, weight_granularity)
        self.observer, self.observer_of_outputs = observers
        self.wide = WideStates(wide)
        self.weight_bits = weight_bits
        self.equalize = equalize
        self.correct_bias = correct_bias
        self.takes_prepared_graphs = False

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        """Runs the passes that make the graph quantizable. Called by `prepare_pt2e`.

        A graph with a note of `equalize` is not equalized again. Raises `ModelError` for an operator that neither the
        NPU nor ExecuTorch's CPU kernels support.
        """
        if self.takes_prepared_graphs:
            return model
        return self.prepare_graph(model, equalizes=self.equalize and not was_equalized(model))

    def replace(
        self, *, takes_prepared_graphs: bool = False, observer: Any = None, wide: Iterable[Key] | None = None
    ) -> Int8Quantizer:
        """Returns a copy of this quantizer with the given changes.

        With `takes_prepared_graphs`, the copy is for graphs from `prepare_graph`, and `prepare_pt2e` runs no passes.
        `observer` replaces the observer of values that are not outputs of the model. `wide` replaces the option `wide`.
        """
        changed = copy.copy(self)
        changed.takes_prepared_graphs = self.takes_prepared_graphs or takes_prepared_graphs
        changed.observer = self.observer if observer is None else observer
        changed.wide = self.wide if wide is None else WideStates(wide)
        return changed

    @typed_errors("Preparing the model for quantization")
    def prepare_graph(self, model: GraphModule, *, equalizes: bool) -> GraphModule:
        """Runs the passes that make the graph quantizable, in place, and equalizes its channels if `equalizes` is True.

        Raises `ModelError` as `transform_for_annotation` does, and `OptionError` for a key of `layers` that matches
        nothing in this model and for a key of `wide` that matches no operator with a wide state. Raises `ModelError`
        for a graph that is prepared or quantized already.
        """
        _check_is_float(model)
        keeps_float, is_wide = self.layers.leave_in_float, self.wide.selects
        self.wide.check(model)
        with compiled_once(model):
            passes.prepare(
                model, self.target.neutron_target, training=self.is_qat, keeps_float=keeps_float, is_wide=is_wide
            )
            if self.is_qat:
                training.prepare_for_training(model)
            elif equalizes:
                equalize_channels(model, keeps_float=keeps_float)
        note_equalized(model, equalized=bool(was_equalized(model)))
        self.layers.check(model)
        self._check_float_operators(model)
        return model

    def _check_float_operators(self, model: GraphModule) -> None:
        """Raises `ModelError` for a float operator without a CPU kernel in ExecuTorch. Linear in nodes."""
        # operators on parameters are constants of the program, although training keeps them
        constants = computed_constants(model) if self.is_qat else set()
        operators = [
            node for node in model.graph.nodes if is_operator(node) and not is_size(node) and node not in constants
        ]
        asked_for = {node: None for node in operators if self.layers.leave_in_float(node)}
        reasons = {node: quantizable_reason(node, self.target) for node in operators if node not in asked_for}
        check_cpu_kernels([(node, reason) for node, reason in reasons.items() if reason], trusts_table=False)
        check_cpu_kernels([(node, "layers leaves it in float.") for node in asked_for], trusts_table=True)

    @typed_errors("Annotating the model")
    def annotate(self, model: GraphModule) -> GraphModule:
        """Annotates the operators that can be quantized. Called by `prepare_pt2e`. Linear in nodes.

        Raises `OptionError` for a key of `layers` that matches nothing in this model.
        """
        self.layers.check(model)
        masks, sums = added_masks(model)
        operators, left = self._quantizable_operators(model)
        if self.is_qat and not operators:
            raise _nothing_to_train_error(left)
        joined = float_concatenations(operators)
        for node in joined:
            note_float_concatenation(node)
        quantized = [fused for fused in operators if fused.instance.node not in joined]
        settings = AnnotationSettings(
            self.observer, self.observer_of_outputs, self.weight_bits, self.is_qat, self.layers
        )
        Annotation(settings, quantized, joined, masks, sums).write(model)
        if self.is_qat:
            training.fold_float_batch_norms(model)
        _warn_of_coarse_softmaxes(operators)
        if left:
            warnings.warn("These operators stay in float:\n" + _reasons_text(left), UnquantizedWarning, stacklevel=3)
        return model

    def _quantizable_operators(self, model: GraphModule) -> tuple[list[FusedOperator], list[tuple[Node, str]]]:
        """Returns the operators that can be quantized, and the others with their reasons.

        Marks the operators that `layers` leaves in float; they are in neither list.
        """
        operators: list[FusedOperator] = []
        left: list[tuple[Node, str]] = []
        fused_activations: set[Node] = set()
        computed = computed_constants(model) if self.is_qat else set()

        def constant_of(node: object) -> torch.Tensor | None:
            return value_of(model, node) if isinstance(node, Node) and node in computed else constant_value(node)

        for node in list(model.graph.nodes):
            if not is_operator(node) or node in fused_activations or node in computed or is_size(node):
                continue
            if is_state(node) or is_state_write(node) or left_in_float(node):
                continue
            if self.layers.leave_in_float(node):
                self.layers.mark(node)
            elif (reason := quantizable_reason(node, self.target, constant_of)) is not None:
                left.append((node, reason))
            else:
                operators.append(self._fused_operator(node))
                fused_activations.update(filter(None, [operators[-1].activation]))
        return operators, left

    def validate(self, model: GraphModule) -> None:
        """Does nothing, because `annotate` has checked the model. Called by `prepare_pt2e`."""

    def prepare_obs_or_fq_callback(self, model: GraphModule, edge_or_node_to_obs_or_fq: dict[Any, Any]) -> None:
        """Adds corrections at conversion, limits of addends, resets of states, and checks of inputs.

        Called by `prepare_pt2e`.
        """
        if not self.is_qat:
            self.insert_corrections(model, edge_or_node_to_obs_or_fq)
        link_addends(edge_or_node_to_obs_or_fq.values())
        reset_states_at_conversion(model)
        check_inputs_before_observers(edge_or_node_to_obs_or_fq)

    def insert_corrections(self, model: GraphModule, observers: dict[Any, Any]) -> None:
        """Inserts the observers by which conversion corrects biases and selects ranges of cell states.

        `model` is an annotated graph. `observers` maps nodes and edges (producer, consumer) to the observers that
        `prepare_pt2e` will insert. Linear in nodes.
        """
        if self.correct_bias:
            correct_biases_at_conversion(model, observers)
        select_cell_ranges_at_conversion(model, observers)

    def _fused_operator(self, node: Node) -> FusedOperator:
        spec = OPERATORS[op_name(node)]
        batch_norm = batch_norm_after(node)
        activation = self._fusable_activation(spec, batch_norm or node)
        return FusedOperator(spec, OpInstance(node, self.target.neutron_target), batch_norm, activation)

    def _fusable_activation(self, spec: OpSpec, node: Node) -> Node | None:
        """Returns the activation that is the only reader of `node`, if operator and target can fuse it."""
        activation = activation_after(node, self.target.neutron_target) if spec.fuses_activation else None
        return None if activation is None or self.layers.leave_in_float(activation) else activation


def _check_is_float(model: GraphModule) -> None:
    """Raises `ModelError` for a graph that is prepared or quantized already. Linear in nodes."""
    is_observed = is_prepared(model)
    if is_observed or is_quantized(model):
        state = "prepared by prepare_pt2e" if is_observed else "quantized"
        raise ModelError(
            f"This graph is {state} already, and cannot be prepared again. Give the result of torch.export.export of "
            "the float model, as module()."
        )


def _reasons_text(left: list[tuple[Node, str]]) -> str:
    """Returns one line for each operator that stays in float, with its reason."""
    return "\n".join(f"  {node.name} ({op_name(node)}, {place_of(node)}): {reason}" for node, reason in left)


def _nothing_to_train_error(left: list[tuple[Node, str]]) -> ModelError:
    message = "Nothing of this model is quantized, so there is nothing to train quantized."
    if not left:
        return ModelError(f"{message} It has no operators, or `layers` leaves all of them in float.")
    node, _ = left[0]
    message = f"{message} Its operators stay in float:\n{_reasons_text(left)}\n"
    return error_at(node, message)


def _warn_of_coarse_softmaxes(operators: list[FusedOperator]) -> None:
    """Warns of each softmax over many values that `divide_after_sums` did not rewrite."""
    for fused in operators:
        node = fused.instance.node
        if not is_op(node, "softmax"):
            continue
        shape, dim = shape_of(node), int(fused.instance.args["dim"])
        count = shape[dim]
        other = dim % len(shape) != len(shape) - 1
        advice = f" Transpose its input, so that dimension {dim} is the last one, for this." if other else ""
        if count > WIDE_SOFTMAX:
            warnings.warn(
                f"{node.name} ({op_name(node)}, {place_of(node)}) returns {count} probabilities in steps of 1/256: "
                "those below 1/512 become 0. The largest ones stay in order. Where only weighted sums over the last "
                "dimension read them (matmul; sum of a product), the NPU divides after the sum and loses "
                f"nothing.{advice}",
                CoarseSoftmaxWarning,
                stacklevel=4,
            )


def annotated(model: GraphModule) -> Iterator[Node]:
    """Returns the nodes that have an annotation."""
    return (node for node in model.graph.nodes if Q_ANNOTATION_KEY in node.meta)
