"""Finds clusters: dequantize -> operator (-> activation) -> quantize."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import numpy as np
import torch
from torch.export import ExportedProgram
from torch.fx import Node

from openneutron.compile_spec import CompileOptions
from openneutron.core.fx import (
    first_operand,
    is_dequantize,
    is_operator,
    is_quantize,
    iterate_nodes,
    op_name,
    shape_of,
)
from openneutron.ir.graph import Array, Op, QParams, Tensor
from openneutron.ir.scales import may_break_scale_limits, scale_fault
from openneutron.ops import OPERATORS, OpSpec, is_op
from openneutron.ops.channel_alignment import PaddedInstance, pad_to_alignment
from openneutron.ops.fusion import activation_after, activation_name
from openneutron.ops.lowering import Lowering
from openneutron.ops.op_instance import OpInstance
from openneutron.ops.spec import OutputRule
from openneutron.partition.blocked_names import check_blocked_names, names_of
from openneutron.passes.functionalize import may_alias, writes_memory
from openneutron.quantizer.layer_options import left_in_float
from openneutron.quantizer.output_parts import is_float_concatenation
from openneutron.quantizer.quantizable import quantizable_reason
from openneutron.targets import takes_weights_per_channel

__all__ = ["Cluster", "Clusters", "Constants", "find_clusters", "is_int8", "qparams_of"]

# TFLite's own tolerance for the scale of a bias, relative to input scale x weight scale.
BIAS_SCALE_TOLERANCE = 1e-5


@dataclass(frozen=True, eq=False)
class Cluster:
    """One quantized operator, with its fused activation (or None), its operands and its quantize.

    `operands` are the dequantize nodes of its inputs, weight and bias. A requantization is a cluster, too: its `node`
    is its quantize.
    """

    spec: OpSpec
    instance: OpInstance
    activation: Node | None
    operands: tuple[Node, ...]
    quantize: Node
    padded: PaddedInstance | None = None
    """The lowering on padded operands; None if the NPU supports the operands as they are."""

    @property
    def node(self) -> Node:
        """The node of the operator."""
        return self.instance.node

    @property
    def operators(self) -> tuple[Node, ...]:
        """The node of the operator, and the node of its fused activation, if any."""
        return (self.node,) if self.activation is None else (self.node, self.activation)

    @property
    def output_rule(self) -> OutputRule | QParams:
        """The rule for the qparams of the output; `QParams` if they are fixed."""
        return self.spec.output_rule(self.node) if self.activation is None else OutputRule.OBSERVED

    @property
    def activations(self) -> list[Node]:
        """The dequantize nodes of the operator's activations, in the order of the arguments."""
        return [node for name in self.spec.inputs for node in iterate_nodes(self.instance.args[name])]

    def weight_qparams(self, constants: Constants) -> QParams | None:
        """Returns the qparams of the weight; None for an operator without a weight."""
        return None if self.spec.weight is None else qparams_of(self.instance.args[self.spec.weight], constants)

    def lower(self, operands: dict[Node, Tensor], ops: list[Op]) -> Tensor:
        """Appends its TFLite operators to `ops`; returns its output in torch's dimension order."""
        activation = "NONE" if self.activation is None else activation_name(self.activation) or "NONE"
        lowering = Lowering(self.instance, operands, qparams_of(self.quantize), activation, ops)
        return self.spec.lower(lowering) if self.padded is None else self.padded.lower(lowering)


@dataclass(frozen=True)
class Clusters:
    """The clusters in graph order, and the reason for each operator that is in no cluster."""

    clusters: tuple[Cluster, ...]
    reasons: dict[Node, str]


