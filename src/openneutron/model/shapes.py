"""Makes example inputs from texts such as "1,3,32,32"."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from openneutron.errors import OptionError

__all__ = ["example_inputs_of"]

_DTYPES = {
    "float32": torch.float32, "int64": torch.int64, "int32": torch.int32, "int16": torch.int16, "int8": torch.int8,
    "uint8": torch.uint8, "bool": torch.bool,
}  # fmt: skip
_INPUT = re.compile(r"(?:(?P<name>[A-Za-z_]\w*)=)?(?:(?P<dtype>[a-z]\w*):)?(?P<shape>(?:\d+(?:[,x]\d+)*)?,?)")
_SEED = 0


def example_inputs_of(texts: Sequence[str], *, channels_last: bool = False) -> tuple[Any, ...] | dict[str, Any]:
    """Returns an example tensor for each text: a tuple, or a mapping from names if all texts have names.

    A text is "1,3,32,32" or "1x3x32x32", with an optional dtype and name: "mask=bool:1,128". Tensors of floats hold
    normal random numbers of a fixed seed, and tensors of integers zeros. With `channels_last`, tensors of four
    dimensions have that memory format. Raises `OptionError` for another text.
    """
    generator = torch.Generator().manual_seed(_SEED)
    found = [_example(text, generator, channels_last=channels_last) for text in texts]
    named = {name: value for name, value in found if name is not None}
    if not named:
        return tuple(value for _, value in found)
    if len(named) != len(found):
        raise OptionError("Either all inputs have different names (name=1,3,32,32), or none has a name.")
    return named


def _example(text: str, generator: torch.Generator, *, channels_last: bool) -> tuple[str | None, Tensor]:
    match = _INPUT.fullmatch(text.replace(" ", "").strip("()[]"))
    if match is None:
        raise OptionError(f"An input is a shape such as 1,3,32,32, int64:1,128 or mask=bool:1,128, not {text!r}.")
    dtype = match["dtype"] or "float32"
    if dtype not in _DTYPES:
        raise OptionError(f"The dtype of an input is one of {', '.join(_DTYPES)}, not {dtype!r}.")
    sizes = [int(size) for size in re.split("[,x]", match["shape"]) if size]
    if _DTYPES[dtype].is_floating_point:
        value = torch.randn(sizes, generator=generator)
    else:
        value = torch.zeros(sizes, dtype=_DTYPES[dtype])
    return match["name"], value.contiguous(memory_format=torch.channels_last) if _is_image(
        value, channels_last
    ) else value


def _is_image(value: Tensor, channels_last: bool) -> bool:
    return channels_last and value.dim() == 4
