"""Recognizes mistakes in a board's inputs: runs the program on this machine with the same mistake, and compares."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations

from openneutron.accuracy.board_dump import Array, BoardTensor
from openneutron.accuracy.board_evidence import (
    NEEDED_BITS,
    BoardCase,
    ExplainedValues,
    Explanation,
    explanation_of,
    mean_difference,
)
from openneutron.accuracy.board_input_changes import (
    InputChange,
    Normalization,
    input_changes,
    shift_text,
    shifts_of,
)
from openneutron.accuracy.board_output_mistakes import Diagnosis, diagnosis_of
from openneutron.accuracy.board_simulation import Simulation, Vector, run_or_refuse
from openneutron.accuracy.board_transforms import as_type
from openneutron.core.progress import phase_bar
from openneutron.errors import HostProcessError

__all__ = [
    "difference_of_vector", "explanation_by_run", "input_diagnoses", "note_of_ended_process", "vectors_by_difference",
]  # fmt: skip

_MOST_VECTORS = 8
_BITS_OF_CONSTANTS = 4.0
_CONSTANT = "input never written"
Changed = Callable[[int], Vector | None]
"""Returns the mistaken inputs of a vector; None if the mistake cannot occur there."""


def input_diagnoses(
    case: BoardCase, simulation: Simulation, vectors: Sequence[Vector], normalization: Normalization | None
) -> tuple[list[Diagnosis], list[str]]:
    """Returns each mistake in the inputs that alone explains the differences, and notes on those not examined.

    For each mistake, runs the program on the vector with the largest difference. If its outputs then are much nearer,
    runs up to eight vectors. A program with states also runs all vectors before them. A mistake with which the program
    ends its process is not examined.
    """
    found, notes = dict[tuple[str, str], Diagnosis](), list[str]()
    mistaken = list(_mistaken_vectors(simulation, vectors, normalization))
    with phase_bar("mistakes in inputs", [1.0] * len(mistaken)) as end_phase:
        for mistake, text, changed in mistaken:
            # A constant input often causes constant outputs, which are weaker evidence.
            needed = _BITS_OF_CONSTANTS if mistake == _CONSTANT else NEEDED_BITS
            try:
                explanation = explanation_by_run(case, simulation, changed, needed_bits=needed)
            except HostProcessError:
                notes.append(note_of_ended_process(simulation, text))
                explanation = None
            end_phase()
            known = found.get((mistake, text))
            if explanation is not None and (known is None or explanation.after < known.remaining_lsb):
                found[mistake, text] = diagnosis_of(mistake, text, case.failing, explanation)
    failing = sorted({vector for vector, _ in case.failing})
    for text, used, starts, skipped in _state_mistakes(simulation, vectors):
        try:
            outputs = run_or_refuse(simulation, used, starts)
        except HostProcessError:
            notes.append(note_of_ended_process(simulation, text))
            continue
        if outputs is None:
            continue
        explanation = explanation_of(case, _comparisons(case, failing, dict(enumerate(outputs[skipped:]))))
        if explanation is not None:
            found["stale state", text] = diagnosis_of("stale state", text, case.failing, explanation)
    return list(found.values()), notes


def note_of_ended_process(simulation: Simulation, text: str) -> str:
    """Makes the program usable after the end of its process, and returns the note on the assumption `text`."""
    simulation.host.reset()
    return f"The program ended its process on this machine under the assumption: {text}"


def vectors_by_difference(case: BoardCase) -> list[int]:
    """Returns the vectors that disagree, the one with the largest difference first."""
    largest: dict[int, float] = {}
    for vector, output in case.failing:
        observed, expected = case.observed[vector, output], case.expected[vector][output]
        if observed.size == expected.size:
            difference = mean_difference(observed, expected, case.outputs[output])
            largest[vector] = max(difference, largest.get(vector, 0.0))
    return sorted(largest, key=lambda vector: (-largest[vector], vector))


def explanation_by_run(
    case: BoardCase,
    simulation: Simulation,
    changed: Changed,
    *,
    parameters: int = 0,
    needed_bits: float = NEEDED_BITS,
) -> Explanation | None:
    """Returns how the outputs of this machine on mistaken inputs explain the outputs of the board; None if not."""
    failing = vectors_by_difference(case)[:_MOST_VECTORS]
    if not failing:
        return None
    if simulation.host.has_state:
        found = _outputs_of_all(simulation, changed, max(failing) + 1)
    else:
        found = _outputs_of(case, simulation, changed, failing)
    if found is None:
        return None
    comparisons = _comparisons(case, failing, found)
    return explanation_of(case, comparisons, parameters=parameters, needed_bits=needed_bits)


def _outputs_of_all(simulation: Simulation, changed: Changed, count: int) -> dict[int, tuple[Array, ...]] | None:
    vectors = [vector for vector in map(changed, range(count)) if vector is not None]
    if len(vectors) < count:
        return None
    outputs = run_or_refuse(simulation, vectors)
    return None if outputs is None else dict(enumerate(outputs))


def _outputs_of(
    case: BoardCase, simulation: Simulation, changed: Changed, vectors: Sequence[int]
) -> dict[int, tuple[Array, ...]] | None:
    """Returns the outputs of mistaken inputs; None if they do not come nearer to those of the board at first."""
    found: dict[int, tuple[Array, ...]] = {}
    for vector in vectors:
        made = changed(vector)
        outputs = None if made is None else run_or_refuse(simulation, [made])
        if outputs is None:
            return None
        if not found and not _is_nearer(case, vector, outputs[0]):
            return None
        found[vector] = outputs[0]
    return found


def _is_nearer(case: BoardCase, vector: int, outputs: tuple[Array, ...]) -> bool:
    """Whether the mean difference of all outputs of a vector is at most half of that from the expected outputs."""
    before = difference_of_vector(case, vector, case.expected[vector])
    return math.isfinite(before) and 2 * difference_of_vector(case, vector, outputs) <= before


def difference_of_vector(case: BoardCase, vector: int, outputs: Sequence[Array]) -> float:
    """Returns the sum of the mean differences of a vector's outputs in LSBs; infinity if they differ in size."""
    pairs = [pair for pair in case.observed if pair[0] == vector]
    if any(case.observed[pair].size != outputs[pair[1]].size for pair in pairs):
        return math.inf
    return sum(mean_difference(case.observed[pair], outputs[pair[1]], case.outputs[pair[1]]) for pair in pairs)


