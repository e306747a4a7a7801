"""Converts data of any form to inputs of a model, for calibration, analysis and evaluation."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils.data import DataLoader, Dataset

from openneutron.core.fx import placeholders
from openneutron.data.audio import AudioTransform, Waveform
from openneutron.data.images import ImageTransform, is_picture
from openneutron.data.samples import Samples, read_data
from openneutron.data.shape_advice import size_advice
from openneutron.data.transforms import DefaultTransform, Transform, fitted
from openneutron.errors import CalibrationError, InputError, ModelError, OptionError
from openneutron.model.arguments import MISSING, Leaf, argument_names, leaves_at
from openneutron.model.arguments import Path as LeafPath
from openneutron.model.examples import leaves_of, to_tensors
from openneutron.model.sample_store import SampleStore
from openneutron.model.state import Stream

__all__ = [
    "Data", "InputForm", "Inputs", "align", "calibration_inputs", "describe", "first_steps", "forms_of", "in_batches",
    "inputs_in", "is_batch_of", "items_of", "streams_in",
]  # fmt: skip

Inputs = tuple[Any, ...]
"""A value for each input of an exported model: a tensor, or the constant that the model was exported with."""
Data = Iterable[Any] | Dataset[Any] | Samples | str | os.PathLike[str]
"""The forms of data that `inputs_in` takes."""

FEWEST_SAMPLES = 3  # a sequence of this many samples is none of an input and a label
ALIGNMENT = 64  # bytes; the alignment of memory that torch allocates


@dataclass(frozen=True)
class InputForm:
    """One input of a model: the sizes of its dimensions, None for a dimension of any size, and its dtype.

    `path` identifies the input in the arguments of `forward`, and `name` is the path as text. An input that is not a
    tensor has dtype None and a `constant`, the value that the model was exported with.
    """

    name: str
    sizes: tuple[int | None, ...]
    dtype: torch.dtype | None
    path: LeafPath = ()
    constant: int | float | bool | str | None = None

    @property
    def is_tensor(self) -> bool:
        """Whether the input is a tensor, as opposed to a number, a text or None."""
        return self.dtype is not None

    @property
    def batch(self) -> int | None:
        """The size of the first dimension; 1 for an input without dimensions."""
        return self.sizes[0] if self.sizes else 1

    def accepts_sizes(self, sizes: Sequence[int]) -> bool:
        """Whether the input may be a tensor of these `sizes`."""
        return len(sizes) == len(self.sizes) and all(
            wanted in (None, size) for wanted, size in zip(self.sizes, sizes, strict=True)
        )

    def takes(self, value: Any) -> bool:
        """Whether `value` is a tensor with matching sizes and dtype, or equals the constant."""
        if not self.is_tensor:
            return type(value) is type(self.constant) and bool(value == self.constant)
        return isinstance(value, Tensor) and value.dtype == self.dtype and self.accepts_sizes(value.shape)

    def __str__(self) -> str:
        if not self.is_tensor:
            return repr(self.constant)
        sizes = ", ".join("any" if size is None else str(size) for size in self.sizes)
        return f"{self.dtype} ({sizes}{',' * (len(self.sizes) == 1)})"


def forms_of(module: GraphModule) -> tuple[InputForm, ...]:
    """Returns the forms of the inputs of an exported module. Raises `ModelError` for an input of unknown form."""
    return tuple(map(_form_of, placeholders(module.graph), leaves_of(module)))


def _form_of(node: Node, leaf: Leaf) -> InputForm:
    example = node.meta.get("val")
    if not leaf.is_tensor:
        return InputForm(leaf.name, (), None, leaf.path, leaf.constant)
    if not isinstance(example, Tensor):
        raise ModelError(
            f"The input '{leaf.name}' of the exported module must be a tensor, a number, a text or None, "
            f"not {example!r}. Export a model whose inputs have these types."
        )
    sizes = tuple(size if isinstance(size, int) else None for size in example.shape)  # dynamic: SymInt
    return InputForm(leaf.name, sizes, example.dtype, leaf.path)


def calibration_inputs(
    data: Data, forms: Sequence[InputForm], *, transform: Callable[[Any], Any] | None = None
) -> list[list[Inputs]]:
    """Returns the results of `streams_in` as lists. Inputs beyond the limit of `SampleStore` are kept in files.

    Raises `CalibrationError` for data that are empty, do not match `forms` or cannot be kept, and `OptionError` for a
    wrong `transform`.
    """
    if not forms:
        raise CalibrationError("The model has no inputs, so it cannot be calibrated.")
    try:
        store, found = SampleStore(), list[list[Inputs]]()
        for steps in streams_in(data, forms, transform=transform):
            found.append([])
            for inputs in steps:
                store.keep(found[-1], inputs)
        store.write()
    except InputError as error:
        raise CalibrationError(f"The calibration data do not fit the model: {error}") from error
    if not any(found):
        raise CalibrationError("The calibration data are empty. Give at least one input, or better about a hundred.")
    return found


def streams_in(
    data: Data, forms: Sequence[InputForm], *, transform: Callable[[Any], Any] | None = None
) -> Iterator[Iterator[Inputs]]:
    """Returns the inputs of each `Stream` in `data`. Data without a `Stream` count as one stream.

    Raises `InputError` for data that mix streams with other items, and the errors of `inputs_in`.
    """
    if isinstance(data, Stream):
        yield inputs_in(data.steps, forms, transform=transform)
        return
    opened, transform = _opened(data, transform)
    if isinstance(opened, (Samples, Tensor, DataLoader)):
        yield inputs_in(opened, forms, transform=transform)
        return
    items = iter(items_of(opened))
    first = list(islice(items, 1))
    if not any(isinstance(item, Stream) for item in first):
        yield inputs_in(chain(first, items), forms, transform=transform)
        return
    for index, item in enumerate(chain(first, items)):
        if not isinstance(item, Stream):
            raise InputError(
                f"Item {index} of the data is not a Stream, but the items before it are Streams. Make all items "
                "Streams, or none."
            )
        yield inputs_in(item.steps, forms, transform=transform)


def first_steps(streams: Iterable[Iterable[Inputs]], count: int) -> list[list[Inputs]]:
    """Returns the first `count` steps of all streams together, as a list for each stream."""
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
    """Returns an iterator over the inputs in `data`, in the forms of `forms`. Items are read when they are needed.

    `data` is one of:

    - An iterable of tensors, numpy arrays, tuples, lists, or mappings from the names of forward's arguments or from the
      positions "input0", "input1" ... Arguments may be lists, mappings and dataclasses of inputs. Items after the
      inputs, such as a label, are dropped. Inputs that are not tensors may be left out.
    - A data set with `__getitem__` and `__len__`.
    - A DataLoader, whose batches are split into batches of the model's size. An incomplete last batch is dropped.
    - One tensor of samples, which is split in the same way.
    - `Samples` of `openneutron.data`, or anything that `read_data` reads: a folder, a file, or the name of a function,
      "file.py:function".

    The first dimension of a sample may be missing if the model's batch size is 1; samples of files are stacked to
    larger batches. `transform` converts each item to an input; for an image file, it gets a PIL image. Without
    `transform`, an image is converted to RGB, or to grey for a model with one channel, resized to the model's height
    and width, and scaled to 0..1, and a recording is padded or cut to the model's length. A model that expects
    normalized images needs a `transform` that normalizes, such as `ImageTransform(mean=..., std=...)`.

    Raises `InputError` for data of another form and for values that are not finite, and `OptionError` for a `transform`
    that is not callable.
    """
    if transform is not None and not callable(transform):
        raise OptionError(f"transform must be a function of one item of the data, not {transform!r}.")
    data, transform = _opened(data, transform)
    for name, item in _transformed_items(data, forms, transform):
        values = _values(item, forms, name, is_batch=isinstance(data, DataLoader))
        if isinstance(data, DataLoader) and _is_batch(values, forms):
            batches: Iterable[Inputs] = _split_batch(values, forms)
        else:
            batches = [values]
        for inputs in batches:
            yield _check_values(inputs, forms, name)


def _split_batch(values: Sequence[Any], forms: Sequence[InputForm]) -> Iterator[Inputs]:
    """Splits a DataLoader's batch into batches of the model's size. Each batch gets all constants."""
    tensors = [index for index, form in enumerate(forms) if form.is_tensor]
    for parts in in_batches([values[index] for index in tensors], [forms[index].batch for index in tensors]):
        inputs = list(values)
        for index, part in zip(tensors, parts, strict=True):
            inputs[index] = part
        yield tuple(inputs)


def items_of(data: Iterable[Any] | Dataset[Any]) -> Iterable[Any]:
    """Returns the items of an iterable or of a data set. Raises `InputError` for any other value."""
    if not isinstance(data, Mapping):
        if isinstance(data, Iterable):
            return data
        if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
            return (data[index] for index in range(len(data)))
    raise InputError(
        "data must be an iterable of inputs, a tensor of samples, a data set, or the path of a folder or a file, not "
        f"{data!r}."
    )


def in_batches(values: Sequence[Any], sizes: Sequence[int | None]) -> Iterator[tuple[Any, ...]]:
    """Splits each of `values` along its first dimension into parts of its size in `sizes`; None stands for size 1.

    Drops an incomplete last part.
    """
    steps = [size or 1 for size in sizes]
    for number in range(min(len(value) // step for value, step in zip(values, steps, strict=True))):
        yield tuple(value[number * step : (number + 1) * step] for value, step in zip(values, steps, strict=True))


def align(value: Any) -> Any:
    """Returns `value`, or a copy if it is a tensor whose address is not a multiple of `ALIGNMENT` bytes.

    The last bit of MKL's matrix products depends on the alignment of the operands. Alignment makes results independent
    of the process and the buffer that hold a sample.
    """
    return value.clone() if isinstance(value, Tensor) and value.data_ptr() % ALIGNMENT else value


def describe(values: Sequence[Any]) -> str:
    """Returns the dtypes and shapes of `values` as text for messages."""
    words = (
        f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else _kind_name(value) for value in values
    )
    return f"({', '.join(words)})"


def _kind_name(value: Any) -> str:
    return repr(value) if isinstance(value, (int, float, bool, str, type(None))) else type(value).__name__


def _opened(data: Data, transform: Transform | None) -> tuple[Any, Transform | None]:
    """Returns data that a text names, and their transform. The items of a function are returned as it returns them."""
    if isinstance(data, (str, os.PathLike)):
        data = read_data(data)
    if not isinstance(data, Samples):
        return data, transform
    if transform is not None and data.transform is not None:
        raise OptionError("The samples have a transform already. Leave out `transform`.")
    own = transform or data.transform
    if not data.is_given:
        return data.with_transform(own), None
    return data.given, _OfPairs(own) if data.are_pairs and own is not None else own


@dataclass(frozen=True)
class _OfPairs:
    """Transforms the inputs of a pair of inputs and label."""

    transform: Transform

    def __call__(self, pair: Any) -> Any:
        return (self.transform(pair[0]), pair[1])


def _transformed_items(data: Any, forms: Sequence[InputForm], transform: Transform | None) -> Iterable[tuple[str, Any]]:
    """Returns the name of each item in messages, and the item."""
    tensors = [form for form in forms if form.is_tensor]
    if isinstance(data, Samples):
        samples = data.with_transform(_fitted(data.transform, tensors))
        return _stacked(((sample.name, sample.inputs) for sample in samples), tensors)
    data = torch.from_numpy(data) if isinstance(data, np.ndarray) else data
    batch = next((form.batch for form in tensors), None) or 1
    items: Iterable[Any] = _samples(data, batch) if isinstance(data, Tensor) else items_of(data)
    fit = _fitted(transform, tensors)
    reads_inputs_only = isinstance(fit, (DefaultTransform, ImageTransform, AudioTransform))
    found = (_with_transformed_inputs(fit, item) for item in items) if reads_inputs_only else map(fit, items)
    return ((f"Item {index} of the data", item) for index, item in enumerate(found))


def _fitted(transform: Transform | None, tensors: Sequence[InputForm]) -> Transform:
    if len(tensors) != 1 or tensors[0].dtype is None:
        return fitted(transform, None)
    return fitted(transform, tensors[0].sizes, is_float=tensors[0].dtype.is_floating_point)


def _with_transformed_inputs(transform: Transform, item: Any) -> Any:
    """Transforms an item, or the first value of a tuple whose first value is an image or a recording."""
    if isinstance(item, (tuple, list)) and item and (is_picture(item[0]) or isinstance(item[0], Waveform)):
        return (transform(item[0]), *item[1:])
    return transform(item)


def _stacked(items: Iterable[tuple[str, Any]], forms: Sequence[InputForm]) -> Iterator[tuple[str, Any]]:
    """Stacks items without a batch dimension to batches of the model's size, if it is above 1.

    Drops an incomplete last batch.
    """
    form = forms[0] if len(forms) == 1 else None
    size = 1 if form is None else form.batch or 1
    waiting: list[tuple[str, Tensor]] = []
    for name, item in items:
        value = to_tensors(item)
        if size == 1 or form is None or not isinstance(value, Tensor) or not form.accepts_sizes((size, *value.shape)):
            yield name, item
            continue
        waiting.append((name, value))
        if len(waiting) == size:
            yield waiting[0][0], torch.stack([value for _, value in waiting])
            waiting.clear()


def _samples(data: Tensor, size: int) -> Iterable[Tensor]:
    return (part for part in data.split(size) if len(part) == size) if data.dim() else [data]


def _values(item: Any, forms: Sequence[InputForm], name: str, *, is_batch: bool) -> tuple[Any, ...]:
    """Returns the values for the inputs of `forms`.

    These are the first reading of `item` that matches `forms`. If none matches, they are its first reading, without
    missing values; `_check_values` then reports the mismatch.
    """
    if not is_batch:
        _check_that_it_is_one_sample(item, forms, name)
    readings = [tuple(map(to_tensors, values)) for values in _possible_readings(item, forms)]
    for values in readings:
        fits = map(_fits_in_a_batch if is_batch else _matches_form, values, forms)
        if len(values) == len(forms) and all(fits):
            return values
    if isinstance(item, Mapping):
        _check_that_none_is_missing(item, forms, name)
    return tuple(value for value in readings[0] if value is not MISSING)


def _check_that_it_is_one_sample(item: Any, forms: Sequence[InputForm], name: str) -> None:
    """Raises `InputError` for a list of samples, of which all but the first would be dropped as labels."""
    if not isinstance(item, (tuple, list)) or len(item) < FEWEST_SAMPLES or len(item) == len(forms):
        return
    parts = item if all(map(_holds_inputs, item)) else [(part,) for part in item] if isinstance(item, list) else ()
    if parts and all(isinstance(part, (tuple, list)) and _is_sample(part, forms) for part in parts):
        raise InputError(
            f"{name} is a {type(item).__name__} of {len(item)} samples. Give each sample as an item of its own. If "
            "they are the steps of one sequence of a model with state, wrap them: Stream([...])."
        )


def _is_sample(values: Sequence[Any], forms: Sequence[InputForm]) -> bool:
    return len(values) == len(forms) and all(map(_matches_form, map(to_tensors, values), forms))


def _possible_readings(item: Any, forms: Sequence[InputForm]) -> Iterator[Sequence[Any]]:
    """Returns the possible readings of `item`, in order of preference. A reading has a value for each form.

    1. If `item` is a sequence that begins with a container: that container, followed by a label.
    2. If `item` is a mapping: arguments by name.
    3. Arguments by position.
    4. All tensors in one flat sequence.
    5. One argument.
    """
    paths = [form.path or (form.name,) for form in forms]
    sequence = isinstance(item, (tuple, list))
    if sequence and item and _holds_inputs(item[0]):
        yield from _possible_readings(item[0], forms)  # inputs and label
    if isinstance(item, Mapping):
        yield _fill_constants(leaves_at(paths, (), {str(name): value for name, value in item.items()}), forms)
    args = tuple(item) if sequence else (item,)
    tensors = sum(form.is_tensor for form in forms)
    yield _fill_constants(leaves_at(paths, args, {}), forms)
    if len(args) >= tensors and len(args) != len(argument_names(paths)):
        flat = iter(args)
        yield [next(flat) if form.is_tensor else form.constant for form in forms]
    yield _fill_constants(leaves_at(paths, (item,), {}), forms)


def _holds_inputs(value: Any) -> bool:
    return isinstance(value, (tuple, list, Mapping)) or dataclasses.is_dataclass(value)


def _fill_constants(values: Sequence[Any], forms: Sequence[InputForm]) -> list[Any]:
    """Returns `values`, with the form's constant for each missing value that is not a tensor."""
    pairs = zip(values, forms, strict=True)
    return [form.constant if value is MISSING and not form.is_tensor else value for value, form in pairs]


