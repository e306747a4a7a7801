"""Finds the reason why a float operator cannot be quantized."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from openneutron.core.constants import constant_value
from openneutron.core.fx import iterate_nodes, op_name
from openneutron.ops import DECOMPOSITIONS, OPERATORS, OpSpec
from openneutron.ops.masks import MASK_REASON, is_mask_computation
from openneutron.ops.op_instance import OpInstance
from openneutron.targets import Generation, NeutronTargetSpec

__all__ = ["is_size", "quantizable_reason"]

ConstantOf = Callable[[object], torch.Tensor | None]


def quantizable_reason(node: Node, target: NeutronTargetSpec, constant_of: ConstantOf = constant_value) -> str | None:
    """Returns why the float operator `node` cannot be quantized, or None if it can. `constant_of` returns constants of
    the graph.

    Limits of the legacy generation alone are not reasons: there the operator is quantized too, and runs in int8 on the
    CPU.
    """
    value = node.meta.get("val")
    spec, declared = OPERATORS.get(op_name(node)), DECOMPOSITIONS.get(op_name(node))
    instance = OpInstance(node, target.neutron_target, constant_of=constant_of)
    if isinstance(value, torch.Tensor) and value.dtype != torch.float32:
        if declared is not None and declared.returns_integers:
            return _undecomposed_reason(instance)
        return f"It returns {value.dtype}; only float32 is quantized."
    if spec is None or is_mask_computation(node) or not isinstance(value, torch.Tensor):
        return _undecomposed_reason(instance)
    if not value.numel():
        return "It returns a tensor without elements."
    return _input_reason(spec, instance) or _weight_reason(spec, instance) or _limit_reason(spec, instance)


def is_size(node: Node) -> bool:
    """Returns whether `node` computes with sizes, as models with a dynamic batch size do."""
    return isinstance(node.meta.get("val"), (int, torch.SymInt))


def _input_reason(spec: OpSpec, instance: OpInstance) -> str | None:
    """Returns why an activation that the operator reads cannot be quantized, or None."""
    reasons = (_argument_reason(name, instance.args[name]) for name in spec.inputs)
    return next(filter(None, reasons), None)


def _argument_reason(name: str, argument: Any) -> str | None:
    operands = [node.meta["val"] for node in iterate_nodes(argument)]
    if not operands:
        return f"Its argument '{name}' is not a tensor."
    for operand in operands:
        if operand.dtype != torch.float32:
            return f"Its argument '{name}' is {operand.dtype}; only float32 is quantized."
        if not operand.numel() and len(operands) == 1:
            return f"Its argument '{name}' has no elements."
    return None


def _weight_reason(spec: OpSpec, instance: OpInstance) -> str | None:
    """Returns why the weight or the bias cannot be quantized, or None."""
    for name, role in ((spec.weight, "weight"), (spec.bias, "bias")):
        constant = instance.args[name] if name else None
        if constant is not None and instance.constant_of(constant) is None:
            return f"Its {role} is computed while the model runs, not a constant."
    return None


def _limit_reason(spec: OpSpec, instance: OpInstance) -> str | None:
    """Returns which limits of the operator this occurrence violates, or None."""
    rejections = spec.rejections(instance, Generation.MODERN)
    if not rejections:
        return None
    declared = DECOMPOSITIONS.get(op_name(instance.node))
    if declared is not None and declared.applies(instance):
        return _undecomposed_reason(instance)
    return f"The NPU takes {spec.name} only if: {' '.join(rejections)}"


def _undecomposed_reason(instance: OpInstance) -> str:
    declared = DECOMPOSITIONS.get(op_name(instance.node))
    if is_mask_computation(instance.node):
        return MASK_REASON
    if declared is None:
        return "OpenNeutron has no such operator; docs/operators.md lists those it has."
    rejections = declared.rejections(instance)
    if not rejections:
        return f"{declared.name} becomes {declared.becomes} for float32 values only, when the model is quantized."
    return f"{declared.name} becomes {declared.becomes} only if: {' '.join(rejections)}"
