"""Mistakes that are made on purpose in the outputs of a board are named, and no others."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn

from openneutron import lower, quantize
from openneutron.accuracy.board_dump import Array, BoardTensor, Dump, read_dump
from openneutron.accuracy.board_input_mistakes import Normalization, Simulation
from openneutron.accuracy.board_outputs import (
    MISTAKES,
    BoardValidation,
    Vectors,
    _split,
    validate_board,
    vectors_of_data,
)  # fmt: skip
from openneutron.accuracy.board_tensors import board_inputs, board_outputs
from openneutron.accuracy.validate import load_program
from openneutron.errors import InputError, OptionError

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


class Image(nn.Module):
    """Gives two outputs, of which one has an image's layout."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = self.features(x).relu()
        return found, self.head(found[:, :, ::2, 1:].amax((2, 3)))


class Pair(nn.Module):
    """Takes two inputs of the same shape, and gives two outputs of the same shape."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 24), nn.Linear(16, 24)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.first(x) + 0.5 * self.second(y), self.second(x).tanh()


class Signal(nn.Module):
    """Computes on (batch, channels, length)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.conv(x).sigmoid()
        return found


class Sums(nn.Module):
    """Keeps a state."""

    total: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(1, 12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.total = (0.5 * self.total + x).clamp(-4, 4)
        return self.total * 1.0


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...], bool]] = {
    "image": (Image, ((1, 3, 8, 6),), False),
    "channels last": (Image, ((1, 3, 8, 6),), True),
    "pair": (Pair, ((1, 16), (1, 16)), False),
    "signal": (Signal, ((1, 4, 20),), False),
    "state": (Sums, ((1, 12),), False),
}
VECTORS = 5


@dataclass(frozen=True)
class Board:
    """A board that runs a program of one of the networks."""

    simulation: Simulation
    vectors: Vectors
    expected: tuple[tuple[Array, ...], ...]

    @property
    def input(self) -> BoardTensor:
        return self.simulation.inputs[0]

    def with_inputs(self, change: Callable[[Array], Array], number: int = 0) -> list[tuple[Array, ...]]:
        """Returns the outputs of a board that changes one input."""
        inputs = [
            tuple(change(value) if position == number else value for position, value in enumerate(vector))
            for vector in self.vectors.inputs
        ]
        return list(self.simulation.run(inputs))

    def with_output(self, number: int, change: Callable[[Array], Array]) -> list[tuple[Array, ...]]:
        """Returns the outputs of a board that changes one output."""
        return [
            tuple(change(value) if position == number else value for position, value in enumerate(outputs))
            for outputs in self.expected
        ]

    def check(self, outputs: Sequence[Sequence[Array]] | bytes, **options: object) -> BoardValidation:
        data = outputs if isinstance(outputs, bytes) else raw(outputs)
        return validate_board(self.simulation.host, data, self.vectors, **options)  # type: ignore[arg-type]


def raw(outputs: Sequence[Sequence[Array]]) -> bytes:
    return b"".join(value.tobytes() for vector in outputs for value in vector)


@functools.cache
def board(name: str, int8_io: bool) -> Board:
    make, shapes, channels_last = NETWORKS[name]
    torch.manual_seed(3)
    model = make().eval()
    generator = torch.Generator().manual_seed(1)
    pixels = [tuple(torch.rand(shape, generator=generator) for shape in shapes) for _ in range(2 * VECTORS)]
    data = [tuple(_normalized(value) for value in sample) for sample in pixels]
    if channels_last:
        data = [tuple(value.to(memory_format=torch.channels_last) for value in sample) for sample in data]
    program = lower(quantize(model, data[0], data, recover=None), int8_io=int8_io)
    host = load_program(program)
    vectors = vectors_of_data(host, data, VECTORS)
    if name == "state":
        vectors = replace(vectors, starts=frozenset({0}))
    simulation = Simulation(host, board_inputs(host), board_outputs(host), vectors.starts)
    return Board(simulation, vectors, tuple(simulation.run(vectors.inputs)))


def _normalized(value: torch.Tensor) -> torch.Tensor:
    if value.dim() != 4:
        return 3 * value - 1.2
    mean, std = (torch.tensor(one).reshape(1, 3, 1, 1) for one in (MEAN, STD))
    return (value - mean) / std