def _matches_form(value: Any, form: InputForm) -> bool:
    return form.takes(_with_batch(value, form))


def _fits_in_a_batch(value: Any, form: InputForm) -> bool:
    return _matches_form(value, form) or (form.is_tensor and is_batch_of(value, form))


def _check_that_none_is_missing(item: Mapping[Any, Any], forms: Sequence[InputForm], name: str) -> None:
    values = leaves_at([form.path or (form.name,) for form in forms], (), {str(key): item[key] for key in item})
    for value, form in zip(values, forms, strict=True):
        if value is MISSING and form.is_tensor:
            near = difflib.get_close_matches(form.name, map(str, item), n=1)
            hint = f" Is it '{near[0]}'?" if near else ""
            raise InputError(f"{name} lacks '{form.name}', which is an input of forward.{hint}")


def _is_batch(values: Sequence[Any], forms: Sequence[InputForm]) -> bool:
    """Whether all tensors of `values` match `forms` except in their first dimension, which counts samples."""
    return len(values) == len(forms) and all(
        is_batch_of(value, form) for value, form in zip(values, forms, strict=True) if form.is_tensor
    )


def is_batch_of(value: Any, form: InputForm) -> bool:
    """Whether `value` is a tensor that matches the sizes of `form` in all dimensions but the first."""
    return isinstance(value, Tensor) and bool(form.sizes) and form.accepts_sizes((form.batch or 1, *value.shape[1:]))


