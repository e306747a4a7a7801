"""Tensors, numbers, texts and None as bytes, to send them between processes.

A message is a list of values: the length of a JSON header as a little-endian uint32, the header, and the bytes of each
tensor. The header has an entry for each value: `{"tensor": dtype, "shape": sizes, "order": dims}`, where `order` lists
the dimensions from the outermost to the innermost in memory, or `{"value": value}`. Unlike pickle, reading it runs no
code.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["from_bytes", "to_bytes"]

_LENGTH = struct.Struct("<I")


def to_bytes(values: Sequence[Any]) -> bytes:
    """Returns the message for tensors, numbers, bools, texts and None. Strides are kept as an order of dimensions."""
    entries: list[dict[str, Any]] = []
    parts: list[bytes] = []
    for value in values:
        if not isinstance(value, torch.Tensor):
            entries.append({"value": value})
            continue
        tensor = value.detach().cpu()
        strides = tensor.stride()
        order = sorted(range(tensor.dim()), key=lambda dim: -strides[dim])
        packed = tensor.permute(order).contiguous()
        entries.append(
            {"tensor": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape), "order": order}
        )
        parts.append(bytes(packed.reshape(-1).view(torch.uint8).numpy()))
    header = json.dumps(entries).encode()
    return b"".join([_LENGTH.pack(len(header)), header, *parts])


def from_bytes(message: bytes) -> list[Any]:
    """Returns the values of a message. Raises ValueError for other bytes."""
    try:
        (length,) = _LENGTH.unpack_from(message)
        entries = json.loads(message[_LENGTH.size : _LENGTH.size + length])
        values: list[Any] = []
        start = _LENGTH.size + length
        for entry in entries:
            if "tensor" not in entry:
                values.append(entry["value"])
                continue
            tensor, start = _read_tensor(message, start, entry)
            values.append(tensor)
    except (struct.error, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"not a message with values: {error}") from error
    return values


def _read_tensor(message: bytes, start: int, entry: dict[str, Any]) -> tuple[torch.Tensor, int]:
    """Returns the tensor whose bytes begin at `start`, and the offset of its end."""
    dtype, shape, order = getattr(torch, entry["tensor"]), entry["shape"], entry["order"]
    end = start + math.prod(shape) * dtype.itemsize
    data = bytearray(message[start:end])
    flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
    packed = flat.reshape([shape[dim] for dim in order])
    return packed.permute([order.index(dim) for dim in range(len(shape))]), end
