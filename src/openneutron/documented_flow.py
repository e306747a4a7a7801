"""The quantizer of the documented flow, whose conversion recovers the accuracy of recurrent networks."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

from openneutron.calibration import CalibrationOptions
from openneutron.core.boundary import typed_errors
from openneutron.core.constants import attribute, free_name, set_attribute
from openneutron.core.fx import output_node, placeholders
from openneutron.core.garbage import rare_full_collections
from openneutron.core.locks import traces_alone
from openneutron.model.state import states_of
from openneutron.quantizer import Int8Quantizer
from openneutron.quantizer.recorded_inputs import InputRecorder
from openneutron.recovery.recipes import FAST, copy_that_shares_constants, quantize_by_recipe, was_recovered
from openneutron.recovery.shared_layers import is_recurrent
from openneutron.recovery.wide_inputs import inputs_to_widen, widen_inputs

__all__ = ["NeutronQuantizer", "RecurrentRecovery"]


class NeutronQuantizer(Int8Quantizer):
    """Static int8 quantizer for the eIQ Neutron NPU, for `prepare_pt2e`. Its options are those of `Int8Quantizer`.

    `convert_pt2e` recovers the accuracy of recurrent networks (`RecurrentRecovery`), unless `correct_bias` is False.
    """

    def insert_corrections(self, model: GraphModule, observers: dict[Any, Any]) -> None:
        """Inserts the recovery of a recurrent network, or the corrections of `Int8Quantizer` for other networks.

        Networks with states count as other networks, and so do graphs that a recipe recovers.
        """
        by_recipe = self.takes_prepared_graphs or was_recovered(model)
        recovers = self.correct_bias and not by_recipe and not states_of(model.graph)
        if recovers and is_recurrent(model.graph):
            _insert_last(model, RecurrentRecovery(_float_copy(model), self))
        else:
            super().insert_corrections(model, observers)


class RecurrentRecovery(InputRecorder):
    """Records calibration inputs. Conversion quantizes the network again, by the recipe "fast" on these inputs.

    A rounding error in a recurrent layer changes all later steps, so ranges and biases that are selected for each value
    alone are not enough. The recipe rounds weights by the inputs of all steps, and by the errors of earlier layers. It
    selects limits of candidates and of cell states, and the inputs that need two int8 tensors. The observer of the
    quantizer selects all other ranges, from the recorded inputs. Weights and biases of the float graph do not change,
    so that `analyze` can compare the result with the model.
    """

    def __init__(self, reference: GraphModule, quantizer: Int8Quantizer) -> None:
        """Takes the float graph `reference` before annotation, which it will change, and the quantizer."""
        values = [node.meta.get("val") for node in placeholders(reference.graph)]
        super().__init__([len(value) if isinstance(value, torch.Tensor) and value.dim() else None for value in values])
        self._reference = (reference,)  # in a tuple, so that it is not registered as a submodule
        self._quantizer = quantizer.replace()

    @traces_alone  # filters of warnings and thresholds of the garbage collection belong to the process
    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def convert(self, model: GraphModule, node: Node) -> None:
        """Replaces the graph of `model` by that of the recovered network.

        `node` calls this module, after all other observers. Raises `CalibrationError` for values that are not finite.
        """
        model.graph.erase_node(node)
        (reference,), quantizer = self._reference, self._quantizer
        _copy_constants(model, reference)
        samples = [tuple(map(_with_gradients, sample)) for sample in self.samples]
        recipe = replace(FAST, range_by=None, equalizes=False, trusts_samples=False)
        with typed_errors("Recovering the recurrent network"), rare_full_collections(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # prepare_pt2e has given the warnings of annotation
            if not quantizer.wide.is_empty_list:
                widen_inputs(reference, samples, inputs_to_widen(reference, samples))
            converted, _ = quantize_by_recipe(recipe, reference, quantizer, samples, CalibrationOptions())
        _replace_graph(model, converted)


def _with_gradients(value: Any) -> Any:
    """Returns a tensor that operators with gradients take: a copy of a tensor that was made in inference mode."""
    return value.clone() if isinstance(value, torch.Tensor) and value.is_inference() else value


def _float_copy(model: GraphModule) -> GraphModule:
    """Returns a copy of an annotated graph without its annotations, which shares the constants of `model`."""
    reference = copy_that_shares_constants(model)
    for node in reference.graph.nodes:
        node.meta.pop(Q_ANNOTATION_KEY, None)
    return reference


def _insert_last(model: GraphModule, recorder: InputRecorder) -> None:
    """Inserts a call of `recorder` on the inputs of `model` before its output, so that it is converted last."""
    name = free_name(model, "recurrent_recovery")
    model.add_submodule(name, recorder)
    with model.graph.inserting_before(output_node(model.graph)):
        model.graph.call_module(name, tuple(placeholders(model.graph)))


def _copy_constants(model: GraphModule, reference: GraphModule) -> None:
    """Gives the constants of `reference` the values in `model`, whose user may have replaced them after preparation."""
    for node in reference.graph.nodes:
        if node.op == "get_attr":
            set_attribute(reference, str(node.target), _with_gradients(attribute(model, str(node.target))))


def _replace_graph(model: GraphModule, other: GraphModule) -> None:
    """Gives `model` the graph of `other`, with the constants and modules that it reads."""
    for path in {str(node.target): None for node in other.graph.nodes if node.op in ("get_attr", "call_module")}:
        set_attribute(model, path, attribute(other, path))
    model.graph = other.graph
