"""Quantization-aware training: prepares a model exported in train mode for annotation.

`prepare_qat_pt2e` calls the quantizer first and folds batch norms afterwards, by patterns that match convolutions, one
eps, and certain quantized operands. These patterns match nothing in the graph after `prepare_for_training`, because
each batch norm is a call of `trained_modules.BatchNorm`, and each dropout in train mode is a call of `OnlyInTraining`.
The other operators are the same as in eval mode, and are annotated in the same way.

Each weight of a quantized operator is read through a `WeightFakeQuantize`, which folds and quantizes weight and bias
when the model is converted. Biases are not fake quantized, because the int32 steps of a bias are far finer than the
int8 steps of the sum.

The calls of `BatchNorm` and `OnlyInTraining` read the training mode from a constant of the graph. torchao's
`move_exported_model_to_eval` and `move_exported_model_to_train` set this constant. If the graph contained batch norm
and dropout operators, these two functions would rewrite them, and lose their eps, momentum and probability. Conversion
works in both modes.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.export_utils import _EXPORTED_TRAINING_ATTR

from openneutron.core.boundary import error_at
from openneutron.core.constants import computed_constants, free_name
from openneutron.core.fx import arguments, draws_random_numbers, first_operand, op_name, set_argument
from openneutron.errors import ModelError
from openneutron.ops import OPERATORS
from openneutron.ops.declared import facts_of, is_op
from openneutron.ops.spec import OutputRule
from openneutron.passes.fold_batch_norm import can_fold_batch_norm_into, insert_identity_convolution
from openneutron.passes.remove_batch_counts import BATCH_COUNT
from openneutron.quantizer.trained_modules import (
    BatchNorm,
    FloatWeight,
    OnlyInTraining,
    RemovedAtConversion,
    ReplaceZeros,
    WeightFakeQuantize,
    batch_norm_after,
    batch_norm_arguments,
    called,
    weight_and_bias,
)

__all__ = [
    "fold_float_batch_norms",
    "observed",
    "observing_reader",
    "only_moves",
    "prepare_for_training",
    "read_weight_through",
]

_ONLY_IN_TRAINING = ("dropout", "dropout of another kind", "detach")


def prepare_for_training(module: GraphModule) -> None:
    """Replaces operators of train mode. Rules, linear in nodes:

    1. A batch norm in train mode, or in eval mode with computed parameters, becomes a call of a `BatchNorm`. If it
       cannot be folded into the operator before it, or if that operator has other readers, a depthwise convolution with
       weight 1 is inserted before it. In train mode, the call also counts the batches.
    2. A dropout in train mode and a detach become calls of `OnlyInTraining`. A relu, and operators that only move
       values, are moved before a dropout, so that they read the same values as in eval mode.
    3. The input of an operator that is infinite at zero is read through a `ReplaceZeros`.

    Raises `ModelError` for a batch norm over three dimensions that cannot be folded, or with parameters that are
    computed from inputs, and for any other operator that draws random numbers.
    """
    constants = computed_constants(module)
    buffers = {name for name, _ in module.named_buffers()}
    setattr(module, _EXPORTED_TRAINING_ATTR, True)
    with module.graph.inserting_before(next(iter(module.graph.nodes))):
        trains = module.graph.create_node("get_attr", _EXPORTED_TRAINING_ATTR)
    for node in list(module.graph.nodes):
        if is_op(node, "batch_norm"):
            _prepare_batch_norm(module, node, trains, constants, buffers)
        elif is_op(node, *_ONLY_IN_TRAINING) and node not in constants:
            source, *options = _move_dropout_after_moves(node).args
            _replace_by_module(node, OnlyInTraining(op_name(node), tuple(options)), (source, trains))
        elif facts_of(node).is_infinite_at_zero and node not in constants:
            value = first_operand(node)
            reader = _insert_module_call(node, ReplaceZeros(), (value,))
            reader.meta = dict(value.meta)
            node.replace_input_with(value, reader)
        elif draws_random_numbers(node):
            raise _training_error(node, "This operator draws random numbers, in the converted model too.")
    module.graph.eliminate_dead_code()


def _prepare_batch_norm(
    module: GraphModule, node: Node, trains: Node, constants: Container[Node], buffers: Container[str]
) -> None:
    """Applies rule 1 to a batch norm. `trains` reads the mode, and `buffers` has the names of the module's buffers."""
    parameters = node.all_input_nodes[1:]
    if not all(parameter in constants for parameter in parameters):
        message = "The parameters of this batch norm are computed from inputs, and cannot be folded."
        raise _training_error(node, message, remedy="Write it as a multiplication and an addition.")
    _move_before(parameters, trains)
    is_foldable = can_fold_batch_norm_into(node.args[0], constants.__contains__)
    if not is_foldable and not insert_identity_convolution(module, node):
        raise _training_error(node, "This batch norm cannot be folded: no operator before it can absorb it.")
    if not arguments(node)["training"]:
        _call_batch_norm(node, None, trains=False)
        return
    count = str(arguments(node)["running_mean"].target).removesuffix("running_mean") + BATCH_COUNT
    _call_batch_norm(node, count if count in buffers else None, trains)


