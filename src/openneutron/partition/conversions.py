"""Rejects models that were converted with an unsupported option of `convert_pt2e`."""

from __future__ import annotations

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Graph, Node

from openneutron.core.boundary import error_at
from openneutron.core.fx import arguments, is_pure, is_quantize, op_name, source_of
from openneutron.errors import OptionError

__all__ = ["check_constants_are_quantized", "check_quantize_is_an_operator"]

_CONSTANTS = {InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR}


def check_constants_are_quantized(program: ExportedProgram) -> None:
    """Raises `OptionError` if the program quantizes a constant at run time. Linear in nodes.

    `convert_pt2e(..., fold_quantize=False)` returns such programs. A buffer that the program writes is not a constant.
    """
    signature = program.graph_signature
    constants = {
        spec.arg.name
        for spec in signature.input_specs
        if spec.kind in _CONSTANTS and spec.target not in signature.buffers_to_mutate.values()
    }
    computed: set[Node] = set()
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in constants:
            computed.add(node)
        elif is_quantize(node) and node.args[0] in computed:
            raise OptionError(
                "This constant would be quantized each time the program runs, on the CPU: the model was converted with "
                "fold_quantize=False. Call convert_pt2e(prepared) without that option.",
                node=node.name,
                op=op_name(node),
                source=source_of(next(iter(node.users), node)),
            )
        elif is_pure(node) and node.all_input_nodes and computed.issuperset(node.all_input_nodes):
            computed.add(node)


def check_quantize_is_an_operator(graph: Graph) -> None:
    """Raises `OptionError` if quantize and dequantize are written as integer arithmetic. Linear in nodes.

    `convert_pt2e(..., use_reference_representation=True)` returns such graphs.
    """
    for node in graph.nodes:
        if _is_written_out_quantize(node) or node.target is torch.ops.higher_order.out_dtype:
            raise error_at(
                node,
                "The model was converted with use_reference_representation=True, which writes quantize and dequantize "
                "as integer arithmetic. OpenNeutron cannot recognize quantized operators in it. Call "
                "convert_pt2e(prepared) without that option.",
                OptionError,
            )


def _is_written_out_quantize(node: Node) -> bool:
    """Whether `node` ends this chain of operators: round, to (int32), add, clamp, to (int8 or uint8)."""
    found: object = node
    for packet in ("to", "clamp", "add", "to", "round"):  # torchao calls the packets, without overloads
        if not isinstance(found, Node) or str(found.target).split(".")[:2] != ["aten", packet]:
            return False
        found = next(iter(found.all_input_nodes), None)
    return arguments(node)["dtype"] in (torch.int8, torch.uint8)
