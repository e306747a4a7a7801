"""Recognizes mistakes in a board's outputs: undoes or repeats one mistake, and compares."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from openneutron.accuracy.board_dump import Array, BoardTensor, Pair
from openneutron.accuracy.board_evidence import (
    BoardCase,
    ExplainedValues,
    Explanation,
    agreement,
    explanation_of,
    lsb_of,
)
from openneutron.accuracy.board_transforms import (
    WORDS,
    AffineTransform,
    affine_fits,
    as_type,
    constant_text,
    orders_of,
    reverse_groups,
)

__all__ = ["Diagnosis", "best_of", "diagnosis_of", "output_diagnoses", "vector_diagnoses"]

_LARGEST_SHIFT = 64
_NEAR = 0.01
"""A fitted factor within this relative distance of a known factor counts as equal to it."""
_NEARLY_EQUAL = 1.25
"""Diagnoses are alternatives if they leave differences with at most this ratio."""
_SMALL = 0.1
"""LSBs. Smaller remaining differences count as equal."""
_BITS_OF_VECTORS = 10.0
"""The needed evidence for outputs of other vectors, which are few in comparison with all mistakes that are examined."""
_LEAST_UNWRITTEN = 4
"""Bytes. A shorter output may be constant by chance."""


@dataclass(frozen=True)
class Diagnosis:
    """A known mistake that explains values of the board."""

    mistake: str
    """The kind of mistake, one of `MISTAKES` of board_outputs.py."""
    text: str
    """A sentence that describes the mistake."""
    pairs: tuple[Pair, ...]
    """The vectors and outputs whose differences it explains."""
    is_exact: bool = True
    """Whether all values agree if this mistake is assumed. Otherwise, most of the difference disappears."""
    remaining_lsb: float = 0.0
    """The root mean square of the differences that remain if this mistake is assumed, in LSBs."""


def diagnosis_of(mistake: str, text: str, pairs: tuple[Pair, ...], explanation: Explanation) -> Diagnosis:
    """Returns a diagnosis. The text of an approximate one gets the mean differences with and without the mistake."""
    if not explanation.is_exact:
        text += (
            f" This is approximate: with this mistake, the mean difference falls from {explanation.before:.3g} to "
            f"{explanation.after:.3g} LSB."
        )
    return Diagnosis(mistake, text, pairs, explanation.is_exact, explanation.after)


def best_of(diagnoses: list[Diagnosis]) -> list[Diagnosis]:
    """Returns the diagnoses that leave about the smallest difference: exact ones, or approximate ones if none is."""
    found = [one for one in diagnoses if one.is_exact] or diagnoses
    least = min((one.remaining_lsb for one in found), default=0.0)
    return [one for one in found if one.remaining_lsb <= _NEARLY_EQUAL * least + _SMALL]


def output_diagnoses(case: BoardCase, output: int) -> list[Diagnosis]:
    """Returns each mistake that alone explains all differences of one output.

    Returns a wrong scale or zero point only if no more specific mistake explains the differences. Returns approximate
    explanations only if none is exact.
    """
    pairs = case.failing_of(output)
    if not pairs:
        return []
    found = list(_specific_mistakes(case, output, pairs))
    if not any(one.is_exact for one in found):
        found += _affine(case, output, pairs)
    return best_of(found)


def _specific_mistakes(case: BoardCase, output: int, pairs: list[Pair]) -> Iterator[Diagnosis]:
    """Yields mistakes other than a wrong scale or zero point."""
    own, what = tuple(pairs), f"Output '{case.outputs[output].name}'"
    if (text := _unwritten(case, pairs)) is not None:
        yield Diagnosis("never written", f"{what} was never written, or not copied from the right memory: {text}.", own)
        return
    for mistake, text, comparisons in _rearrangements(case, output, pairs):
        if (found := explanation_of(case, comparisons)) is not None:
            yield diagnosis_of(mistake, text, own, found)
    yield from best_of(list(_shifts(case, output, pairs)))[:1]
    if (text := _partly_written(case, pairs)) is not None:
        yield Diagnosis("partly written", f"{what} {text}.", own)


def _rearrangements(
    case: BoardCase, output: int, pairs: list[Pair]
) -> Iterator[tuple[str, str, Iterator[ExplainedValues]]]:
    """Yields mistakes, their texts, and the values of the board beside the values that the mistake predicts."""
    tensor, what = case.outputs[output], f"Output '{case.outputs[output].name}'"

    def undone(undo: Callable[[Array], Array | None], *, is_moved: bool = True) -> Iterator[ExplainedValues]:
        for one in _undone_comparisons(case, pairs, undo):
            yield replace(one, is_moved=is_moved)

    for order in orders_of(tensor):
        text = f"{what} is read in the wrong order: {order.name}."
        yield "output layout", text, undone(lambda values, order=order: order.undo(values, tensor))  # type: ignore[misc]
    for group in WORDS:
        if tensor.bytes >= group:
            text = f"{what} has the {group} bytes of each word in the wrong order (endian)."
            yield "byte order", text, _in_words(case, pairs, group)
    if tensor.dtype == np.int8:
        yield (
            "uint8 for int8", f"{what} holds uint8 codes: its zero point is off by 128. The program gives int8.",
            undone(lambda values: (values.view(np.uint8) ^ 0x80).view(np.int8), is_moved=False),
        )  # fmt: skip
    yield from _other_outputs(case, output, pairs)
    if len(pairs) > 1:
        late = [(vector, max(0, vector - 1)) for vector, _ in pairs]
        text = f"{what} holds its values of the previous run: it is read, or copied, one run late."
        yield "stale", text, _of_runs(case, output, [pair for pair in late if pair[0]])


def _of_runs(case: BoardCase, output: int, runs: list[tuple[int, int]]) -> Iterator[ExplainedValues]:
    """Yields an output of the board in a run beside the expected output of another run."""
    for vector, other in runs:
        pair = vector, output
        yield ExplainedValues(pair, case.observed[pair], case.expected[other][output], case.outputs[output], case.limit)


def _in_words(case: BoardCase, pairs: list[Pair], group: int) -> Iterator[ExplainedValues]:
    """Yields the values with reversed bytes in whole words, without the bytes after the last whole word."""
    for pair in pairs:
        tensor = case.outputs[pair[1]]
        whole = tensor.bytes // group * group // tensor.dtype.itemsize
        reversed_words = reverse_groups(case.observed[pair][:whole], group)
        given = case.observed[pair][:0] if reversed_words is None else reversed_words
        is_moved = tensor.dtype.itemsize == 1
        wanted = case.expected[pair[0]][pair[1]][:whole]
        yield ExplainedValues(pair, given, wanted, tensor, case.limit, is_moved=is_moved)


def _undone_comparisons(
    case: BoardCase, pairs: list[Pair], undo: Callable[[Array], Array | None]
) -> Iterator[ExplainedValues]:
    for vector, output in pairs:
        tensor = case.outputs[output]
        observed = case.observed[vector, output]
        corrected = undo(observed) if observed.size == tensor.size else None
        wanted = case.expected[vector][output]
        yield ExplainedValues(
            (vector, output), observed[:0] if corrected is None else corrected, wanted, tensor, case.limit
        )


def _unwritten(case: BoardCase, pairs: list[Pair]) -> str | None:
    """Returns a text for the constant in the output's memory; None if the memory is not constant, or should be."""
    joined = np.concatenate([case.observed[pair] for pair in pairs])
    wanted = np.concatenate([case.expected[vector][output] for vector, output in pairs])
    text = constant_text(joined)
    if text is None or joined.nbytes < _LEAST_UNWRITTEN or constant_text(wanted) is not None:
        return None
    tensor = case.outputs[pairs[0][1]]
    if tensor.dtype.kind == "i" and text.startswith("all bytes are 0x") and joined[0] in (-128, 127):
        return f"all values are {joined[0]}, an end of the range of int8"
    return text


