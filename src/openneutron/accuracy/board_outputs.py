"""Compares the outputs of a board with the outputs of the program on this machine, and names known mistakes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import permutations
from typing import Any

import numpy as np

from openneutron.accuracy.board_dump import Array, BoardTensor, Dump, Pair, read_dump
from openneutron.accuracy.board_evidence import BoardCase, agreement, lsb_distance
from openneutron.accuracy.board_input_changes import Normalization
from openneutron.accuracy.board_input_mistakes import input_diagnoses
from openneutron.accuracy.board_input_search import searched_diagnoses
from openneutron.accuracy.board_output_mistakes import Diagnosis, best_of, output_diagnoses, vector_diagnoses
from openneutron.accuracy.board_simulation import Simulation, Vector, values_in_memory
from openneutron.accuracy.board_tensors import board_inputs, board_outputs
from openneutron.accuracy.board_transforms import as_type
from openneutron.accuracy.validate import load_program, names_of_tensors, program_forms, random_samples
from openneutron.core.boundary import typed_errors
from openneutron.core.json_values import without_infinite_numbers
from openneutron.errors import InputError, OptionError
from openneutron.model.data import Data, first_steps, streams_in
from openneutron.neutron_program import NeutronProgram
from openneutron.runtime.native import native_module
from openneutron.runtime.program import HostProgram, TensorInfo

__all__ = [
    "MISTAKES",
    "BoardDifference",
    "BoardInputs",
    "BoardValidation",
    "Diagnosis",
    "Normalization",
    "validate_board",
    "vectors_of_data",
]  # fmt: skip

MISTAKES = (
    "output layout", "missing output dequantization", "swapped outputs", "byte order", "alignment", "wrong scale",
    "wrong zero point", "wrong scale and zero point", "uint8 for int8", "never written", "partly written", "stale",
    "vectors out of order", "stale state", "input layout", "missing input quantization", "wrong input quantization",
    "missing normalization", "RGB for BGR", "swapped inputs", "input never written", "input byte order",
    "input alignment", "wrong input scale", "wrong input zero point", "input partly written", "mirrored input",
    "padded outputs", "dequantized outputs",
)  # fmt: skip
"""The kinds of mistakes that are recognized."""

DEFAULT_LSB = 1.0
PADDINGS = (4, 8, 16, 32, 64)
"""The alignments in bytes that are tried if a dump pads its outputs."""
_MOST_ORDERED_OUTPUTS = 5
_LARGEST_HEADER = 256


@dataclass(frozen=True)
class BoardInputs:
    """The inputs that the board ran, each in one dimension in the order of the program's memory."""

    inputs: tuple[tuple[Array, ...], ...]
    starts: frozenset[int] = frozenset({0})
    """The vectors before which the board resets the states."""
    expected: tuple[tuple[Array, ...], ...] | None = None
    """The outputs that a package stores; None to compute them."""


@dataclass(frozen=True)
class BoardDifference:
    """The difference of one output of the board, over all vectors that the dump holds."""

    output: int
    """Index of the output."""
    shape: tuple[int, ...]
    """Shape of the output."""
    dtype: str
    """Dtype of the output."""
    vectors: int
    """The number of vectors that were compared."""
    wrong: int
    """The number of elements that differ by more than the limit."""
    elements: int
    """The number of elements that were compared."""
    lsb: float
    """The largest difference, in LSBs."""
    vector: int
    """The vector of the largest difference."""
    index: tuple[int, ...]
    """The index of the element with the largest difference."""
    expected: float
    """This machine's value of that element."""
    given: float
    """The board's value of that element."""
    where: str
    """What the differing elements have in common, such as "all in channel 3"; empty if nothing."""
    name: str
    """The name of the output: its path in a dict or dataclass ("boxes"), or "output0"."""


