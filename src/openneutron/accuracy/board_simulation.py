"""Runs a program on this machine with inputs in the order of memory, as a board gets them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from openneutron.accuracy.board_dump import Array, BoardTensor
from openneutron.errors import HostError, HostProcessError
from openneutron.runtime.program import HostProgram, TensorInfo

__all__ = ["Simulation", "Vector", "run_or_refuse", "values_in_memory"]

Vector = Sequence[Array]
"""The inputs of one run, each in one dimension in the order of memory."""


@dataclass(frozen=True)
class Simulation:
    """Runs the program on this machine with inputs in the order of memory."""

    host: HostProgram
    inputs: tuple[BoardTensor, ...]
    outputs: tuple[BoardTensor, ...]
    starts: frozenset[int]
    """The vectors before which the states of the program are reset."""

    def run(self, vectors: Sequence[Vector], starts: frozenset[int] | None = None) -> Iterator[tuple[Array, ...]]:
        """Returns the outputs of each vector in the order of memory. Resets the states at `starts`."""
        starts = self.starts if starts is None else starts
        for number, vector in enumerate(vectors):
            if number in starts and self.host.has_state:
                self.host.reset()
            yield self._run_one(vector)

    def _run_one(self, vector: Vector) -> tuple[Array, ...]:
        given = iter(vector)
        tensors = iter(self.inputs)
        values = [
            _as_tensor(next(given), next(tensors), info.dtype) if isinstance(info, TensorInfo) else info.value
            for info in self.host.inputs
        ]
        found = [leaf for leaf in tree_leaves(self.host.run(*values)) if isinstance(leaf, Tensor)]
        return tuple(values_in_memory(value, tensor) for value, tensor in zip(found, self.outputs, strict=True))


def values_in_memory(value: Tensor, tensor: BoardTensor) -> Array:
    """Returns a tensor's values in one dimension, in the program's order of memory."""
    values = value.detach().cpu().numpy()
    if tensor.dtype == np.uint8 and values.dtype == np.bool_:
        values = values.view(np.uint8)
    return tensor.in_memory(values).copy()


def _as_tensor(values: Array, tensor: BoardTensor, dtype: torch.dtype) -> Tensor:
    logical = np.ascontiguousarray(tensor.from_memory(values)).reshape(tensor.shape)
    found = torch.from_numpy(logical.copy())
    return found if found.dtype == dtype else found.to(dtype)


def run_or_refuse(
    simulation: Simulation, vectors: Sequence[Vector], starts: frozenset[int] | None = None
) -> list[tuple[Array, ...]] | None:
    """Returns the outputs; None if the program refuses the mistaken inputs, such as indices out of range.

    Raises `HostProcessError` if the program ends its process.
    """
    try:
        return list(simulation.run(vectors, starts))
    except HostProcessError:
        raise
    except HostError:
        return None
