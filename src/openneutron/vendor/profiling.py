"""Which operators of a partition each kernel on the NPU computes, read from what the vendor's converter prints.

With `useProfiling`, the NPU times its kernels one by one, and numbers them in the order in which they run. What they
compute, the converter prints when it is asked for its graphs (`dumpAfterImport`, `dumpAfterGenerate`, `verbose`): the
NPU's operators in their order with their kernels, and each one's own graph with the names of the model's tensors, as
they are or with "/" and something behind. With `use_profiling`, the TFLite file that the converter gets names the
output of each operator by the node that it comes from.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from openneutron.formats import tflite

__all__ = ["Kernel", "kernels_of", "node_of"]

_GRAPHS = "Graphs:"
_EXTRACTED, _GENERATED = "= Extract Graphs =", "Generate code for NeutronGraph"
_OPERATOR = re.compile(r'NeutronOperator\s+"subgraph_(\d+)":')
_SUBGRAPH = re.compile(r"Name:\s+subgraph_(\d+)")
_NODE = re.compile(r"Type:\s+\w+\s+Inputs:(?P<inputs>.*?)Outputs:(?P<outputs>.*?)Location:\s+\d+", re.DOTALL)
_TENSOR = re.compile(r"\[\d+\]:\s+(\S+)")
_NAME = re.compile(r"(.+)\.t\d+")


@dataclass(frozen=True)
class Kernel:
    """A kernel on the NPU, in the order in which they run; `nodes` are names of the nodes of the quantized graph."""

    name: str
    """The vendor's name of it."""
    nodes: tuple[str, ...]
    """What it computes, or a part of what it computes; empty where the converter's text does not say."""


@dataclass(frozen=True)
class _Part:
    """A node of an NPU operator's own graph: the names of the model's tensors that it reads and writes."""

    inputs: frozenset[str]
    outputs: frozenset[str]


def node_of(tensor: str) -> str | None:
    """The node that a tensor of our TFLite files is named by; None where it has no such name."""
    found = _NAME.fullmatch(tensor)
    return found[1] if found else None


def kernels_of(log: str, model: bytes) -> tuple[Kernel, ...]:
    """The NPU's kernels of a converted partition; `model` is its TFLite file before, `log` what the converter printed.

    Empty where the converter printed no graphs. Linear in the text, and in kernels times operators.
    """
    imported, _, generated = log.partition(_GRAPHS)[2].partition(_GRAPHS)
    listed = imported.partition(_EXTRACTED)[2].partition(_GENERATED)[0]
    parts = {number: list(_parts(text)) for number, text in _sections(_SUBGRAPH, generated)}
    operators = [operator for graph in tflite.read(model).subgraphs for operator in graph.operators]
    written = {tensor.name for operator in operators for tensor in operator.outputs}
    return tuple(
        Kernel(name, _nodes(parts.get(number, []), operators, written))
        for number, text in _sections(_OPERATOR, listed)
        for name in _kernel_names(text)
    )


def _sections(heading: re.Pattern[str], text: str) -> Iterator[tuple[int, str]]:
    """The number in each heading, and the text up to the next one."""
    pieces = heading.split(text)[1:]
    for number, section in zip(pieces[::2], pieces[1::2], strict=True):
        yield int(number), section


def _kernel_names(text: str) -> Iterator[str]:
    """The lines below "Kernels:", up to an empty one or a heading."""
    for line in text.partition("Kernels:")[2].lstrip().splitlines():
        name = line.strip()
        if not name or name.startswith("="):
            return
        yield name


def _parts(text: str) -> Iterator[_Part]:
    for node in _NODE.finditer(text):
        inputs, outputs = (
            frozenset(name.partition("/")[0] for name in _TENSOR.findall(node[side])) for side in ("inputs", "outputs")
        )
        yield _Part(inputs, outputs)


def _nodes(parts: Sequence[_Part], operators: Sequence[tflite.Operator], written: set[str]) -> tuple[str, ...]:
    computed = (operator for operator in operators if any(_computes(part, operator, written) for part in parts))
    nodes = (node_of(operator.outputs[0].name) for operator in computed if operator.outputs)
    return tuple(dict.fromkeys(node for node in nodes if node is not None))


def _computes(part: _Part, operator: tflite.Operator, written: set[str]) -> bool:
    """By what it writes; or, where that is no tensor of the model, by reading all that the operator reads."""
    outputs = {tensor.name for tensor in operator.outputs}
    inputs = {tensor.name for tensor in operator.inputs if tensor is not None}
    return bool(outputs & part.outputs) or (not part.outputs & written and inputs <= part.inputs)
