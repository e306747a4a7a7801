"""The diagnosis names mistakes that a test makes in the inputs or outputs of a board."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from tests.board_models import (
    MEAN,
    STD,
    VECTORS,
    as_codes,
    as_floats,
    board,
    early,
    late,
    named,
    other_order,
    raw,
    words_reversed,
)

from openneutron.accuracy.board_dump import Array, BoardTensor
from openneutron.accuracy.board_input_changes import Normalization
from openneutron.accuracy.board_transforms import orders_of
from openneutron.errors import HostProcessError
from openneutron.runtime import HostProgram


@pytest.fixture(params=[False, True], ids=["float", "int8"])
def int8_io(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.mark.parametrize("name", ["image", "channels last", "signal"])
class TestLayouts:
    def test_of_an_output(self, name: str, int8_io: bool) -> None:
        one = board(name, int8_io)
        tensor = one.simulation.outputs[0]
        found = one.check(one.with_output(0, lambda values: other_order(tensor, values)))
        assert named(found) == ["output layout"]
        assert "for" in found.diagnoses[0].text

    def test_of_an_input(self, name: str, int8_io: bool) -> None:
        one = board(name, int8_io)
        assert named(one.check(one.with_inputs(lambda values: other_order(one.input, values)))) == ["input layout"]

    def test_rows_for_columns(self, name: str, int8_io: bool) -> None:
        if name == "signal":
            pytest.skip("has no columns")
        one = board(name, int8_io)
        tensor = one.simulation.outputs[0]

        def exchanged(values: Array) -> Array:
            return tensor.in_memory(np.swapaxes(tensor.from_memory(values), 2, 3).reshape(tensor.shape))

        found = one.check(one.with_output(0, exchanged))
        assert named(found) == ["output layout"]


@pytest.mark.parametrize("name", ["image", "pair", "signal"])
class TestOutputs:
    def test_never_written(self, name: str, int8_io: bool) -> None:
        one = board(name, int8_io)
        assert named(one.check(one.with_output(0, np.zeros_like))) == ["never written"]
        assert named(one.check(one.with_output(0, lambda x: np.full(x.nbytes, 0xA5, np.uint8).view(x.dtype)))) == [
            "never written"
        ]

    def test_partly_written(self, name: str, int8_io: bool) -> None:
        one = board(name, int8_io)

        def half(values: Array) -> Array:
            return np.where(np.arange(values.size) < values.size // 2, values, 0).astype(values.dtype)

        found = one.check(one.with_output(0, half))
        assert "partly written" in named(found)
        border = one.simulation.outputs[0].size // 2
        text = next(one.text for one in found.diagnoses if one.mistake == "partly written")
        assert "the end is not" in text
        if border % math.prod(one.simulation.outputs[0].shape[2:]):
            assert "weights" not in text

    def test_partly_written_or_constant_channels(self, name: str, int8_io: bool) -> None:
        one = board(name, int8_io)
        tensor = one.simulation.outputs[0]
        rows = tensor.shape[1]
        for channels, change in (("channel 0", slice(1)), ("channels 0 to 1", slice(2)),
                                 (f"channel {rows - 1}", slice(-1, None)),
                                 (f"channels {rows - 2} to {rows - 1}", slice(-2, None))):  # fmt: skip

            def constant(values: Array, change: slice = change) -> Array:
                made = values.reshape(rows, -1).copy()
                made[change] = 0.25 if tensor.dtype.kind == "f" else 7
                return made.reshape(-1)

            found = one.check(one.with_output(0, constant))
            texts = [one.text for one in found.diagnoses if one.mistake == "partly written"]
            if name == "pair":  # its channels have one element
                assert not any("weights" in text for text in texts)
                continue
            part = "beginning" if " 0" in channels else "end"
            assert len(texts) == 1
            assert f"(the {part} is not), or the board's weights of {channels} are zero" in texts[0]

    @pytest.mark.parametrize("group", [2, 4])
    def test_byte_order(self, name: str, int8_io: bool, group: int) -> None:
        one = board(name, int8_io)
        if any(value.nbytes % group for value in one.expected[0]):
            pytest.skip("the output has no whole words")
        assert named(one.check(one.with_output(0, lambda values: words_reversed(values, group)))) == ["byte order"]

    @pytest.mark.parametrize("shift", [1, 4])
    def test_alignment(self, name: str, int8_io: bool, shift: int) -> None:
        one = board(name, int8_io)
        for change in (late, early):
            found = one.check(one.with_output(0, functools.partial(change, shift=shift)))
            assert named(found) == ["alignment"]
            assert f" {shift} bytes" in found.diagnoses[0].text

    def test_dump_that_begins_too_late(self, name: str, int8_io: bool) -> None:
        one = board(name, int8_io)
        assert named(one.check(bytes([1, 2, 3]) + raw(one.expected))) == ["alignment"]
        assert "alignment" in named(one.check(raw(one.expected)[3:]))

    def test_padded_outputs(self, name: str, int8_io: bool) -> None:
        one = board(name, int8_io)
        sizes = [tensor.bytes for tensor in one.simulation.outputs]
        if all(size % 32 == 0 for size in sizes):
            pytest.skip("has nothing to pad")
        padded = b"".join(value.tobytes() + bytes(-value.nbytes % 32) for vector in one.expected for value in vector)
        assert named(one.check(padded)) == ["padded outputs"]

    def test_wrong_scale(self, name: str, int8_io: bool) -> None:
        one = board(name, int8_io)
        tensor = one.simulation.outputs[0]

        def scaled(values: Array) -> Array:
            if tensor.dtype.kind == "f":
                return (values * 1.7).astype(values.dtype)
            return (np.rint((values.astype(float) - tensor.zero_point) * 0.6) + tensor.zero_point).astype(values.dtype)

        assert named(one.check(one.with_output(0, scaled))) == ["wrong scale"]

    def test_wrong_zero_point(self, name: str, int8_io: bool) -> None:
        one = board(name, int8_io)
        tensor = one.simulation.outputs[0]

        def moved(values: Array) -> Array:
            if tensor.dtype.kind == "f":
                return (values + 9 * float(tensor.scale or 1)).astype(values.dtype)
            return (values.astype(int) + 9).clip(-128, 127).astype(values.dtype)

        found = one.check(one.with_output(0, moved))
        assert named(found) == ["wrong zero point"]
        assert "+9 LSB" in found.diagnoses[0].text

    def test_wrong_scale_and_zero_point(self, name: str, int8_io: bool) -> None:
        one = board(name, int8_io)
        tensor = one.simulation.outputs[0]

        def moved(values: Array) -> Array:
            if tensor.dtype.kind == "f":
                return (values * 1.3 - 11 * float(tensor.scale or 1)).astype(values.dtype)
            moved = np.rint((values.astype(float) - tensor.zero_point) * 0.8) + tensor.zero_point + 11
            return moved.clip(-128, 127).astype(values.dtype)

        assert named(one.check(one.with_output(0, moved))) == ["wrong scale and zero point"]

    def test_stale_outputs(self, name: str, int8_io: bool) -> None:
        one = board(name, int8_io)
        assert "stale" in named(one.check([one.expected[0], *one.expected[:-1]]))
        assert "stale" in named(one.check([one.expected[0]] * VECTORS))

    def test_vectors_out_of_order(self, name: str, int8_io: bool) -> None:
        one = board(name, int8_io)
        order = (2, 0, 1, 4, 3)
        assert named(one.check([one.expected[number] for number in order])) == ["vectors out of order"]

    def test_input_never_written(self, name: str, int8_io: bool) -> None:
        one = board(name, int8_io)
        assert "input never written" in named(one.check(one.with_inputs(np.zeros_like)))

    def test_input_alignment(self, name: str, int8_io: bool) -> None:
        one = board(name, int8_io)
        assert "input alignment" in named(one.check(one.with_inputs(lambda values: late(values, 4))))


@pytest.mark.parametrize("name", ["image", "channels last", "signal"])
class TestQuantization:
    def test_output_of_codes_for_floats(self, name: str) -> None:
        one = board(name, int8_io=False)
        tensors = one.simulation.outputs
        codes = [tuple(map(as_codes, tensors, vector)) for vector in one.expected]
        floats = [tuple(value.astype(np.float32) for value in vector) for vector in codes]
        for outputs in (codes, floats):
            assert set(named(one.check(outputs))) == {"missing output dequantization"}

    def test_output_without_its_zero_point(self, name: str) -> None:
        one = board(name, int8_io=False)
        tensor = one.simulation.outputs[0]
        if not tensor.zero_point:
            pytest.skip("the zero point is 0")
        scale = float(tensor.scale or 1)
        found = one.check(one.with_output(0, lambda x: (as_codes(tensor, x) * scale).astype(np.float32)))
        assert named(found) == ["wrong zero point"]

    def test_output_of_floats_for_codes(self, name: str) -> None:
        one = board(name, int8_io=True)
        outputs = [tuple(map(as_floats, one.simulation.outputs, vector)) for vector in one.expected]
        assert named(one.check(outputs)) == ["dequantized outputs"]

    def test_uint8_output(self, name: str) -> None:
        one = board(name, int8_io=True)
        found = one.check(one.with_output(0, lambda codes: (codes.view(np.uint8) ^ 0x80).view(np.int8)))
        assert named(found) == ["uint8 for int8"]

    def test_uint8_input(self, name: str) -> None:
        one = board(name, int8_io=True)
        found = one.check(one.with_inputs(lambda codes: (codes.view(np.uint8) ^ 0x80).view(np.int8)))
        assert named(found) == ["uint8 for int8"]

    def test_input_that_is_not_quantized(self, name: str) -> None:
        one = board(name, int8_io=True)
        cast = one.with_inputs(lambda codes: as_floats(one.input, codes).astype(np.int8))
        copied = one.with_inputs(
            lambda codes: np.frombuffer(as_floats(one.input, codes).tobytes()[: codes.size], np.int8)
        )
        for outputs in (cast, copied):
            assert "missing input quantization" in named(one.check(outputs))

    def test_codes_for_a_float_input(self, name: str) -> None:
        one = board(name, int8_io=False)
        found = one.check(one.with_inputs(lambda values: as_codes(one.input, values).astype(np.float32)))
        assert "wrong input quantization" in named(found)

    def test_input_without_its_zero_point(self, name: str) -> None:
        one = board(name, int8_io=True)
        zero = one.input.zero_point
        found = one.check(one.with_inputs(lambda codes: (codes.astype(int) - zero).clip(-128, 127).astype(np.int8)))
        assert "wrong input quantization" in named(found)

    def test_input_byte_order(self, name: str) -> None:
        one = board(name, int8_io=False)
        assert "input byte order" in named(one.check(one.with_inputs(lambda values: words_reversed(values, 4))))


@pytest.mark.parametrize("name", ["image", "channels last"])
class TestImages:
    def test_channels_in_reverse(self, name: str, int8_io: bool) -> None:
        one = board(name, int8_io)
        found = one.check(one.with_inputs(lambda x: one.input.in_memory(np.flip(one.input.from_memory(x), 1))))
        assert named(found) == ["RGB for BGR"]

    @pytest.mark.parametrize("factor", [1, 255])
    def test_not_normalized(self, name: str, int8_io: bool, factor: int) -> None:
        one = board(name, int8_io)
        mean, std = (np.reshape(value, (1, 3, 1, 1)) for value in (MEAN, STD))

        def pixels(values: Array) -> Array:
            floats = as_floats(one.input, values) if int8_io else values
            given = one.input.in_memory((one.input.from_memory(floats) * std + mean) * factor).astype(np.float32)
            return as_codes(one.input, given) if int8_io else given

        found = one.check(one.with_inputs(pixels), normalization=Normalization(MEAN, STD))
        assert "missing normalization" in named(found)
        assert any("settings'" in one.text for one in found.diagnoses)


class TestSeveral:
    def test_swapped_outputs(self, int8_io: bool) -> None:
        for name in ("pair", "image"):
            one = board(name, int8_io)
            found = one.check([outputs[::-1] for outputs in one.expected])
            assert set(named(found)) == {"swapped outputs"}

    def test_swapped_inputs(self, int8_io: bool) -> None:
        one = board("pair", int8_io)
        found = one.check(list(one.simulation.run([vector[::-1] for vector in one.vectors.inputs])))
        assert named(found) == ["swapped inputs"]

    def test_mistake_in_the_second_input(self) -> None:
        one = board("pair", int8_io=True)
        found = one.check(one.with_inputs(lambda codes: (codes.view(np.uint8) ^ 0x80).view(np.int8), 1))
        assert named(found) == ["uint8 for int8"]
        assert "Input 'y'" in found.diagnoses[0].text

    def test_one_mistake_for_each_output(self, int8_io: bool) -> None:
        one = board("pair", int8_io)
        outputs = [(np.zeros_like(first), words_reversed(second, 4)) for first, second in one.expected]
        found = one.check(outputs)
        assert named(found) == ["never written", "byte order"]

    def test_ambiguous_mistakes_are_all_named(self) -> None:
        """In an elementwise sum, reversed bytes of the input and reversed bytes of the output have the same effect."""
        one = board("state", int8_io=True)
        found = one.check(one.with_output(0, lambda values: words_reversed(values, 4)))
        assert named(found) == ["byte order", "input byte order"]
        assert "Several mistakes explain the same differences" in str(found)

    def test_input_or_output_never_written(self) -> None:
        """The sum of zeros is zero, so a mistake in the input and one in the output explain the difference equally."""
        one = board("state", int8_io=False)
        assert set(named(one.check(one.with_inputs(np.zeros_like)))) == {"never written", "input never written"}

    def test_state_with_mistaken_inputs(self) -> None:
        one = board("state", int8_io=True)
        assert "input never written" in named(one.check(one.with_inputs(np.zeros_like)))
        found = one.check(one.with_inputs(lambda codes: as_floats(one.input, codes).astype(np.int8)))
        assert "missing input quantization" in named(found)


def test_stale_state(int8_io: bool) -> None:
    one = board("state", int8_io)
    kept = list(one.simulation.run([*one.vectors.inputs, *one.vectors.inputs]))[VECTORS:]
    reset = list(one.simulation.run(one.vectors.inputs, frozenset(range(VECTORS))))
    assert named(one.check(kept)) == ["stale state"]
    assert named(one.check(reset)) == ["stale state"]


def test_a_mistake_that_ends_the_process_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other mistakes are examined in a new process."""
    one = board("image", int8_io=False)
    outputs = one.with_inputs(lambda values: other_order(one.input, values))
    host, alive = one.simulation.host, [True]
    run = HostProgram.run

    def dies_of_zeros(program: HostProgram, *inputs: torch.Tensor) -> object:
        alive[0] = alive[0] and bool(inputs[0].any())
        if not alive[0]:
            raise HostProcessError("the program ended the process that ran it (SIGSEGV).")
        return run(program, *inputs)

    monkeypatch.setattr(HostProgram, "run", dies_of_zeros)
    monkeypatch.setattr(HostProgram, "reset", lambda program: alive.__setitem__(0, program is host))
    found = one.check(outputs)
    assert named(found) == ["input layout"]
    (note,) = found.notes
    assert note.startswith("The program ended its process on this machine under the assumption: Input 'x' ")


