"""Summarizes a quantized model or a program in a few lines, for `print`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from openneutron.core.fx import is_dequantize, is_operator, is_quantize
from openneutron.formats import pte
from openneutron.partition.placing import Placement

if TYPE_CHECKING:
    from openneutron.neutron_program import NeutronProgram
    from openneutron.quantized_model import QuantizedModel

__all__ = [
    "inputs_of_model", "operators_of_model", "program_edges", "program_kind", "summary_of_model", "summary_of_program",
]  # fmt: skip

MOST_ROWS = 8


def summary_of_program(program: NeutronProgram) -> str:
    """Returns the program's kind, target and size, its inputs and outputs, and the placement of its operators."""
    short = {"input": "in ", "output": "out"}
    return "\n".join([
        f"{program_kind(program)}, which {'the board' if program.is_device else 'this host'} runs; for "
        f"{program.target}, {len(program.buffer):,} bytes",
        *(f"  {short[where]} {name}: {text}" for where, name, text in program_edges(program)),
        *_placement_lines(program.placement),
    ])  # fmt: skip


def program_kind(program: NeutronProgram) -> str:
    """Returns "Device program" or "Portable program"."""
    return "Device program" if program.is_device else "Portable program"


def program_edges(program: NeutronProgram) -> Iterator[tuple[str, str, str]]:
    """Returns "input" or "output", the name, and dtype and shape of each input and output."""
    method = pte.read(program.portable).methods[0]
    names = [leaf.name for leaf in program.leaves or ()] or [f"input {i}" for i in range(len(method.inputs))]
    for name, value in zip(names, method.inputs, strict=True):
        yield "input", name, _value_text(value)
    for number, value in enumerate(method.outputs):
        yield "output", str(number), _value_text(value)


def _value_text(value: pte.ProgramValue) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if value.dtype in pte.SCALAR_TYPES.values() else f"{value.constant!r}"


def _placement_lines(rows: Iterable[Placement]) -> Iterator[str]:
    rows = list(rows)
    left = [row for row in rows if row.where == "cpu"]
    delegates = len({row.partition for row in rows} - {None})
    yield f"  {len(rows) - len(left)} operators on the NPU in {delegates} delegates, {len(left)} on the CPU"
    for row in left[:MOST_ROWS]:
        yield f"    {row.node} ({row.op}, {row.source or f'module {row.module!r}'}): {row.reason}"
    if len(left) > MOST_ROWS:
        yield f"    and {len(left) - MOST_ROWS} more; see placement"


def summary_of_model(model: QuantizedModel) -> str:
    """Returns the model's target and inputs, its number of int8 operators, and its recovery recipe."""
    quantized, operators = operators_of_model(model)
    return (
        f"Quantized model for {model.target}: {quantized} of {operators} operators in int8\n"
        f"  in  {', '.join(inputs_of_model(model))}\n"
        f"  recovery: {model.recipe or 'none'}"
    )


def operators_of_model(model: QuantizedModel) -> tuple[int, int]:
    """Returns the number of operators in int8, and of all operators."""
    operators = [node for node in model.module.graph.nodes if _computes(node)]
    return sum(map(_is_quantized, operators)), len(operators)


def inputs_of_model(model: QuantizedModel) -> list[str]:
    """Returns the dtype and shape of each input; the value of an input that is not a tensor."""
    return [
        f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
        for value in model.examples.leaves
    ]


def _computes(node: Node) -> bool:
    return is_operator(node) and not is_quantize(node) and not is_dequantize(node)


def _is_quantized(node: Node) -> bool:
    """Whether an operator has an int8 input or output. A fused activation has only an int8 output."""
    return any(map(is_dequantize, node.all_input_nodes)) or any(map(is_quantize, node.users))
