"""Data of any form as inputs of a model: to calibrate, to analyze and to evaluate with."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils.data import DataLoader, Dataset

from openneutron.core.fx import placeholders
from openneutron.errors import CalibrationError, InputError, ModelError, OptionError
from openneutron.model.arguments import MISSING, Leaf, argument_names, leaves_at
from openneutron.model.arguments import Path as LeafPath
from openneutron.model.examples import in_tensors, leaves_of
from openneutron.model.state import Stream

__all__ = [
    "Data", "InputForm", "aligned", "calibration_inputs", "described", "first_steps", "forms_of", "in_batches",
    "inputs_in", "items_of", "streams_in",
]  # fmt: skip

Inputs = tuple[Any, ...]
"""A value for each input of an exported model: a tensor, or the number, text or None that it was exported with."""
Data = Iterable[Any] | Dataset[Any] | str | os.PathLike[str]
"""What `inputs_in` takes."""

IMAGES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".pgm", ".tif", ".tiff", ".webp"})
ARRAYS = frozenset({".npy"})
ALIGNMENT = 64  # bytes; that of memory that torch allocates


@dataclass(frozen=True)
class InputForm:
    """What a model takes as one of its inputs: sizes of its dimensions, None where any will do, and its dtype.

    `name` is the path as text, and `path` leads to the input in the arguments of `forward`. An input that is no tensor
    has no dtype, but the `constant` that the model was exported with.
    """

    name: str
    sizes: tuple[int | None, ...]
    dtype: torch.dtype | None
    path: LeafPath = ()
    constant: int | float | bool | str | None = None

    @property
    def is_tensor(self) -> bool:
        """Whether the input is a tensor, and not a number, a text or None."""
        return self.dtype is not None

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
        """Whether this is a tensor of these sizes and this dtype, or the constant."""
        if not self.is_tensor:
            return type(value) is type(self.constant) and bool(value == self.constant)
        return isinstance(value, Tensor) and value.dtype == self.dtype and self.takes_sizes(value.shape)

    def __str__(self) -> str:
        if not self.is_tensor:
            return repr(self.constant)
        sizes = ", ".join("any" if size is None else str(size) for size in self.sizes)
        return f"{self.dtype} ({sizes}{',' * (len(self.sizes) == 1)})"


def forms_of(module: GraphModule) -> tuple[InputForm, ...]:
    """The forms of the inputs of an exported module. Raises `ModelError` if one is not known."""
    return tuple(map(_form_of, placeholders(module.graph), leaves_of(module)))


def _form_of(node: Node, leaf: Leaf) -> InputForm:
    example = node.meta.get("val")
    if not leaf.is_tensor:
        return InputForm(leaf.name, (), None, leaf.path, leaf.constant)
    if not isinstance(example, Tensor):
        raise ModelError(
            f"The input '{leaf.name}' of the exported module is neither a tensor nor a number, a text or None "
            f"({example!r}). Export a model that takes these."
        )
    sizes = tuple(size if isinstance(size, int) else None for size in example.shape)  # of a dynamic shape, a symbol
    return InputForm(leaf.name, sizes, example.dtype, leaf.path)


def calibration_inputs(
    data: Data, forms: Sequence[InputForm], *, transform: Callable[[Any], Any] | None = None
) -> list[list[Inputs]]:
    """All of `streams_in`. Raises `CalibrationError` for data that do not fit or are empty, and `OptionError`."""
    if not forms:
        raise CalibrationError("The model has no inputs, so there is nothing to calibrate with.")
    try:
        found = [list(steps) for steps in streams_in(data, forms, transform=transform)]
    except InputError as error:
        raise CalibrationError(f"This cannot be calibrated with: {error}") from error
    if not any(found):
        raise CalibrationError("The calibration data are empty: give at least one input, better a hundred.")
    return found


def streams_in(
    data: Data, forms: Sequence[InputForm], *, transform: Callable[[Any], Any] | None = None
) -> Iterator[Iterator[Inputs]]:
    """The inputs of each `Stream` in `data`; data without a `Stream` are one stream.

    Raises `InputError` for data that mix streams with other items, and the errors of `inputs_in`.
    """
    if isinstance(data, Stream):
        yield inputs_in(data.steps, forms, transform=transform)
        return
    if isinstance(data, (str, os.PathLike, Tensor, DataLoader)):
        yield inputs_in(data, forms, transform=transform)
        return
    items = iter(items_of(data))
    first = list(islice(items, 1))
    if not any(isinstance(item, Stream) for item in first):
        yield inputs_in(chain(first, items), forms, transform=transform)
        return
    for index, item in enumerate(chain(first, items)):
        if not isinstance(item, Stream):
            raise InputError(f"Item {index} of the data is no Stream, as those before it are.")
        yield inputs_in(item.steps, forms, transform=transform)


def first_steps(streams: Iterable[Iterable[Inputs]], count: int) -> list[list[Inputs]]:
    """The first `count` steps over all streams, as a list for each stream."""
    found: list[list[Inputs]] = []
    for steps in streams:
        found.append(list(islice(steps, count)))
        count -= len(found[-1])
        if not count:
            break
    return found


def inputs_in(
    data: Data, forms: Sequence[InputForm], *, transform: Callable[[Any], Any] | None = None
) -> Iterator[Inputs]:
    """The inputs that `data` has, each as `forms` say, one after the other as they are asked for.

    `data` is an iterable of tensors or numpy arrays, of tuples or lists (what comes behind the inputs, such as a label,
    is dropped), or of mappings from the names of forward's arguments; arguments may be lists, mappings and dataclasses
    of inputs, and inputs that are no tensors may be left out. It may also be a data set with items by number; a
    DataLoader, whose batches are split into the model's batch size (what does not fill the last one is left out); one
    tensor, split likewise; or a folder of images or .npy files, read in the order of their paths. The dimension of a
    batch of one may be missing. `transform` makes an input of each item; of an image it gets PIL's. Without it, an
    image becomes RGB, or grey for a model with one channel, of the model's size and from 0 to 1: a model that wants its
    images normalized needs that in `transform`.

    Raises `InputError` for what fits none of that, or is not finite, and `OptionError` for a `transform` that cannot be
    called.
    """
    if transform is not None and not callable(transform):
        raise OptionError(f"transform is a function of one item of the data, not {transform!r}.")
    for index, item in enumerate(_transformed_items(data, forms, transform)):
        values = _values(item, forms, index, is_batch=isinstance(data, DataLoader))
        if isinstance(data, DataLoader) and _is_batch(values, forms):
            batches: Iterable[Inputs] = _cut(values, forms)
        else:
            batches = [values]
        for inputs in batches:
            yield _checked(inputs, forms, index)


def _cut(values: Sequence[Any], forms: Sequence[InputForm]) -> Iterator[Inputs]:
    """Cut a DataLoader's batch into the model's batches; constants are repeated in each."""
    tensors = [index for index, form in enumerate(forms) if form.is_tensor]
    for parts in in_batches([values[index] for index in tensors], [forms[index].batch for index in tensors]):
        inputs = list(values)
        for index, part in zip(tensors, parts, strict=True):
            inputs[index] = part
        yield tuple(inputs)


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
    """`value`, copied if it is a tensor that does not begin at a multiple of `ALIGNMENT` bytes.

    The last bit of MKL's matrix products depends on the alignment of their operands. With aligned samples, results do
    not depend on the memory or the process that a sample comes from.
    """
    return value.clone() if isinstance(value, Tensor) and value.data_ptr() % ALIGNMENT else value


def described(values: Sequence[Any]) -> str:
    """Dtypes and shapes, for messages."""
    words = (
        f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else _word_for(value) for value in values
    )
    return f"({', '.join(words)})"


def _word_for(value: Any) -> str:
    return repr(value) if isinstance(value, (int, float, bool, str, type(None))) else type(value).__name__


def _transformed_items(data: Data, forms: Sequence[InputForm], transform: Callable[[Any], Any] | None) -> Iterable[Any]:
    if isinstance(data, (str, os.PathLike)):
        return _files(Path(data), forms, transform)
    data = torch.from_numpy(data) if isinstance(data, np.ndarray) else data
    batch = next((form.batch for form in forms if form.is_tensor), None) or 1
    items: Iterable[Any] = _samples(data, batch) if isinstance(data, Tensor) else items_of(data)
    return items if transform is None else map(transform, items)


def _samples(data: Tensor, size: int) -> Iterable[Tensor]:
    return (part for part in data.split(size) if len(part) == size) if data.dim() else [data]


def _files(folder: Path, forms: Sequence[InputForm], transform: Callable[[Any], Any] | None) -> Iterator[Any]:
    if not folder.is_dir():
        raise InputError(f"The folder '{folder}' is not there.")
    forms = [form for form in forms if form.is_tensor]
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


def _values(item: Any, forms: Sequence[InputForm], index: int, *, is_batch: bool) -> tuple[Any, ...]:
    """The values for the inputs: the first reading of `item` that fits, else its first one without missing values."""
    readings = [tuple(map(in_tensors, values)) for values in _readings(item, forms)]
    for values in readings:
        fits = map(_fits_in_a_batch if is_batch else _fits, values, forms)
        if len(values) == len(forms) and all(fits):
            return values
    if isinstance(item, Mapping):
        _check_that_none_is_missing(item, forms, index)
    return tuple(value for value in readings[0] if value is not MISSING)


def _readings(item: Any, forms: Sequence[InputForm]) -> Iterator[Sequence[Any]]:
    """The readings of `item`: arguments by name or position, all inputs flat, one argument, or these with a label."""
    paths = [form.path or (form.name,) for form in forms]
    sequence = isinstance(item, (tuple, list))
    if sequence and item and _holds_inputs(item[0]):
        yield from _readings(item[0], forms)  # inputs and label
    if isinstance(item, Mapping):
        yield _filled(leaves_at(paths, (), {str(name): value for name, value in item.items()}), forms)
    args = tuple(item) if sequence else (item,)
    tensors = sum(form.is_tensor for form in forms)
    yield _filled(leaves_at(paths, args, {}), forms)
    if len(args) >= tensors and len(args) != len(argument_names(paths)):
        flat = iter(args)
        yield [next(flat) if form.is_tensor else form.constant for form in forms]
    yield _filled(leaves_at(paths, (item,), {}), forms)


def _holds_inputs(value: Any) -> bool:
    return isinstance(value, (tuple, list, Mapping)) or dataclasses.is_dataclass(value)


def _filled(values: Sequence[Any], forms: Sequence[InputForm]) -> list[Any]:
    """`values`, with constants in the place of those that were left out."""
    pairs = zip(values, forms, strict=True)
    return [form.constant if value is MISSING and not form.is_tensor else value for value, form in pairs]


def _fits(value: Any, form: InputForm) -> bool:
    return form.takes(_with_batch(value, form))


def _fits_in_a_batch(value: Any, form: InputForm) -> bool:
    return _fits(value, form) or (form.is_tensor and _is_batch_of(value, form))


def _check_that_none_is_missing(item: Mapping[Any, Any], forms: Sequence[InputForm], index: int) -> None:
    values = leaves_at([form.path or (form.name,) for form in forms], (), {str(key): item[key] for key in item})
    for value, form in zip(values, forms, strict=True):
        if value is MISSING and form.is_tensor:
            near = difflib.get_close_matches(form.name, map(str, item), n=1)
            hint = f" Is it '{near[0]}'?" if near else ""
            raise InputError(f"Item {index} of the data has no '{form.name}', which forward takes.{hint}")


def _is_batch(values: Sequence[Any], forms: Sequence[InputForm]) -> bool:
    """Whether these are tensors of samples, which differ from what the model takes in their first dimension alone."""
    return len(values) == len(forms) and all(
        _is_batch_of(value, form) for value, form in zip(values, forms, strict=True) if form.is_tensor
    )


def _is_batch_of(value: Any, form: InputForm) -> bool:
    return isinstance(value, Tensor) and bool(form.sizes) and form.takes_sizes((form.batch or 1, *value.shape[1:]))


def _checked(values: tuple[Any, ...], forms: Sequence[InputForm], index: int) -> Inputs:
    """`values` as the model takes them, with the dimension of a batch of one where only that was missing."""
    if len(values) == len(forms):
        values = tuple(map(_with_batch, values, forms))
    if len(values) != len(forms) or not all(form.takes(value) for value, form in zip(values, forms, strict=True)):
        taken = ", ".join(map(str, forms))
        raise InputError(f"Item {index} of the data is {described(values)}; the model takes ({taken}).")
    # Minus infinity may be part of a mask. Observers refuse it in other values.
    floats = (value for value in values if isinstance(value, Tensor) and value.is_floating_point())
    if not all(bool((value < torch.inf).all()) for value in floats):
        raise InputError(f"Item {index} of the data holds NaN or infinite values.")
    return tuple(map(aligned, values))


def _with_batch(value: Any, form: InputForm) -> Any:
    is_one = isinstance(value, Tensor) and form.is_tensor and form.takes_sizes((1, *value.shape))
    return value[None] if is_one else value
