"""The converter: takes a TFLite model as a list of integers, and returns one with NeutronGraph operators.

`NEUTRON_DOUBLE` is a word, or several separated by colons. "answer:FILE" returns the file. "version1", "reversed" and
"outside" change the result. "crash", "exit", "hang", "raise", "memory", "garbage" and "empty" are failures. Without it,
the result is as the documents describe.
"""

import os
import signal
import struct
import sys
import time
from pathlib import Path
from typing import Any

from ai_edge_litert import schema_py_generated as schema  # noqa: TID251
from flatbuffers import Builder  # noqa: TID251

from eiq_neutron_sdk.neutron_library_utils import Target

MAGIC = 0x64434D6E


class CompilationOptions:
    def __init__(self) -> None:
        self.minNumOpsPerGraph = 1
        self.excludeGraphPasses = ""
        self.fetchConstantsToSRAM = False
        self.dumpKernelSelectionCode = False
        self.useProfiling = False
        self.dumpAfterImport = ""
        self.dumpAfterGenerate = ""
        self.verbose = False


class CompilationContext:
    def __init__(self) -> None:
        self.targetOpts: Any = None
        self.compilationOpts = CompilationOptions()


def getNeutronTarget(name: str) -> Target:  # noqa: N802
    return Target(name)


def convertModel(model: list[int], context: CompilationContext) -> list[int]:  # noqa: N802
    print(f"converting {len(model)} bytes for {context.targetOpts.name}", flush=True)
    words = os.environ.get("NEUTRON_DOUBLE", "").split(":")
    count = os.environ.get("NEUTRON_DOUBLE_COUNT")
    if count:
        with Path(count).open("a") as file:
            file.write("run\n")
    if "crash" in words:
        os.kill(os.getpid(), signal.SIGSEGV)
    if "exit" in words:
        print("error: unsupported operator", file=sys.stderr, flush=True)
        os._exit(3)
    if "hang" in words:
        time.sleep(600)
    if "raise" in words:
        raise RuntimeError("no kernel for CONV_2D")
    if "memory" in words:
        raise MemoryError
    if "garbage" in words:
        return [1, 2, 3, 4] * 10
    if "empty" in words:
        return []
    if context.compilationOpts.dumpKernelSelectionCode:
        Path("_kernel_selection.c").write_text(f"// kernels of {len(model)} bytes\n")
    if words[0] == "answer":
        return list(Path(words[1]).read_bytes())
    if context.compilationOpts.dumpAfterGenerate == "console" and context.compilationOpts.verbose:
        _print_graphs(bytes(model))
    return list(_convert(bytes(model), words))


def _print_graphs(data: bytes) -> None:
    """Prints graphs in the form that ExecuTorch's reader expects. A convolution takes two kernels."""
    (graph,) = schema.ModelT.InitFromPackedBuf(data, 0).subgraphs
    codes = schema.ModelT.InitFromPackedBuf(data, 0).operatorCodes
    names = [tensor.name.decode() for tensor in graph.tensors]
    kinds = {value: name for name, value in vars(schema.BuiltinOperator).items() if isinstance(value, int)}
    nodes = [
        (kinds[codes[node.opcodeIndex].builtinCode], [names[i] for i in node.inputs], [names[i] for i in node.outputs])
        for node in graph.operators
    ]
    print("= Import Graph =\nGraphs:\nName: main")
    for number, node in enumerate(nodes):
        _print_node(number, *node)
    print('= Optimize Graph =\n= Extract Graphs =\nNeutronGraph "subgraph_900":')
    for number, (kind, _, _) in enumerate(nodes):
        print(f'NeutronOperator "subgraph_{number:03}":\n    Operators:\n        {kind}\n    Kernels:')
        print("        Pad\n        Conv2DStandardV2" if kind == "CONV_2D" else f"        {kind.title()}")
    print("= Generate Code =\nGenerate code for NeutronGraph\nGraphs:")
    for number, node in enumerate(nodes):
        print(f"Name: subgraph_{number:03}")
        _print_names(node[1], node[2])
        print("Tensors:\nOperators:")
        _print_node(0, *node)
    print("Name: subgraph_900")
    _print_names([names[i] for i in graph.inputs], [names[i] for i in graph.outputs])
    print('Tensors:\nStatistics for NeutronGraph "subgraph_900":', flush=True)


