"""A converted module as a module that can be trained, and the trained codes as a converted module.

The trained module has the graph of the converted module. Each quantize with its dequantizes becomes one fake
quantization with the same scale, each int8 weight of a layer becomes a parameter that is fake quantized with the
weight's scale, and each bias becomes a parameter. So the first outputs equal those of the converted module, and the
conversion back writes codes and scales only.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from openneutron.core.constants import attribute, free_name
from openneutron.core.fx import (
    arguments,
    first_operand,
    is_dequantize,
    is_quantize,
    is_state_write,
    modules_of,
    op_name,
    set_argument,
)
from openneutron.errors import InputError
from openneutron.ir.graph import QParams
from openneutron.model.examples import Examples, arguments_of, to_tensors
from openneutron.model.state import has_state, reset
from openneutron.ops import OPERATORS
from openneutron.ops.graph_builder import detach
from openneutron.passes.add_input_guards import GUARDS
from openneutron.quantizer.training import only_moves
from openneutron.recovery.weighted_layers import WeightedLayer, layers_of
from openneutron.training.fake_quantize import FakeQuantizedWeight, RangeFactors, fake_quantize

if TYPE_CHECKING:
    from openneutron.quantized_model import QuantizedModel

__all__ = ["TrainableModel"]

Qparams = tuple[float, int, int, int]
"""Scale, zero point, and the lowest and the highest code of an activation."""


@dataclass(frozen=True)
class _Trained:
    """The names of the trained modules and parameters."""

    weights: Mapping[str, str]
    """From the attribute of a weight's codes in the converted module to a `FakeQuantizedWeight`."""
    biases: Mapping[str, str]
    """From the attribute of a bias's codes in the converted module to a parameter. Equal biases have one parameter."""
    ranges: tuple[Qparams, ...]
    """The qparams before training, in the order of the scales of `RangeFactors`."""