@dataclass(frozen=True)
class BoardValidation:
    """The comparison of a board with this machine."""

    vectors: int
    """The number of vectors that the board should have run."""
    max_lsb: float
    """The limit of the differences, in LSBs."""
    outputs: tuple[BoardDifference, ...]
    """The differences of the outputs."""
    missing: tuple[str, ...]
    """A text for each vector and output that the dump does not hold."""
    diagnoses: tuple[Diagnosis, ...]
    """The known mistakes that explain differences. Several mistakes of one output are alternatives."""
    notes: tuple[str, ...]
    """Sentences about the dump and about mistakes that were not examined."""

    @property
    def passed(self) -> bool:
        """Whether no output is missing, all agree within the limit, and no mistake was found."""
        return not (self.missing or self.diagnoses) and all(one.wrong == 0 for one in self.outputs)

    def as_dict(self) -> dict[str, Any]:
        """Returns the result as values that JSON can hold."""
        found: dict[str, Any] = without_infinite_numbers({**asdict(self), "passed": self.passed})
        return found

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"{self.vectors} vector{'s' * (self.vectors != 1)} against the board; limit {self.max_lsb:g} LSB"
        for one in self.outputs:
            yield f"  {one.name} {one.dtype}{list(one.shape)}: " + _words(one)
        yield from (f"  MISSING: {text}" for text in self.missing)
        yield from (f"  note: {text}" for text in self.notes)
        if any(one.wrong for one in self.outputs) and not self.diagnoses:
            yield "  No known mistake explains the differences."
        many = len(self.diagnoses) > 1 and len({one.pairs for one in self.diagnoses}) < len(self.diagnoses)
        if many:
            yield "  Several mistakes explain the same differences:"
        yield from (f"  {'POSSIBLE ' if many else ''}MISTAKE ({one.mistake}): {one.text}" for one in self.diagnoses)
        yield "  passed" if self.passed else "  FAILED"


def _words(one: BoardDifference) -> str:
    if not one.wrong:
        return f"{one.vectors} vectors agree; largest difference {one.lsb:.4g} LSB"
    where = f"; {one.where}" if one.where else ""
    return (
        f"{one.wrong:,} of {one.elements:,} elements differ{where}. The largest difference is {one.lsb:.4g} LSB in "
        f"vector {one.vector}, element {list(one.index)}: {one.given:.6g}, expected {one.expected:.6g}"
    )


def validate_board(
    program: NeutronProgram | HostProgram | bytes | str | os.PathLike[str],
    dump: str | os.PathLike[str] | bytes,
    data: Data | BoardInputs | None = None,
    *,
    samples: int = 16,
    transform: Callable[[Any], Any] | None = None,
    max_lsb: float = DEFAULT_LSB,
    normalization: Normalization | None = None,
) -> BoardValidation:
    """Compares the outputs that a board printed or dumped with those of the program on this machine.

    - `dump`: a file or its bytes, in the forms of `read_dump`.
    - `data`: the inputs that the board ran: `BoardInputs`, or data in the forms that `quantize` takes. None stands for
      the random inputs of `validate`.
    - `samples`: the largest number of vectors from `data`.
    - `max_lsb`: the largest difference of an element that passes, in integer steps of the output, or in steps of the
      scale from which a float output is dequantized. Unless it is 0, rounding of floats may add less than 0.0001 steps.
    - `normalization`: how pixels become the model's input, to recognize an input that is not normalized.

    If outputs differ, tries known mistakes: undoes each mistake in the outputs, and runs the program with each mistake
    in the inputs. Reports a mistake only if it explains all differences of the outputs that it concerns.

    Raises `InputError` for a dump or data that do not fit, `OptionError` for a wrong limit, `NativeModuleError` if the
    native module is not installed, and `HostError` for a device program, which does not run on this machine.
    """
    native_module()
    if isinstance(max_lsb, bool) or not isinstance(max_lsb, (int, float)) or not max_lsb >= 0:
        raise OptionError(f"max_lsb must be a number that is not negative, not {max_lsb!r}.")
    host = load_program(program)
    inputs, outputs = board_inputs(host), board_outputs(host)
    if not outputs:
        raise InputError("The program has no output that is a tensor, so there is nothing to compare.")
    vectors = data if isinstance(data, BoardInputs) else vectors_of_data(host, data, samples, transform)
    simulation = Simulation(host, inputs, outputs, vectors.starts)
    expected = vectors.expected or tuple(simulation.run(vectors.inputs))
    read = read_dump(dump, outputs)
    return _validation(read, expected, simulation, vectors, limit=float(max_lsb), normalization=normalization)


