"""Inputs out of whatever yields them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.fx import GraphModule

from openneutron.errors import InputError
from openneutron.fx import placeholders

__all__ = ["samples_of"]


def samples_of(module: GraphModule, data: Iterable[Any]) -> Iterator[tuple[torch.Tensor, ...]]:
    """The inputs in `data`: of each item as many tensors as `module` takes. Raises `InputError` for what has not."""
    if not isinstance(data, Iterable):
        raise InputError(f"data is an iterable of inputs, not {data!r}.")
    count = len(placeholders(module.graph))
    for index, item in enumerate(data):
        values = item if isinstance(item, (tuple, list)) else (item,)
        if values and isinstance(values[0], (tuple, list)):  # (inputs, label)
            values = values[0]
        inputs = tuple(values[:count])
        if len(inputs) != count or not all(isinstance(value, torch.Tensor) for value in inputs):
            kinds = ", ".join(type(value).__name__ for value in values)
            raise InputError(f"Sample {index} is ({kinds}); the model takes {count} tensors.")
        yield inputs
