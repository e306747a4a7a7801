"""Data of any form as inputs of the model."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openneutron.errors import CalibrationError, OptionError

__all__ = ["collect", "described", "forward_names"]

Inputs = tuple[Tensor, ...]
IMAGES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".pgm", ".tif", ".tiff", ".webp"})
ARRAYS = frozenset({".npy"})


def collect(
    calibration: Any,
    examples: Inputs,
    names: Sequence[str] = (),
    *,
    transform: Callable[[Any], Any] | None = None,
) -> list[Inputs]:
    """The inputs that `calibration` has, each of the shapes and dtypes of `examples`.

    `calibration` is an iterable of tensors, of tuples or lists (what comes behind the inputs, such as a label, is
    dropped), or of mappings from `names`, the arguments of the model's `forward`; a DataLoader, whose batches are split
    into the model's batch size (what does not fill the last one is left out); one tensor, split likewise; or a folder
    of images or .npy files, read in the order of their paths. `transform` makes an input of each item; of an image it
    gets PIL's, and what it returns may lack the dimension of a batch of one. Without it, an image becomes RGB, or grey
    for a model with one channel, of the model's size and from 0 to 1: a model that wants its images normalized needs
    that in `transform`.

    Raises `CalibrationError` for what fits none of that, is not finite, or is empty, and `OptionError` for a
    `transform` that cannot be called.
    """
    if transform is not None and not callable(transform):
        raise OptionError(f"transform is a function of one item of the calibration data, not {transform!r}.")
    items, may_lack_batch, batched = _items(calibration, examples, transform)
    found: list[Inputs] = []
    for index, item in enumerate(items):
        values = _values(item, examples, names, index)
        if may_lack_batch:
            values = tuple(map(_with_batch, values, examples)) if len(values) == len(examples) else values
        for inputs in _split(values, examples) if batched else [values]:
            _check(inputs, examples, index)
            found.append(inputs)
    if not found:
        raise CalibrationError("The calibration data are empty: give at least one input, better a hundred.")
    return found


def described(values: Sequence[Any]) -> str:
    """Dtypes and shapes, for messages."""
    words = (
        f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__ for value in values
    )
    return f"({', '.join(words)})"


def forward_names(model: torch.nn.Module) -> list[str]:
    """The names of the arguments of the model's `forward`."""
    return list(inspect.signature(model.forward).parameters)


def _items(
    calibration: Any, examples: Inputs, transform: Callable[[Any], Any] | None
) -> tuple[Iterable[Any], bool, bool]:
    """The items, whether they may lack the dimension of the batch, and whether they are batches to be split."""
    from torch.utils.data import DataLoader

    if isinstance(calibration, (str, Path)):
        return _files(Path(calibration), examples, transform), True, False
    if isinstance(calibration, Tensor):
        size = examples[0].shape[0] if examples[0].dim() else 1
        whole = (part for part in calibration.split(size) if len(part) == size) if calibration.dim() else [calibration]
        return _transformed(whole, transform), transform is not None, False
    if not isinstance(calibration, Iterable) or isinstance(calibration, Mapping):
        raise CalibrationError(
            "calibration takes an iterable of inputs, a tensor of samples, or a folder of images or .npy files, not "
            f"{calibration!r}."
        )
    return _transformed(calibration, transform), transform is not None, isinstance(calibration, DataLoader)


def _transformed(items: Iterable[Any], transform: Callable[[Any], Any] | None) -> Iterable[Any]:
    return items if transform is None else map(transform, items)


def _files(folder: Path, examples: Inputs, transform: Callable[[Any], Any] | None) -> Iterator[Any]:
    if not folder.is_dir():
        raise CalibrationError(f"The folder of calibration data '{folder}' is not there.")
    if len(examples) != 1:
        raise CalibrationError("A folder has one input a file; this model takes several. Give an iterable of tuples.")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGES | ARRAYS)
    if not paths:
        raise CalibrationError(f"No file in '{folder}' is one of {', '.join(sorted(IMAGES | ARRAYS))}.")
    return (_file(path, examples[0], transform) for path in paths)


def _file(path: Path, example: Tensor, transform: Callable[[Any], Any] | None) -> Any:
    if path.suffix.lower() in ARRAYS:
        try:
            array = torch.from_numpy(np.load(path))
        except (OSError, ValueError, TypeError) as error:
            raise CalibrationError(f"{path} cannot be read as an array: {error}") from error
        return array if transform is None else transform(array)
    try:
        from PIL import Image
    except ImportError as error:
        raise CalibrationError("Images are read with Pillow, which is not installed: pip install pillow.") from error
    try:
        with Image.open(path) as image:
            image.load()
            return _pixels(image, example) if transform is None else transform(image)
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read as an image: {error}") from error


def _pixels(image: Any, example: Tensor) -> Tensor:
    """An image [1, C, H, W] from 0 to 1, as the model takes it: not normalized."""
    if example.dim() != 4 or example.shape[1] not in (1, 3):
        raise CalibrationError(
            f"The model takes {described([example])}, which is no image of 1 or 3 channels. Give a transform."
        )
    _, channels, height, width = example.shape
    image = image.convert("L" if channels == 1 else "RGB").resize((width, height))
    pixels = torch.from_numpy(np.array(image)).float() / 255
    return pixels.reshape(height, width, channels).permute(2, 0, 1)[None].contiguous()


def _values(item: Any, examples: Inputs, names: Sequence[str], index: int) -> Inputs:
    if isinstance(item, (tuple, list)) and item and isinstance(item[0], (tuple, list, Mapping)):
        item = item[0]  # inputs and label
    if isinstance(item, Mapping):
        wanted = list(names)[: len(examples)]
        for name in wanted:
            if name not in item:
                near = difflib.get_close_matches(name, map(str, item), n=1)
                hint = f" Is it '{near[0]}'?" if near else ""
                raise CalibrationError(f"Calibration input {index} has no '{name}', which forward takes.{hint}")
        return tuple(item[name] for name in wanted)
    return tuple(item)[: len(examples)] if isinstance(item, (tuple, list)) else (item,)


def _with_batch(value: Any, example: Tensor) -> Any:
    lacks = isinstance(value, Tensor) and example.dim() > 0 and value.shape == example.shape[1:]
    return value[None] if lacks and example.shape[0] == 1 else value


def _split(values: Inputs, examples: Inputs) -> Iterator[Inputs]:
    """`values` in batches of the model's size; as they are where that cannot be."""
    pairs = list(zip(values, examples, strict=False))
    if len(values) != len(examples) or not all(
        isinstance(value, Tensor) and value.dim() == example.dim() > 0 and value.shape[1:] == example.shape[1:]
        for value, example in pairs
    ):
        yield values
        return
    sizes = [example.shape[0] for example in examples]
    for number in range(min(len(value) // size for value, size in zip(values, sizes, strict=True))):
        yield tuple(value[number * size : (number + 1) * size] for value, size in zip(values, sizes, strict=True))


def _check(values: Inputs, examples: Inputs, index: int) -> None:
    fits = len(values) == len(examples) and all(
        isinstance(value, Tensor) and value.shape == example.shape and value.dtype == example.dtype
        for value, example in zip(values, examples, strict=True)
    )
    if not fits:
        raise CalibrationError(
            f"Calibration input {index} is {described(values)}; the model takes {described(examples)}."
        )
    if not all(bool(torch.isfinite(value).all()) for value in values if value.is_floating_point()):
        raise CalibrationError(f"Calibration input {index} holds NaN or infinite values.")
