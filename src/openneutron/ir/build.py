"""From the operators of a partition to the IR, and through its passes."""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch.fx import Node

from openneutron.core.driver import Driver
from openneutron.ir.absorption import absorb_padding
from openneutron.ir.graph import Array, Graph, Op, QParams, Tensor
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

__all__ = ["PASSES", "Lowerable", "Pass", "Stage", "build", "driver_of", "optimize", "run_stage"]

INT8 = np.dtype(np.int8)
TO_CHANNELS_FIRST = (0, 3, 1, 2)
TO_CHANNELS_LAST = (0, 2, 3, 1)


class Lowerable(Protocol):
    """A quantized operator that can write itself."""

    @property
    def operands(self) -> tuple[Node, ...]:
        """The dequantize nodes it reads."""

    @property
    def quantize(self) -> Node:
        """The node that yields its int8 output."""

    def lower(self, operands: dict[Node, Tensor], ops: list[Op]) -> Tensor:
        """Append its operators to `ops`; returns its output in torch's dimension order."""


def build(
    operators: Iterable[Lowerable],
    inputs: Mapping[Node, QParams],
    outputs: Sequence[Node],
    constant: Callable[[Node], Array | None],
    qparams_of: Callable[[Node], QParams],
    *,
    channels_last: Callable[[Node], bool],
) -> Graph:
    """The IR of `operators`, in their order, as it comes: each in torch's dimension order, views around what is NHWC.

    `inputs` are the int8 values it reads, `outputs` those it yields; either is NHWC in memory where `channels_last`
    says so, and has shape [1] where its node has no dimensions: LiteRT gives no access to a scalar's memory. `constant`
    gives the values of a constant node, `qparams_of` those of a dequantize node.
    """
    ops: list[Op] = []
    values: dict[Node, Tensor] = {}
    stored_inputs = []
    for node, qparams in inputs.items():
        shape = tuple(node.meta["val"].shape)
        if channels_last(node):
            stored = Tensor(tuple(shape[dim] for dim in TO_CHANNELS_LAST), INT8, qparams)
            values[node] = _transpose(ops, stored, TO_CHANNELS_FIRST, node.name)
        elif not shape:
            stored = Tensor((1,), INT8, qparams)
            values[node] = _reshape(ops, stored, (), node.name)
        else:
            stored = values[node] = Tensor(shape, INT8, qparams)
        stored_inputs.append(stored)
    for operator in operators:
        operands = {}
        for dequantize in operator.operands:
            source = dequantize.args[0]
            assert isinstance(source, Node)  # the clusters hold nothing else
            operands[dequantize] = values.get(source) or _constant(constant(source), qparams_of(dequantize))
        values[operator.quantize] = operator.lower(operands, ops)
    stored_outputs = []
    for node in outputs:
        stored = values[node]
        if channels_last(node):
            stored = _transpose(ops, stored, TO_CHANNELS_LAST, node.name)
        elif not stored.shape:
            stored = _reshape(ops, stored, (1,), node.name)
        stored_outputs.append(stored)
    return verify(Graph(tuple(stored_inputs), tuple(stored_outputs), tuple(ops)), "build")


class Stage(enum.Enum):
    """When a pass runs; the stages run in this order."""

    FIRST = "on the graph as the lowerings wrote it"
    LAYOUT = "to remove transposes and reshapes; the result is dropped if it transposes more values"
    PADDING = "once the layout is settled, where the target is known"
    LAST = "at the end"
    FORMATS = "where the runtime converts inputs and outputs between NCHW and NHWC"
    LEGACY = "for the legacy generation, after FORMATS"
    ENDS = "after FORMATS and LEGACY"


@dataclass(frozen=True)
class Pass:
    """One row of the table: a function from a graph to a graph."""

    run: Callable[..., Graph]
    purpose: str
    stages: tuple[Stage, ...]

    @property
    def name(self) -> str:
        """The name of the function."""
        return self.run.__name__


