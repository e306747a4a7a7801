"""Builds the IR of a partition, and runs the passes over it."""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch.fx import Node

from openneutron.core.driver import Driver
from openneutron.core.fx import first_operand
from openneutron.ir.absorption import absorb_padding
from openneutron.ir.graph import Array, Graph, Op, QParams, Tensor
from openneutron.ir.kernel_extension import extend_kernels
from openneutron.ir.kinds import RESHAPE, TRANSPOSE
from openneutron.ir.layout import propagate_layouts
from openneutron.ir.rewrites import (
    copy_unwritten_outputs,
    eliminate_common_subexpressions,
    eliminate_dead_code,
    hoist_format_conversions,
    merge_slices,
    share_constants,
    transpose_as_images,
)
from openneutron.ir.text import dump
from openneutron.ir.verify import verify
from openneutron.targets import NeutronTarget

__all__ = ["PASSES", "GraphPass", "Lowerable", "Stage", "build", "driver_of", "optimize", "run_stage"]

INT8 = np.dtype(np.int8)
TO_CHANNELS_FIRST = (0, 3, 1, 2)
TO_CHANNELS_LAST = (0, 2, 3, 1)


class Lowerable(Protocol):
    """A quantized operator that can be lowered to the IR."""

    @property
    def operands(self) -> tuple[Node, ...]:
        """The dequantize nodes that it reads."""

    @property
    def quantize(self) -> Node:
        """The quantize node that returns its int8 output."""

    def lower(self, operands: dict[Node, Tensor], ops: list[Op]) -> Tensor:
        """Appends its operators to `ops`, and returns its output in torch's dimension order."""


def build(
    operators: Iterable[Lowerable],
    inputs: Mapping[Node, QParams],
    outputs: Sequence[Node],
    constant: Callable[[Node], Array | None],
    qparams_of: Callable[[Node], QParams],
    *,
    channels_last: Callable[[Node], bool],
) -> Graph:
    """Returns the unoptimized IR of `operators`, in their order.

    Values are in torch's dimension order, with transposes around NHWC operators. `inputs` are the int8 values that the
    partition reads, `outputs` those that it returns. A value is NHWC in memory if `channels_last(node)`. A value
    without dimensions has shape [1] in the IR, because LiteRT gives no access to the memory of a scalar. `constant`
    returns the values of a constant node, `qparams_of` the qparams of a dequantize node.
    """
    ops: list[Op] = []
    values: dict[Node, Tensor] = {}
    stored_inputs = []
    for node, qparams in inputs.items():
        shape = tuple(node.meta["val"].shape)
        if channels_last(node):
            stored = Tensor(tuple(shape[dim] for dim in TO_CHANNELS_LAST), INT8, qparams)
            values[node] = _append_transpose(ops, stored, TO_CHANNELS_FIRST, node.name)
        elif not shape:
            stored = Tensor((1,), INT8, qparams)
            values[node] = _append_reshape(ops, stored, (), node.name)
        else:
            stored = values[node] = Tensor(shape, INT8, qparams)
        stored_inputs.append(stored)
    for operator in operators:
        operands = {}
        for dequantize in operator.operands:
            source = first_operand(dequantize)
            operands[dequantize] = values.get(source) or _constant_tensor(constant(source), qparams_of(dequantize))
        values[operator.quantize] = operator.lower(operands, ops)
    stored_outputs = []
    for node in outputs:
        stored = values[node]
        if channels_last(node):
            stored = _append_transpose(ops, stored, TO_CHANNELS_LAST, node.name)
        elif not stored.shape:
            stored = _append_reshape(ops, stored, (1,), node.name)
        stored_outputs.append(stored)
    return verify(Graph(tuple(stored_inputs), tuple(stored_outputs), tuple(ops)), "build")


class Stage(enum.Enum):
    """When a pass runs; the stages run in this order."""

    FIRST = "on the graph that the lowerings emitted"
    LAYOUT = "to remove transposes and reshapes; the result is dropped if it transposes more values"
    PADDING = "after LAYOUT, if the target is known"
    LAST = "at the end"
    FORMATS = "if the runtime converts inputs and outputs between NCHW and NHWC"
    LEGACY = "for the legacy generation, after FORMATS"
    ENDS = "after FORMATS and LEGACY"


@dataclass(frozen=True)
class GraphPass:
    """One row of the table of passes: a function from a graph to a graph."""

    run: Callable[..., Graph]
    purpose: str
    stages: tuple[Stage, ...]

    @property
    def name(self) -> str:
        """The name of the function."""
        return self.run.__name__


