"""Dumps of the outputs of a board: logs of the serial line, arrays and raw bytes."""

from __future__ import annotations

import io

import numpy as np
import pytest
from tests.board_models import (
    VECTORS,
    Board,
    as_floats,
    board,
)

from openneutron.accuracy.board_dump import BoardTensor, Dump, read_dump
from openneutron.accuracy.board_outputs import (
    _split,
    validate_board,
)  # fmt: skip
from openneutron.errors import InputError


@pytest.fixture(params=[False, True], ids=["float", "int8"])
def int8_io(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


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
        assert found.missing == ("vector 3, output1",)
        assert not found.passed
        assert not found.diagnoses

    def test_damaged_and_lost_pieces_are_named(self) -> None:
        one = board("image", int8_io=True)
        lines = self.lines(one)
        lines[1] = lines[1][:-3] + "?!"
        found = one.check("\n".join(lines).encode())
        assert found.missing == ("vector 0, output0",)
        assert any("damaged" in note for note in found.notes)
        assert any("leave out bytes, the first of which is byte 16" in note for note in found.notes)

    def test_colours_of_a_terminal_are_ignored(self) -> None:
        one = board("image", int8_io=True)
        text = "\n".join(f"\x1b[1;33m{line}\x1b[0m" for line in self.lines(one))
        found = one.check(text.encode())
        assert found.passed
        assert not found.notes

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
        assert found.missing == tuple(f"vector {number}, output0" for number in range(1, VECTORS))
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


def test_split_of_outputs_without_elements() -> None:
    outputs = [BoardTensor((0, 3), np.dtype(np.float32), (0, 1)), BoardTensor((0,), np.dtype(np.int8), (0,), number=1)]
    expected = [(np.zeros(0, np.float32), np.zeros(0, np.int8))] * 2
    pieces, mistakes, notes = _split(Dump("raw", raw=b"1234"), expected, outputs, 1.0)
    assert pieces == {(vector, output): b"" for vector in range(2) for output in range(2)}
    assert not mistakes
    assert notes == ("The dump has 4 bytes, but the outputs of the program have no elements.",)


def test_empty_dump() -> None:
    with pytest.raises(InputError, match="empty"):
        board("pair", int8_io=True).check(b"")