class TrainableModel(nn.Module):
    """The module of a `QuantizedModel` in a form that can be trained. `prepare_training` returns it.

    Its parameters are the weights and biases of layers, the float parameters of operators that stay in float, and the
    logarithms of the factors of the activations' scales (`graph_module.ranges`). `forward` takes the arguments with
    which the model was exported, or several samples at once: tensors whose first dimension is a multiple of that of the
    example inputs, or tensors with one more dimension in front. Outputs of several samples have the same form. It
    computes the same in train mode and in eval mode.

    `forward` raises `InputError` for tensors of other shapes, and for several samples of a model with state.
    """

    def __init__(self, quantized: QuantizedModel, *, learn_ranges: bool = True) -> None:
        super().__init__()
        self.quantized = quantized
        self.graph_module, self._trained = _trainable(quantized.module, learn_ranges=learn_ranges)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Returns the outputs of the quantized model, with gradients."""
        inputs, named = pytree.tree_map(to_tensors, (inputs, named))
        leaves, structure = pytree.tree_flatten((inputs, {name: named[name] for name in sorted(named)}))
        form = _form_of(leaves, structure, self.quantized.examples)
        if form == "sample":
            return self.graph_module(*inputs, **named)
        if has_state(self.graph_module):
            raise InputError("This model has state: give one sample at a time, in the order of time.")
        expected, _ = _leaves_of(self.quantized.examples)
        if form == "batch":
            leaves = [_samples_in(value, wanted) for value, wanted in zip(leaves, expected, strict=True)]

        outputs = _mapped_over_samples(
            self.graph_module, leaves, lambda sample: pytree.tree_unflatten(sample, structure)
        )
        return pytree.tree_map(_joined, outputs) if form == "batch" else outputs

    def of_samples(self, leaves: Sequence[Any], graph_module: GraphModule | None = None) -> Any:
        """Returns the outputs for several samples.

        `leaves` are the leaves of the arguments in the order of the inputs, with samples stacked in each tensor. With
        `graph_module`, which takes the arguments of this module, returns the outputs of that one.
        """

        def arguments_of_sample(sample: Sequence[Any]) -> tuple[Any, Any]:
            arguments = arguments_of(self.graph_module, sample)
            return arguments.args, arguments.kwargs

        return _mapped_over_samples(graph_module or self.graph_module, list(leaves), arguments_of_sample)

    def reset(self) -> None:
        """Restores the state that the module had when the model was exported. Does nothing for one without state."""
        reset(self.graph_module)

    @torch.no_grad()
    def converted(self) -> GraphModule:
        """Returns a copy of the quantized model's module with the trained codes, biases and scales."""
        module = copy.deepcopy(self.quantized.module)
        scales = self._trained_scales()
        written: set[str] = set()
        for layer in layers_of(module):
            self._write_layer(layer, scales, written)
        for node in module.graph.nodes:
            if (qparams := _qparams(node)) is not None and qparams in scales:
                set_argument(node, "scale", scales[qparams])
        self._write_float_parameters(module)
        module.recompile()
        return module

    @torch.no_grad()
    def reference(self) -> GraphModule | None:
        """Returns a copy of the quantized model's float graph with the trained weights and biases; None without one."""
        if self.quantized.reference is None:
            return None
        module = copy.deepcopy(self.quantized.reference)
        nodes = {node.name: node for node in module.graph.nodes}
        front = next(iter(module.graph.nodes))
        constants: dict[str, Node] = {}
        for layer in layers_of(self.quantized.module):
            node = nodes[layer.node.name]
            for role, (name, value) in self._constants_of(layer).items():
                if name not in constants:
                    constants[name] = _constant_before(module, front, name, value, arguments(node)[role])
                set_argument(node, role, constants[name])
        self._write_float_parameters(module)
        module.graph.eliminate_dead_code()
        module.recompile()
        return module

    def _write_float_parameters(self, module: GraphModule) -> None:
        """Copies the trained parameters of operators that stay in float. They have the same names in `module`."""
        trained, written = dict(self.graph_module.named_parameters()), dict(module.named_parameters())
        for name, _ in self.quantized.module.named_parameters():
            if name in trained and name in written:
                written[name].copy_(trained[name])

    def _constants_of(self, layer: WeightedLayer) -> dict[str, tuple[str, Tensor]]:
        """Returns the names and the values of the trained weight and bias of `layer`, by their roles."""
        weight = self._trained.weights[_target_of(layer.weight)]
        found = {"weight": (weight, self._weight(layer).value.detach())}
        if layer.bias is not None:
            bias = self._trained.biases[_target_of(layer.bias)]
            found["bias"] = bias, self.graph_module.get_parameter(bias).detach()
        return found

    def _trained_scales(self) -> dict[Qparams | None, float]:
        """Returns the trained scale of each group of activations, by the qparams before training."""
        if not self._trained.ranges:
            return {}
        factors = self.graph_module.get_submodule(_RANGES)
        assert isinstance(factors, RangeFactors)
        return dict(zip(self._trained.ranges, factors.scales.tolist(), strict=True))

    def _write_layer(self, layer: WeightedLayer, scales: Mapping[Qparams | None, float], written: set[str]) -> None:
        if _target_of(layer.weight) not in written:
            layer.codes.copy_(self._weight(layer).codes)
            written.add(_target_of(layer.weight))
        if layer.bias is None or _target_of(layer.bias) in written:
            return
        qparams = _qparams(arguments(layer.node)["input"])
        if qparams is not None and qparams in scales:
            _multiply_scale(layer.module, layer.bias, scales[qparams] / qparams[0])
        layer.set_bias(self.graph_module.get_parameter(self._trained.biases[_target_of(layer.bias)]))
        written.add(_target_of(layer.bias))

    def _weight(self, layer: WeightedLayer) -> FakeQuantizedWeight:
        found = self.graph_module.get_submodule(self._trained.weights[_target_of(layer.weight)])
        assert isinstance(found, FakeQuantizedWeight)
        return found


def _mapped_over_samples(
    module: GraphModule, leaves: list[Any], arguments_of_sample: Callable[[Sequence[Any]], tuple[Any, Any]]
) -> Any:
    """Returns the outputs of `module` for samples along the first dimension of the tensors in `leaves`.

    `arguments_of_sample` makes the positional and the keyword arguments from the leaves of one sample. Outputs that are
    not tensors, such as None, are returned once.
    """
    found: list[Any] = []
    form: list[pytree.TreeSpec] = []

    def outputs_of_sample(*sample: Any) -> tuple[Tensor, ...]:
        args, kwargs = arguments_of_sample(sample)
        found[:], output_form = pytree.tree_flatten(module(*args, **kwargs))
        form[:] = [output_form]
        return tuple(value for value in found if isinstance(value, Tensor))

    dims = tuple(0 if isinstance(value, Tensor) else None for value in leaves)
    tensors = iter(torch.func.vmap(outputs_of_sample, in_dims=dims)(*leaves))
    outputs = [next(tensors) if isinstance(value, Tensor) else value for value in found]
    return pytree.tree_unflatten(outputs, form[0])