def _training_error(
    node: Node, message: str, remedy: str = "Call eval() on the module that it comes from before torch.export.export."
) -> ModelError:
    return error_at(node, f"{message} {remedy}")


def _move_before(constants: list[Node], front: Node) -> None:
    """Moves `constants`, and the operators that compute them, before `front`, so that calls after it can read them."""
    waiting = [node for node in constants if node.op != "get_attr"]
    moved: set[Node] = set()
    while waiting:
        node = waiting[-1]
        missing = [source for source in node.all_input_nodes if source not in moved]
        if missing:
            waiting += missing
            continue
        if node not in moved:
            moved.add(node)
            front.prepend(node)
        waiting.pop()


def _call_batch_norm(node: Node, count: str | None, trains: Node | bool) -> None:
    args = arguments(node)
    with node.graph.inserting_before(node):
        batches = None if count is None else node.graph.get_attr(count)
    running = (args["running_mean"], args["running_var"], batches)
    submodule = BatchNorm(args["momentum"], args["eps"])
    _replace_by_module(node, submodule, (args["input"], (args["weight"], args["bias"]), running, trains))


def _move_dropout_after_moves(node: Node) -> Node:
    """Moves a dropout after its only reader, repeatedly, while this reader is a relu or only moves values."""
    while is_op(node, "dropout") and len(node.users) == 1:
        (reader,) = node.users
        if not is_op(reader, "relu") and not only_moves(reader):
            break
        reader.replace_input_with(node, node.args[0])  # type: ignore[arg-type]
        reader.replace_all_uses_with(node)
        reader.append(node)
        node.args = (reader, *node.args[1:])
        node.meta = {**node.meta, "val": reader.meta["val"]}
    return node


def only_moves(node: Node) -> bool:
    """Whether an operator only moves the values of one tensor, so that its output has the qparams of its input."""
    spec = OPERATORS.get(op_name(node))
    return spec is not None and spec.output is OutputRule.SHARED and not spec.is_compute and spec.inputs == ("self",)


def _replace_by_module(node: Node, submodule: torch.nn.Module, args: tuple[Any, ...]) -> None:
    """Replaces `node` by a call of a new submodule."""
    call = _insert_module_call(node, submodule, args)
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)
    node.graph.erase_node(node)


def _insert_module_call(node: Node, submodule: torch.nn.Module, args: tuple[Any, ...]) -> Node:
    module = node.graph.owning_module
    assert module is not None
    name = free_name(module, f"_{node.name}_{type(submodule).__name__}")
    module.add_submodule(name, submodule)
    with node.graph.inserting_before(node):
        return node.graph.call_module(name, args)


def observed(node: Node) -> Node:
    """Returns the value whose range is observed for `node`: the input of the `RemovedAtConversion` calls before `node`.

    After conversion both are equal.
    """
    while isinstance(called(node), RemovedAtConversion):
        node = node.args[0]  # type: ignore[assignment]
    return node


def observing_reader(value: Node, operator: Node) -> Node:
    """Returns the node at whose edge from `value` a fake quantizer is inserted for `operator`.

    It is a `ReplaceZeros` between them, so that the zeros of the fake quantizer are replaced; else `operator`.
    """
    between = [node for node in operator.all_input_nodes if isinstance(called(node), ReplaceZeros)]
    return next((node for node in between if node.args[0] is value), operator)


def read_weight_through(operator: Node, reader: WeightFakeQuantize | FloatWeight) -> None:
    """Inserts a call of `reader` on the weight of `operator`. Conversion calls `reader.convert` for weight and bias."""
    role, _ = weight_and_bias(operator)
    weight = arguments(operator)[role]
    args: tuple[Any, ...] = (weight,)
    norm = batch_norm_after(operator)
    if norm is not None and isinstance(reader, WeightFakeQuantize):
        (norm_weight, _), (_, variance, _), module = batch_norm_arguments(norm)
        args = (weight, norm_weight, variance, module.eps)
    call = _insert_module_call(operator, reader.to(weight.meta["val"].device), args)
    call.meta = dict(weight.meta)
    set_argument(operator, role, call)


def fold_float_batch_norms(module: GraphModule) -> None:
    """Inserts a `FloatWeight` for each float operator before a batch norm, so that conversion folds the batch norm."""
    for node in list(module.graph.nodes):
        if isinstance(called(node), BatchNorm):
            operator = node.args[0]
            weight = arguments(operator)[weight_and_bias(operator)[0]]
            if called(weight) is None:
                read_weight_through(operator, FloatWeight())
