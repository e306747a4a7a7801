"""Data of any form as inputs of a model: to calibrate, to analyze and to evaluate with."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils.data import DataLoader, Dataset

from openneutron.errors import CalibrationError, InputError, ModelError, OptionError
from openneutron.fx import placeholders

__all__ = [
    "Data", "InputForm", "aligned", "calibration_inputs", "described", "forms_of", "in_batches", "inputs_in",
    "items_of",
]  # fmt: skip

Inputs = tuple[Tensor, ...]
Data = Iterable[Any] | Dataset[Any] | str | os.PathLike[str]
"""What `inputs_in` takes."""

IMAGES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".pgm", ".tif", ".tiff", ".webp"})
ARRAYS = frozenset({".npy"})
ALIGNMENT = 64  # bytes; that of memory that torch allocates


@dataclass(frozen=True)
class InputForm:
    """What a model takes as one of its inputs: sizes of its dimensions, None where any will do, and its dtype.

    `name` is the argument of the model's `forward`.
    """

    name: str
    sizes: tuple[int | None, ...]
    dtype: torch.dtype

    @property
    def batch(self) -> int | None:
        """The size of the first dimension; 1 without any."""
        return self.sizes[0] if self.sizes else 1

    def takes_sizes(self, sizes: Sequence[int]) -> bool:
        """Whether a tensor may have these `sizes`."""
        return len(sizes) == len(self.sizes) and all(
            wanted in (None, size) for wanted, size in zip(self.sizes, sizes, strict=True)
        )

    def takes(self, value: Any) -> bool:
        """Whether this is a tensor of these sizes and this dtype."""
        return isinstance(value, Tensor) and value.dtype == self.dtype and self.takes_sizes(value.shape)

    def __str__(self) -> str:
        sizes = ", ".join("any" if size is None else str(size) for size in self.sizes)
        return f"{self.dtype} ({sizes}{',' * (len(self.sizes) == 1)})"


def forms_of(module: GraphModule) -> tuple[InputForm, ...]:
    """What an exported module takes. Raises `ModelError` where that is not tensors alone, or not known."""
    return tuple(map(_form_of, placeholders(module.graph)))


def _form_of(node: Node) -> InputForm:
    example = node.meta.get("val")
    if not isinstance(example, Tensor):
        raise ModelError(
            f"The input '{node.target}' of the exported module is no tensor ({example!r}). Export a model that takes "
            "tensors alone."
        )
    sizes = tuple(size if isinstance(size, int) else None for size in example.shape)  # of a dynamic shape, a symbol
    return InputForm(str(node.target), sizes, example.dtype)


def calibration_inputs(
    data: Data, forms: Sequence[InputForm], *, transform: Callable[[Any], Any] | None = None
) -> list[Inputs]:
    """All of `inputs_in`. Raises `CalibrationError` for data that do not fit or are empty, and `OptionError`."""
    try:
        found = list(inputs_in(data, forms, transform=transform))
    except InputError as error:
        raise CalibrationError(f"This cannot be calibrated with: {error}") from error
    if not found:
        raise CalibrationError("The calibration data are empty: give at least one input, better a hundred.")
    return found


def inputs_in(
    data: Data, forms: Sequence[InputForm], *, transform: Callable[[Any], Any] | None = None
) -> Iterator[Inputs]:
    """The inputs that `data` has, each as `forms` say, one after the other as they are asked for.

    `data` is an iterable of tensors, of tuples or lists (what comes behind the inputs, such as a label, is dropped), or
    of mappings from the names of `forms`; a data set with items by number; a DataLoader, whose batches are split into
    the model's batch size (what does not fill the last one is left out); one tensor, split likewise; or a folder of
    images or .npy files, read in the order of their paths. The dimension of a batch of one may be missing. `transform`
    makes an input of each item; of an image it gets PIL's. Without it, an image becomes RGB, or grey for a model with
    one channel, of the model's size and from 0 to 1: a model that wants its images normalized needs that in
    `transform`.

    Raises `InputError` for what fits none of that, or is not finite, and `OptionError` for a `transform` that cannot be
    called.
    """
    if transform is not None and not callable(transform):
        raise OptionError(f"transform is a function of one item of the data, not {transform!r}.")
    for index, item in enumerate(_transformed_items(data, forms, transform)):
        values = _values(item, forms, index)
        if isinstance(data, DataLoader) and _is_batch(values, forms):
            batches: Iterable[Inputs] = in_batches(values, [form.batch for form in forms])
        else:
            batches = [values]
        for inputs in batches:
            yield _checked(inputs, forms, index)


def items_of(data: Iterable[Any] | Dataset[Any]) -> Iterable[Any]:
    """What `data` hold, one after the other: an iterable as it is, a data set by number. Raises `InputError`."""
    if not isinstance(data, Mapping):
        if isinstance(data, Iterable):
            return data
        if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
            return (data[index] for index in range(len(data)))
    raise InputError(
        "data are an iterable of inputs, a tensor of samples, a data set, or a folder of images or .npy files, not "
        f"{data!r}."
    )


def in_batches(values: Sequence[Any], sizes: Sequence[int | None]) -> Iterator[tuple[Any, ...]]:
    """`values` cut along their first dimension, each into parts of its size of `sizes`; where that is None, into ones.

    What does not fill the last part is left out.
    """
    steps = [size or 1 for size in sizes]
    for number in range(min(len(value) // step for value, step in zip(values, steps, strict=True))):
        yield tuple(value[number * step : (number + 1) * step] for value, step in zip(values, steps, strict=True))


def aligned(value: Any) -> Any:
    """`value`, a tensor copied where it does not begin at a multiple of `ALIGNMENT` bytes, as a slice may not.

    Matrix products of MKL differ in the last bit by where their operands begin. What is computed of a copy is the same
    in whatever memory the sample came, and in another process.
    """
    return value.clone() if isinstance(value, Tensor) and value.data_ptr() % ALIGNMENT else value


def described(values: Sequence[Any]) -> str:
    """Dtypes and shapes, for messages."""
    words = (
        f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__ for value in values
    )
    return f"({', '.join(words)})"


def _transformed_items(data: Data, forms: Sequence[InputForm], transform: Callable[[Any], Any] | None) -> Iterable[Any]:
    if isinstance(data, (str, os.PathLike)):
        return _files(Path(data), forms, transform)
    items: Iterable[Any] = _samples(data, forms[0].batch or 1) if isinstance(data, Tensor) else items_of(data)
    return items if transform is None else map(transform, items)


def _samples(data: Tensor, size: int) -> Iterable[Tensor]:
    return (part for part in data.split(size) if len(part) == size) if data.dim() else [data]


def _files(folder: Path, forms: Sequence[InputForm], transform: Callable[[Any], Any] | None) -> Iterator[Any]:
    if not folder.is_dir():
        raise InputError(f"The folder '{folder}' is not there.")
    if len(forms) != 1:
        raise InputError("A folder has one input a file; this model takes several. Give an iterable of tuples.")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGES | ARRAYS)
    if not paths:
        raise InputError(f"No file in '{folder}' is one of {', '.join(sorted(IMAGES | ARRAYS))}.")
    return (_file(path, forms[0], transform) for path in paths)


def _file(path: Path, form: InputForm, transform: Callable[[Any], Any] | None) -> Any:
    if path.suffix.lower() in ARRAYS:
        try:
            array = torch.from_numpy(np.load(path))
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{path} cannot be read as an array: {error}") from error
        return array if transform is None else transform(array)
    try:
        from PIL import Image
    except ImportError as error:
        raise InputError("Images are read with Pillow, which is not installed: pip install pillow.") from error
    try:
        with Image.open(path) as image:
            image.load()
            return _pixels(image, form) if transform is None else transform(image)
    except OSError as error:
        raise InputError(f"{path} cannot be read as an image: {error}") from error


def _pixels(image: Any, form: InputForm) -> Tensor:
    """An image [1, C, H, W] from 0 to 1, as the model takes it: not normalized."""
    _, channels, height, width = form.sizes if len(form.sizes) == 4 else (None,) * 4
    if channels not in (1, 3) or height is None or width is None:
        raise InputError(f"The model takes {form}, which is no image of 1 or 3 channels. Give a transform.")
    image = image.convert("L" if channels == 1 else "RGB").resize((width, height))
    pixels = torch.from_numpy(np.array(image)).float() / 255
    return pixels.reshape(height, width, channels).permute(2, 0, 1)[None].contiguous()


def _values(item: Any, forms: Sequence[InputForm], index: int) -> tuple[Any, ...]:
    """What `item` has for each input, or for fewer."""
    if isinstance(item, (tuple, list)) and item and isinstance(item[0], (tuple, list, Mapping)):
        item = item[0]  # inputs and label
    if not isinstance(item, Mapping):
        return tuple(item)[: len(forms)] if isinstance(item, (tuple, list)) else (item,)
    for form in forms:
        if form.name not in item:
            near = difflib.get_close_matches(form.name, map(str, item), n=1)
            hint = f" Is it '{near[0]}'?" if near else ""
            raise InputError(f"Item {index} of the data has no '{form.name}', which forward takes.{hint}")
    return tuple(item[form.name] for form in forms)


def _is_batch(values: Sequence[Any], forms: Sequence[InputForm]) -> bool:
    """Whether these are tensors of samples, which differ from what the model takes in their first dimension alone."""
    return len(values) == len(forms) and all(
        isinstance(value, Tensor) and bool(form.sizes) and form.takes_sizes((form.batch or 1, *value.shape[1:]))
        for value, form in zip(values, forms, strict=True)
    )


def _checked(values: tuple[Any, ...], forms: Sequence[InputForm], index: int) -> Inputs:
    """`values` as the model takes them, with the dimension of a batch of one where only that was missing."""
    if len(values) == len(forms):
        values = tuple(map(_with_batch, values, forms))
    if len(values) != len(forms) or not all(form.takes(value) for value, form in zip(values, forms, strict=True)):
        taken = ", ".join(map(str, forms))
        raise InputError(f"Item {index} of the data is {described(values)}; the model takes ({taken}).")
    if not all(bool(torch.isfinite(value).all()) for value in values if value.is_floating_point()):
        raise InputError(f"Item {index} of the data holds NaN or infinite values.")
    return tuple(map(aligned, values))


def _with_batch(value: Any, form: InputForm) -> Any:
    return value[None] if isinstance(value, Tensor) and form.takes_sizes((1, *value.shape)) else value