_RANGES = "ranges"


def _trainable(converted: GraphModule, *, learn_ranges: bool) -> tuple[GraphModule, _Trained]:
    """Copies `converted` to a graph with parameters. Linear in nodes."""
    module = copy.deepcopy(converted)
    front = next(iter(module.graph.nodes))
    for node in list(module.graph.nodes):
        if node.op == "call_module" and node.target == GUARDS:
            module.graph.erase_node(node)
        elif is_state_write(node):
            value = node.args[1]
            with module.graph.inserting_before(node):
                node.replace_input_with(value, detach(module.graph, value))
    weights, biases = _train_layers(module, front)
    ranges = _fake_quantize_activations(module, front, learn_ranges=learn_ranges)
    module.graph.eliminate_dead_code()
    trained = GraphModule(module, module.graph)  # without the parameters that nothing reads
    trained.meta.update(module.meta)
    for parameter in filter(torch.is_floating_point, trained.parameters()):
        parameter.requires_grad_(True)
    return trained, _Trained(weights, biases, ranges)


def _train_layers(module: GraphModule, front: Node) -> tuple[dict[str, str], dict[str, str]]:
    weights: dict[str, str] = {}
    biases: dict[str, str] = {}
    equal: dict[tuple[str, bytes, bytes], str] = {}
    for layer in list(layers_of(module)):
        place = _name_of(layer.node)
        codes = _target_of(layer.weight)
        if codes not in weights:
            weights[codes] = name = free_name(module, f"{place}_weight")
            module.add_submodule(name, FakeQuantizedWeight(layer.codes, layer.scale, layer.code_range))
        bias = layer.real_bias
        if layer.bias is not None and bias is not None:
            own = _target_of(layer.bias)
            key = (codes, *layer.bias_bytes)
            if own not in biases:
                if key not in equal:
                    equal[key] = free_name(module, f"{place}_bias")
                    module.register_parameter(equal[key], nn.Parameter(bias))
                biases[own] = equal[key]
    with module.graph.inserting_before(front):
        calls = {codes: module.graph.call_module(name) for codes, name in weights.items()}
        values = {own: module.graph.get_attr(name) for own, name in biases.items()}
    for layer in list(layers_of(module)):
        codes = _target_of(layer.weight)
        if layer.bias is not None:
            set_argument(layer.node, "bias", values[_target_of(layer.bias)])
        layer.weight.replace_all_uses_with(calls[codes])
    return weights, biases


def _name_of(node: Node) -> str:
    modules = modules_of(node)
    return (modules[-1][0] if modules else "").replace(".", "_") or node.name


def _fake_quantize_activations(module: GraphModule, front: Node, *, learn_ranges: bool) -> tuple[Qparams, ...]:
    """Replaces each quantize with its dequantizes by a fake quantization. Returns the qparams with a trained scale.

    Values with equal qparams keep equal qparams, because operators that only move values require it.
    """
    found: dict[Node, Qparams] = {}
    for node in module.graph.nodes:
        qparams = _qparams(node) if is_quantize(node) and all(map(is_dequantize, node.users)) else None
        if qparams is not None:
            found[node] = qparams
    fixed = {qparams for node, qparams in found.items() if _has_fixed_qparams(first_operand(node))}
    learned = tuple(one for one in dict.fromkeys(found.values()) if learn_ranges and one not in fixed)
    scales = _scales(module, front, learned, tuple(dict.fromkeys(found.values())))
    rounded: dict[Node, Qparams] = {}
    for node, qparams in found.items():
        new = source = first_operand(node)
        if not only_moves(source) or rounded.get(first_operand(source)) != qparams:
            with module.graph.inserting_before(node):
                new = module.graph.call_function(fake_quantize, (source, scales[qparams], *qparams[1:]))
            new.meta = dict(node.meta)
        rounded[new] = qparams
        for dequantize in list(node.users):
            dequantize.replace_all_uses_with(new)
            module.graph.erase_node(dequantize)
        module.graph.erase_node(node)
    return learned