def vectors_of_data(
    host: HostProgram, data: Data | None, samples: int, transform: Callable[[Any], Any] | None = None
) -> BoardInputs:
    """Returns inputs in the form that the program takes. If `data` is None, these are the random inputs of `validate`.

    The states are reset where a stream begins. Raises `InputError` for data that do not fit.
    """
    forms = program_forms(host)
    if data is None:
        streams = [[one] for one in random_samples(forms, samples)]
        if host.has_state:
            streams = [[steps[0] for steps in streams]]
    else:
        with typed_errors("Reading the data", InputError):
            streams = first_steps(streams_in(data, forms, transform=transform), samples)
    if not any(streams):
        raise InputError("The data are empty. Give the inputs that the board got.")
    tensors = board_inputs(host)
    found: list[tuple[Array, ...]] = []
    starts = set()
    for steps in streams:
        starts.add(len(found))
        for values in steps:
            given = [
                info.quantize(value) if info.scale is not None else value
                for value, info in zip(values, host.inputs, strict=True)
                if isinstance(info, TensorInfo)
            ]
            found.append(tuple(values_in_memory(value, tensor) for value, tensor in zip(given, tensors, strict=True)))
    return BoardInputs(tuple(found), frozenset(starts))


def _validation(
    dump: Dump,
    expected: Sequence[tuple[Array, ...]],
    simulation: Simulation,
    vectors: BoardInputs,
    *,
    limit: float,
    normalization: Normalization | None,
) -> BoardValidation:
    outputs = simulation.outputs
    pieces, layout, notes = _split(dump, expected, outputs, limit)
    extra = sorted({vector for vector, _ in pieces if vector >= len(expected)})
    if extra:
        notes = (*notes, f"The dump holds {len(extra)} more vectors than the {len(expected)} that were run here.")
    typed, missing, converted = _typed({pair: pieces[pair] for pair in pieces if pair[0] < len(expected)}, outputs,
                                       len(expected))  # fmt: skip
    failing = tuple(
        pair
        for pair, values in sorted(typed.items())
        if values.size != outputs[pair[1]].size
        or not agreement(values, expected[pair[0]][pair[1]], outputs[pair[1]], limit).all()
    )
    case = BoardCase(simulation.inputs, outputs, tuple(expected), typed, failing, limit)
    value_diagnoses, unexamined = _diagnoses(case, simulation, vectors.inputs, normalization)
    diagnoses = [*layout, *(converted if not failing else []), *value_diagnoses]
    rows = tuple(_difference(case, output, name) for output, name in enumerate(names_of_tensors(simulation.host)))
    all_notes = (*dump.notes, *notes, *unexamined)
    return BoardValidation(len(expected), limit, rows, tuple(missing), tuple(diagnoses), all_notes)


def _diagnoses(
    case: BoardCase, simulation: Simulation, vectors: Sequence[Vector], normalization: Normalization | None
) -> tuple[list[Diagnosis], list[str]]:
    if not case.failing:
        return [], []
    by_output = [output_diagnoses(case, output) for output in range(len(case.outputs))]
    of_outputs = [one for diagnoses in by_output for one in diagnoses]
    found, notes = input_diagnoses(case, simulation, vectors, normalization)
    of_runs = vector_diagnoses(case) + found
    if not any(one.is_exact for one in of_runs) and not _explain_all(case, [one for one in of_outputs if one.is_exact]):
        searched, more_notes = searched_diagnoses(case, simulation, vectors)
        of_runs, notes = of_runs + searched, notes + more_notes
    return _chosen(case, of_outputs, best_of(of_runs)), notes


_GENERAL = {"wrong scale", "wrong zero point", "wrong scale and zero point", "stale"}


def _explain_all(case: BoardCase, diagnoses: Sequence[Diagnosis]) -> bool:
    return set(case.failing) <= {pair for one in diagnoses for pair in one.pairs}


def _chosen(case: BoardCase, of_outputs: list[Diagnosis], of_runs: list[Diagnosis]) -> list[Diagnosis]:
    """Returns the diagnoses of single outputs, or of whole runs, or both if they are alternatives.

    A diagnosis of runs replaces general ones of outputs. Exact ones replace approximate ones.
    """
    if not of_runs:
        return of_outputs
    if not of_runs[0].is_exact:
        is_exact = _explain_all(case, [one for one in of_outputs if one.is_exact])
        return of_outputs if is_exact else best_of(of_outputs + of_runs)
    wrong = {pair[1] for pair in case.failing}
    alternatives = [
        one
        for one in of_outputs
        if one.is_exact and one.mistake not in _GENERAL and wrong == {pair[1] for pair in one.pairs}
    ]
    return alternatives + of_runs


