"""What to do about an array of another shape than the model takes."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["size_advice"]

SEQUENCE_RANK = 3
"""The largest number of dimensions of a sequence: batch, steps and features."""
IMAGE_RANK = 4


def size_advice(given: Sequence[int], sizes: Sequence[int | None]) -> str:
    """Returns what to do about an input of shape `given` for a model that takes `sizes`, None for any size.

    Returns an empty text unless `given` has the channels last, differs from `sizes` in dimensions of size 1 only, has
    the channels of `sizes` and another height or width, or may be a sequence of another length: up to three dimensions,
    of which the first fits the model and another does not.
    """
    return (
        _order_advice(given, sizes)
        or _rank_advice(given, sizes)
        or _area_advice(given, sizes)
        or _length_advice(given, sizes)
    )


def _order_advice(given: Sequence[int], sizes: Sequence[int | None]) -> str:
    if len(sizes) != IMAGE_RANK or [*given[-3:]] == [*sizes[1:]]:
        return ""
    batch, channels, *area = sizes
    last = [*area, channels]
    if [*given] == last:
        return " The channels are last. Put them first, in numpy with array.transpose(2, 0, 1)."
    if [*given] == [batch, *last]:
        return " The channels are last. Put them first, in numpy with array.transpose(0, 3, 1, 2)."
    return ""


def _rank_advice(given: Sequence[int], sizes: Sequence[int | None]) -> str:
    wanted = [size for size in sizes if size != 1]
    if len(given) == len(sizes) or None in wanted or [size for size in given if size != 1] != wanted:
        return ""
    return f" Only dimensions of size 1 differ. Use reshape{tuple(sizes)}."


def _area_advice(given: Sequence[int], sizes: Sequence[int | None]) -> str:
    if len(sizes) != IMAGE_RANK or len(given) not in (IMAGE_RANK - 1, IMAGE_RANK) or given[-3] != sizes[1]:
        return ""
    if all(size in {None, one} for one, size in zip(given[-2:], sizes[2:], strict=True)):
        return ""
    taken = " x ".join("any" if size is None else str(size) for size in sizes[2:])
    shape = ",".join(map(str, (sizes[0] or 1, *given[-3:])))
    return (
        f" Give data of {taken}, for images with a transform that resizes them. Or quantize or build the model again "
        f"for this size, with --input {shape}."
    )


def _length_advice(given: Sequence[int], sizes: Sequence[int | None]) -> str:
    same = [size in {None, one} for one, size in zip(given, sizes, strict=False)]
    if len(given) != len(sizes) or not 1 < len(sizes) <= SEQUENCE_RANK or all(same) or not same[0]:
        return ""
    return (
        " The export fixes the size of every dimension: pad or cut the data to it. For sequences of any length, export "
        "a model of one step that keeps its state in buffers, and give each sequence as a Stream (docs/options.md)."
    )
