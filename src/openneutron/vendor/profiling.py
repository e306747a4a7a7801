"""Maps the NPU's kernels to the operators that they compute. Parses the text that the vendor's converter prints.

With `useProfiling`, the NPU measures the time of each kernel and numbers the kernels in order of execution. With the
flags `dumpAfterImport`, `dumpAfterGenerate` and `verbose`, the converter prints its graphs: the NPU's operators in
order with their kernels, and the graph of each operator with the names of the model's tensors. It may append "/" and a
suffix to a name. With `use_profiling`, OpenNeutron's TFLite files name the output of each operator after the graph node
that the operator came from.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from openneutron.formats import tflite

__all__ = ["Kernel", "kernels_of", "node_of"]

_GRAPHS = "Graphs:"
_EXTRACTED, _GENERATED = "= Extract Graphs =", "Generate code for NeutronGraph"
_OPERATOR = re.compile(r'NeutronOperator\s+"subgraph_(\d{1,9})":')
_SUBGRAPH = re.compile(r"Name:\s+subgraph_(\d{1,9})\b")
_NODE = re.compile(r"Type:\s+\w+\s+Inputs:(?P<inputs>.*?)Outputs:(?P<outputs>.*?)Location:\s+\d+", re.DOTALL)
_TENSOR = re.compile(r"\[\d+\]:\s+(\S+)")
_NAME = re.compile(r"(.+)\.t\d+")


@dataclass(frozen=True)
class Kernel:
    """A kernel of the NPU. `nodes` are the names of the quantized graph's nodes that it computes."""

    name: str
    """The vendor's name of the kernel."""
    nodes: tuple[str, ...]
    """All or some of the nodes that the kernel computes; empty if the converter's text does not name any."""


@dataclass(frozen=True)
class _Part:
    """A node in the graph of an NPU operator: the names of the model's tensors that it reads and writes."""

    inputs: frozenset[str]
    outputs: frozenset[str]


def node_of(tensor: str) -> str | None:
    """Returns the graph node in the name of a tensor of our TFLite files; None if the name contains no node."""
    found = _NAME.fullmatch(tensor)
    return found[1] if found else None


def kernels_of(log: str, model: bytes) -> tuple[Kernel, ...]:
    """Returns the NPU's kernels of a converted partition, in order of execution.

    `model` is the TFLite file before conversion, `log` is the converter's output. Returns an empty tuple if the log has
    no graphs. Time is linear in the text, and in kernels times operators.
    """
    imported, _, generated = log.partition(_GRAPHS)[2].partition(_GRAPHS)
    listed = imported.partition(_EXTRACTED)[2].partition(_GENERATED)[0]
    parts = {number: list(_parse_parts(text)) for number, text in _split_sections(_SUBGRAPH, generated)}
    operators = [operator for graph in tflite.read(model).subgraphs for operator in graph.operators]
    written = {tensor.name for operator in operators for tensor in operator.outputs}
    return tuple(
        Kernel(name, _nodes_of_parts(parts.get(number, []), operators, written))
        for number, text in _split_sections(_OPERATOR, listed)
        for name in _kernel_names(text)
    )


def _split_sections(heading: re.Pattern[str], text: str) -> Iterator[tuple[int, str]]:
    """Returns the number in each heading, with the text up to the next heading."""
    pieces = heading.split(text)[1:]
    for number, section in zip(pieces[::2], pieces[1::2], strict=True):
        yield int(number), section


def _kernel_names(text: str) -> Iterator[str]:
    """Returns the lines below "Kernels:", up to an empty line or a heading."""
    for line in text.partition("Kernels:")[2].lstrip().splitlines():
        name = line.strip()
        if not name or name.startswith("="):
            return
        yield name


def _parse_parts(text: str) -> Iterator[_Part]:
    for node in _NODE.finditer(text):
        inputs, outputs = (
            frozenset(name.partition("/")[0] for name in _TENSOR.findall(node[side])) for side in ("inputs", "outputs")
        )
        yield _Part(inputs, outputs)


def _nodes_of_parts(parts: Sequence[_Part], operators: Sequence[tflite.Operator], written: set[str]) -> tuple[str, ...]:
    computed = (operator for operator in operators if any(_computes(part, operator, written) for part in parts))
    nodes = (node_of(operator.outputs[0].name) for operator in computed if operator.outputs)
    return tuple(dict.fromkeys(node for node in nodes if node is not None))


def _computes(part: _Part, operator: tflite.Operator, written: set[str]) -> bool:
    """Whether `part` computes `operator`: it writes the operator's output.

    If `part` writes no tensor of the model, it must read all inputs of the operator instead.
    """
    outputs = {tensor.name for tensor in operator.outputs}
    inputs = {tensor.name for tensor in operator.inputs if tensor is not None}
    return bool(outputs & part.outputs) or (not part.outputs & written and inputs <= part.inputs)