@dataclass
class Constants:
    """The constants of an exported program, by their placeholders. Buffers that the program writes are excluded."""

    program: ExportedProgram
    _targets: dict[str, str] = field(default_factory=dict)
    _states: dict[str, str] = field(default_factory=dict)
    """The buffers that the program writes, by the names of their placeholders."""

    def __post_init__(self) -> None:
        signature = self.program.graph_signature
        stored = {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }
        written = _written_placeholders(self.program)
        self._targets = {name: target for name, target in stored.items() if name not in written}
        self._states = {name: target for name, target in stored.items() if name in written}

    def __contains__(self, node: object) -> bool:
        return isinstance(node, Node) and node.op == "placeholder" and node.name in self._targets

    def is_written(self, node: object) -> TypeGuard[Node]:
        """Whether `node` is a buffer that the program writes."""
        return isinstance(node, Node) and node.op == "placeholder" and node.name in self._states

    def initial_value(self, state: Node) -> torch.Tensor:
        """Returns the value of a state's buffer before the first call."""
        return self._stored_tensor(self._states[state.name])

    def name_of(self, state: Node) -> str:
        """Returns the name of the buffer that holds a state."""
        return self._states[state.name]

    def array(self, node: Node) -> Array | None:
        """Returns the values of a constant; None for any other node."""
        return np.asarray(self._stored_tensor(self._targets[node.name]).cpu().numpy()) if node in self else None

    def _stored_tensor(self, target: str) -> torch.Tensor:
        stored = self.program.state_dict.get(target)
        tensor: torch.Tensor = self.program.constants[target] if stored is None else stored
        return tensor.detach()

    def tensor(self, node: object) -> torch.Tensor | None:
        """Returns the values of a constant, as integers if it is quantized; None for any other node."""
        source = node.args[0] if isinstance(node, Node) and is_dequantize(node) else node
        array = self.array(source) if isinstance(source, Node) else None
        return None if array is None else torch.from_numpy(array)


def _written_placeholders(program: ExportedProgram) -> set[str]:
    """Returns the names of the placeholders that a program writes, in place or by an output of its signature."""
    mutated = set(program.graph_signature.buffers_to_mutate.values())
    inputs = program.graph_signature.inputs_to_buffers
    found = {name for name, target in inputs.items() if target in mutated}
    for node in program.graph.nodes:
        if writes_memory(node) and node.args and isinstance(node.args[0], Node):
            found.add(_memory_of(node.args[0]).name)
    return found


def _memory_of(value: Node) -> Node:
    """Returns the value that `value` is a view of, or `value` itself."""
    while value.args and isinstance(value.args[0], Node) and may_alias(value):
        value = value.args[0]
    return value


def qparams_of(node: Node, constants: Constants | None = None) -> QParams:
    """Returns the qparams of a quantize or dequantize node. `constants` are needed for a per-channel one."""
    args: Any = node.args
    if "per_channel" not in op_name(node):
        return QParams.per_tensor(float(args[1]), int(args[2]))
    assert constants is not None  # only constants are quantized per channel
    scales, zero_points = constants.array(args[1]), constants.array(args[2])
    assert scales is not None
    assert zero_points is not None
    return QParams(tuple(map(float, scales)), tuple(map(int, zero_points)), int(args[3]))


def find_clusters(program: ExportedProgram, options: CompileOptions) -> Clusters:
    """Finds the operators of a quantized program that the NPU of `options.target` supports.

    Visits each node once; linear in nodes and uses. Raises `OptionError` if a name in `operators_not_to_delegate` is
    neither a declared operator nor a node of the graph.
    """
    search = _ClusterSearch(program, options)
    clusters: dict[Node, Cluster] = {}
    reasons: dict[Node, str] = {}
    fused: set[Node] = set()
    for node in program.graph.nodes:
        if not is_operator(node) or node in fused:
            continue
        if is_dequantize(node) or (is_quantize(node) and not search.is_requantization(node)):
            continue
        found = search.cluster(node)
        if isinstance(found, Cluster):
            clusters[node] = found
            fused.update(filter(None, [found.activation]))
        else:
            reasons[node] = found
    return Clusters(tuple(clusters.values()), reasons)


