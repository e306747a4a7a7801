"""Passes over the edge program, by the names that scripts for ExecuTorch's NXP backend use.

Partitions are compiled before there is an edge program, so these passes change only CPU operators, and the inputs and
outputs of the program.
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
# Operators that copy values, and so compute the same in int8 as in float32.
_MOVING = {
    target for spec in SPECS if spec.facts.movement in (Movement.PERMUTE, Movement.JOIN) for target in spec.edge_targets
}
_ROUNDS = 10


class NeutronEdgePass(ExportPass):
    """A pass that runs until it changes nothing: `run(graph_module)` returns a `PassResult`."""

    def call(self, graph_module: GraphModule) -> PassResult:
        """Repeat `run`, at most as often as the graph has nodes."""
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
        """Change the graph once."""
        raise NotImplementedError


class NeutronEdgePassManager(PassManager):
    """Runs passes in their order until none changes anything, at most ten times.

    Without `passes`, it removes pairs of dequantize and quantize with equal qparams. OpenNeutron's partitioner does the
    work of the other default passes of ExecuTorch's NXP backend.
    """

    def __init__(self, passes: Sequence[Any] | None = None) -> None:
        super().__init__(list(passes) if passes else [FoldRedundantDequantizeQuantizePass()], steps=_ROUNDS)


class RemoveAdditionalQDQClustersPass(NeutronEdgePass):
    """Makes CPU permutes and concatenations compute in int8 if all operands have equal qparams. Linear in nodes."""

    def run(self, graph_module: GraphModule) -> PassResult:
        """Remove the dequantize and quantize around each such operator, which changes no result."""
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
    """The qparams that all inputs and outputs of `node` share; None if they differ."""
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

    Inputs with another reader than one quantize, and outputs that are computed in float, stay in float: a
    `FloatIOWarning` lists them. In the documented flow `openneutron.int8_io` does the same before the program is
    lowered.
    """

    def __init__(self, edge_program_manager: EdgeProgramManager) -> None:
        super().__init__()
        self.manager = edge_program_manager

    def call(self, graph_module: GraphModule) -> PassResult:
        """Remove quantize behind inputs and dequantize in front of outputs."""
        program = self.manager.exported_program()
        nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
        inputs = [nodes.get(str(name)) for name in program.graph_signature.user_inputs]
        returned: Any = output_node(program.graph).args[0]
        taken = [index for index, node in enumerate(inputs) if node is not None and _is_quantized_alone(node)]
        given = [index for index, node in enumerate(returned) if getattr(node, "target", None) is _DEQUANTIZE]
        left = [
            f"input {index}, '{node.name}'" for index, node in enumerate(inputs) if node and _stays(node, index, taken)
        ]
        left += [
            f"output {index}, {op_name(node)}" for index, node in enumerate(returned) if _stays(node, index, given)
        ]
        if left:
            warnings.warn(f"These stay in float: {'; '.join(left)}.", FloatIOWarning, stacklevel=2)
        QuantizeInputs(self.manager, taken).call(graph_module)
        QuantizeOutputs(self.manager, given).call(graph_module)
        return PassResult(graph_module, True)


def _is_quantized_alone(node: Node) -> bool:
    """Whether a single quantize node is the only reader of an input."""
    readers = list(node.users)
    return len(readers) == 1 and readers[0].target is _QUANTIZE


def _stays(node: Any, index: int, changed: Sequence[int]) -> bool:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return index not in changed and isinstance(value, torch.Tensor) and value.dtype == torch.float32
