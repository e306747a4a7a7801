"""Passes over the edge program, with the names of ExecuTorch's NXP backend.

OpenNeutron compiles partitions before the edge program exists, so these passes change only CPU operators, and inputs
and outputs of the program.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from executorch.exir import EdgeProgramManager
from executorch.exir.dialects._ops import ops as edge
from executorch.exir.pass_base import ExportPass
from executorch.exir.pass_manager import PassManager
from executorch.exir.passes.fold_redundant_qdq_pass import FoldRedundantDequantizeQuantizePass
from executorch.exir.passes.quantize_io_pass import QuantizeInputs, QuantizeOutputs
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from openneutron.core.fx import iterate_nodes, op_name, output_node
from openneutron.ops import SPECS, Movement
from openneutron.partition.quantized_io import FloatIOWarning

__all__ = ["NeutronEdgePass", "NeutronEdgePassManager", "RemoveAdditionalQDQClustersPass", "RemoveIOQuantOpsPass"]

_QUANTIZE = edge.edge.quantized_decomposed.quantize_per_tensor.default
_DEQUANTIZE = edge.edge.quantized_decomposed.dequantize_per_tensor.default
# Operators that only move values, so their results in int8 and in float32 are equal.
_MOVING = {
    target for spec in SPECS if spec.facts.movement in (Movement.PERMUTE, Movement.JOIN) for target in spec.edge_targets
}
_ROUNDS = 10


class NeutronEdgePass(ExportPass):
    """A pass that runs until it changes nothing: `run(graph_module)` returns a `PassResult`."""

    def call(self, graph_module: GraphModule) -> PassResult:
        """Repeats `run` until it changes nothing, at most once for each node of the graph."""
        changed = False
        for _ in range(len(graph_module.graph.nodes)):
            result = self.run(graph_module)
            graph_module = result.graph_module
            if not result.modified:
                break
            changed = True
        graph_module.recompile()
        return PassResult(super().call(graph_module).graph_module, changed)

    def run(self, graph_module: GraphModule) -> PassResult:
        """Changes the graph once."""
        raise NotImplementedError


class NeutronEdgePassManager(PassManager):
    """Runs passes in their order until none changes anything, at most ten times.

    Without `passes`, it removes pairs of dequantize and quantize with equal qparams. OpenNeutron's partitioner replaces
    the other default passes of ExecuTorch's NXP backend.
    """

    def __init__(self, passes: Sequence[Any] | None = None) -> None:
        super().__init__(list(passes) if passes else [FoldRedundantDequantizeQuantizePass()], steps=_ROUNDS)


class RemoveAdditionalQDQClustersPass(NeutronEdgePass):
    """Lets permutes and concatenations on the CPU run in int8 if all operands have equal qparams. Linear in nodes."""

    def run(self, graph_module: GraphModule) -> PassResult:
        """Removes the dequantize and quantize around each such operator. Results do not change."""
        changed = False
        for node in list(graph_module.graph.nodes):
            qparams = _common_qparams(node) if op_name(node) in _MOVING else None
            if qparams is not None:
                _compute_in_int8(node)
                changed = True
        if changed:
            graph_module.graph.eliminate_dead_code()
            graph_module.recompile()
        return PassResult(graph_module, changed)


def _common_qparams(node: Node) -> tuple[Any, ...] | None:
    """Returns the qparams of all inputs and outputs of `node`; None if they differ."""
    sources, readers = list(iterate_nodes(node.args[0])), list(node.users)
    if not readers or any(source.target is not _DEQUANTIZE for source in sources):
        return None
    if any(reader.target is not _QUANTIZE for reader in readers):
        return None
    found = {other.args[1:] for other in (*sources, *readers)}
    return found.pop() if len(found) == 1 else None


def _compute_in_int8(node: Node) -> None:
    for source in set(iterate_nodes(node.args[0])):
        node.replace_input_with(source, source.args[0])  # type: ignore[arg-type]
    for reader in list(node.users):
        node.meta["val"] = reader.meta["val"]
        reader.replace_all_uses_with(node)
        node.graph.erase_node(reader)


class RemoveIOQuantOpsPass(ExportPass):
    """Makes quantized inputs and outputs of the program int8; their qparams become methods of the `.pte`.

    Inputs whose only reader is not a quantize, and outputs computed in float, remain float; a `FloatIOWarning` lists
    them. In the documented flow, `openneutron.int8_io` does the same before lowering.
    """

    def __init__(self, edge_program_manager: EdgeProgramManager) -> None:
        super().__init__()
        self.manager = edge_program_manager

    def call(self, graph_module: GraphModule) -> PassResult:
        """Removes each quantize after an input and each dequantize before an output."""
        program = self.manager.exported_program()
        nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
        inputs = [nodes.get(str(name)) for name in program.graph_signature.user_inputs]
        returned: Any = output_node(program.graph).args[0]
        taken = [index for index, node in enumerate(inputs) if node is not None and _is_quantized_alone(node)]
        given = [index for index, node in enumerate(returned) if getattr(node, "target", None) is _DEQUANTIZE]
        left = [
            f"input {index}, '{node.name}'"
            for index, node in enumerate(inputs)
            if node and _is_float(node, index, taken)
        ]
        left += [
            f"output {index}, {op_name(node)}" for index, node in enumerate(returned) if _is_float(node, index, given)
        ]
        if left:
            warnings.warn(f"These remain float: {'; '.join(left)}.", FloatIOWarning, stacklevel=2)
        QuantizeInputs(self.manager, taken).call(graph_module)
        QuantizeOutputs(self.manager, given).call(graph_module)
        return PassResult(graph_module, True)


def _is_quantized_alone(node: Node) -> bool:
    """Whether a single quantize node is the only reader of an input."""
    readers = list(node.users)
    return len(readers) == 1 and readers[0].target is _QUANTIZE


def _is_float(node: Any, index: int, changed: Sequence[int]) -> bool:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return index not in changed and isinstance(value, torch.Tensor) and value.dtype == torch.float32