class _ClusterSearch:
    def __init__(self, program: ExportedProgram, options: CompileOptions) -> None:
        self.constants = Constants(program)
        self.options = options
        self.target = options.target_spec.neutron_target
        self.blocked = frozenset(options.operators_not_to_delegate)
        check_blocked_names(self.blocked, program)

    def is_requantization(self, node: Node) -> bool:
        source = node.args[0]
        return isinstance(source, Node) and is_dequantize(source) and source.args[0] not in self.constants

    def cluster(self, node: Node) -> Cluster | str:
        """Returns the cluster of `node`, or the reason why `node` is in no cluster."""
        if writes_memory(node):
            return self._write(node)
        if is_op(node, "copy") and self.constants.is_written(node.args[0]):
            name = self.constants.name_of(node.args[0])
            return f"The value of the buffer '{name}' is copied, because it is needed after the next value is stored."
        if is_op(node, "copy") and node.args[0] in self.constants and all(map(writes_memory, node.users)):
            return "It copies the constant that becomes the next value of a buffer."
        if key := left_in_float(node):
            return f"{key} leaves it in float."
        if blocked := self.blocked & names_of(node):
            return f"'{min(blocked)}' is in operators_not_to_delegate."
        spec = OPERATORS.get(op_name(node))
        if spec is None:
            return self._float_reason(node)
        instance = OpInstance(node, self.target, self.options.generation)
        operands = self._operand_dequantizes(spec, instance)
        if isinstance(operands, str):
            return operands
        found = self._activation_and_quantize(spec, node)
        if isinstance(found, str):
            return found
        activation, quantize = found
        if activation is not None and (blocked := self.blocked & names_of(activation)):
            return f"Its fused activation '{activation.name}' is in operators_not_to_delegate ('{min(blocked)}')."
        padded = self._padded_lowering(spec, instance)
        if isinstance(padded, str):
            return padded
        cluster = Cluster(spec, instance, activation, operands, quantize, padded)
        return self._qparams_rejection(cluster) or self._scale_rejection(cluster) or cluster

    def _write(self, node: Node) -> str:
        store = node.args[0]
        if self.constants.is_written(store):
            name = self.constants.name_of(store)
            return f"ExecuTorch stores the next value of the buffer '{name}' by a copy on the CPU."
        return "It writes in place, which the NPU does not support."

    def _operand_dequantizes(self, spec: OpSpec, instance: OpInstance) -> tuple[Node, ...] | str:
        operands: list[Node] = []
        for name in spec.inputs:
            nodes = list(iterate_nodes(instance.args[name]))
            if not nodes:
                return self._float_reason(instance.node)
            for operand in nodes:
                if not (is_dequantize(operand) and is_int8(operand)):
                    if spec.name == "requantize":
                        return "It requantizes a value that is not int8."
                    return self._float_reason(instance.node)
                operands.append(operand)
        for argument, dtype in ((spec.weight, torch.int8), (spec.bias, torch.int32)):
            constant = instance.args[argument] if argument else None
            if constant is None:
                continue
            if not (is_dequantize(constant) and constant.args[0] in self.constants):
                return f"Its '{argument}' is not a quantized constant."
            stored = constant.args[0].meta["val"].dtype
            if stored != dtype:
                return f"Its '{argument}' is {stored}, not {dtype}."
            operands.append(constant)
        return tuple(dict.fromkeys(operands))

    def _activation_and_quantize(self, spec: OpSpec, node: Node) -> tuple[Node | None, Node] | str:
        """Returns the fused activation, if any, and the quantize node after it; or the reason for a rejection."""
        if spec.name == "requantize":
            return None, node
        activation: Node | None = None
        users = list(node.users)
        if spec.fuses_activation and (found := activation_after(node, self.target)) is not None:
            activation = found
            users = list(activation.users)
        if len(users) != 1 or not is_quantize(users[0]) or not is_int8(users[0]):
            if reason := self._unquantizable_reason(node) or self._float_concatenation_reason(node):
                return reason
            readers = ", ".join(f"'{user.name}'" for user in users if not is_quantize(user)) or "nothing"
            return f"Its float output is read by {readers} instead of being quantized to int8."
        return activation, users[0]

    def _float_concatenation_reason(self, node: Node) -> str | None:
        """Returns why the quantizer left the concatenation `node` in float; None for other nodes.

        The quantizer leaves it in float if its parts have different qparams and only moves separate it from an output
        or an operator in float.
        """
        if not is_float_concatenation(node):
            return None
        parts = dict.fromkeys(qparams_of(value) for value in node.all_input_nodes if is_dequantize(value))
        scales = f" (of scales {', '.join(f'{part.scale[0]:.3g}' for part in parts)})" if len(parts) > 1 else ""
        return (
            f"Its output is only returned by the program, so its parts{scales} keep their own qparams: the CPU "
            "dequantizes the parts and joins them in float. With one shared scale, the part with the smallest values "
            "would lose resolution."
        )

    def _unquantizable_reason(self, node: Node) -> str | None:
        """Returns why the quantizer left `node` in float; None if `node` can be quantized."""
        return quantizable_reason(node, self.options.target_spec, self.constants.tensor)

    def _float_reason(self, node: Node) -> str:
        reason = self._unquantizable_reason(node) or self._float_concatenation_reason(node)
        if reason is not None:
            return reason
        operands = [operand for operand in iterate_nodes(list(node.args)) if not is_dequantize(operand)]
        return f"It is not quantized: '{operands[0].name}' is in float." if operands else "It is not quantized."

    def _padded_lowering(self, spec: OpSpec, instance: OpInstance) -> PaddedInstance | str | None:
        """Returns the padded lowering, None if no padding is needed, or the reason if the NPU cannot run it."""
        limits = spec.rejections(instance, instance.generation)
        if not limits:
            return None
        reason = f"{self.options.target} takes {spec.name} only if: {' '.join(limits)}"
        padded = pad_to_alignment(spec, instance)
        if padded is None:
            return reason
        if padded.cycles < padded.cpu_cycles:
            return padded
        return (
            f"{reason} Padded with zeros, it would take about {padded.cycles} cycles on the NPU, and it takes about "
            f"{padded.cpu_cycles} on the CPU (estimates)."
        )

    def _scale_rejection(self, cluster: Cluster) -> str | None:
        """Returns which TFLite operator of `cluster` does not support its scales, and why; None if all support them."""
        qparams = {operand: qparams_of(operand, self.constants) for operand in cluster.operands}
        largest_dim = max((dim for operand in qparams for dim in shape_of(operand)), default=1)
        if not may_break_scale_limits(list(qparams.values()), qparams_of(cluster.quantize), largest_dim):
            return None
        ops: list[Op] = []
        cluster.lower({operand: self._ir_tensor(operand, given) for operand, given in qparams.items()}, ops)
        faults = [f"{op.kind.name}, which it becomes, {fault}." for op in ops if (fault := scale_fault(op))]
        return faults[0] if faults else None

    def _ir_tensor(self, operand: Node, qparams: QParams) -> Tensor:
        """Returns the IR tensor that a dequantize node reads."""
        source = first_operand(operand)
        data = self.constants.array(source)
        dtype = np.dtype(np.int8) if data is None else data.dtype
        return Tensor(tuple(operand.meta["val"].shape), dtype, qparams, data)

    def _qparams_rejection(self, cluster: Cluster) -> str | None:
        """Returns the message of the first rule for qparams that `cluster` breaks; None if it breaks none."""
        messages = (rule(cluster, self.constants, self.options) for rule in _QPARAMS_RULES)
        return next(filter(None, messages), None)


