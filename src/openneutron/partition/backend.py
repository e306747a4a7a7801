"""The backend as ExecuTorch sees it."""

from __future__ import annotations

from dataclasses import replace

from executorch.exir.backend.backend_details import BackendDetails, CompileSpec, PreprocessResult
from torch.export import ExportedProgram

from openneutron.compile_spec import CompileOptions
from openneutron.errors import ModelError
from openneutron.formats.payload import pack_device, pack_portable, parse
from openneutron.formats.tflite.outputs import with_fewer_outputs
from openneutron.partition.delegate_call import is_delegate_call, is_trace, outputs_by_node

__all__ = ["NeutronBackend"]


class NeutronBackend(BackendDetails):
    """ExecuTorch's entry: takes a tagged partition, returns its payload."""

    @staticmethod
    def preprocess(edge_program: ExportedProgram, compile_specs: list[CompileSpec]) -> PreprocessResult:
        """The payload that the partition carries, its maps set to the order in which the delegate is called.

        An output that ExecuTorch's decompositions left without a reader is left out. Profiled, the payload comes with
        the debug handles of what each kernel on the NPU computes.
        """
        CompileOptions.from_specs(compile_specs)
        (node,) = (node for node in edge_program.graph.nodes if is_delegate_call(node))
        inputs, payload, _ = node.args
        signature = edge_program.graph_signature
        called_with = {name: index for index, name in enumerate(signature.user_inputs)}
        numbers = {output.name: number for output, number in outputs_by_node(node).items()}
        output_position = {numbers[name]: index for index, name in enumerate(signature.user_outputs)}
        data = edge_program.constants[signature.inputs_to_lifted_tensor_constants[payload.name]]
        given = data.numpy().tobytes()
        parsed = parse(given)
        needed = [i for i, index in enumerate(parsed.header.output_map) if index in output_position]
        header = replace(
            parsed.header,
            input_map=tuple(called_with[inputs[index].name] for index in parsed.header.input_map),
            output_map=tuple(output_position[parsed.header.output_map[i]] for i in needed),
            output_formats=tuple(parsed.header.output_formats[i] for i in needed),
            argument_count=len(called_with),
        )
        all_needed = len(needed) == len(parsed.header.output_map)
        if header == parsed.header:
            blob = given
        elif parsed.is_portable:
            blob = pack_portable(header, parsed.tflite if all_needed else with_fewer_outputs(parsed.tflite, needed))
        elif all_needed:
            blob = pack_device(header, parsed.microcode, parsed.weights, parsed.kernels)
        else:
            raise ModelError(
                "A CPU operator reads only the shape of a partition's output. ExecuTorch drops that output, which the "
                "partition's microcode still returns. Compute the shape from an input of the model, or lower with "
                'payload="portable" and compile the .pte afterwards.',
                node=node.name,
            )
        return PreprocessResult(processed_bytes=blob, debug_handle_map=_debug_handles(edge_program))


def _debug_handles(edge_program: ExportedProgram) -> dict[int, tuple[int, ...]]:
    """By the numbers under which the NPU's profile has its kernels; the last stands for writing the profile itself."""
    handles: dict[int, tuple[int, ...]] = {}
    for node in filter(is_trace, edge_program.graph.nodes):
        _, _, kernels, count = node.args
        for kernel in range(count + 1):
            known = handles.setdefault(kernel, ())
            if kernel in kernels:
                handles[kernel] = (*known, node.meta["debug_handle"])
    return handles
