"""Files before and after NXP's converter, for tests of the payload and of facts about targets."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from ai_edge_litert import schema_py_generated as schema  # noqa: TID251  tests read the vendor's files

Blocks = tuple[bytes, bytes, bytes]
Filters = npt.NDArray[np.int8]


def neutron_graphs(tflite: bytes) -> list[Blocks]:
    """Returns microcode, weights and kernels of each NeutronGraph: the last three inputs of the custom operator."""
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


def _builtin(code: schema.OperatorCodeT) -> int:
    """Returns the number of the operator. Old files have it in an older field only."""
    return int(max(code.builtinCode, code.deprecatedBuiltinCode))


def pointwise_filters(tflite: bytes) -> list[Filters]:
    """Returns the weights [outputs, inputs] of each 1x1 convolution of a file before conversion."""
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(tflite))
    graph = model.subgraphs[0]
    found = []
    for operator in graph.operators:
        if _builtin(model.operatorCodes[operator.opcodeIndex]) == schema.BuiltinOperator.CONV_2D:
            weight = graph.tensors[operator.inputs[1]]
            outputs, height, width, inputs = weight.shape
            if height == width == 1:
                data = bytes(model.buffers[weight.buffer].data)
                found.append(np.frombuffer(data, np.int8).reshape(outputs, inputs))
    return found


def operators_outside(tflite: bytes) -> list[tuple[str, tuple[int, ...]]]:
    """Returns the operators that a converted file leaves to the CPU: the name and output shape of each."""
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(tflite))
    graph = model.subgraphs[0]
    names = {code: name for name, code in vars(schema.BuiltinOperator).items() if isinstance(code, int)}
    codes = [(names[_builtin(code)], code.customCode) for code in model.operatorCodes]
    return [
        (codes[operator.opcodeIndex][0], tuple(map(int, graph.tensors[operator.outputs[0]].shape)))
        for operator in graph.operators
        if codes[operator.opcodeIndex][1] != b"NeutronGraph"
    ]
