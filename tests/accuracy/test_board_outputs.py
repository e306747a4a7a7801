"""Outputs of a board: right ones pass, and differences without a known cause get no diagnosis."""

from __future__ import annotations

import numpy as np
import pytest
from tests.board_models import (
    NETWORKS,
    board,
    named,
    raw,
)

from openneutron.accuracy.board_dump import Array
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
