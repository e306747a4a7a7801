"""Checks that raise `ModelError` for a model that cannot be quantized."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import has_free_unbacked_symbols
from torch.utils._pytree import tree_leaves

from openneutron.core.boundary import error_at
from openneutron.core.constants import attribute, computed_constants
from openneutron.core.fx import (
    arguments,
    draws_random_numbers,
    dtype_of,
    first_operand,
    is_state_write,
    modules_of,
    op_name,
    output_node,
    source_of,
)
from openneutron.errors import ModelError
from openneutron.ops.declared import facts_of, is_op
from openneutron.passes.functionalize import may_alias, writes_memory
from openneutron.passes.remove_batch_counts import counts_batches
from openneutron.passes.write_back import can_be_written_back

__all__ = [
    "check_batch_norm",
    "check_is_static_eval",
    "check_outputs",
    "check_parameters_are_kept",
    "check_writes_nothing",
]

_OTHER_FLOATS = (torch.float16, torch.bfloat16, torch.float64)
_EVAL = (
    "Call model.eval() before torch.export.export. To train it quantized, give NeutronQuantizer(is_qat=True) to "
    "prepare_qat_pt2e."
)


def check_is_static_eval(module: GraphModule, *, training: bool = False) -> bool:
    """Raises `ModelError` for train mode, dynamic shapes, or floating point other than float32. Changes nothing.

    `training` (quantization-aware) allows train mode and dynamic shapes, because training uses other batch sizes than
    the program. Constants may have another floating-point dtype if the values that are computed with them are float32.
    """
    constants = computed_constants(module)
    for node in module.graph.nodes:
        if node not in constants:
            _check_constant_operands(node)
        _check_shape_and_dtype(node, training=training)
        check_batch_norm(node)
        if not training:
            _check_eval(node)
    return False


def check_outputs(module: GraphModule) -> bool:
    """Raises `ModelError` for an output that a program cannot return. Changes nothing."""
    leaves = tree_leaves(output_node(module.graph).args[0])
    if not any(isinstance(leaf, Node) for leaf in leaves):
        raise ModelError("The model returns no tensor, so a program has nothing to compute. Return one.")
    for index, leaf in enumerate(leaves):
        if leaf is None or isinstance(leaf, (Node, int, float)):
            continue
        what = f"the text '{leaf}'" if isinstance(leaf, str) else f"a {type(leaf).__name__}"
        raise ModelError(
            f"The model's output {index} is {what}. A program returns tensors, numbers, truth values and None: do "
            "not return it from forward."
        )
    return False


def _check_shape_and_dtype(node: Node, *, training: bool) -> None:
    value = node.meta.get("val")
    operator_node = first_operand(node) if node.target is operator.getitem else node
    where = {"node": operator_node.name, "op": op_name(operator_node), "source": source_of(operator_node)}
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)) and has_free_unbacked_symbols(value):
        raise ModelError(
            "This number depends on the values of a tensor (.item(), int(...)): a program has the same numbers for all "
            "inputs. Compute with the tensor itself, or compute the number before the export.",
            **where,
        )
    if node.op not in ("placeholder", "get_attr", "call_function") or not isinstance(value, torch.Tensor):
        return
    if torch._C._functorch.is_functorch_wrapped_tensor(value):
        raise ModelError(
            "torch.export does not finish the control flow of torch.associative_scan, so the graph cannot run. Unroll "
            "it to a fixed number of steps, or write the scan with cumsum or a matrix product.",
            **where,
        )
    if _selects_by_mask(node) and not all(isinstance(size, int) for size in value.shape):
        raise ModelError(
            f"The shape {tuple(value.shape)} depends on the values of a tensor: on how many values of a mask are true. "
            "The NPU runs static shapes only. A constant mask is supported; a mask that depends on the data, or that "
            "the model writes to, is not: compute with torch.where over the whole tensor.",
            **where,
        )
    if has_free_unbacked_symbols(value):
        raise ModelError(
            f"The shape {tuple(value.shape)} depends on the values of a tensor (a mask as index, nonzero, unique), and "
            "the NPU runs static shapes only. Compute with torch.where over the whole tensor, or select the values "
            "outside of the model.",
            **where,
        )
    if not training and not all(isinstance(size, int) for size in value.shape):
        raise ModelError(
            f"The shape {tuple(value.shape)} is dynamic, and the NPU runs static shapes only. Export without "
            "dynamic_shapes, one program for each shape.",
            **where,
        )
    if node.op == "placeholder" and value.dtype in _OTHER_FLOATS:
        raise _unsupported_dtype(node)


def _check_constant_operands(node: Node) -> None:
    """Raises `ModelError` if `node`, which is not a constant, takes over the dtype of a double or half constant."""
    if node.op != "output" and dtype_of(node) not in _OTHER_FLOATS:
        return
    for operand in node.all_input_nodes:
        if operand.op == "get_attr" and dtype_of(operand) in _OTHER_FLOATS:
            raise _unsupported_dtype(operand)


def _unsupported_dtype(node: Node) -> ModelError:
    return error_at(
        node,
        f"The dtype {dtype_of(node)} is not supported. Quantization starts from float32: call model.float() and give "
        "float32 example inputs.",
    )


def _selects_by_mask(node: Node) -> bool:
    """Returns whether the operator selects the values at which a boolean tensor is true."""
    if not is_op(node, "selection by truth values"):
        return False
    masks = node.all_input_nodes[1:] or node.all_input_nodes
    return any(mask.meta["val"].dtype in (torch.bool, torch.uint8) for mask in masks)


def _check_eval(node: Node) -> None:
    name = op_name(node)
    where = {"node": node.name, "op": name, "source": source_of(node)}
    if facts_of(node).is_in_train_mode(node):
        raise ModelError(
            f"The model is in train mode. {_EVAL}" if _is_in_torch_module(node) else _training_call_message(node),
            **where,
        )
    if draws_random_numbers(node) and (node.users or writes_memory(node)):
        raise ModelError(
            "This operator draws new random numbers in each call, so calibration and the device would not see the "
            "same values. Draw only if self.training, or make the numbers an input or a buffer of the model.",
            **where,
        )
    # A batch norm in train mode counts its batches. The counter remains after the batch norm was folded.
    if counts_batches(node):
        raise ModelError(f"A batch norm of the model is in train mode. {_EVAL}", **where)


def _is_in_torch_module(node: Node) -> bool:
    """Whether `node` comes from the forward of a torch.nn module. `eval()` then changes its mode."""
    modules = modules_of(node)
    return bool(modules) and modules[-1][1].startswith("torch.nn.")


def _training_call_message(node: Node) -> str:
    """Returns the message for a function of torch.nn.functional that is called with training=True."""
    name, args = op_name(node).split(".")[1], arguments(node)
    if is_op(node, "batch_norm"):
        return (
            f"This call of {name} has training=True, so it normalizes by the statistics of its batch. Call it with "
            "training=self.training, and export the model in eval mode."
        )
    what = f"p={args['p']:g}: it drops values" if "p" in args else "two limits: it draws slopes"
    return (
        f"This call of {name} has training=True and {what} at random, in eval mode too unless the argument is "
        "self.training. Call it with training=self.training, and export the model in eval mode; or remove the call."
    )


def check_batch_norm(node: Node) -> None:
    """Raises `ModelError` for a batch norm without running statistics. Other nodes pass."""
    if is_op(node, "batch_norm") and arguments(node)["running_mean"] is None:
        raise error_at(
            node,
            "This batch norm has no running statistics (track_running_stats=False): it normalizes by the statistics "
            "of each batch, and cannot be folded. Train it with track_running_stats=True.",
        )


def check_writes_nothing(module: GraphModule) -> bool:
    """Raises `ModelError` for an in-place operator that `functionalize` did not convert. Changes nothing.

    Quantize and dequantize nodes copy their input, and an in-place write would not reach these copies.
    """
    for node in module.graph.nodes:
        if writes_memory(node) and not is_state_write(node):
            raise error_at(
                node,
                f"This operator writes in place to {_written_memory_text(node)}. Write the result to a new tensor, or "
                "to a copy: x = x.clone().",
            )
    return False


def _written_memory_text(write: Node) -> str:
    """Returns a description of the memory that a remaining in-place operator writes to."""
    memory = write.args[0] if write.args else None
    while isinstance(memory, Node) and memory.op == "call_function" and may_alias(memory) and memory.args:
        if not writes_memory(memory) and not can_be_written_back(memory):
            return f"the view that {op_name(memory)} returns, which cannot be written back to the tensor that it views"
        memory = memory.args[0]
    if isinstance(memory, Node) and memory.op == "placeholder":
        return f"a part of an input of the model ('{memory.name}')"
    if isinstance(memory, Node) and memory.op == "get_attr":
        return f"a buffer or a parameter of the model ('{memory.target}')"
    return "a tensor, and PyTorch has no form of it that returns a new tensor"


@contextmanager
def check_parameters_are_kept(module: GraphModule) -> Iterator[None]:
    """Raises `ModelError` if a pass replaces a trainable parameter by a constant."""
    before = _read_parameters(module)
    yield
    after = _read_parameters(module)
    lost = sorted(before - after)
    if lost:
        raise ModelError(
            f"These parameters would not be trained: {', '.join(map(repr, lost))}. Passes replace the operators "
            "that read them, and compute constants from them. Call requires_grad_(False) on them before "
            "torch.export.export."
        )


def _read_parameters(module: GraphModule) -> set[str]:
    """Returns the names of the trainable parameters that the graph reads."""
    read = {str(node.target) for node in module.graph.nodes if node.op == "get_attr" and node.users}
    return {target for target in read if getattr(attribute(module, target), "requires_grad", False)}