def _shifts(case: BoardCase, output: int, pairs: list[Pair]) -> Iterator[Diagnosis]:
    """Yields the numbers of bytes by which the outputs may begin too late or too early; an exact one is the last."""
    tensor = case.outputs[output]
    for size in range(1, min(_LARGEST_SHIFT, tensor.bytes // 2) + 1):
        for shift in (size, -size):
            found = explanation_of(case, _without_shift(case, pairs, shift))
            if found is None:
                continue
            where = f"{size} bytes too {'late' if shift > 0 else 'early'}"
            text = f"Output '{tensor.name}' begins {where} in the dump (an error of alignment or of an address)."
            yield diagnosis_of("alignment", text, tuple(pairs), found)
            if found.is_exact:
                return


def _without_shift(case: BoardCase, pairs: list[Pair], shift: int) -> Iterator[ExplainedValues]:
    """Yields the values of the board after `shift` bytes, and the expected values at their positions."""
    for vector, output in pairs:
        tensor = case.outputs[output]
        wanted = case.expected[vector][output]
        data = case.observed[vector, output].tobytes()
        if shift > 0:
            given = as_type(data[shift:], tensor.dtype)
            yield ExplainedValues((vector, output), given, wanted[: given.size], tensor, case.limit, is_moved=True)
            continue
        skipped = -(shift // tensor.dtype.itemsize)  # whole elements that are missing at the start
        start = skipped * tensor.dtype.itemsize + shift
        given = as_type(data[start:], tensor.dtype)[: wanted.size - skipped]
        wanted = wanted[skipped : skipped + given.size]
        yield ExplainedValues((vector, output), given, wanted, tensor, case.limit, is_moved=True)


def _other_outputs(
    case: BoardCase, output: int, pairs: list[Pair]
) -> Iterator[tuple[str, str, Iterator[ExplainedValues]]]:
    own = case.outputs[output]
    for other, tensor in enumerate(case.outputs):
        if other == output or (tensor.dtype, tensor.size) != (own.dtype, own.size):
            continue
        text = f"Output '{own.name}' has the values of '{tensor.name}': the outputs are swapped."
        yield "swapped outputs", text, (
            ExplainedValues(pair, case.observed[pair], case.expected[pair[0]][other], tensor, case.limit)
            for pair in pairs
        )  # fmt: skip


def _partly_written(case: BoardCase, pairs: list[Pair]) -> str | None:
    """Returns what is said of an output with a constant part at one end; None if no constant part is found."""
    tensor = case.outputs[pairs[0][1]]
    parts, firsts, channels = set(), [], set()
    for vector, output in pairs:
        observed = case.observed[vector, output]
        wrong = np.flatnonzero(~agreement(observed, case.expected[vector][output], tensor, case.limit))
        first, last = int(wrong[0]), int(wrong[-1])
        head, tail = observed[first:], observed[: last + 1]
        if first and constant_text(head) is not None and head.nbytes >= _LEAST_UNWRITTEN:
            parts.add("end")
            channels.add(_constant_channels(tensor, observed, from_end=True))
        elif last + 1 < observed.size and constant_text(tail) is not None and tail.nbytes >= _LEAST_UNWRITTEN:
            parts.add("beginning")
            channels.add(_constant_channels(tensor, observed, from_end=False))
        else:
            return None
        firsts.append(first)
    if len(parts) != 1:
        return None
    part = next(iter(parts))
    if len(channels) == 1 and (constant := next(iter(channels))) is not None:
        count = len(constant)
        which = f"channel {constant[0]}" if count == 1 else f"channels {constant[0]} to {constant[-1]}"
        return (
            f"is only partly written (the {part} is not), or the board's weights of {which} are zero: exactly "
            f"{'this channel is' if count == 1 else 'these channels are'} constant"
        )
    start = f", from about element {min(firsts)} on" if part == "end" else ""
    return f"is only partly written: the {part} is not{start}"


def _constant_channels(tensor: BoardTensor, values: Array, *, from_end: bool) -> range | None:
    """Returns the channels that make up the constant values at an end; None if these are not whole channels."""
    if len(tensor.shape) < 3 or tensor.shape[0] != 1:
        return None
    place = tensor.dim_order.index(1)
    is_outermost = math.prod(tensor.memory_shape[:place]) == 1
    size = math.prod(tensor.memory_shape[place + 1 :])
    ordered = values[::-1] if from_end else values
    is_other = (ordered != ordered[0]) & ~(np.isnan(ordered) & np.isnan(ordered[0]))
    constant = int(is_other.argmax())  # the part is not the whole output, which is never constant here
    if not is_outermost or size == 1 or not constant or constant % size:
        return None
    count = constant // size
    return range(tensor.shape[1] - count, tensor.shape[1]) if from_end else range(count)


def _affine(case: BoardCase, output: int, pairs: list[Pair]) -> Iterator[Diagnosis]:
    """Yields a wrong scale or zero point: the fit with the fewest parameters that explains the differences."""
    tensor = case.outputs[output]
    if any(case.observed[pair].size != tensor.size for pair in pairs):
        return
    expected = np.concatenate([case.expected[vector][number] for vector, number in pairs])
    observed = np.concatenate([case.observed[pair] for pair in pairs])
    lsb = lsb_of(expected, tensor)
    found: list[Diagnosis] = []
    for fit in affine_fits(expected, observed, tensor):
        known = _with_whole_offset(fit, tensor, lsb)
        if known is None:
            continue
        explanation = explanation_of(case, _affine_comparisons(case, pairs, known), parameters=fit.parameters)
        if explanation is not None:
            found.append(diagnosis_of(*_affine_text(known, tensor, lsb), tuple(pairs), explanation))
    yield from best_of(found)[:1]


def _with_whole_offset(fit: AffineTransform, tensor: BoardTensor, lsb: float) -> AffineTransform | None:
    """Returns the fit, with a rounded offset for codes; None if it changes nothing or its factor is near 0."""
    offset = fit.offset if tensor.dtype.kind == "f" else float(round(fit.offset))
    if not np.isfinite(fit.factor) or abs(fit.factor) < _NEAR * _NEAR:
        return None
    if fit.factor == 1.0 and abs(offset) < lsb / 2:
        return None
    return AffineTransform(fit.factor, offset, fit.parameters)


def _affine_comparisons(case: BoardCase, pairs: list[Pair], fit: AffineTransform) -> Iterator[ExplainedValues]:
    for vector, output in pairs:
        tensor = case.outputs[output]
        wanted = fit.apply(case.expected[vector][output], tensor)
        tolerance = case.limit * max(1.0, abs(fit.factor)) + (0.0 if tensor.dtype.kind == "f" else 1.0)
        yield ExplainedValues((vector, output), case.observed[vector, output], wanted, tensor, max(tolerance, 0.01))


def _affine_text(fit: AffineTransform, tensor: BoardTensor, lsb: float) -> tuple[str, str]:
    what = f"Output '{tensor.name}'"
    if tensor.dtype.kind == "f" and tensor.scale is not None:
        codes = fit.factor * tensor.scale
        if abs(codes - 1) < _NEAR and abs(fit.offset - tensor.zero_point) < 1:
            return "missing output dequantization", f"{what} holds int8 codes: it is not dequantized."
        if abs(codes - 1) < _NEAR and abs(fit.offset) < 1:
            return "missing output dequantization", f"{what} is not multiplied by its scale, {tensor.scale:.6g}."
        without_zero = tensor.zero_point * tensor.scale
        if abs(fit.factor - 1) < _NEAR and tensor.zero_point and abs(fit.offset - without_zero) < lsb / 2:
            return (
                "wrong zero point",
                f"{what} is dequantized without its zero point, {tensor.zero_point}.",
            )
    scale = "" if tensor.scale is None else f" The scale of the program is {tensor.scale:.6g}."
    if abs(fit.factor - 1) < 1e-4 or fit.factor == 1.0:
        steps = fit.offset / lsb
        return "wrong zero point", f"{what} is off by {steps:+.3g} LSB everywhere: its zero point is wrong."
    offset = "" if abs(fit.offset) < lsb / 2 else f", and off by {fit.offset / lsb:+.3g} LSB"
    kind = "wrong scale" if not offset else "wrong scale and zero point"
    return kind, f"{what} is {fit.factor:.4g} times the expected values{offset}: its scale is wrong.{scale}"


def vector_diagnoses(case: BoardCase) -> list[Diagnosis]:
    """Returns an explanation of the differences by outputs of other vectors: stale, repeated or out of order.

    The first run may hold other values, because the outputs of the run before it are unknown.
    """
    found: dict[int, list[int]] = {}
    for vector in sorted({vector for vector, _ in case.failing}):
        given = [pair for pair in case.observed if pair[0] == vector]
        found[vector] = [other for other in range(len(case.expected)) if _is_of(case, given, other)]
        if not found[vector] and vector:
            return []
    is_late = all(vector - 1 in others for vector, others in found.items() if vector)
    if not found.get(0, [0]):
        del found[0]
    if not found or (case.failing[0][0] == 0 and 0 not in found and not is_late):
        return []
    text = _order_text(found, len(case.expected))
    comparisons = [
        ExplainedValues(
            pair, case.observed[pair], case.expected[found[pair[0]][0]][pair[1]], case.outputs[pair[1]], case.limit
        )
        for pair in case.failing
        if pair[0] in found
    ]
    explanation = explanation_of(case, comparisons, needed_bits=_BITS_OF_VECTORS)
    return [] if explanation is None else [diagnosis_of(*text, case.failing, explanation)]


def _is_of(case: BoardCase, pairs: list[Pair], other: int) -> bool:
    for pair in pairs:
        observed, wanted = case.observed[pair], case.expected[other][pair[1]]
        if observed.size != wanted.size:
            return False
        if not agreement(observed, wanted, case.outputs[pair[1]], case.limit).all():
            return False
    return True


def _order_text(found: dict[int, list[int]], vectors: int) -> tuple[str, str]:
    for same in range(vectors):
        if all(same in others for others in found.values()) and len(found) >= min(2, vectors - 1):
            return "stale", f"Every vector gives the outputs of vector {same}: the input or the output is not updated."
    for late in (1, -1, 2, -2):
        if all(vector - late in others for vector, others in found.items()) and len(found) >= min(2, vectors - 1):
            which = "previous" if late == 1 else "next" if late == -1 else f"{abs(late)} vectors away, one"
            return "stale" if late > 0 else "vectors out of order", (
                f"Each vector gives the outputs of the {which} vector: "
                + ("an output or an input is read one run late." if late == 1 else "vectors are lost or out of order.")
            )
    order = ", ".join(f"{vector} gives the outputs of vector {others[0]}" for vector, others in list(found.items())[:4])
    return "vectors out of order", f"The outputs belong to other vectors: vector {order}."
