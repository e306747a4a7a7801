"""Parses texts such as "1,3,32,32" that describe inputs. Does not import torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

from openneutron.core.messages import did_you_mean
from openneutron.errors import OptionError

__all__ = ["DTYPES", "InputShape", "image_size", "parse_input"]

DTYPES = ("float32", "int64", "int32", "int16", "int8", "uint8", "bool")
_SIZE = r"\d{1,4000}"  # `int` takes at most 4,300 digits
_INPUT = re.compile(
    rf"(?:(?P<name>[A-Za-z_]\w*)=)?(?:(?P<dtype>[a-z]\w*):)?(?P<shape>(?:{_SIZE}(?:[,x]{_SIZE})*)?,?)"
)


@dataclass(frozen=True)
class InputShape:
    """The name, the dtype and the sizes of an input."""

    name: str | None
    dtype: str
    sizes: tuple[int, ...]


def parse_input(text: str) -> InputShape:
    """Parses "1,3,32,32" or "1x3x32x32", with an optional dtype and name: "mask=bool:1,128".

    Raises `OptionError` for another text, for an unknown dtype and for a size of 0.
    """
    match = _INPUT.fullmatch(text.replace(" ", "").strip("()[]"))
    if match is None:
        raise OptionError(f"An input is a shape such as 1,3,32,32, int64:1,128 or mask=bool:1,128, not {text!r}.")
    dtype = match["dtype"] or "float32"
    if dtype not in DTYPES:
        raise OptionError(
            f"The dtype of an input is one of {', '.join(DTYPES)}, not {dtype!r}.{did_you_mean(dtype, DTYPES)}"
        )
    sizes = tuple(int(size) for size in re.split("[,x]", match["shape"]) if size)
    if 0 in sizes:
        raise OptionError(f"The sizes of an input are at least 1, but {text!r} has a 0. Give 1 for the batch size.")
    return InputShape(match["name"], dtype, sizes)


def image_size(text: str) -> tuple[int, int]:
    """Returns height and width from a text such as "96x128". Raises `OptionError` for another text."""
    found = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text, re.ASCII)
    if found is None:
        raise OptionError(f"'{text}' is not a size of images. Give height and width in pixels, such as 96x128.")
    return int(found[1]), int(found[2])
