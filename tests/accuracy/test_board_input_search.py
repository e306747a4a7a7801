"""Mistakes in the inputs of a board with a parameter or with unknown memory, and a trained network of few classes."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from benchmarks.networks import NETWORKS as TRAINED
from rich.console import Console
from tests.board_models import VECTORS, Board, as_codes, as_floats, board, board_of, named, raw, serial

from openneutron import lower, quantize
from openneutron.accuracy import board_input_search
from openneutron.accuracy.board_dump import Array, BoardTensor
from openneutron.accuracy.board_simulation import Simulation, Vector, run_or_refuse
from openneutron.core.progress import shown_step

Outputs = list[tuple[Array, ...]]


@pytest.fixture(params=[False, True], ids=["float", "int8"])
def int8_io(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def with_floats(one: Board, change: Callable[[Array], Array]) -> Outputs:
    """Returns the outputs of a board that changes the floats of its input before it quantizes them."""

    def changed(values: Array) -> Array:
        floats = as_floats(one.input, values) if one.input.holds_codes else values
        made = np.asarray(change(floats.astype(np.float64)))
        return as_codes(one.input, made) if one.input.holds_codes else made.astype(np.float32)

    return one.with_inputs(changed)


def moved(values: Array, shift: int) -> Array:
    """Returns values that begin `shift` bytes late (negative: early), with other contents of the memory around them."""
    data, other = values.tobytes(), bytes(range(40, 40 + abs(shift)))
    return np.frombuffer(other + data[:-shift] if shift > 0 else data[-shift:] + other, values.dtype)


def scaled(factor: float, one: Board) -> Outputs:
    return with_floats(one, lambda floats: floats * factor)


def off(steps: int, one: Board) -> Outputs:
    return with_floats(one, lambda floats: floats + steps * float(one.input.scale or 1))


def shifted(elements: int, one: Board) -> Outputs:
    return one.with_inputs(lambda values: moved(values, elements * values.itemsize))


def half_written(end: bool, one: Board) -> Outputs:
    def half(values: Array) -> Array:
        is_written = (np.arange(values.size) < values.size * 3 // 5) == end
        return np.where(is_written, values, 0).astype(values.dtype)

    return one.with_inputs(half)


def mirrored(axis: int, one: Board) -> Outputs:
    return one.with_inputs(lambda values: one.input.in_memory(np.flip(one.input.from_memory(values), axis)))


def output_scaled(factor: float, one: Board) -> Outputs:
    tensor = one.simulation.outputs[0]

    def changed(values: Array) -> Array:
        if tensor.dtype.kind == "f":
            return (values * factor).astype(values.dtype)
        moved = np.rint((values.astype(float) - tensor.zero_point) * factor) + tensor.zero_point
        return moved.clip(-128, 127).astype(values.dtype)

    return one.with_output(0, changed)


def output_off(steps: int, one: Board) -> Outputs:
    tensor = one.simulation.outputs[0]

    def changed(values: Array) -> Array:
        if tensor.dtype.kind == "f":
            return (values + steps * float(tensor.scale or 1)).astype(values.dtype)
        return (values.astype(int) + steps).clip(-128, 127).astype(values.dtype)

    return one.with_output(0, changed)


def output_moved(shift: int, one: Board) -> Outputs:
    return one.with_output(0, lambda values: moved(values, shift))


def one_late(one: Board) -> Outputs:
    """Each run gives the outputs of the run before it, and the first run gives zeros."""
    return [tuple(map(np.zeros_like, one.expected[0])), *one.expected[:-1]]


Mistakes = dict[str, tuple[str, Callable[[Board], Outputs]]]
INPUT_MISTAKES: Mistakes = {
    "half scale": ("wrong input scale", functools.partial(scaled, 0.5)),
    "double scale": ("wrong input scale", functools.partial(scaled, 2)),
    "0.8 of the scale": ("wrong input scale", functools.partial(scaled, 0.8)),
    "zero point +10": ("wrong input zero point", functools.partial(off, 10)),
    "zero point -20": ("wrong input zero point", functools.partial(off, -20)),
    "one element late": ("input alignment", functools.partial(shifted, 1)),
    "one element early": ("input alignment", functools.partial(shifted, -1)),
    "end not written": ("input partly written", functools.partial(half_written, True)),
    "beginning not written": ("input partly written", functools.partial(half_written, False)),
}
OUTPUT_MISTAKES: Mistakes = {
    **{f"{factor} of the output scale": ("wrong scale", functools.partial(output_scaled, factor))
       for factor in (0.25, 0.5, 0.8, 1.25, 2)},
    **{f"output zero point {steps:+}": ("wrong zero point", functools.partial(output_off, steps))
       for steps in (-40, -3, 3, 20)},
    **{f"output moved by {shift:+} bytes": ("alignment", functools.partial(output_moved, shift))
       for shift in (-4, -1, 1, 4)},
    "outputs one run late": ("stale", one_late),
}  # fmt: skip
IMAGE_MISTAKES: Mistakes = {
    "rows in reverse order": ("mirrored input", functools.partial(mirrored, 2)),
    "columns in reverse order": ("mirrored input", functools.partial(mirrored, 3)),
}
BOTH = INPUT_MISTAKES | OUTPUT_MISTAKES


@pytest.mark.parametrize("mistake", INPUT_MISTAKES)
@pytest.mark.parametrize("name", ["image", "channels last"])
def test_mistake_in_an_input(name: str, mistake: str, int8_io: bool) -> None:
    one = board(name, int8_io)
    kind, make = INPUT_MISTAKES[mistake]
    assert kind in named(one.check(make(one)))


@pytest.mark.parametrize("mistake", IMAGE_MISTAKES)
@pytest.mark.parametrize("name", ["image", "channels last"])
def test_mirrored_image(name: str, mistake: str, int8_io: bool) -> None:
    one = board(name, int8_io)
    kind, make = IMAGE_MISTAKES[mistake]
    assert named(one.check(make(one))) == [kind]


def test_parameters_are_in_the_text() -> None:
    one = board("image", int8_io=True)
    tensor = one.input
    (scale,) = one.check(scaled(0.5, one)).diagnoses
    assert f"with a scale of about {2 * float(tensor.scale or 0):.2g}" in scale.text
    assert f"The program has {tensor.scale:.6g}." in scale.text
    (zero,) = one.check(off(10, one)).diagnoses
    assert f"off by +10: it is quantized with the zero point {tensor.zero_point + 10}." in zero.text
    (part,) = one.check(half_written(True, one)).diagnoses
    assert f"from about element {tensor.size * 3 // 5} on" in part.text


def test_an_approximate_explanation_says_so() -> None:
    one = board("image", int8_io=True)
    (found,) = one.check(shifted(1, one)).diagnoses
    assert not found.is_exact
    assert "This is approximate: with this mistake, the mean difference falls from" in found.text


def test_qparams_of_the_output_for_the_input() -> None:
    one = board("pair", int8_io=True)
    other = one.simulation.outputs[1]
    found = one.check(one.with_inputs(lambda codes: other.codes_of(as_floats(one.input, codes))))
    assert named(found) == ["wrong input quantization"]
    assert "of 'output1'" in found.diagnoses[0].text


def test_one_of_two_outputs_is_stale(int8_io: bool) -> None:
    one = board("pair", int8_io)
    outputs = [(first, one.expected[max(0, run - 1)][1]) for run, (first, _) in enumerate(one.expected)]
    found = one.check(outputs)
    assert named(found) == ["stale"]
    assert "Output 'output1' holds its values of the previous run" in found.diagnoses[0].text


def test_first_run_of_stale_outputs_may_hold_anything(int8_io: bool) -> None:
    one = board("pair", int8_io)
    assert named(one.check(one_late(one))) == ["stale"]


def test_truncated_dump_names_what_is_missing(int8_io: bool) -> None:
    one = board("pair", int8_io)
    found = one.check(raw(one.expected)[:-3])
    assert found.missing == (f"vector {VECTORS - 1}, output1",)
    assert not found.diagnoses
    assert not found.passed


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", ["image", "pair", "classes"])
def test_noise_gets_no_diagnosis(name: str, seed: int, int8_io: bool) -> None:
    """Neither small noise nor large errors in a few elements resemble a mistake."""
    one = board(name, int8_io)
    tensor = one.simulation.outputs[0]
    generator = np.random.default_rng(seed)
    step = 1.0 if tensor.dtype.kind == "i" else float(tensor.scale or 1)

    def noisy(values: Array) -> Array:
        found = np.asarray(values + step * generator.integers(-2, 3, values.size))
        return (found.clip(-128, 127) if tensor.dtype.kind == "i" else found).astype(values.dtype)

    def few_wrong(values: Array) -> Array:
        found = values.copy()
        found[generator.choice(values.size, 2, replace=False)] = generator.choice(values, 2) // 2 + 30 * step
        return found

    assert named(one.check(one.with_output(0, noisy))) == []
    assert named(one.check(one.with_output(0, few_wrong))) == []


@functools.cache
def trained(name: str, int8_io: bool, count: int) -> Board:
    """Returns a board that runs a trained network."""
    network = TRAINED[name]
    calibration = [network.sample(index)[0] for index in list(network.calibrates)[:32]]
    program = lower(quantize(network.build(), calibration[0], calibration, recover=None), int8_io=int8_io)
    return board_of(program, [network.sample(index)[0] for index in range(3, 3 + 97 * count, 97)], count=count)


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.usefixtures("data_folder")
class TestTrained:
    @pytest.mark.parametrize(("name", "count"), [("ds_cnn", 3), ("ds_cnn", 8), ("resnet8", 8)])
    @pytest.mark.parametrize("mistake", BOTH)
    def test_mistake(self, name: str, mistake: str, count: int, int8_io: bool) -> None:
        """ResNet-8 ends with a softmax, so most of its outputs are nearly zero."""
        one = trained(name, int8_io, count)
        kind, make = BOTH[mistake]
        outputs = make(one)
        found = one.check(raw(outputs))
        assert kind in named(found)
        assert named(one.check(serial(outputs))) == named(found)

    @pytest.mark.parametrize("seed", range(10))
    @pytest.mark.parametrize("count", [1, 3, 8])
    @pytest.mark.parametrize("name", ["ds_cnn", "resnet8"])
    def test_random_errors(self, name: str, seed: int, count: int, int8_io: bool) -> None:
        one = trained(name, int8_io, count)
        tensor = one.simulation.outputs[0]
        generator = np.random.default_rng(seed)
        step = 1.0 if int8_io else float(tensor.scale or 1)

        def noisy(values: Array) -> Array:
            found = np.asarray(values + step * generator.choice([-2, 2], values.size))
            return (found.clip(-128, 127) if int8_io else found).astype(values.dtype)

        assert named(one.check(one.with_output(0, noisy))) == []
        assert named(one.check(one.with_output(0, generator.permutation))) == []


DOCUMENTED_RUNS = {"wrong input scale": 370, "wrong input zero point": 270, "input partly written": 430}


def _most_runs(family: board_input_search._Family) -> float:
    coarse = len(family.points)
    return coarse + board_input_search._PROBES * (family.examined - coarse)


def test_an_image_needs_no_more_runs_than_the_docs_state() -> None:
    image = BoardTensor((1, 3, 224, 224), np.dtype(np.int8), (0, 1, 2, 3), 0.02, -3)
    runs = [(family.mistake, _most_runs(family)) for family in board_input_search._families(0, image)]
    assert {mistake for mistake, _ in runs} == set(DOCUMENTED_RUNS)
    for mistake, most in runs:
        assert 0.95 * DOCUMENTED_RUNS[mistake] <= most <= DOCUMENTED_RUNS[mistake]
    assert sum(most for _, most in runs) == 1482


@pytest.mark.parametrize(("seconds", "least", "most"), [(60.0, 400, 1482), (0.0, 50, 250)])
def test_a_slow_program_is_searched_in_fewer_runs(
    seconds: float, least: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = board("image", int8_io=True)
    outputs = scaled(0.5, one)
    runs = 0

    def counted(simulation: Simulation, vectors: Sequence[Vector]) -> list[tuple[Array, ...]] | None:
        nonlocal runs
        runs += len(vectors)
        return run_or_refuse(simulation, vectors)

    monkeypatch.setattr(board_input_search, "run_or_refuse", counted)
    monkeypatch.setattr(board_input_search, "_MOST_SECONDS", seconds)
    found = one.check(outputs)
    assert least <= runs <= most
    assert any("6 % of the parameters were examined" in note for note in found.notes) == (seconds == 0)
    if seconds:
        assert named(found) == ["wrong input scale"]


def test_a_bar_shows_the_progress_of_the_search() -> None:
    one = board("image", int8_io=True)
    stream = io.StringIO()
    with shown_step("validate", Console(file=stream, force_terminal=True, width=100)):
        one.check(scaled(0.5, one))
    assert "mistakes in inputs" in stream.getvalue()
    assert "parameters of mistakes" in stream.getvalue()
