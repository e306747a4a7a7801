"""The backend that ExecuTorch calls for each tagged partition."""

from __future__ import annotations

from dataclasses import replace

from executorch.exir.backend.backend_details import BackendDetails, CompileSpec, PreprocessResult
from torch.export import ExportedProgram

from openneutron.compile_spec import CompileOptions
from openneutron.errors import ModelError
from openneutron.formats.payload import pack_device, pack_portable, parse
from openneutron.formats.tflite.outputs import with_fewer_outputs
from openneutron.partition.delegate_call import is_delegate_call, is_trace, output_indices

__all__ = ["NeutronBackend"]


class NeutronBackend(BackendDetails):
    """ExecuTorch's backend interface: returns the payload of a partition.

    ExecuTorch calls it in `to_edge_transform_and_lower`; `NeutronPartitioner` puts its name into the delegation spec.
    """

    @staticmethod
    def preprocess(edge_program: ExportedProgram, compile_specs: list[CompileSpec]) -> PreprocessResult:
        """Returns the payload of a partition, with the input and output maps of the delegate call in `edge_program`.

        Outputs that have no reader after ExecuTorch's decompositions are removed. With profiling, the result also maps
        each kernel of the NPU to the debug handles of the operators that it computes. Raises `OptionError` for
        invalid `compile_specs`, and `ModelError` if an output has no reader but the microcode of a device payload
        returns it.
        """
        CompileOptions.from_specs(compile_specs)
        (node,) = (node for node in edge_program.graph.nodes if is_delegate_call(node))
        inputs, payload, _ = node.args
        signature = edge_program.graph_signature
        called_with = {name: index for index, name in enumerate(signature.user_inputs)}
        numbers = {output.name: number for output, number in output_indices(node).items()}
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
    """Returns the debug handles of each kernel's operators, by the kernel's number in the NPU's profile.

    The last number stands for the NPU's own write of the profile, which has no debug handles.
    """
    handles: dict[int, tuple[int, ...]] = {}
    for node in filter(is_trace, edge_program.graph.nodes):
        _, _, kernels, count = node.args
        for kernel in range(count + 1):
            known = handles.setdefault(kernel, ())
            if kernel in kernels:
                handles[kernel] = (*known, node.meta["debug_handle"])
    return handles