def _split(
    dump: Dump, expected: Sequence[tuple[Array, ...]], outputs: Sequence[BoardTensor], limit: float
) -> tuple[dict[Pair, bytes], list[Diagnosis], tuple[str, ...]]:
    """Splits a raw dump into outputs. Returns their bytes, the mistake that the split assumes (if any), and notes."""
    if dump.raw is None:
        return dict(dump.outputs), [], ()
    whole = sum(tensor.bytes for tensor in outputs)
    if not whole:
        note = f"The dump has {len(dump.raw):,} bytes, but the outputs of the program have no elements."
        return {(vector, output): b"" for vector in range(len(expected)) for output in range(len(outputs))}, [], (note,)
    plain = _cut(dump.raw, outputs, len(expected), [tensor.bytes for tensor in outputs])
    if _agrees(plain, expected, outputs, limit):
        return plain, [], ()
    for text, mistake, pieces in _other_cuts(dump.raw, outputs, len(expected)):
        if _agrees(pieces, expected, outputs, limit):
            return pieces, [Diagnosis(mistake, text, tuple(pieces))], ()
    for sizes in _converted_sizes(outputs):
        is_complete = len(dump.raw) == len(expected) * sum(sizes) != len(expected) * whole
        if is_complete or (len(dump.raw) % sum(sizes) == 0 and len(dump.raw) % whole):
            return _cut(dump.raw, outputs, len(expected), sizes), [], ()
    notes: tuple[str, ...] = ()
    if len(dump.raw) % whole:
        notes = (f"The dump has {len(dump.raw):,} bytes. The outputs of a vector have {whole:,} bytes, so "
                 f"{len(dump.raw) % whole:,} bytes are missing or too many.",)  # fmt: skip
    return plain, [], notes


