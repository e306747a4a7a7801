"""Labelled data as arguments of a model and labels."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.data import DataLoader, Dataset

from openneutron.core.user_code import code_of_user
from openneutron.data.samples import Samples, read_data
from openneutron.data.shape_advice import size_advice
from openneutron.data.sources import Sample
from openneutron.data.transforms import Transform, fitted
from openneutron.errors import InputError, OptionError
from openneutron.model.arguments import with_argument_names
from openneutron.model.data import InputForm, describe, in_batches, items_of
from openneutron.model.examples import Examples, register_dataclasses, to_tensors
from openneutron.model.state import Stream

__all__ = ["LabelledData", "LabelledSample", "labelled_samples", "open_labelled"]

LabelledData = Iterable[Any] | Dataset[Any] | Samples | str | os.PathLike[str]
"""The forms of data that `evaluate` takes."""


@dataclass(frozen=True)
class LabelledSample:
    """The arguments of one run, the label for its outputs, and the names and files of the rows, if they are known."""

    inputs: Examples
    label: Any
    names: tuple[str, ...] = ()
    paths: tuple[Path | None, ...] = ()


def open_labelled(data: LabelledData, transform: Transform | None) -> tuple[Any, Transform | None]:
    """Returns `Samples` with labels, or the Python object with pairs of inputs and label; and the transform of inputs.

    Raises `InputError` for samples without labels, and `OptionError` for two transforms, and for a transform of the
    batches of a DataLoader.
    """
    if transform is not None and not callable(transform):
        raise OptionError(f"transform must be a function of the inputs of a sample, not {transform!r}.")
    opened: Any = read_data(data, labelled=True) if isinstance(data, (str, os.PathLike, Samples)) else data
    if isinstance(opened, Samples):
        if transform is not None and opened.transform is not None:
            raise OptionError("The samples have a transform already. Leave out `transform`.")
        transform = transform or opened.transform
        opened = opened.given if opened.is_given else opened
    if transform is not None and isinstance(opened, DataLoader):
        raise OptionError("A transform takes single samples, and a DataLoader has batches: give it to its data set.")
    return opened, transform


def labelled_samples(
    data: Any,
    size: int,
    forms: Sequence[InputForm] | None,
    transform: Transform | None = None,
    begin: Callable[[], None] = lambda: None,
) -> Iterator[LabelledSample]:
    """Returns the samples of a result of `open_labelled`, in batches of `size`. Reads them when they are needed.

    `forms` are the forms of the model's inputs, if known. Calls `begin` before the first pair of each `Stream`.
    """
    tensors = [form for form in forms or () if form.is_tensor]
    form = tensors[0] if len(tensors) == 1 else None
    if form is None or form.dtype is None:
        fit = fitted(transform, None)
    else:
        fit = fitted(transform, form.sizes, is_float=form.dtype.is_floating_point)
    if isinstance(data, Samples):
        return _of_files(data.with_transform(fit), size, forms or ())
    return _of_pairs(data, size, _PairTransform(fit, form), begin, forms or ())


@dataclass(frozen=True)
class _PairTransform:
    """Transforms the inputs of a pair, and adds the batch dimension of `form` if a transform returns none."""

    transform: Transform
    form: InputForm | None

    def __call__(self, inputs: Any) -> Any:
        with code_of_user("The transform"):
            made = to_tensors(self.transform(inputs))
        is_new = made is not inputs and isinstance(made, Tensor) and not isinstance(inputs, np.ndarray)
        if is_new and self.form is not None and self.form.accepts_sizes((1, *made.shape)):
            return made[None]
        return made


def _of_pairs(
    data: Any, size: int, transform: Callable[[Any], Any], begin: Callable[[], None], forms: Sequence[InputForm]
) -> Iterator[LabelledSample]:
    for index, item in enumerate([data] if isinstance(data, Stream) else items_of(data)):
        if isinstance(item, Stream):
            begin()
            yield from _of_pairs(item.steps, size, transform, lambda: None, forms)
            continue
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise InputError(
                f"Sample {index} is a {type(item).__name__} instead of a pair of inputs and label. Give data whose "
                "items are (inputs, label)."
            )
        given = item[0] if isinstance(data, DataLoader) else transform(item[0])
        inputs = tuple(given) if isinstance(given, (tuple, list)) and not hasattr(given, "_fields") else given
        register_dataclasses(inputs)
        leaves, structure = tree_flatten(tree_map(to_tensors, inputs))
        pair = *leaves, item[1]
        for *part, label in in_batches(pair, [size] * len(pair)) if _is_batch(data, pair) else [pair]:
            yield LabelledSample(_arguments(tree_unflatten(part, structure), forms), label)


def _arguments(inputs: Any, forms: Sequence[InputForm]) -> Examples:
    if isinstance(inputs, Mapping):
        return Examples((), _by_names(inputs, forms))
    return Examples(inputs if isinstance(inputs, tuple) and not hasattr(inputs, "_fields") else (inputs,))


def _by_names(inputs: Mapping[str, Any], forms: Sequence[InputForm]) -> dict[str, Any]:
    """Returns arguments by name, with the names of arguments instead of their positions ("input0")."""
    return with_argument_names([form.path or (form.name,) for form in forms], inputs)


def _is_batch(data: Any, values: Sequence[Any]) -> bool:
    """Whether `values` come from a DataLoader and all have the same length."""
    if not isinstance(data, DataLoader) or not all(map(_has_length, values)):
        return False
    return len({len(value) for value in values}) == 1


def _has_length(value: Any) -> bool:
    return isinstance(value, (list, tuple)) or (isinstance(value, torch.Tensor) and value.dim() > 0)


def _of_files(samples: Samples, size: int, forms: Sequence[InputForm]) -> Iterator[LabelledSample]:
    """Stacks `size` samples to a batch. Drops an incomplete last batch."""
    tensors = [form for form in forms if form.is_tensor]
    by_name = {form.path[0] if form.path else form.name: form for form in tensors}
    found = iter(samples)
    while len(group := list(islice(found, size))) == size:
        inputs = [sample.inputs for sample in group]
        if isinstance(inputs[0], Mapping):
            inputs = [_by_names(one, forms) for one in inputs]
            named = {name: _batch(group, [one[name] for one in inputs], by_name.get(name)) for name in inputs[0]}
            arguments = Examples((), named)
        else:
            arguments = Examples((_batch(group, inputs, tensors[0] if len(tensors) == 1 else None),))
        label = group[0].label if size == 1 else torch.tensor([sample.label for sample in group])
        names, paths = zip(*((sample.name, sample.path) for sample in group), strict=True)
        yield LabelledSample(arguments, label, names, paths)


def _batch(group: Sequence[Sample], values: Sequence[Any], form: InputForm | None) -> Tensor:
    """Stacks values to a batch; a single value that has the batch dimension already stays as it is."""
    tensors = [to_tensors(value) for value in values]
    name = group[0].name
    if not all(isinstance(tensor, Tensor) for tensor in tensors):
        raise InputError(
            f"{name} is a {type(values[0]).__name__} and not a tensor. Give a transform that returns a tensor."
        )
    if len({tensor.shape for tensor in tensors}) > 1:
        raise InputError(f"{name} and the samples after it have different shapes: {describe(tensors)}.")
    has_batch = form is not None and len(tensors) == 1 and form.accepts_sizes(tensors[0].shape)
    batch: Tensor = tensors[0] if has_batch else torch.stack(tensors)
    if form is not None and not form.takes(batch):
        given = tensors[0].shape if len(tensors) == 1 else batch.shape
        advice = size_advice(given, form.sizes) if batch.dtype == form.dtype else ""
        raise InputError(f"{name} is {describe([batch])}; the model takes ({form}).{advice}")
    return batch
