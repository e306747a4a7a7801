"""Changes the outputs of a TFLite file."""

from __future__ import annotations

from collections.abc import Sequence

import flatbuffers  # noqa: TID251
from ai_edge_litert import schema_py_generated as schema  # noqa: TID251

from openneutron.formats.tflite.write import FILE_IDENTIFIER

__all__ = ["with_fewer_outputs", "with_more_outputs"]


def with_more_outputs(model: bytes, tensors: Sequence[int]) -> bytes:
    """Returns the model with additional outputs: the tensors of these indices in the first subgraph.

    Appends them to the existing outputs, without duplicates. Linear in bytes.
    """
    unpacked = schema.ModelT.InitFromPackedBuf(model, 0)
    subgraph = unpacked.subgraphs[0]
    returned = [int(tensor) for tensor in subgraph.outputs]
    subgraph.outputs = [*returned, *(tensor for tensor in dict.fromkeys(tensors) if tensor not in returned)]
    return _pack(unpacked, len(model))


def with_fewer_outputs(model: bytes, positions: Sequence[int]) -> bytes:
    """Returns the model with a subset of its outputs: those at `positions` in the first subgraph, in that order.

    Keeps all operators. Linear in bytes.
    """
    unpacked = schema.ModelT.InitFromPackedBuf(model, 0)
    subgraph = unpacked.subgraphs[0]
    subgraph.outputs = [int(subgraph.outputs[position]) for position in positions]
    return _pack(unpacked, len(model))


def _pack(unpacked: schema.ModelT, size: int) -> bytes:
    builder = flatbuffers.Builder(2 * size)
    builder.Finish(unpacked.Pack(builder), file_identifier=FILE_IDENTIFIER)
    return bytes(builder.Output())
