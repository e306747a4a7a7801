"""Quantizes a model for smaller images, to find the memory that its program would need."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from openneutron.core.messages import first_line, listed
from openneutron.errors import OpenNeutronError, OptionError
from openneutron.flow import quantize
from openneutron.model.examples import register_dataclasses, to_tensors
from openneutron.quantized_model import QuantizedModel
from openneutron.targets import Target

__all__ = [
    "NOT_MEASURED", "ImageSize", "SmallerImages", "quantized_for_smaller_images", "smaller_examples",
]  # fmt: skip

ImageSize = tuple[int, int]
"""Height and width in pixels."""

FRACTIONS = (Fraction(3, 4), Fraction(1, 2))
"""The sides of the smaller images, relative to those of the example inputs."""
SMALLEST_SIDE = 16
"""A tensor whose height or width is less, in pixels, is not taken as an image."""
STRIDE = 32
"""Networks that accept only multiples of a number as sides mostly need 32, because they halve an image five times."""
MOST_CHANNELS = 4
"""The most channels of an image in NHWC. A tensor with more elements in its last dimension is taken as NCHW."""
NOT_MEASURED = (
    "The accuracy with smaller inputs was not measured: train or fine-tune the model for them, and evaluate it."
)


@dataclass(frozen=True)
class SmallerImages:
    """A model that is quantized for smaller images."""

    change: str
    """The shapes of the images, as the name of a change."""
    quantized: QuantizedModel


def quantized_for_smaller_images(
    model: Any,
    example_inputs: Any,
    target: Target,
    options: Mapping[str, Any],
    sizes: Sequence[ImageSize] = (),
) -> tuple[list[SmallerImages], list[str]]:
    """Quantizes a float model for images of `sizes`, by default with 3/4 and with half of their sides.

    `example_inputs` and `options` are those of `quantize`. The model is calibrated with the smaller example inputs and
    without recovery, so the results are valid for the memory of a program, not for its accuracy. If the model does not
    take the exact fraction, the next smaller multiple of 32 is tried. Returns the quantized models, and notes on the
    sizes that the model does not take. Raises `OptionError` if no input has an image of a size.
    """
    found: list[SmallerImages] = []
    notes: list[str] = []
    trials = [[_examples_of_size(example_inputs, size)] for size in sizes] or [
        list(_candidates(example_inputs, fraction)) for fraction in FRACTIONS
    ]
    for candidates in trials:
        reason = ""
        for change, smaller in candidates:
            if change in (one.change for one in found):
                break
            try:
                found.append(SmallerImages(change, _quantized(model, smaller, target, options)))
                break
            except OpenNeutronError as error:
                reason = reason or f"The change {change} has no result, because the model fails: {first_line(error)}"
        else:
            notes += [reason] if reason else []
    return found, notes


def smaller_examples(example_inputs: Any, fraction: Fraction, multiple: int = 1) -> tuple[str, Any] | None:
    """Returns example inputs with smaller images, cut from `example_inputs`, and the name of the change.

    An image is a tensor of rank 4 whose sides have at least 16 pixels, in NCHW or in NHWC with at most 4 channels. The
    new sides are multiples of `multiple`. Returns None if there is no image, or if a side would be 0.
    """
    return _cut(example_inputs, lambda *sides: tuple(int(side * fraction) // multiple * multiple for side in sides))


def _examples_of_size(example_inputs: Any, size: ImageSize) -> tuple[str, Any]:
    """Returns the same for images of `size`. Raises `OptionError` if no input has an image of at least this size."""
    found = _cut(example_inputs, lambda *sides: tuple(map(min, sides, size)))
    if found is None or not any(_size_of(leaf) == size for leaf in tree_leaves(found[1])):
        raise OptionError(
            f"No example input has an image of at least {size[0]}x{size[1]} pixels, with sides of {SMALLEST_SIDE} or "
            "more. Give a smaller size."
        )
    return found


def _size_of(value: Any) -> ImageSize | None:
    sides = _sides(value, smallest=1)
    return None if sides is None else (value.shape[sides[0]], value.shape[sides[1]])


def _cut(example_inputs: Any, new_sides: Callable[[int, int], tuple[int, ...]]) -> tuple[str, Any] | None:
    """Cuts each image to `new_sides` of its height and width."""
    register_dataclasses(example_inputs)
    shapes: list[str] = []

    def cut(leaf: Any) -> Any:
        value = to_tensors(leaf)
        sides = _sides(value)
        if sides is None:
            return value
        is_last = value.is_contiguous(memory_format=torch.channels_last)
        for dim, side in zip(sides, new_sides(*(value.shape[dim] for dim in sides)), strict=True):
            value = value.narrow(dim, 0, side)
        shapes.append("x".join(map(str, value.shape)))
        return value.clone(memory_format=torch.channels_last if is_last else torch.contiguous_format)

    smaller = tree_map(cut, example_inputs)
    if not shapes or any(isinstance(leaf, torch.Tensor) and not leaf.numel() for leaf in tree_leaves(smaller)):
        return None
    return f"input{'s' if len(shapes) > 1 else ''} of {listed(shapes)}", smaller


def _candidates(example_inputs: Any, fraction: Fraction) -> Iterator[tuple[str, Any]]:
    changes: set[str] = set()
    for multiple in (1, STRIDE):
        found = smaller_examples(example_inputs, fraction, multiple)
        if found is not None and found[0] not in changes:
            changes.add(found[0])
            yield found


def _sides(value: Any, smallest: int = SMALLEST_SIDE) -> tuple[int, int] | None:
    """Returns the dimensions of height and width; None if the value is not an image with sides of `smallest`."""
    if not isinstance(value, torch.Tensor) or value.dim() != 4:
        return None
    sides = (1, 2) if value.shape[3] <= MOST_CHANNELS < value.shape[1] else (2, 3)
    return sides if all(value.shape[dim] >= smallest for dim in sides) else None


def _quantized(model: Any, example_inputs: Any, target: Target, options: Mapping[str, Any]) -> QuantizedModel:
    given = {name: value for name, value in options.items() if name not in ("recover", "recovery_seconds")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a model that is only measured
        return quantize(model, example_inputs, [example_inputs], target, recover=None, progress=False, **given)