def _cut(
    raw: bytes, outputs: Sequence[BoardTensor], vectors: int, sizes: Sequence[int], order: Sequence[int] | None = None
) -> dict[Pair, bytes]:
    """Splits a raw dump whose outputs have `sizes` bytes, in the order `order`. Returns the complete outputs."""
    found: dict[Pair, bytes] = {}
    at = 0
    for vector in range(max(vectors, len(raw) // max(1, sum(sizes)))):
        for output in order or range(len(outputs)):
            piece = raw[at : at + sizes[output]]
            if len(piece) < sizes[output]:
                return found
            at += sizes[output]
            found[vector, output] = piece
    return found


def _other_cuts(
    raw: bytes, outputs: Sequence[BoardTensor], vectors: int
) -> Iterator[tuple[str, str, dict[Pair, bytes]]]:
    sizes = [tensor.bytes for tensor in outputs]
    for padding in PADDINGS:
        padded = [-(-size // padding) * padding for size in sizes]
        if padded != sizes:
            missing = padded[-1] - sizes[-1]  # the padding of the last output may be missing, too
            found = _cut(raw + bytes(missing), outputs, vectors, padded)
            pieces = {pair: piece[: sizes[pair[1]]] for pair, piece in found.items()}
            yield f"Each output is padded to a multiple of {padding} bytes in the dump.", "padded outputs", pieces
    if 1 < len(outputs) <= _MOST_ORDERED_OUTPUTS:
        for order in permutations(range(len(outputs))):
            if list(order) != sorted(order):
                text = f"The dump holds the outputs in the order {', '.join(map(str, order))}: the outputs are swapped."
                yield text, "swapped outputs", _cut(raw, outputs, vectors, sizes, order)
    rest = len(raw) - vectors * sum(sizes)
    if 0 < rest <= _LARGEST_HEADER:
        text = f"The dump begins with {rest} bytes that belong to no output (a header, or an error of alignment)."
        yield text, "alignment", _cut(raw[rest:], outputs, vectors, sizes)
    for shift in range(1, min(_LARGEST_HEADER, sum(sizes) // 2)):
        late = _cut(raw[shift:], outputs, vectors, sizes)
        yield f"The outputs begin {shift} bytes too late in the dump (an error of alignment or of an address).", (
            "alignment"), late  # fmt: skip
        early = _cut(bytes(shift) + raw, outputs, vectors, sizes)
        yield f"The first {shift} bytes of the outputs are missing in the dump (an error of alignment).", "alignment", {
            pair: piece for pair, piece in early.items() if pair != (0, 0)
        }  # fmt: skip


def _converted_sizes(outputs: Sequence[BoardTensor]) -> Iterator[list[int]]:
    """Returns the sizes of outputs if the board stores codes instead of floats, and floats instead of codes."""
    yield [tensor.size if tensor.dtype.kind == "f" else tensor.bytes for tensor in outputs]
    yield [4 * tensor.size if tensor.holds_codes else tensor.bytes for tensor in outputs]


def _agrees(
    pieces: dict[Pair, bytes], expected: Sequence[tuple[Array, ...]], outputs: Sequence[BoardTensor], limit: float
) -> bool:
    """Whether the complete outputs agree, are at least half of all outputs, and do not repeat one byte only."""
    pieces = {pair: piece for pair, piece in pieces.items() if pair[0] < len(expected)}
    if not pieces or 2 * len(pieces) < len(expected) * len(outputs):
        return False
    if len({byte for piece in pieces.values() for byte in piece}) < 2:
        return False
    return all(
        agreement(as_type(piece, outputs[output].dtype), expected[vector][output], outputs[output], limit).all()
        for (vector, output), piece in pieces.items()
    )


def _typed(
    pieces: dict[Pair, bytes], outputs: Sequence[BoardTensor], vectors: int
) -> tuple[dict[Pair, Array], list[str], list[Diagnosis]]:
    """Returns the values of each output, texts about missing outputs, and a diagnosis of needless dequantization."""
    found: dict[Pair, Array] = {}
    missing: list[str] = []
    converted: list[Pair] = []
    for vector in range(vectors):
        for output, tensor in enumerate(outputs):
            piece = pieces.get((vector, output))
            if piece is None:
                missing.append(f"vector {vector}, {tensor.name}")
            elif len(piece) == tensor.bytes:
                found[vector, output] = as_type(piece, tensor.dtype)
            elif tensor.dtype.kind == "f" and len(piece) == tensor.size:
                found[vector, output] = np.frombuffer(piece, np.int8).astype(tensor.dtype)
            elif tensor.holds_codes and len(piece) == 4 * tensor.size:
                found[vector, output] = tensor.codes_of(np.frombuffer(piece, np.float32))
                converted.append((vector, output))
            else:
                missing.append(
                    f"vector {vector}, {tensor.name} is not complete: it has {len(piece)} bytes of {tensor.bytes}"
                )
    texts = [Diagnosis(
        "dequantized outputs",
        "The dump holds dequantized float32 values of outputs that the program gives in int8. The values agree.",
        tuple(converted),
    )] if converted else []  # fmt: skip
    return found, _grouped(missing), texts


def _grouped(missing: list[str]) -> list[str]:
    most = 12
    return missing if len(missing) <= most else [*missing[: most - 1], f"and {len(missing) - most + 1} more"]


def _difference(case: BoardCase, output: int, name: str) -> BoardDifference:
    tensor = case.outputs[output]
    pairs = sorted(pair for pair in case.observed if pair[1] == output and case.observed[pair].size == tensor.size)
    distances = {pair: lsb_distance(case.observed[pair], case.expected[pair[0]][output], tensor) for pair in pairs}
    row = BoardDifference(output, tensor.shape, str(tensor.dtype), len(pairs), 0, 0, 0.0, 0, (), 0.0, 0.0, "", name)
    if not pairs or not tensor.size:
        return row
    worst = max(pairs, key=lambda pair: float(distances[pair].max()))
    at = int(distances[worst].argmax())
    wrong = {
        pair: np.flatnonzero(~agreement(case.observed[pair], case.expected[pair[0]][output], tensor, case.limit))
        for pair in pairs
    }
    return replace(
        row,
        wrong=sum(len(positions) for positions in wrong.values()),
        elements=len(pairs) * tensor.size,
        lsb=float(distances[worst][at]),
        vector=worst[0],
        index=tensor.index_of(at),
        expected=float(case.expected[worst[0]][output][at]),
        given=float(case.observed[worst][at]),
        where=_common_place(tensor, wrong),
    )


def _common_place(tensor: BoardTensor, wrong: dict[Pair, Any]) -> str:
    """Returns a text about what all wrong elements share: the vector, or the index in a dimension; empty if nothing."""
    vectors = [pair[0] for pair, positions in wrong.items() if len(positions)]
    parts = [f"all in vector {vectors[0]}"] if len(vectors) == 1 and len(wrong) > 1 else []
    positions = np.unique(np.concatenate([np.asarray(one) for one in wrong.values()]))
    if len(positions) < 2:
        return ", ".join(parts)
    indices = np.unravel_index(positions, tensor.memory_shape)
    for dim, found in zip(tensor.dim_order, indices, strict=True):
        if tensor.shape[dim] > 1 and len(np.unique(found)) == 1:
            name = "channel" if dim == 1 and len(tensor.shape) > 2 else f"index of dimension {dim}:"
            parts.append(f"all in {name} {int(found[0])}")
    return ", ".join(parts)
