"""Programs in processes of their own, and the messages between the processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from openneutron import load, lower, quantize
from openneutron.errors import HostError, HostProcessError, InputError
from openneutron.runtime import HostProgram
from openneutron.runtime.child import ChildSession
from openneutron.runtime.values import from_bytes, to_bytes


class Accumulator(nn.Module):
    """Returns a sum over all calls, so its outputs show the state."""

    total: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("total", torch.zeros(1, 4))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None, int]:
        self.total.copy_(self.total + self.layer(x))
        return self.total.clone(), None, 3


X = torch.linspace(-1, 1, 4)[None]


@pytest.fixture(scope="module")
def data() -> bytes:
    torch.manual_seed(0)
    return lower(quantize(Accumulator().eval(), (X,), [(X,), (-X,)])).buffer


@pytest.fixture(scope="module")
def isolated(data: bytes) -> HostProgram:
    return load(data, isolated=True)


def child_of(program: HostProgram) -> int:
    session = program._session
    assert isinstance(session, ChildSession)
    return session._child.pid


def outputs_of(run: Callable[..., Any]) -> list[Any]:
    return [output.tolist() if isinstance(output, torch.Tensor) else output for output in run(X)]


class TestIsolated:
    def test_an_isolated_program_equals_one_in_this_process(self, data: bytes, isolated: HostProgram) -> None:
        program = load(data)
        isolated.reset()
        assert isolated.inputs == program.inputs
        assert isolated.outputs == program.outputs
        assert isolated.has_state
        for _ in range(3):
            assert outputs_of(isolated.run) == outputs_of(program.run)
        isolated.reset()
        program.reset()
        assert outputs_of(isolated.run) == outputs_of(program.run)

    def test_an_isolated_program_is_usable_after_wrong_inputs(self, isolated: HostProgram) -> None:
        with pytest.raises(InputError, match="has shape"):
            isolated.run(X[0])
        assert len(isolated.run(X)) == 3

    def test_the_end_of_the_process_is_an_error_and_reset_restarts_it(self, isolated: HostProgram) -> None:
        isolated.reset()
        expected = outputs_of(isolated.run)
        os.kill(child_of(isolated), signal.SIGKILL)
        for _ in range(2):
            with pytest.raises(HostProcessError, match=r"the program ended the process that ran it \(SIGKILL\)"):
                isolated.run(X)
        isolated.reset()
        assert outputs_of(isolated.run) == expected

    def test_memory_and_time_are_measured_in_the_child_process(self, data: bytes, isolated: HostProgram) -> None:
        assert isolated.memory == load(data).memory
        assert isolated.memory.measured is not None
        assert len(isolated.seconds((X,), {}, 3)) == 3
        with pytest.raises(InputError, match="has shape"):
            isolated.seconds((X[0],), {}, 1)

    def test_errors_of_the_child(self, data: bytes, tmp_path: Path) -> None:
        file = tmp_path / "damaged.pte"
        at = data.index(b"TFL3") + 200
        file.write_bytes(data[:at] + bytes(64) + data[at + 64 :])
        messages = []
        for is_isolated in (False, True):
            with pytest.raises(HostError) as caught:
                load(file, isolated=is_isolated)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]
        assert "CRC-32" in messages[0]

    def test_the_process_of_an_isolated_program_ends_with_it(self, data: bytes) -> None:
        program = load(data, isolated=True)
        child = child_of(program)
        del program
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)


DTYPES = [torch.float32, torch.float64, torch.float16, torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool]


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    values = torch.arange(int(torch.tensor(shape).prod()) if shape else 1).reshape(shape)
    return values.to(draw(st.sampled_from(DTYPES))).permute(draw(st.permutations(range(len(shape)))))


plain = st.none() | st.integers(-(2**60), 2**60) | st.booleans() | st.text() | st.floats(allow_nan=False)


class TestMessages:
    @given(st.lists(plain | tensors(), max_size=5))
    def test_messages_are_read_as_written(self, values: list[Any]) -> None:
        read = from_bytes(to_bytes(values))
        assert len(read) == len(values)
        for value, copy in zip(values, read, strict=True):
            if isinstance(value, torch.Tensor):
                assert copy.dtype == value.dtype
                assert copy.shape == value.shape
                assert torch.equal(copy, value)
            else:
                assert copy == value

    def test_keep_the_memory_format(self) -> None:
        x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
        (copy,) = from_bytes(to_bytes([x]))
        assert copy.is_contiguous(memory_format=torch.channels_last)

    @given(st.binary(max_size=60))
    def test_other_bytes_are_refused(self, message: bytes) -> None:
        with pytest.raises(ValueError, match="not a message with values"):
            from_bytes(message)

    @given(st.data())
    def test_truncated_messages_are_refused(self, data: st.DataObject) -> None:
        message = to_bytes([torch.arange(5), "text", None])
        with pytest.raises(ValueError, match="not a message with values"):
            from_bytes(message[: data.draw(st.integers(0, len(message) - 1))])