_SHARES = (Stage.FIRST, Stage.LAYOUT, Stage.LAST)
PASSES: tuple[Pass, ...] = (
    Pass(merge_slices, "read what a slice reads instead of the slice", (Stage.FIRST, Stage.LAST)),
    Pass(propagate_layouts, "move transposes and reshapes to where they cancel", (Stage.LAYOUT,)),
    Pass(absorb_padding, "make padding and slicing part of the convolutions around it", (Stage.PADDING,)),
    Pass(hoist_format_conversions, "leave transposes at the ends to the runtime", (Stage.FORMATS,)),
    Pass(transpose_as_images, "write transposes as the legacy generation has them", (Stage.LEGACY,)),
    Pass(eliminate_dead_code, "remove operators that nothing reads", (*_SHARES, Stage.LEGACY)),
    Pass(share_constants, "store equal constants once", _SHARES),
    Pass(eliminate_common_subexpressions, "compute equal operators once", _SHARES),
    Pass(copy_unwritten_outputs, "copy outputs that are inputs or constants", (Stage.LAST, Stage.ENDS)),
)
"""All passes over the IR, in the order in which those of one stage run."""


def driver_of(partition: str = "", intermediates_dir: str | None = None) -> Driver[Graph]:
    """The driver of the passes over one partition, which verifies the IR after each; `partition` names its dumps."""
    return Driver(f"ir_{partition}" if partition else "ir", dump, verify, intermediates_dir)


def optimize(graph: Graph, target: NeutronTarget | None = None, driver: Driver[Graph] | None = None) -> Graph:
    """Run the stages `FIRST` to `LAST`; the pass of `PADDING` compares costs and needs a `target`.

    No more values are transposed than the lowerings asked for: if views move to where more values are transposed, the
    graph is kept as it was before the stage `LAYOUT`. Linear in operators and in the bytes of constants.
    """
    driver = driver_of() if driver is None else driver
    graph = run_stage(Stage.FIRST, graph, driver)
    graph = min(run_stage(Stage.LAYOUT, graph, driver), graph, key=_cost)
    if target is not None:
        graph = run_stage(Stage.PADDING, graph, driver, target)
    return run_stage(Stage.LAST, graph, driver)


def run_stage(stage: Stage, graph: Graph, driver: Driver[Graph], *arguments: object) -> Graph:
    """Run the passes of one stage, which get `arguments` behind the graph."""
    for row in PASSES:
        if stage in row.stages:
            graph = driver.run(row.name, row.purpose, functools.partial(_apply, row, arguments), graph)
    return graph


def _apply(row: Pass, arguments: tuple[object, ...], graph: Graph) -> Graph:
    return row.run(graph, *arguments)


def _cost(graph: Graph) -> tuple[int, int]:
    """How many elements are transposed, and how many operators there are."""
    return sum(op.output.size for op in graph.ops if op.kind is TRANSPOSE), len(graph.ops)


def is_channels_last(node: Node) -> bool:
    """Whether the values of a rank-4 node lie in NHWC order, and not in NCHW order too."""
    import torch

    value = node.meta["val"]
    return (
        value.dim() == 4
        and value.is_contiguous(memory_format=torch.channels_last)
        and not value.is_contiguous(memory_format=torch.contiguous_format)
    )


def _transpose(ops: list[Op], tensor: Tensor, perm: tuple[int, ...], origin: str) -> Tensor:
    output = Tensor(tuple(tensor.shape[dim] for dim in perm), tensor.dtype, tensor.qparams)
    ops.append(Op(TRANSPOSE, (tensor,), output, {"perm": perm}, origin))
    return output


def _reshape(ops: list[Op], tensor: Tensor, shape: tuple[int, ...], origin: str) -> Tensor:
    output = Tensor(shape, tensor.dtype, tensor.qparams)
    ops.append(Op(RESHAPE, (tensor,), output, {"new_shape": shape}, origin))
    return output


def _constant(data: Array | None, qparams: QParams) -> Tensor:
    assert data is not None  # the clusters hold computed values of the partition, or constants
    return Tensor(data.shape, data.dtype, qparams, data)