def _scales(
    module: GraphModule, front: Node, learned: tuple[Qparams, ...], every: tuple[Qparams, ...]
) -> dict[Qparams, Node]:
    """Inserts a node for the scale of each of the qparams."""
    scales: dict[Qparams, Node] = {}
    with module.graph.inserting_before(front):
        if learned:
            module.add_submodule(_RANGES, RangeFactors([qparams[0] for qparams in learned]))
            factors = module.graph.call_module(_RANGES)
            for index, qparams in enumerate(learned):
                scales[qparams] = module.graph.call_function(operator.getitem, (factors, index))
        for qparams in every:
            if qparams not in scales:
                name = free_name(module, "_fixed_scale")
                module.register_buffer(name, torch.tensor([qparams[0]]))
                scales[qparams] = module.graph.get_attr(name)
    return scales


def _qparams(node: object) -> Qparams | None:
    """Returns the qparams of a quantize or dequantize of an activation per tensor; None for any other node."""
    if not isinstance(node, Node) or not (is_quantize(node) or is_dequantize(node)):
        return None
    args = arguments(node)
    if not isinstance(args.get("scale"), float) or first_operand(node).op == "get_attr":
        return None
    return args["scale"], args["zero_point"], args["quant_min"], args["quant_max"]


def _target_of(dequantize: Node) -> str:
    """Returns the attribute that holds the codes that a node dequantizes."""
    return str(first_operand(dequantize).target)


def _has_fixed_qparams(node: Node) -> bool:
    spec = OPERATORS.get(op_name(node))
    return spec is not None and isinstance(spec.output_rule(node), QParams)


def _multiply_scale(module: GraphModule, dequantize: Node, factor: float) -> None:
    args = arguments(dequantize)
    if "scale" in args:
        set_argument(dequantize, "scale", args["scale"] * factor)
    else:
        attribute(module, str(args["scales"].target)).mul_(factor)


def _constant_before(module: GraphModule, front: Node, name: str, value: Tensor, replaced: Node) -> Node:
    name = free_name(module, name)
    module.register_parameter(name, nn.Parameter(value.detach().clone()))
    with module.graph.inserting_before(front):
        constant = module.graph.get_attr(name)
    constant.meta = {key: item for key, item in replaced.meta.items() if key in ("val", "stack_trace")}
    return constant


def _leaves_of(examples: Examples) -> tuple[list[Any], pytree.TreeSpec]:
    kwargs = {name: examples.kwargs[name] for name in sorted(examples.kwargs)}
    return pytree.tree_flatten((examples.args, kwargs))


def _form_of(leaves: list[Any], structure: pytree.TreeSpec, examples: Examples) -> str:
    """Returns "sample", "batch" (concatenated samples) or "stack" (samples with a new dimension in front)."""
    expected, wanted = _leaves_of(examples)
    if structure != wanted:
        raise InputError(f"The inputs have the structure {structure}. The model was exported with {wanted}.")
    pairs = [(found, one) for found, one in zip(leaves, expected, strict=True) if isinstance(one, Tensor)]
    if all(isinstance(found, Tensor) and found.dtype == one.dtype for found, one in pairs):
        if all(found.shape == one.shape for found, one in pairs):
            return "sample"
        if len(counts := {_count_of_samples(found, one) for found, one in pairs}) == 1 and all(counts):
            return "batch"
        if len(counts := {_count_of_stacked(found, one) for found, one in pairs}) == 1 and all(counts):
            return "stack"
    raise InputError(
        f"The inputs are {', '.join(_text_of(found) for found, _ in pairs)}. A sample is "
        f"{', '.join(_text_of(one) for _, one in pairs)}. Give one sample, several concatenated in their first "
        "dimension, or several stacked in a new first dimension."
    )


def _text_of(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _count_of_samples(found: Tensor, one: Tensor) -> int:
    """Returns the number of samples that are concatenated in `found`; 0 if its shape does not fit."""
    fits = found.dim() == one.dim() > 0 and found.shape[1:] == one.shape[1:] and len(one)
    return len(found) // len(one) if fits and len(found) % len(one) == 0 else 0


def _count_of_stacked(found: Tensor, one: Tensor) -> int:
    """Returns the number of samples that are stacked in `found`; 0 if its shape does not fit."""
    return len(found) if found.dim() == one.dim() + 1 and found.shape[1:] == one.shape else 0


def _samples_in(value: Any, one: Any) -> Any:
    return value.reshape(-1, *one.shape) if isinstance(value, Tensor) else value


def _joined(output: Any) -> Any:
    return output.flatten(0, 1) if isinstance(output, Tensor) and output.dim() > 1 else output