def _output_rejection(cluster: Cluster, _: Constants, __: CompileOptions) -> str | None:
    rule, output = cluster.output_rule, qparams_of(cluster.quantize)
    if not isinstance(rule, QParams) or rule == output:
        return None
    return (
        f"Its output has scale {output.scale[0]:.6g} and zero point {output.zero_point[0]}; the NPU returns "
        f"{rule.scale[0]:.6g} and {rule.zero_point[0]}."
    )


def _shared_qparams_rejection(cluster: Cluster, _: Constants, __: CompileOptions) -> str | None:
    output = qparams_of(cluster.quantize)
    if cluster.output_rule is not OutputRule.SHARED or all(qparams_of(node) == output for node in cluster.activations):
        return None
    return "It only moves values, so its inputs and output need equal scales and zero points, but they differ."


def _symmetry_rejection(cluster: Cluster, _: Constants, __: CompileOptions) -> str | None:
    for name in cluster.spec.symmetric:
        zero_points = [qparams_of(node).zero_point[0] for node in iterate_nodes(cluster.instance.args[name])]
        if any(zero_points):
            return f"Its input '{name}' has zero point {max(zero_points, key=abs)}; the NPU supports only 0."
    return None


def _weight_rejection(cluster: Cluster, constants: Constants, _: CompileOptions) -> str | None:
    weight, axis = cluster.weight_qparams(constants), cluster.spec.weight_axis
    if weight is None:
        return None
    if any(weight.zero_point) or weight.axis not in (None, axis):
        return f"Its weight must be symmetric, {'per tensor' if axis is None else 'per tensor or per output channel'}."
    if weight.axis is None:
        return None
    broken = cluster.spec.per_channel_rejections(cluster.instance, cluster.instance.generation)
    return f"The NPU takes its weight per channel only if: {' '.join(broken)}" if broken else None


