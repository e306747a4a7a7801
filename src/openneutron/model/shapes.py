"""Makes example inputs from texts such as "1,3,32,32"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from openneutron.errors import OptionError
from openneutron.settings.input_shapes import InputShape, parse_input

__all__ = ["example_inputs_of"]

_SEED = 0


def example_inputs_of(texts: Sequence[str], *, channels_last: bool = False) -> tuple[Any, ...] | dict[str, Any]:
    """Returns an example tensor for each text: a tuple, or a mapping from names if all texts have names.

    `parse_input` describes the texts. Tensors of floats hold normal random numbers of a fixed seed, and tensors of
    integers zeros. With `channels_last`, tensors of four dimensions have that memory format. Raises `OptionError` for
    another text, and for a tensor that does not fit in memory.
    """
    generator = torch.Generator().manual_seed(_SEED)
    shapes = list(map(parse_input, texts))
    values = [_example(shape, generator, channels_last=channels_last) for shape in shapes]
    named = {shape.name: value for shape, value in zip(shapes, values, strict=True) if shape.name is not None}
    if not named:
        return tuple(values)
    if len(named) != len(values):
        raise OptionError("Either all inputs have different names (name=1,3,32,32), or none has a name.")
    return named


def _example(shape: InputShape, generator: torch.Generator, *, channels_last: bool) -> Tensor:
    dtype = getattr(torch, shape.dtype)
    try:
        if dtype.is_floating_point:
            value = torch.randn(shape.sizes, generator=generator)
        else:
            value = torch.zeros(shape.sizes, dtype=dtype)
    except (RuntimeError, TypeError, OverflowError) as error:  # torch raises these for sizes that are too large
        sizes = ",".join(map(str, shape.sizes))
        raise OptionError(
            f"An input of shape {sizes} does not fit in memory. Give the shape that the model takes."
        ) from error
    is_image = channels_last and value.dim() == 4
    return value.contiguous(memory_format=torch.channels_last) if is_image else value
