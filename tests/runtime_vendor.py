"""The NeutronGraph operators of a file that NXP's converter wrote, for the tests of the payload."""

from __future__ import annotations

from ai_edge_litert import schema_py_generated as schema  # noqa: TID251  a test of the payload reads the vendor's files

Blocks = tuple[bytes, bytes, bytes]


def neutron_graphs(tflite: bytes) -> list[Blocks]:
    """Microcode, weights and kernels of each NeutronGraph: the last three inputs of the custom operator."""
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(tflite))
    graph = model.subgraphs[0]
    codes = [code.customCode for code in model.operatorCodes]
    found = []
    for operator in graph.operators:
        if codes[operator.opcodeIndex] == b"NeutronGraph":
            buffers = [model.buffers[graph.tensors[tensor].buffer] for tensor in operator.inputs[-3:]]
            microcode, weights, kernels = (bytes(buffer.data) for buffer in buffers)
            found.append((microcode, weights, kernels))
    assert found, "the file has no NeutronGraph"
    return found