def _comparisons(
    case: BoardCase, vectors: Sequence[int], outputs: dict[int, tuple[Array, ...]]
) -> Iterator[ExplainedValues]:
    for pair in case.observed:
        if pair[0] in vectors:
            wanted = outputs[pair[0]][pair[1]]
            yield ExplainedValues(pair, case.observed[pair], wanted, case.outputs[pair[1]], case.limit)


def _mistaken_vectors(
    simulation: Simulation, vectors: Sequence[Vector], normalization: Normalization | None
) -> Iterator[tuple[str, str, Changed]]:
    others = (*simulation.inputs, *simulation.outputs)
    for number, tensor in enumerate(simulation.inputs):
        for change in input_changes(tensor, others, normalization):
            yield (
                change.mistake, change.text,
                lambda vector, number=number, change=change: _changed(vectors[vector], number, change),  # type: ignore[misc]
            )  # fmt: skip
        for shift in shifts_of(tensor):
            yield (
                "input alignment", shift_text(tensor, shift),
                lambda vector, number=number, shift=shift: _moved_among(vectors, vector, number, shift),  # type: ignore[misc]
            )  # fmt: skip
    for first, second in combinations(range(len(simulation.inputs)), 2):
        names = [f"'{simulation.inputs[number].name}'" for number in (first, second)]
        if _is_exchangeable(simulation.inputs[first], simulation.inputs[second]):
            yield (
                "swapped inputs", f"Inputs {' and '.join(names)} are swapped.",
                lambda vector, pair=(first, second): _exchanged(vectors[vector], *pair),  # type: ignore[misc]
            )  # fmt: skip
    if simulation.host.has_state:
        yield "stale", "Each run gets the input of the previous run.", lambda vector: vectors[max(0, vector - 1)]


def _is_exchangeable(first: BoardTensor, second: BoardTensor) -> bool:
    return (first.size, first.dtype) == (second.size, second.dtype)


def _exchanged(vector: Vector, first: int, second: int) -> Vector:
    found = list(vector)
    found[first], found[second] = found[second], found[first]
    return found


def _changed(vector: Vector, number: int, change: InputChange) -> Vector | None:
    return _replaced(vector, number, change.apply(vector[number]))


def _replaced(vector: Vector, number: int, made: Array | None) -> Vector | None:
    if made is None or made.tobytes() == vector[number].tobytes():
        return None
    return [*vector[:number], made, *vector[number + 1 :]]


def _moved_among(vectors: Sequence[Vector], vector: int, number: int, shift: int) -> Vector | None:
    """Returns an input that is read from a stream of inputs, `shift` bytes before its begin, or after if negative."""
    neighbour = max(0, vector - 1) if shift > 0 else min(len(vectors) - 1, vector + 1)
    own, other = vectors[vector][number].tobytes(), vectors[neighbour][number].tobytes()
    data = other[-shift:] + own[:-shift] if shift > 0 else own[-shift:] + other[:-shift]
    return _replaced(vectors[vector], number, as_type(data, vectors[vector][number].dtype))


def _state_mistakes(
    simulation: Simulation, vectors: Sequence[Vector]
) -> Iterator[tuple[str, list[Vector], frozenset[int], int]]:
    """Returns a text, the inputs, the runs before which the states are reset, and a number for each mistake.

    The outputs of the first runs, as many as the number says, are not compared.
    """
    if not simulation.host.has_state:
        return
    used = [*vectors, *vectors]
    none, every = frozenset({0}), frozenset(range(len(vectors)))
    ways = [
        ("The states are not reset where a stream begins.", list(vectors), none, 0),
        ("The states are reset before every run, so that nothing is kept.", list(vectors), every, 0),
        ("The states are not reset before the first run: they hold those of an earlier pass over the vectors.", used,
         none, len(vectors)),
    ]  # fmt: skip
    yield from (way for way in ways if way[2] != simulation.starts or way[3])
