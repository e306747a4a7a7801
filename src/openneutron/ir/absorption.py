"""Pass that absorbs padding and slices of channels into the weights of neighboring operators."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from openneutron.ir.cost import cost_of
from openneutron.ir.graph import Graph, Layout, Op, QParams, Tensor
from openneutron.ir.kinds import (
    CONCATENATION,
    MEAN,
    PAD,
    RESHAPE,
    SLICE,
    TRANSPOSE,
    Weights,
)
from openneutron.targets import NeutronTarget

__all__ = ["absorb_padding"]

Sizes = tuple[int, ...]


def absorb_padding(graph: Graph, target: NeutronTarget) -> Graph:
    """Applies these rules to each operator in order. Linear in operators, and in the bytes of the weights that grow.

    1. If a PAD restores the size before a SLICE, and no result depends on the padding, the PAD is removed. Its readers
       read the input of the SLICE.
    2. If a PAD of channels is the only reader of a CONV_2D or FULLY_CONNECTED, the PAD is removed and the operator gets
       filters of zeros for the added channels, unless this makes `target` slower.
    3. If a CONV_2D or FULLY_CONNECTED reads a SLICE of the first channels of a tensor, it reads the whole tensor, with
       zero weights for the other channels, unless this makes `target` slower.
    4. Rule 3 also applies to a FULLY_CONNECTED, or a linear's CONV_2D, that reads the SLICE through a RESHAPE to rows.

    `eliminate_dead_code` removes a SLICE that has no readers afterwards.
    """
    return _PaddingAbsorber(graph, target).run()


@dataclass
class _PaddingAbsorber:
    graph: Graph
    target: NeutronTarget
    ops: list[Op] = field(default_factory=list)
    writers: dict[int, int] = field(default_factory=dict)  # index in `ops`, by id of the tensor
    renamed: dict[int, Tensor] = field(default_factory=dict)

    def run(self) -> Graph:
        self.live = _needed_sizes_by_tensor(self.graph)
        self.readers = Counter(id(tensor) for op in self.graph.ops for tensor in op.inputs)
        self.readers.update(id(tensor) for tensor in self.graph.outputs)
        for op in self.graph.ops:
            self._rewrite_op(replace(op, inputs=tuple(self._replacement_of(tensor) for tensor in op.inputs)))
        outputs = tuple(self._replacement_of(tensor) for tensor in self.graph.outputs)
        return Graph(self.graph.inputs, outputs, tuple(self.ops))

    def _replacement_of(self, tensor: Tensor) -> Tensor:
        return self.renamed.get(id(tensor), tensor)

    def _writer_of(self, tensor: Tensor) -> Op | None:
        index = self.writers.get(id(tensor))
        return None if index is None else self.ops[index]

    def _rewrite_op(self, op: Op) -> None:
        if _pads_ends(op) and self._absorb_pad(op):
            return
        if op.kind.has_filters_last:
            op = self._with_sliced_channels(op)
        self.writers[id(op.output)] = len(self.ops)
        self.ops.append(op)

    def _absorb_pad(self, pad: Op) -> bool:
        """Rules 1 and 2."""
        (padded,) = pad.inputs
        writer = self._writer_of(padded)
        if writer is None:
            return False
        if _takes_first(writer) and writer.inputs[0].shape == pad.output.shape:
            live = self.live.get(id(pad.output), pad.output.shape)
            if all(needed <= size for needed, size in zip(live, padded.shape, strict=True)):
                self.renamed[id(pad.output)] = writer.inputs[0]
                return True
        if writer.kind.has_filters_last and _is_last_only(pad) and self.readers[id(padded)] == 1:
            wider = _with_zero_filters(writer, pad.output)
            if self._cycles_of(wider) <= self._cycles_of(writer) + self._cycles_of(pad):
                index = self.writers.pop(id(padded))
                self.ops[index], self.writers[id(pad.output)] = wider, index
                return True
        return False

    def _with_sliced_channels(self, op: Op) -> Op:
        """Rules 3 and 4."""
        reshape, rows = None, op.inputs[0]
        writer = self._writer_of(rows)
        reads_rows = op.kind.layout is Layout.FEATURES
        if writer is not None and writer.kind is RESHAPE and reads_rows:
            reshape, writer = writer, self._writer_of(writer.inputs[0])
        if writer is None or not _takes_first(writer) or not _is_last_only(writer):
            return op
        whole, kept = writer.inputs[0], writer.output.shape[-1]
        features = op.inputs[1].shape[-1]
        if features % kept or (features != kept and not reads_rows):
            return op
        wider = _with_zero_weights(op, whole, kept)
        if self._cycles_of(wider) > self._cycles_of(op) + self._cycles_of(writer) // self.readers[id(writer.output)]:
            return op
        if wider.inputs[0].shape == whole.shape:
            return replace(wider, inputs=(whole, *wider.inputs[1:]))
        view = Op(RESHAPE, (whole,), wider.inputs[0], {"new_shape": wider.inputs[0].shape}, (reshape or op).origin)
        self.writers[id(view.output)] = len(self.ops)
        self.ops.append(view)
        return wider

    def _cycles_of(self, op: Op) -> int:
        return cost_of(op, self.target).cycles


def _pads_ends(op: Op) -> bool:
    """Whether the operator adds real zeros at ends of dimensions only."""
    return op.kind == PAD and not any(front for front, _ in op.attrs["paddings"])


def _takes_first(op: Op) -> bool:
    """Whether the operator is a SLICE that starts at the first index of each dimension."""
    return op.kind == SLICE and not any(op.attrs["begin"])


def _is_last_only(op: Op) -> bool:
    """Whether the operator changes the size of the last dimension only."""
    return op.inputs[0].shape[:-1] == op.output.shape[:-1]


def _with_zero_filters(op: Op, output: Tensor) -> Op:
    """Rule 2: returns the operator with zero filters and zero biases for the channels that `output` adds.

    The added channels contain the code of real zero, because each fused activation maps zero to zero.
    """
    activation, weight, bias = op.inputs
    more = output.shape[-1] - weight.shape[0]
    return replace(op, inputs=(activation, _append_zeros(weight, more), _append_zeros(bias, more)), output=output)


def _append_zeros(constant: Tensor, more: int) -> Tensor:
    """Adds `more` zeros to a constant, at the end of its first dimension."""
    data = np.asarray(constant.data)
    padded = np.pad(data, [(0, more), *[(0, 0)] * (data.ndim - 1)])
    qparams = constant.qparams
    if qparams.axis == 0:
        last = QParams(qparams.scale[-1:] * more, qparams.zero_point[-1:] * more)
        qparams = QParams(qparams.scale + last.scale, qparams.zero_point + last.zero_point, 0)
    return Tensor(padded.shape, constant.dtype, qparams, padded)


def _with_zero_weights(op: Op, whole: Tensor, kept: int) -> Op:
    """Rules 3 and 4: returns the operator on all channels of `whole`. The caller emits its input."""
    activation, weight, *bias = op.inputs
    data = np.asarray(weight.data)
    blocks = data.reshape(*data.shape[:-1], data.shape[-1] // kept, kept)
    padded = np.pad(blocks, [*[(0, 0)] * (blocks.ndim - 1), (0, whole.shape[-1] - kept)])
    padded = padded.reshape(*data.shape[:-1], -1)
    shape = (*activation.shape[:-1], padded.shape[-1])
    wide = Tensor(shape, activation.dtype, activation.qparams)
    return replace(op, inputs=(wide, Tensor(padded.shape, weight.dtype, weight.qparams, padded), *bias))


def _needed_sizes_by_tensor(graph: Graph) -> dict[int, Sizes]:
    """Returns the live sizes of each tensor, by its id. Results depend only on indices below the live sizes."""
    live = {id(tensor): tensor.shape for tensor in graph.outputs}
    for op in reversed(graph.ops):
        needed = live.get(id(op.output))
        if needed is None:
            continue
        for tensor, sizes in _needed_sizes(op, needed):
            before = live.get(id(tensor), (0,) * len(tensor.shape))
            live[id(tensor)] = tuple(map(max, before, sizes))
    return live


def _needed_sizes(op: Op, output: Sizes) -> Iterable[tuple[Tensor, Sizes]]:
    """Returns the live sizes of each input of an operator, given the live sizes `output` of its output."""
    if op.kind.layout is Layout.ELEMENTWISE:
        return _needs_of_elementwise(op, output)
    needs = _needs_of_channelwise if op.kind.keeps_channels else _NEEDS.get(op.kind.name)
    if needs is None or (op.kind == MEAN and not op.attrs["keep_dims"]):
        return _needs_of_weighted(op)
    return needs(op, output)


def _needs_of_elementwise(op: Op, output: Sizes) -> Iterator[tuple[Tensor, Sizes]]:
    for tensor in op.inputs:
        aligned = output[len(output) - len(tensor.shape) :]
        yield tensor, tuple(map(min, tensor.shape, aligned))


def _needs_of_transpose(op: Op, output: Sizes) -> Iterator[tuple[Tensor, Sizes]]:
    perm = op.attrs["perm"]
    yield op.inputs[0], tuple(output[perm.index(dim)] for dim in range(len(perm)))


def _needs_of_slice(op: Op, output: Sizes) -> Iterator[tuple[Tensor, Sizes]]:
    yield op.inputs[0], tuple(map(sum, zip(op.attrs["begin"], output, strict=True)))


def _needs_of_pad(op: Op, output: Sizes) -> Iterator[tuple[Tensor, Sizes]]:
    first = op.inputs[0]
    sizes = zip(first.shape, output, op.attrs["paddings"], strict=True)
    yield first, tuple(min(size, max(0, needed - front)) for size, needed, (front, _) in sizes)


def _needs_of_concatenation(op: Op, output: Sizes) -> Iterator[tuple[Tensor, Sizes]]:
    axis = op.attrs["axis"]
    for tensor in op.inputs:
        yield tensor, (*output[:axis], tensor.shape[axis], *output[axis + 1 :])


def _needs_of_mean(op: Op, output: Sizes) -> Iterator[tuple[Tensor, Sizes]]:
    first, axes = op.inputs[0], op.attrs["axes"]
    yield first, tuple(size if dim in axes else output[dim] for dim, size in enumerate(first.shape))


def _needs_of_channelwise(op: Op, output: Sizes) -> Iterator[tuple[Tensor, Sizes]]:
    first = op.inputs[0]
    yield first, (*first.shape[:-1], output[-1])


_NEEDS: Mapping[str, Callable[[Op, Sizes], Iterator[tuple[Tensor, Sizes]]]] = {
    TRANSPOSE.name: _needs_of_transpose,
    SLICE.name: _needs_of_slice,
    PAD.name: _needs_of_pad,
    CONCATENATION.name: _needs_of_concatenation,
    MEAN.name: _needs_of_mean,
}


def _needs_of_weighted(op: Op) -> Iterator[tuple[Tensor, Sizes]]:
    """Returns the shape of each input, without the last channels if all of their weights are zero."""
    weight = next((tensor.data for tensor in op.inputs if tensor.data is not None and len(tensor.shape) > 1), None)
    for tensor in op.inputs:
        if op.kind.weights is Weights.FILTERS and tensor.data is None and weight is not None:
            used = np.flatnonzero(weight.reshape(-1, weight.shape[-1]).any(axis=0))
            yield tensor, (*tensor.shape[:-1], int(used[-1]) + 1 if used.size else 0)
        else:
            yield tensor, tensor.shape
