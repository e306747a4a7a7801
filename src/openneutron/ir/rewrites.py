"""Clean-up passes over the IR, and passes for the runtime's format conversions and the legacy generation."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace

from openneutron.ir.graph import Graph, Kind, Op, Tensor
from openneutron.ir.kinds import RESHAPE, SLICE, TRANSPOSE
from openneutron.ir.views import swapped_blocks

__all__ = [
    "copy_unwritten_outputs", "eliminate_common_subexpressions", "eliminate_dead_code", "hoist_format_conversions",
    "hoisted_ends", "merge_slices", "share_constants", "transpose_as_images",
]  # fmt: skip


def eliminate_common_subexpressions(graph: Graph) -> Graph:
    """Rule: operators with equal kind, inputs and attributes are merged into one. Linear in operators.

    Copies are not merged, because each output of the graph needs a tensor of its own.
    """
    results: dict[object, Tensor] = {}
    same: dict[int, Tensor] = {}
    kept = []
    for op in graph.ops:
        inputs = tuple(same.get(id(tensor), tensor) for tensor in op.inputs)
        output = op.output
        key = (op.kind, tuple(map(id, inputs)), tuple(sorted(op.attrs.items())), output.shape, output.qparams)
        if key in results and not _is_copy(op):
            same[id(output)] = results[key]
            continue
        results[key] = output
        kept.append(replace(op, inputs=inputs))
    outputs = tuple(same.get(id(tensor), tensor) for tensor in graph.outputs)
    return Graph(graph.inputs, outputs, tuple(kept))


def merge_slices(graph: Graph) -> Graph:
    """Rule: a SLICE of a SLICE becomes one SLICE of the first input. Linear in operators."""
    slices: dict[int, Op] = {}
    ops = []
    for op in graph.ops:
        above = slices.get(id(op.inputs[0])) if op.kind == SLICE else None
        merged = op if above is None else _merge_slice_pair(above, op)
        ops.append(merged)
        if op.kind == SLICE:
            slices[id(op.output)] = merged
    return Graph(graph.inputs, graph.outputs, tuple(ops))


def _merge_slice_pair(first: Op, second: Op) -> Op:
    begin = tuple(map(operator.add, first.attrs["begin"], second.attrs["begin"]))
    return replace(second, inputs=first.inputs, attrs={**second.attrs, "begin": begin})


def eliminate_dead_code(graph: Graph) -> Graph:
    """Rule: an operator whose output has no reader is removed. Linear in operators."""
    needed = {id(tensor) for tensor in graph.outputs}
    kept: list[Op] = []
    for op in reversed(graph.ops):
        if id(op.output) in needed:
            needed.update(id(tensor) for tensor in op.inputs)
            kept.append(op)
    return Graph(graph.inputs, graph.outputs, tuple(reversed(kept)))


def share_constants(graph: Graph) -> Graph:
    """Rule: constants with equal bytes, shape, dtype and qparams are merged into one. Linear in their bytes."""
    unique: dict[object, Tensor] = {}

    def shared(tensor: Tensor) -> Tensor:
        if tensor.data is None:
            return tensor
        key = (tensor.data.tobytes(), tensor.shape, tensor.dtype, tensor.qparams)
        return unique.setdefault(key, tensor)

    ops = tuple(replace(op, inputs=tuple(map(shared, op.inputs))) for op in graph.ops)
    return Graph(graph.inputs, graph.outputs, ops)


def copy_unwritten_outputs(graph: Graph) -> Graph:
    """Rule: an output that is an input, a constant or another output is replaced by a RESHAPE that copies it.

    Runtimes require that an operator writes each output.
    """
    taken = {id(tensor) for tensor in graph.inputs}
    outputs, copies = [], []
    for tensor in graph.outputs:
        written = tensor
        if tensor.data is not None or id(tensor) in taken:
            written = Tensor(tensor.shape, tensor.dtype, tensor.qparams)
            copies.append(Op(RESHAPE, (tensor,), written, {"new_shape": tensor.shape}, "output"))
        taken.add(id(written))
        outputs.append(written)
    return Graph(graph.inputs, tuple(outputs), (*graph.ops, *copies))


def hoist_format_conversions(graph: Graph) -> Graph:
    """Removes conversions between NCHW and NHWC at inputs and outputs; the caller converts. Linear in operators.

    Rules; `hoisted_ends` returns which inputs and outputs became NHWC:

    1. If all readers of an input are conversions to NHWC, the input becomes NHWC.
    2. If a conversion to NCHW writes an output, and no operator reads the output, the output becomes NHWC.
    """
    readers = _readers(graph)
    writers = {id(op.output): op for op in graph.ops}
    returned = {id(tensor) for tensor in graph.outputs}
    replaced: dict[int, Tensor] = {}
    dropped: set[int] = set()

    def hoisted_input(tensor: Tensor) -> Tensor:
        reading = readers.get(id(tensor), [])
        if not reading or id(tensor) in returned or not all(_is_conversion(op, (0, 2, 3, 1)) for op in reading):
            return tensor
        replaced.update((id(op.output), reading[0].output) for op in reading)
        dropped.update(map(id, reading))
        return reading[0].output

    def hoisted_output(tensor: Tensor) -> Tensor:
        writer = writers.get(id(tensor))
        if writer is None or id(tensor) in readers or not _is_conversion(writer, (0, 3, 1, 2)):
            return replaced.get(id(tensor), tensor)
        dropped.add(id(writer))
        return replaced.get(id(writer.inputs[0]), writer.inputs[0])

    inputs = tuple(map(hoisted_input, graph.inputs))
    outputs = tuple(map(hoisted_output, graph.outputs))
    ops = tuple(
        replace(op, inputs=tuple(replaced.get(id(tensor), tensor) for tensor in op.inputs))
        for op in graph.ops
        if id(op) not in dropped
    )
    return Graph(inputs, outputs, ops)


def hoisted_ends(before: Graph, after: Graph) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
    """Returns which inputs and outputs are NHWC in `after`, the result of `hoist_format_conversions(before)`."""
    return _shape_differs(before.inputs, after.inputs), _shape_differs(before.outputs, after.outputs)


def transpose_as_images(graph: Graph) -> Graph:
    """Rewrites transposes to the form that the legacy generation supports. Linear in operators.

    Rules:

    1. A TRANSPOSE that swaps two blocks of consecutive dimensions becomes a TRANSPOSE of an image from NHWC to NCHW,
       between two RESHAPEs.
    2. A RESHAPE of a RESHAPE reads the input of the first one.
    """
    ops: list[Op] = []
    reshaped: dict[int, Tensor] = {}  # the input of a RESHAPE, by id of its output

    def write(kind: Kind, tensor: Tensor, output: Tensor, operand: tuple[int, ...], origin: str) -> None:
        if kind is RESHAPE:
            tensor = reshaped[id(output)] = reshaped.get(id(tensor), tensor)
        ops.append(Op(kind, (tensor,), output, {kind.operands[0]: operand}, origin))

    for op in graph.ops:
        first, perm = op.inputs[0], op.attrs.get("perm")
        blocks = swapped_blocks(first.shape, perm) if perm is not None else None
        if op.kind is RESHAPE:
            write(RESHAPE, first, op.output, op.output.shape, op.origin)
        elif blocks is None or (perm == (0, 3, 1, 2) and first.shape[0] == 1):
            ops.append(op)
        else:
            front, back = blocks
            image = Tensor((1, front, 1, back), first.dtype, first.qparams)
            swapped = Tensor((1, back, front, 1), first.dtype, first.qparams)
            write(RESHAPE, first, image, image.shape, op.origin)
            write(TRANSPOSE, image, swapped, (0, 3, 1, 2), op.origin)
            write(RESHAPE, swapped, op.output, op.output.shape, op.origin)
    return Graph(graph.inputs, graph.outputs, tuple(ops))


def _is_copy(op: Op) -> bool:
    return op.kind is RESHAPE and op.inputs[0].shape == op.output.shape


def _readers(graph: Graph) -> dict[int, list[Op]]:
    """Returns the operators that read each tensor, by the id of the tensor."""
    readers: dict[int, list[Op]] = {}
    for op in graph.ops:
        for tensor in op.inputs:
            readers.setdefault(id(tensor), []).append(op)
    return readers


def _is_conversion(op: Op, perm: tuple[int, ...]) -> bool:
    return op.kind is TRANSPOSE and op.attrs["perm"] == perm


def _shape_differs(before: Sequence[Tensor], after: Sequence[Tensor]) -> tuple[bool, ...]:
    return tuple(old is not new for old, new in zip(before, after, strict=True))
