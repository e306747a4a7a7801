"""Searches for mistakes in a board's inputs that have a parameter: a wrong scale or zero point, or a missing part."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from openneutron.accuracy.board_dump import Array, BoardTensor
from openneutron.accuracy.board_evidence import BoardCase
from openneutron.accuracy.board_input_mistakes import (
    difference_of_vector,
    explanation_by_run,
    note_of_ended_process,
    vectors_by_difference,
)
from openneutron.accuracy.board_output_mistakes import Diagnosis, diagnosis_of
from openneutron.accuracy.board_simulation import Simulation, Vector, run_or_refuse
from openneutron.core.numbers import in_percent
from openneutron.core.progress import phase_bar
from openneutron.errors import HostProcessError

__all__ = ["searched_diagnoses"]

_CANDIDATES = 16
"""The number of coarse points that are examined with several vectors."""
_STARTS = 4
"""The number of coarse points from which the search goes on."""
_NEAR = 8
"""The number of finest steps around the best parameter that are all examined: near it, the difference is not smooth."""
_PROBES = 3
"""The number of vectors that the search compares. Few outputs of one vector may agree by chance."""
_MOST_SECONDS = 60.0
"""The expected time of the search for one kind of mistake in one input. A longer search examines fewer parameters."""
_LEAST_SHARE = 1 / 16
_PARTS = 64
_LEAST_PARTS = 16
_COMMON_FACTORS = (1 / 3, 0.6, 2 / 3, 0.75, 0.8, 0.9, 1.1, 1.2, 1.25, 4 / 3, 1.5, 3)


@dataclass(frozen=True)
class _Family:
    """Mistakes in one input that differ in a parameter. `apply` makes one of them in the values in memory."""

    mistake: str
    number: int
    points: tuple[float, ...]
    """The coarse parameters."""
    step: float
    """The distance of the coarse parameters."""
    finest: float
    """The smallest distance of two parameters that are examined."""
    apply: Callable[[Array, float], Array]
    text: Callable[[float], str]

    @property
    def examined(self) -> float:
        """The number of parameters that the whole search examines, if none is examined twice."""
        refinements = math.ceil(math.log2(self.step / self.finest))
        return len(self.points) + _CANDIDATES + 2 * _STARTS * refinements + 2 * _NEAR + 1


def searched_diagnoses(
    case: BoardCase, simulation: Simulation, vectors: Sequence[Vector]
) -> tuple[list[Diagnosis], list[str]]:
    """Returns the mistakes with a parameter that explain the differences, and notes on those not examined.

    For each kind of mistake, runs the program with coarse parameters on the vector with the largest difference, then
    with parameters near the best ones on three vectors. A program with states also runs the vectors before them. If
    this is expected to take more than a minute, examines fewer parameters, and says so in a note.
    """
    probes = tuple(vectors_by_difference(case)[:_PROBES])
    families = [family for number, tensor in enumerate(simulation.inputs) for family in _families(number, tensor)]
    if not probes or not families:
        return [], []
    seconds = _seconds_of_a_parameter(simulation, vectors, probes)
    found, notes = list[Diagnosis](), list[str]()
    with phase_bar("parameters of mistakes", [family.examined for family in families]) as end_phase:
        for family in families:
            what = f"Input '{simulation.inputs[family.number].name}' has the mistake: {family.mistake}."
            share = _share_of_search(family, seconds)
            if share < 1:
                notes.append(
                    f"The program is slow on this machine: {in_percent(share)} of the parameters were examined for the "
                    f"assumption: {what}"
                )
            try:
                parameter = _best_parameter(case, simulation, vectors, family, probes, share=share)
                made = functools.partial(_changed_vector, vectors, family, parameter)
                explanation = explanation_by_run(case, simulation, made, parameters=1)
            except HostProcessError:
                notes.append(note_of_ended_process(simulation, what))
                explanation = None
            end_phase()
            if explanation is not None:
                found.append(diagnosis_of(family.mistake, family.text(parameter), case.failing, explanation))
    return found, notes


def _seconds_of_a_parameter(simulation: Simulation, vectors: Sequence[Vector], probes: tuple[int, ...]) -> float:
    """Returns the time to run the program on the vectors that the search compares."""
    start = time.perf_counter()
    list(simulation.run([vectors[vector] for vector in _run_vectors(simulation, probes)]))
    return time.perf_counter() - start


def _run_vectors(simulation: Simulation, used: Sequence[int]) -> list[int]:
    """Returns the vectors to run for the outputs of `used`: with states, also all vectors before them."""
    return list(range(max(used) + 1)) if simulation.host.has_state else list(used)


def _share_of_search(family: _Family, seconds: float) -> float:
    """Returns the share of the parameters of a family that are examined, if each takes `seconds`."""
    expected = family.examined * seconds
    return 1.0 if expected <= _MOST_SECONDS else max(_LEAST_SHARE, _MOST_SECONDS / expected)


def _best_parameter(
    case: BoardCase,
    simulation: Simulation,
    vectors: Sequence[Vector],
    family: _Family,
    probes: tuple[int, ...],
    *,
    share: float,
) -> float:
    """Returns the parameter whose outputs are nearest to those of the board, for the vectors `probes`.

    Examines about `share` of the coarse parameters, of those with which the search goes on, and of the finest ones.
    """

    @functools.cache
    def difference(parameter: float, count: int = len(probes)) -> float:
        used = probes[:count]
        run = _run_vectors(simulation, used)
        outputs = run_or_refuse(simulation, [_changed(vectors[vector], family, parameter) for vector in run])
        if outputs is None:
            return math.inf
        by_vector = dict(zip(run, outputs, strict=True))
        return sum(difference_of_vector(case, vector, by_vector[vector]) for vector in used)

    def part(count: int) -> int:
        return max(1, round(share * count))

    points = family.points[:: round(1 / share)]
    candidates = sorted(points, key=lambda parameter: difference(parameter, 1))[: part(_CANDIDATES)]
    starts = sorted(candidates, key=difference)[: part(_STARTS)]
    best = min((_refined(start, family, difference) for start in starts), key=difference)
    near = part(_NEAR)
    return min((best + step * family.finest for step in range(-near, near + 1)), key=difference)


def _refined(start: float, family: _Family, difference: Callable[[float], float]) -> float:
    best, step = start, family.step
    while step > family.finest:
        step /= 2
        best = min((best, best - step, best + step), key=difference)
    return best


def _changed_vector(vectors: Sequence[Vector], family: _Family, parameter: float, vector: int) -> Vector:
    return _changed(vectors[vector], family, parameter)


def _changed(vector: Vector, family: _Family, parameter: float) -> Vector:
    made = family.apply(vector[family.number], parameter)
    return [*vector[: family.number], made, *vector[family.number + 1 :]]


def _families(number: int, tensor: BoardTensor) -> Iterator[_Family]:
    if not (tensor.holds_codes or tensor.dtype.kind == "f"):
        return
    yield _wrong_scale(number, tensor)
    if tensor.scale is not None:
        yield _wrong_zero_point(number, tensor)
    if tensor.size >= _LEAST_PARTS:
        yield from _unwritten_parts(number, tensor)


def _wrong_scale(number: int, tensor: BoardTensor) -> _Family:
    """The parameter is the log2 of the factor."""
    near_one = (part / 32 for part in range(-7, 8))
    points = (*(quarters / 4 for quarters in range(-24, 25)), *near_one, *map(math.log2, _COMMON_FACTORS))

    def text(parameter: float) -> str:
        factor = 2**parameter
        values = f"Input '{tensor.name}' is about {factor:.3g} times the expected values"
        if not tensor.holds_codes or tensor.scale is None:
            return f"{values}: its scale is wrong."
        wrong = tensor.scale / factor
        return f"{values}: it is quantized with a scale of about {wrong:.3g}. The program has {tensor.scale:.6g}."

    return _Family(
        "wrong input scale", number, points, 0.25, 2.0**-10,
        lambda values, parameter: _affine(values, tensor, 2**parameter, 0.0), text,
    )  # fmt: skip


def _wrong_zero_point(number: int, tensor: BoardTensor) -> _Family:
    """The parameter is the offset in steps of the scale."""
    points = tuple(float(offset) for offset in (*range(-128, 129, 8), *range(-32, 33)))

    def text(parameter: float) -> str:
        if tensor.holds_codes:
            wrong = tensor.zero_point + round(parameter)
            return (
                f"Input '{tensor.name}' is off by {round(parameter):+d}: it is quantized with the zero point {wrong}. "
                f"The program has {tensor.zero_point}."
            )
        return f"Input '{tensor.name}' is off by about {parameter * float(tensor.scale or 1):+.3g}: its mean is wrong."

    return _Family(
        "wrong input zero point", number, points, 8.0, 1.0 if tensor.holds_codes else 0.125,
        lambda values, parameter: _affine(values, tensor, 1.0, parameter), text,
    )  # fmt: skip


def _affine(values: Array, tensor: BoardTensor, factor: float, steps: float) -> Array:
    floats = values.astype(np.float64)
    if not tensor.holds_codes:
        return np.asarray(floats * factor + steps * float(tensor.scale or 1)).astype(tensor.dtype)
    limits = np.iinfo(tensor.dtype)  # type: ignore[type-var]
    codes = np.rint((floats - tensor.zero_point) * factor + tensor.zero_point + steps)
    return np.asarray(codes.clip(limits.min, limits.max)).astype(tensor.dtype)


def _unwritten_parts(number: int, tensor: BoardTensor) -> Iterator[_Family]:
    """The parameter is the number of elements before the border of the part that is zero."""
    step = 2 ** max(0, math.ceil(math.log2(tensor.size / _PARTS)))
    points = tuple(float(border) for border in range(step, tensor.size, step))
    positions = np.arange(tensor.size)
    for name, part, is_written in (
        ("end", "from about element {} on", lambda border: positions < border),
        ("beginning", "before about element {}", lambda border: positions >= border),
    ):
        yield _Family(
            "input partly written", number, points, float(step), 1.0,
            lambda values, border, is_written=is_written: np.where(is_written(border), values, 0).astype(values.dtype),  # type: ignore[misc]
            lambda border, name=name, part=part: (  # type: ignore[misc]
                f"Input '{tensor.name}' is only partly written: its {name} is zero, {part.format(round(border))}."
            ),
        )  # fmt: skip