def test_a_mistake_with_states_that_ends_the_process_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program ends its process in the second of two passes, and the diagnosis goes on with a new one."""
    one = board("state", int8_io=False)
    reset_each = list(one.simulation.run(one.vectors.inputs, frozenset(range(VECTORS))))
    run, reset, runs = HostProgram.run, HostProgram.reset, [0]

    def dies_late(program: HostProgram, *inputs: torch.Tensor) -> object:
        runs[0] += 1
        if runs[0] > VECTORS:
            raise HostProcessError("the program ended the process that ran it (SIGSEGV).")
        return run(program, *inputs)

    def counted(program: HostProgram) -> None:
        runs[0] = 0
        reset(program)

    monkeypatch.setattr(HostProgram, "run", dies_late)
    monkeypatch.setattr(HostProgram, "reset", counted)
    found = one.check(reset_each)
    assert named(found) == ["stale state"]
    assert any("assumption: The states are not reset before the first run" in note for note in found.notes)


ROWS, LAST, FIRST = "rows and columns exchanged", "NHWC for NCHW", "NCHW for NHWC"


@pytest.mark.parametrize(
    ("shape", "names"),
    [
        ((1, 3, 8, 9), {LAST, FIRST, ROWS}),
        ((1, 1, 8, 9), {ROWS}),
        ((1, 3, 1, 9), {LAST}),
        ((1, 3, 8, 1), {LAST}),
        ((1, 1, 1, 9), set()),
        ((1, 3, 9), {"channels-last for channels-first"}),
        ((1, 1, 9), set()),
        ((1, 9), set()),
        ((4, 9), {ROWS}),
    ],
)
def test_orders_that_are_equal_in_memory_are_one_mistake(shape: tuple[int, ...], names: set[str]) -> None:
    tensor = BoardTensor(shape, np.dtype(np.int8), tuple(range(len(shape))))
    values = np.arange(tensor.size, dtype=np.int16)
    orders = orders_of(tensor)
    assert {order.name for order in orders} == names
    mistaken = [order.apply(values, tensor).tolist() for order in orders]
    assert values.tolist() not in mistaken
    assert len({tuple(one) for one in mistaken}) == len(orders)
