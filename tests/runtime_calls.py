"""Programs with one delegate call, their inputs, and the comparison of their outputs."""

from __future__ import annotations

import numpy as np
import torch
from tests.runtime_models import Call, Int8, double_model, pte, straight_header

from openneutron.formats.payload import MICROCODE_MAGIC, pack_device, pack_portable

Shape = tuple[int, ...]


SHAPE = (1, 4, 6, 8)


def random_int8(shape: Shape, seed: int = 0) -> Int8:
    return np.random.default_rng(seed).integers(-128, 128, shape, dtype=np.int8)


def blank(shape: Shape) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int8)


def double_payload(shape: Shape = SHAPE) -> bytes:
    return pack_portable(straight_header(1, 1), double_model(shape))


def single_call(payload: bytes, inputs: int = 1, outputs: int = 1, shape: Shape = SHAPE) -> bytes:
    """Returns a program with one call of the payload, with all tensors of one shape."""
    call = Call(payload, tuple(range(inputs)), (shape,) * outputs)
    return pte([call], [blank(shape)] * inputs, range(inputs, inputs + outputs))


def as_arrays(outputs: torch.Tensor | tuple[torch.Tensor, ...]) -> list[Int8]:
    return [output.numpy() for output in (outputs if isinstance(outputs, tuple) else (outputs,))]


def assert_equal(outputs: torch.Tensor | tuple[torch.Tensor, ...], expected: list[Int8]) -> None:
    found = as_arrays(outputs)
    assert [array.shape for array in found] == [array.shape for array in expected]
    for got, want in zip(found, expected, strict=True):
        np.testing.assert_array_equal(got, want)


def device_payload() -> bytes:
    words = np.zeros(18, "<u4")
    words[0] = MICROCODE_MAGIC
    words[6:9] = 72, 16, 1
    words[11:13] = 1
    return pack_device(straight_header(1, 1), words.tobytes(), bytes(16), b"\1")