def _check_values(values: tuple[Any, ...], forms: Sequence[InputForm], name: str) -> Inputs:
    """Returns `values` in the forms of `forms`; inserts a first dimension of 1 where only that is missing.

    Raises `InputError` if the values do not match `forms` or are not finite.
    """
    if len(values) == len(forms):
        values = tuple(map(_with_batch, values, forms))
    if len(values) != len(forms) or not all(form.takes(value) for value, form in zip(values, forms, strict=True)):
        taken = ", ".join(map(str, forms))
        advice = next((text for pair in zip(values, forms, strict=False) if (text := _size_advice(*pair))), "")
        raise InputError(f"{name} is {describe(values)}; the model takes ({taken}).{advice}")
    # Masks may contain minus infinity. Observers reject it in other values.
    floats = (value for value in values if isinstance(value, Tensor) and value.is_floating_point())
    if not all(bool((value < torch.inf).all()) for value in floats):
        raise InputError(f"{name} contains NaN or infinite values. Remove the sample, or correct its preprocessing.")
    return tuple(map(align, values))


def _size_advice(value: Any, form: InputForm) -> str:
    if not isinstance(value, Tensor):
        return ""
    if value.dtype != form.dtype and form.dtype == torch.float32 and form.accepts_sizes(value.shape):
        return _dtype_advice(value.dtype)
    return size_advice(value.shape, form.sizes) if value.dtype == form.dtype else ""


def _dtype_advice(given: torch.dtype) -> str:
    """Returns how to convert values of another dtype to float32."""
    if given.is_complex:
        return " The model takes real numbers: give tensor.real or tensor.abs()."
    if given == torch.uint8:
        return " Scale bytes as for the training of the model, for images usually to 0..1: tensor.float() / 255."
    return " Convert them to float32: array.astype('float32') or tensor.float()."


def _with_batch(value: Any, form: InputForm) -> Any:
    is_one = isinstance(value, Tensor) and form.is_tensor and form.accepts_sizes((1, *value.shape))
    return value[None] if is_one else value
