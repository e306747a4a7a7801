"""Outputs of a board: right ones pass, and differences without a known cause get no diagnosis."""

from __future__ import annotations

import numpy as np
import pytest
from tests.board_models import (
    NETWORKS,
    as_codes,
    as_floats,
    board,
    named,
    raw,
)

from openneutron.accuracy.board_dump import Array, BoardTensor
from openneutron.accuracy.board_evidence import agreement
from openneutron.errors import OptionError


@pytest.fixture(params=[False, True], ids=["float", "int8"])
def int8_io(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.mark.parametrize("name", NETWORKS)
def test_right_outputs_pass(name: str, int8_io: bool) -> None:
    found = board(name, int8_io).check(board(name, int8_io).expected)
    assert found.passed
    assert not found.diagnoses
    assert str(found).endswith("passed")


@pytest.mark.parametrize("name", NETWORKS)
def test_garbage_gets_no_diagnosis(name: str, int8_io: bool) -> None:
    one = board(name, int8_io)
    size = len(raw(one.expected))
    for seed in range(2):
        found = one.check(np.random.default_rng(seed).bytes(size))
        assert named(found) == []
        assert "No known mistake" in str(found)


@pytest.mark.parametrize("name", NETWORKS)
def test_shuffled_values_get_no_diagnosis(name: str, int8_io: bool) -> None:
    one = board(name, int8_io)
    generator = np.random.default_rng(0)
    assert named(one.check(one.with_output(0, generator.permutation))) == []


@pytest.mark.parametrize("name", NETWORKS)
def test_noise_of_a_few_steps_is_not_a_known_mistake(name: str, int8_io: bool) -> None:
    one = board(name, int8_io)
    tensor = one.simulation.outputs[0]
    generator = np.random.default_rng(0)

    def noisy(values: Array) -> Array:
        steps = generator.integers(-3, 4, values.size)
        if tensor.dtype.kind == "f":
            return np.asarray(values + steps * float(tensor.scale or 1), values.dtype)
        return (values.astype(int) + steps).clip(-128, 127).astype(values.dtype)

    found = one.check(one.with_output(0, noisy))
    assert named(found) == []
    assert found.outputs[0].lsb == pytest.approx(3, abs=0.01)
    assert one.check(one.with_output(0, noisy), max_lsb=3.01).passed


def one_code_off(tensor: BoardTensor, values: Array) -> Array:
    """Returns the values of the codes beside the right ones. Outputs without a scale stay as they are."""
    if tensor.scale is None:
        return values
    codes = as_codes(tensor, values) if tensor.dtype.kind == "f" else values
    steps = np.random.default_rng(0).choice([-1, 1], codes.size)
    beside = codes + np.where(codes == -128, 1, np.where(codes == 127, -1, steps))
    return as_floats(tensor, beside) if tensor.dtype.kind == "f" else beside.astype(np.int8)


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_that_are_one_code_off_pass(name: str, int8_io: bool) -> None:
    one = board(name, int8_io)
    tensors = one.simulation.outputs
    outputs = [tuple(map(one_code_off, tensors, values)) for values in one.expected]
    found = one.check(outputs)
    assert found.passed
    assert found.outputs[0].lsb == pytest.approx(1, abs=1e-4)
    stricter = one.check(outputs, max_lsb=0.9999)
    assert stricter.outputs[0].wrong == stricter.outputs[0].elements


FLOATS, WANTED = BoardTensor((3,), np.dtype(np.float32), (0,), 0.1, 0, 0, "y"), np.array([25.5, -3, 0], np.float32)


@pytest.mark.parametrize(
    ("given", "limit", "agrees"),
    [
        (WANTED, 0, [True, True, True]),
        (np.nextafter(WANTED, np.float32(1e9)), 0, [False, False, False]),
        (WANTED + np.float32(0.1), 1, [True, True, True]),
        (WANTED + np.float32(0.10002), 1, [False, False, False]),
        (np.array([np.inf, np.nan, -np.inf], np.float32), 1, [False, False, False]),
        (np.full(3, 1e30, np.float32), 1, [False, False, False]),
    ],
)
def test_agreement_of_floats(given: Array, limit: float, agrees: list[bool]) -> None:
    assert agreement(given, WANTED, FLOATS, limit).tolist() == agrees


@pytest.mark.parametrize("wanted", [np.inf, -np.inf, np.nan])
def test_only_equal_values_agree_with_expected_values_that_are_not_finite(wanted: float) -> None:
    expected = np.array([wanted, 1, 1], np.float32)
    assert agreement(expected, expected, FLOATS, 1).all()
    assert agreement(np.ones(3, np.float32), expected, FLOATS, 1).tolist() == [False, True, True]


def test_the_worst_element_and_its_place() -> None:
    one = board("channels last", int8_io=True)
    tensor = one.simulation.outputs[0]

    def changed(values: Array) -> Array:
        logical = tensor.from_memory(values).reshape(tensor.shape).copy()
        logical[0, 5] = np.where(logical[0, 5] > 0, logical[0, 5] - 40, logical[0, 5] + 40)
        logical[0, 5, 2, 3] += 60 if logical[0, 5, 2, 3] < 0 else -60
        return tensor.in_memory(logical)

    found = one.check(one.with_output(0, changed)).outputs[0]
    assert found.index == (0, 5, 2, 3)
    assert found.where == "all in channel 5"
    assert abs(found.given - found.expected) == found.lsb


@pytest.mark.parametrize("limit", [-1, True, "1", float("nan")])
def test_wrong_limit(limit: object) -> None:
    with pytest.raises(OptionError, match="max_lsb"):
        board("pair", int8_io=True).check(b"", max_lsb=limit)