def _print_node(location: int, kind: str, inputs: list[str], outputs: list[str]) -> None:
    print(f"Type: {kind}")
    _print_names(inputs, outputs)
    print(f"Location: {location}")


def _print_names(inputs: list[str], outputs: list[str]) -> None:
    for side, names in (("Inputs", inputs), ("Outputs", outputs)):
        print(f"{side}:", *(f"  [{number}]: {name}" for number, name in enumerate(names)), sep="\n")


def _convert(data: bytes, words: list[str]) -> bytes:
    model = schema.ModelT.InitFromPackedBuf(data, 0)
    (graph,) = model.subgraphs
    count = len(graph.operators)
    version = 1 if "version1" in words else 0
    inputs, outputs = list(graph.inputs), list(graph.outputs)
    if "reversed" in words:
        inputs, outputs = inputs[::-1], outputs[::-1]
    weights = b"".join(bytes(buffer.data) for buffer in model.buffers if buffer.data is not None and len(buffer.data))
    microcode = _microcode(len(inputs), len(outputs), len(weights), count, version)
    kept = sorted({*inputs, *outputs})
    place = {old: new for new, old in enumerate(kept)}
    result = schema.ModelT()
    result.version = 3
    result.description = "the double"
    result.buffers = [schema.BufferT() for _ in range(4)]
    tensors = [graph.tensors[index] for index in kept]
    for tensor in tensors:
        tensor.buffer = 0
    constants = []
    for number, block in enumerate((microcode, weights, b"\0"), 1):
        result.buffers[number].data = list(block)
        constants.append(_bytes(f"constant{number}", len(block), number))
    scratch = [_bytes(f"scratch{number}", 64, 0) for number in range(3 if version else 1)]
    node = schema.OperatorT()
    node.opcodeIndex = 0
    first = len(tensors)
    node.inputs = [*(place[index] for index in inputs), first, first + 1, first + 2]
    node.outputs = [*(place[index] for index in outputs), *range(first + 3, first + 3 + len(scratch))]
    subgraph = schema.SubGraphT()
    subgraph.tensors = [*tensors, *constants, *scratch]
    subgraph.inputs = [place[index] for index in graph.inputs]
    subgraph.outputs = [place[index] for index in graph.outputs]
    subgraph.operators = [node]
    code = schema.OperatorCodeT()
    code.builtinCode = schema.BuiltinOperator.CUSTOM
    code.deprecatedBuiltinCode = schema.BuiltinOperator.CUSTOM
    code.customCode = "NeutronGraph"
    result.operatorCodes = [code]
    if "outside" in words:
        left = schema.OperatorT()
        left.opcodeIndex = 1
        left.inputs, left.outputs = subgraph.outputs[:1], subgraph.outputs[:1]
        other = schema.OperatorCodeT()
        other.builtinCode = other.deprecatedBuiltinCode = schema.BuiltinOperator.SOFTMAX
        result.operatorCodes.append(other)
        subgraph.operators.append(left)
    result.subgraphs = [subgraph]
    builder = Builder(1024)
    builder.Finish(result.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())


def _bytes(name: str, size: int, buffer: int) -> Any:
    tensor = schema.TensorT()
    tensor.name, tensor.shape, tensor.type, tensor.buffer = name, [size], schema.TensorType.UINT8, buffer
    return tensor


def _microcode(inputs: int, outputs: int, weights: int, operators: int, version: int) -> bytes:
    size = 64 + 4 * operators + 2
    words = [0] * 16
    words[0], words[1], words[6], words[7], words[8], words[9] = MAGIC, 0x1C933F1B, size, weights, 1, 64
    if version:
        words[10], words[11], words[13], words[14], words[15] = 128, 32, inputs, outputs, operators
    else:
        words[11], words[12], words[13] = inputs, outputs, operators
    return struct.pack("<16I", *words).ljust(size, b"m")
