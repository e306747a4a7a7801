"""Programs that the host refuses, and runs that fail."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from tests.firmware_models import program
from tests.runtime_calls import SHAPE, assert_equal, blank, device_payload, double_payload, random_int8, single_call
from tests.runtime_models import double_model, litert, straight_header

from openneutron.errors import HostError
from openneutron.formats.payload import PayloadHeader, pack_portable
from openneutron.runtime import HostProgram, _host
from openneutron.runtime.engine import DelegatePort
from openneutron.runtime.session import Session


@pytest.fixture(scope="module")
def doubling() -> bytes:
    return single_call(double_payload())


class TestRefusals:
    def test_device_payload(self) -> None:
        with pytest.raises(HostError, match=r"holds NPU microcode.*run it on the board, or lower the model again"):
            HostProgram.from_bytes(single_call(device_payload()))

    @pytest.mark.parametrize("offset", [0, 1, 8, 16, 20, 40, 200, -20, -16, -8, -4])
    def test_corrupted_payload_in_the_file(self, doubling: bytes, offset: int) -> None:
        payload = double_payload()
        start = doubling.index(payload)
        data = bytearray(doubling)
        data[start + offset % len(payload)] ^= 0x5A
        with pytest.raises(HostError, match=r"byte \d+ of the delegate payload: expected "):
            HostProgram.from_bytes(bytes(data))

    @pytest.mark.parametrize("length", [0, 1, 15, 16, 24, 100, -1])
    def test_truncated_payload(self, length: int) -> None:
        with pytest.raises(HostError, match=r"byte \d+ of the delegate payload: expected "):
            HostProgram.from_bytes(single_call(double_payload()[:length]))

    def test_tflite_that_litert_refuses(self) -> None:
        payload = pack_portable(straight_header(1, 1), b"\x1c\0\0\0TFL3" + bytes(range(64)))
        with pytest.raises(HostError, match="the TFLite model of a payload: byte"):
            HostProgram.from_bytes(single_call(payload))

    def test_header_that_disagrees_with_the_tflite(self) -> None:
        payload = pack_portable(straight_header(2, 1), double_model(SHAPE))
        with pytest.raises(
            HostError, match="header has 2 inputs and 1 outputs, but its TFLite model has 1 inputs and 1 outputs"
        ):
            HostProgram.from_bytes(single_call(payload, 2))

    @pytest.mark.parametrize("argument_count", [1, 3])
    def test_header_that_disagrees_with_the_program(self, argument_count: int) -> None:
        header = PayloadHeader((0,), (0,), (0,), (0,), argument_count)
        program = HostProgram.from_bytes(single_call(pack_portable(header, double_model(SHAPE)), 2))
        with pytest.raises(HostError, match=f"gives the delegate 3 arguments, the payload takes {argument_count + 1}"):
            program.run(random_int8(SHAPE), random_int8(SHAPE))

    def test_size_that_disagrees_with_the_program(self) -> None:
        program = HostProgram.from_bytes(single_call(double_payload((1, 4, 6, 7))))
        with pytest.raises(HostError, match="delegate argument 0 has 192 bytes, the TFLite model's tensor 168"):
            program.run(random_int8(SHAPE))

    def test_dtype_that_disagrees_with_the_program(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("openneutron.formats.tflite.check", lambda _: None)  # it refuses other dtypes than int8
        payload = pack_portable(straight_header(1, 1), double_model(SHAPE, "FLOAT32"))
        program = HostProgram.from_bytes(single_call(payload))
        with pytest.raises(HostError, match="delegate argument 0 has scalar type 1, the TFLite model takes 6"):
            program.run(random_int8(SHAPE))

    def test_a_failure_leaves_the_next_run_and_other_programs_alone(self, doubling: bytes) -> None:
        bad = HostProgram.from_bytes(single_call(double_payload((1, 4, 6, 7))))
        good = HostProgram.from_bytes(doubling)
        x = random_int8(SHAPE)
        for _ in range(3):
            with pytest.raises(HostError, match="168"):
                bad.run(x)
            assert_equal(good.run(x), litert(double_model(SHAPE), x))


WRONG_QPARAMS: dict[str, tuple[object, object, str]] = {
    "scale of zero": (0.0, 0, r"the scale of input0 is 0\.0, expected a number from 2\^-126"),
    "negative scale": (-0.5, 0, r"the scale of input0 is -0\.5"),
    "scale that is not finite": (math.inf, 0, "the scale of input0 is inf"),
    "NaN": (math.nan, 0, "the scale of input0 is nan"),
    "scale with an infinite reciprocal": (1e-310, 0, "the scale of input0 is 1e-310"),
    "no scale": (None, 0, "the scale of input0 is None"),
    "scale that is no number": ("0.5", 0, "the scale of input0 is '0.5'"),
    "zero point outside of the dtype": (0.5, 128, "the zero point of input0 is 128, expected an integer from -128"),
    "no zero point": (0.5, None, "the zero point of input0 is None"),
    "truth value": (0.5, True, "the zero point of input0 is True"),
}


@pytest.mark.parametrize(("scale", "zero_point", "message"), WRONG_QPARAMS.values(), ids=WRONG_QPARAMS)
def test_wrong_qparams(
    scale: object, zero_point: object, message: str, doubling: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"input0_scale": scale, "input0_zp": zero_point}
    monkeypatch.setattr(Session, "constant", lambda _, name: given.get(name))
    with pytest.raises(HostError, match=rf"cannot be loaded: {message}.*\. Lower the model again"):
        HostProgram.from_bytes(doubling)


def test_qparams_of_a_float_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Session, "constant", lambda _, name: {"input0_scale": 0.5, "input0_zp": 0}.get(name))
    with pytest.raises(HostError, match=r"input0 has dtype torch\.float32, but also a scale and a zero point"):
        HostProgram.from_bytes(program("floats").buffer)


class FakeEngine:
    """Replaces `runtime.engine.Engine` in tests that block or break the interpreter."""

    argument_count = 1
    inputs = ()
    outputs = (
        DelegatePort(argument=1, channels_last=False, dtype=1, channels=8, view=lambda: np.ones(SHAPE, np.int8)),
    )

    def __init__(self, invoke: Callable[[], None]) -> None:
        self.invoke = invoke


class TestEngineFailures:
    def test_exception_in_invoke(self, doubling: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail() -> None:
            raise RuntimeError("no more memory")

        monkeypatch.setattr("openneutron.runtime.engine.Engine", lambda _: FakeEngine(fail))
        program = HostProgram.from_bytes(doubling)
        with pytest.raises(HostError, match="RuntimeError: no more memory"):
            program.run(random_int8(SHAPE))

    def test_exception_that_cannot_even_be_printed(self, doubling: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
        class UnprintableError(Exception):
            def __str__(self) -> str:
                raise ValueError("no words for it")

        def fail() -> None:
            raise UnprintableError

        monkeypatch.setattr("openneutron.runtime.engine.Engine", lambda _: FakeEngine(fail))
        program = HostProgram.from_bytes(doubling)
        with pytest.raises(HostError, match="ValueError: no words for it"):
            program.run(random_int8(SHAPE))

    def test_keyboard_interrupt_reaches_the_user(self, doubling: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupt() -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("openneutron.runtime.engine.Engine", lambda _: FakeEngine(interrupt))
        program = HostProgram.from_bytes(doubling)
        with pytest.raises(KeyboardInterrupt):
            program.run(random_int8(SHAPE))

    def test_call_that_overlaps_another(self, doubling: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
        entered, leave = threading.Event(), threading.Event()

        def wait() -> None:
            entered.set()
            assert leave.wait(30)

        monkeypatch.setattr("openneutron.runtime.engine.Engine", lambda _: FakeEngine(wait))
        program = HostProgram.from_bytes(doubling)
        inputs = [blank(SHAPE)]
        session = program._session
        assert isinstance(session, Session)
        call = functools.partial(session.method.call, inputs, clone_outputs=True)  # without the locks of run()
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(call)
            assert entered.wait(30)
            with pytest.raises(RuntimeError):
                call()
            assert _host.last_error() == "the program is running in another thread"
            leave.set()
            assert_equal(first.result()[0], [np.ones(SHAPE, np.int8)])