@pytest.fixture(params=[False, True], ids=["float", "int8"])
def int8_io(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def named(found: BoardValidation) -> list[str]:
    assert not found.passed
    assert {one.mistake for one in found.diagnoses} <= set(MISTAKES)
    return [one.mistake for one in found.diagnoses]


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
def test_noise_of_a_few_steps_is_no_mistake_that_is_known(name: str, int8_io: bool) -> None:
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


def as_floats(tensor: BoardTensor, codes: Array) -> Array:
    return ((codes.astype(np.float64) - tensor.zero_point) * float(tensor.scale or 1)).astype(np.float32)


def as_codes(tensor: BoardTensor, values: Array) -> Array:
    return (
        (np.rint(values.astype(np.float64) / float(tensor.scale or 1)) + tensor.zero_point)
        .clip(-128, 127)
        .astype(np.int8)
    )


def words_reversed(values: Array, group: int) -> Array:
    return np.frombuffer(values.tobytes(), np.uint8).reshape(-1, group)[:, ::-1].reshape(-1).view(values.dtype)


def late(values: Array, shift: int) -> Array:
    return np.frombuffer(bytes(shift) + values.tobytes()[:-shift], values.dtype)


def early(values: Array, shift: int) -> Array:
    return np.frombuffer(values.tobytes()[shift:] + bytes(range(1, shift + 1)), values.dtype)


def other_order(tensor: BoardTensor, values: Array) -> Array:
    """Returns channels first for channels last, and the reverse."""
    rank = len(tensor.shape)
    dims = (0, *range(2, rank), 1) if tensor.dim_order == tuple(range(rank)) else (0, rank - 1, *range(1, rank - 1))
    return values.reshape(tensor.memory_shape).transpose(dims).reshape(-1)


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

        assert "partly written" in named(one.check(one.with_output(0, half)))

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
        assert "Input 1" in found.diagnoses[0].text

    def test_one_mistake_for_each_output(self, int8_io: bool) -> None:
        one = board("pair", int8_io)
        outputs = [(np.zeros_like(first), words_reversed(second, 4)) for first, second in one.expected]
        found = one.check(outputs)
        assert named(found) == ["never written", "byte order"]

    def test_ambiguous_mistakes_are_all_named(self) -> None:
        """A sum of each element by itself does not tell the order of the input's bytes from that of the output's."""
        one = board("state", int8_io=True)
        found = one.check(one.with_output(0, lambda values: words_reversed(values, 4)))
        assert named(found) == ["byte order", "input byte order"]
        assert "Several mistakes explain the same differences" in str(found)

    def test_input_or_output_never_written(self) -> None:
        """The sum of zeros is zero, so that both explain it."""
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


class TestSerial:
    def lines(self, one: Board, width: int = 16) -> list[str]:
        return [
            f"OUTPUT {vector} {output} {at} {value.tobytes()[at : at + width].hex(' ')}"
            for vector, outputs in enumerate(one.expected)
            for output, value in enumerate(outputs)
            for at in range(0, value.nbytes, width)
        ]

    @pytest.mark.parametrize("end", ["\n", "\r\n"])
    def test_log_with_other_lines(self, int8_io: bool, end: str) -> None:
        one = board("image", int8_io)
        lines = [f"[12:00:0{number % 10}.123] {line}" for number, line in enumerate(self.lines(one))]
        text = end.join(["boot ok", *lines, "vector 0: 12345 cycles", "done", ""])
        assert one.check(text.encode()).passed
        assert one.check(text.encode("utf-16")).passed

    def test_one_line_for_each_output(self, int8_io: bool) -> None:
        one = board("pair", int8_io)
        text = "\n".join(
            f"OUTPUT {v} {o} 0 {value.tobytes().hex()}"
            for v, outputs in enumerate(one.expected)
            for o, value in enumerate(outputs)
        )
        assert one.check(text.encode()).passed

    def test_missing_lines_are_named(self, int8_io: bool) -> None:
        one = board("image", int8_io)
        lines = [line for line in self.lines(one) if not line.startswith("OUTPUT 3 1 ")]
        found = one.check("\n".join(lines).encode())
        assert found.missing == ("vector 3, output 1",)
        assert not found.passed
        assert not found.diagnoses

    def test_damaged_and_lost_pieces_are_named(self) -> None:
        one = board("image", int8_io=True)
        lines = self.lines(one)
        lines[1] = lines[1][:-3] + "?!"
        found = one.check("\n".join(lines).encode())
        assert found.missing == ("vector 0, output 0",)
        assert any("damaged" in note for note in found.notes)
        assert any("leave out bytes, the first of which is byte 16" in note for note in found.notes)

    def test_text_without_outputs(self, tmp_path: object) -> None:
        from pathlib import Path

        file = Path(str(tmp_path)) / "board.log"
        file.write_text("boot ok\n")
        one = board("pair", int8_io=True)
        with pytest.raises(InputError, match="without a line of the form"):
            validate_board(one.simulation.host, file, one.vectors)

    def test_output_of_another_program(self) -> None:
        with pytest.raises(InputError, match="holds output 7, but the program has 2"):
            board("pair", int8_io=True).check(b"OUTPUT 0 7 0 00ff")

    def test_wrong_offset(self) -> None:
        with pytest.raises(InputError, match="has the offset 99999999"):
            board("pair", int8_io=True).check(b"OUTPUT 0 1 99999999 00ff")


class TestArrays:
    @pytest.mark.parametrize("name", ["image", "channels last", "signal"])
    def test_logical_arrays(self, name: str, int8_io: bool, tmp_path: object) -> None:
        from pathlib import Path

        one = board(name, int8_io)
        arrays = [
            np.stack([tensor.from_memory(outputs[number]).reshape(tensor.shape) for outputs in one.expected])
            for number, tensor in enumerate(one.simulation.outputs)
        ]
        file = Path(str(tmp_path)) / "board.npz"
        np.savez(file, *arrays)
        assert validate_board(one.simulation.host, file, one.vectors).passed
        if int8_io:
            np.savez(file, *map(as_floats, one.simulation.outputs, arrays))
            assert validate_board(one.simulation.host, file, one.vectors).passed

    def test_one_vector(self, tmp_path: object) -> None:
        from pathlib import Path

        one = board("signal", int8_io=True)
        tensor = one.simulation.outputs[0]
        file = Path(str(tmp_path)) / "board.npy"
        np.save(file, tensor.from_memory(one.expected[0][0]).reshape(tensor.shape))
        found = validate_board(one.simulation.host, file, one.vectors)
        assert found.missing == tuple(f"vector {number}, output 0" for number in range(1, VECTORS))
        assert found.outputs[0].wrong == 0

    def test_wrong_shape(self, tmp_path: object) -> None:
        from pathlib import Path

        file = Path(str(tmp_path)) / "board.npy"
        np.save(file, np.zeros((7, 7), np.int8))
        one = board("signal", int8_io=True)
        with pytest.raises(InputError, match=r"has the shape \(7, 7\)"):
            validate_board(one.simulation.host, file, one.vectors)

    @pytest.mark.parametrize("position", ["end", "content", "header", "size"])
    def test_damaged_arrays(self, position: str) -> None:
        array, archive = io.BytesIO(), io.BytesIO()
        np.save(array, np.zeros((2, 7), np.int8))
        np.savez_compressed(archive, np.zeros((2, 700), np.int8))
        data, header = archive.getvalue(), array.getvalue()
        damaged = {
            "end": data[: len(data) // 2],
            "content": data[:50] + b"\xff" * 30 + data[80:],
            "header": header.replace(b"), }  ", b"), } ]"),
            "size": header.replace(b"(2, 7), }" + b" " * 16, b"(99999999999999999999,)} "),
        }
        with pytest.raises(InputError, match="The dump cannot be read as arrays"):
            read_dump(damaged[position], [BoardTensor((7,), np.dtype(np.int8), (0,))])


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


def test_split_of_outputs_without_elements() -> None:
    outputs = [BoardTensor((0, 3), np.dtype(np.float32), (0, 1)), BoardTensor((0,), np.dtype(np.int8), (0,), number=1)]
    expected = [(np.zeros(0, np.float32), np.zeros(0, np.int8))] * 2
    pieces, mistakes, notes = _split(Dump("raw", raw=b"1234"), expected, outputs, 1.0)
    assert pieces == {(vector, output): b"" for vector in range(2) for output in range(2)}
    assert not mistakes
    assert notes == ("The dump has 4 bytes, but the outputs of the program have no elements.",)


@pytest.mark.parametrize("limit", [-1, True, "1", float("nan")])
def test_wrong_limit(limit: object) -> None:
    with pytest.raises(OptionError, match="max_lsb"):
        board("pair", int8_io=True).check(b"", max_lsb=limit)


def test_empty_dump() -> None:
    with pytest.raises(InputError, match="empty"):
        board("pair", int8_io=True).check(b"")
