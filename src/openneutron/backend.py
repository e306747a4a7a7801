"""The backend as ExecuTorch sees it, and the compilation of one partition."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import TYPE_CHECKING

from executorch.exir.backend.backend_details import BackendDetails, CompileSpec, PreprocessResult
from torch.export import ExportedProgram

from openneutron import tflite
from openneutron.compile_spec import CompileOptions
from openneutron.ir.build import build, is_channels_last, optimize
from openneutron.ir.graph import Graph, QParams
from openneutron.ir.rewrites import copy_unwritten_outputs, hoist_format_conversions
from openneutron.ir.verify import verify
from openneutron.payload import PayloadHeader, pack_device, pack_portable, parse

if TYPE_CHECKING:
    from openneutron.partition.levels import Partition

__all__ = ["NeutronBackend", "compile_partition", "lower_partition"]


def lower_partition(program: ExportedProgram, partition: Partition) -> Graph:
    """The optimized IR of a partition."""
    from openneutron.partition.clusters import Constants, qparams_of

    constants = Constants(program)
    qparams: dict[object, QParams] = {}
    for cluster in partition.clusters:
        for operand in cluster.operands:
            qparams.setdefault(operand.args[0], qparams_of(operand, constants))
    return optimize(
        build(
            partition.clusters,
            {node: qparams[node] for node in partition.inputs},
            partition.outputs,
            constants.array,
            lambda node: qparams_of(node, constants),
        )
    )


def compile_partition(program: ExportedProgram, partition: Partition, options: CompileOptions) -> bytes:
    """The delegate payload of a partition: its TFLite model, which the host runs and the vendor's converter takes."""
    graph = lower_partition(program, partition)
    input_formats = tuple(is_channels_last(node) for node in partition.inputs)
    output_formats = tuple(is_channels_last(node) for node in partition.outputs)
    if not options.use_neutron_for_format_conversion:
        graph, hoisted_inputs, hoisted_outputs = hoist_format_conversions(graph)
        input_formats = tuple(map(operator.or_, input_formats, hoisted_inputs))
        output_formats = tuple(map(operator.or_, output_formats, hoisted_outputs))
        graph = copy_unwritten_outputs(graph)
    model = tflite.write(verify(graph, "hoist_format_conversions"))
    header = PayloadHeader(
        input_formats=tuple(map(int, input_formats)),
        output_formats=tuple(map(int, output_formats)),
        input_map=tuple(range(len(partition.inputs))),
        output_map=tuple(range(len(partition.outputs))),
        argument_count=len(partition.inputs),
    )
    return pack_portable(header, model)


class NeutronBackend(BackendDetails):
    """ExecuTorch's entry: takes a tagged partition, returns its payload."""

    @staticmethod
    def preprocess(edge_program: ExportedProgram, compile_specs: list[CompileSpec]) -> PreprocessResult:
        """The payload that the partition carries, its maps set to the order in which the delegate is called."""
        from openneutron.partition.opaque import is_opaque

        CompileOptions.from_specs(compile_specs)
        (node,) = (node for node in edge_program.graph.nodes if is_opaque(node))
        inputs, payload, _ = node.args
        signature = edge_program.graph_signature
        called_with = {name: index for index, name in enumerate(signature.user_inputs)}
        items = {user.name: user.args[1] for user in node.users if user.target is operator.getitem}
        output_position = {items[name]: index for index, name in enumerate(signature.user_outputs)}
        data = edge_program.constants[signature.inputs_to_lifted_tensor_constants[payload.name]]
        parsed = parse(data.numpy().tobytes())
        header = replace(
            parsed.header,
            input_map=tuple(called_with[value.name] for value in inputs),
            output_map=tuple(output_position[index] for index in range(len(items))),
            argument_count=len(called_with),
        )
        if parsed.is_portable:
            blob = pack_portable(header, parsed.tflite)
        else:
            blob = pack_device(header, parsed.microcode, parsed.weights, parsed.kernels)
        return PreprocessResult(processed_bytes=blob, debug_handle_map={})
