"""A TFLite file that returns more, or fewer, of its tensors."""

from __future__ import annotations

from collections.abc import Sequence

import flatbuffers  # noqa: TID251
from ai_edge_litert import schema_py_generated as schema  # noqa: TID251

from openneutron.formats.tflite.write import FILE_IDENTIFIER

__all__ = ["returning", "returning_only"]


def returning(model: bytes, tensors: Sequence[int]) -> bytes:
    """The same model, whose first subgraph also returns the tensors of these numbers, behind what it returned.

    What it returned already it does not return twice. Linear in bytes.
    """
    unpacked = schema.ModelT.InitFromPackedBuf(model, 0)
    subgraph = unpacked.subgraphs[0]
    returned = [int(tensor) for tensor in subgraph.outputs]
    subgraph.outputs = [*returned, *(tensor for tensor in dict.fromkeys(tensors) if tensor not in returned)]
    return _packed(unpacked, len(model))


def returning_only(model: bytes, positions: Sequence[int]) -> bytes:
    """The same model, whose first subgraph returns only its outputs at `positions`, in that order.

    Operators that nothing returned needs are left out. Linear in bytes.
    """
    unpacked = schema.ModelT.InitFromPackedBuf(model, 0)
    subgraph = unpacked.subgraphs[0]
    subgraph.outputs = [int(subgraph.outputs[position]) for position in positions]
    return _packed(unpacked, len(model))


def _packed(unpacked: schema.ModelT, size: int) -> bytes:
    builder = flatbuffers.Builder(2 * size)
    builder.Finish(unpacked.Pack(builder), file_identifier=FILE_IDENTIFIER)
    return bytes(builder.Output())