_SHARES = (Stage.FIRST, Stage.LAYOUT, Stage.LAST)
PASSES: tuple[GraphPass, ...] = (
    GraphPass(merge_slices, "replace a slice of a slice by one slice", (Stage.FIRST, Stage.LAST)),
    GraphPass(propagate_layouts, "move transposes and reshapes so that they cancel", (Stage.LAYOUT,)),
    GraphPass(absorb_padding, "absorb padding and slices into convolutions", (Stage.PADDING,)),
    GraphPass(extend_kernels, "extend kernels by zeros where this is faster than padding", (Stage.PADDING,)),
    GraphPass(hoist_format_conversions, "leave transposes of inputs and outputs to the runtime", (Stage.FORMATS,)),
    GraphPass(transpose_as_images, "replace transposes by those of the legacy generation", (Stage.LEGACY,)),
    GraphPass(eliminate_dead_code, "remove operators that nothing reads", (*_SHARES, Stage.LEGACY)),
    GraphPass(share_constants, "store equal constants once", _SHARES),
    GraphPass(eliminate_common_subexpressions, "compute equal operators once", _SHARES),
    GraphPass(copy_unwritten_outputs, "copy outputs that are inputs or constants", (Stage.LAST, Stage.ENDS)),
)
"""All passes over the IR. The passes of a stage run in this order."""


def driver_of(partition: str = "", intermediates_dir: str | None = None) -> Driver[Graph]:
    """Returns a driver that verifies the IR of one partition after each pass. Its dumps are named after `partition`."""
    return Driver(f"ir_{partition}" if partition else "ir", dump, verify, intermediates_dir)


def optimize(graph: Graph, target: NeutronTarget | None = None, driver: Driver[Graph] | None = None) -> Graph:
    """Runs the stages `FIRST` to `LAST`. Without a `target`, the stage `PADDING` is skipped, because it compares costs.

    If the stage `LAYOUT` increases the number of transposed values, its result is dropped. Linear in operators and in
    the bytes of constants.
    """
    driver = driver_of() if driver is None else driver
    graph = run_stage(Stage.FIRST, graph, driver)
    graph = min(run_stage(Stage.LAYOUT, graph, driver), graph, key=_layout_cost)
    if target is not None:
        graph = run_stage(Stage.PADDING, graph, driver, target)
    return run_stage(Stage.LAST, graph, driver)


def run_stage(stage: Stage, graph: Graph, driver: Driver[Graph], *arguments: object) -> Graph:
    """Runs the passes of one stage. `arguments` are passed to them after the graph."""
    for row in PASSES:
        if stage in row.stages:
            graph = driver.run(row.name, row.purpose, functools.partial(_apply_pass, row, arguments), graph)
    return graph


def _apply_pass(row: GraphPass, arguments: tuple[object, ...], graph: Graph) -> Graph:
    return row.run(graph, *arguments)


def _layout_cost(graph: Graph) -> tuple[int, int]:
    """Returns the number of transposed elements, and the number of operators."""
    return sum(op.output.size for op in graph.ops if op.kind is TRANSPOSE), len(graph.ops)


def is_channels_last(node: Node) -> bool:
    """Whether the values of a rank-4 node are in NHWC order in memory, and not also in NCHW order."""
    import torch

    value = node.meta["val"]
    return (
        value.dim() == 4
        and value.is_contiguous(memory_format=torch.channels_last)
        and not value.is_contiguous(memory_format=torch.contiguous_format)
    )


def _append_transpose(ops: list[Op], tensor: Tensor, perm: tuple[int, ...], origin: str) -> Tensor:
    output = Tensor(tuple(tensor.shape[dim] for dim in perm), tensor.dtype, tensor.qparams)
    ops.append(Op(TRANSPOSE, (tensor,), output, {"perm": perm}, origin))
    return output


def _append_reshape(ops: list[Op], tensor: Tensor, shape: tuple[int, ...], origin: str) -> Tensor:
    output = Tensor(shape, tensor.dtype, tensor.qparams)
    ops.append(Op(RESHAPE, (tensor,), output, {"new_shape": shape}, origin))
    return output


def _constant_tensor(data: Array | None, qparams: QParams) -> Tensor:
    assert data is not None  # clusters read computed values of the partition, or constants
    return Tensor(data.shape, data.dtype, qparams, data)