def _flavor_rejection(cluster: Cluster, constants: Constants, options: CompileOptions) -> str | None:
    weight, flavor = cluster.weight_qparams(constants), options.neutron_converter_flavor
    if weight is None or weight.axis is None or takes_weights_per_channel(flavor):
        return None
    return (
        f"Its weight is quantized per channel. neutron_converter_flavor '{flavor}' supports only weights that are "
        "quantized per tensor; SDK_25_09 is the first that supports both. Quantize the weight per tensor with the "
        "quantizer's option weight_granularity or layers."
    )


def _bias_rejection(cluster: Cluster, constants: Constants, _: CompileOptions) -> str | None:
    weight = cluster.weight_qparams(constants)
    bias = cluster.instance.args[cluster.spec.bias] if cluster.spec.bias else None
    if weight is None or bias is None:
        return None
    if _is_accumulated(qparams_of(bias, constants), qparams_of(cluster.activations[0]), weight):
        return None
    return "Its bias needs zero point 0, and a scale that is the product of the scales of its input and its weight."


# In the order in which they are checked.
_QPARAMS_RULES: tuple[Callable[[Cluster, Constants, CompileOptions], str | None], ...] = (
    _output_rejection,
    _shared_qparams_rejection,
    _symmetry_rejection,
    _weight_rejection,
    _flavor_rejection,
    _bias_rejection,
)


def _is_accumulated(bias: QParams, inputs: QParams, weight: QParams) -> bool:
    """Whether a bias has zero point 0 and scales equal to input scale x weight scale, repeated for each group."""
    groups = 1 if weight.axis is None else len(bias.scale) // len(weight.scale)
    products = [inputs.scale[0] * scale for scale in weight.scale] * groups
    return (
        not any(bias.zero_point)
        and len(bias.scale) == len(products)
        and all(math.isclose(*pair, rel_tol=BIAS_SCALE_TOLERANCE) for pair in zip(bias.scale, products, strict=True))
    )


def is_int8(node: Node) -> bool:
    """Whether a quantize or dequantize node is int8, per tensor, with quant_max 127 and quant_min -128 or -127."""
    if "per_tensor" not in op_name(node) or len(node.args) < 6:
        return False
    # Symmetric weights exclude -128.
    return node.args[3:6] in ((-128, 127, torch.int8), (-127, 127, torch.int8))
