"""Programs in several threads, and in processes that were forked after a load."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tests.state_models import RingBuffer
from torch import nn

from openneutron import NeutronProgram, lower, quantize
from openneutron.accuracy.evaluate import evaluate_side_by_side
from openneutron.errors import OpenNeutronError
from openneutron.runtime import HostProgram, load

STREAM_BYTES = 272
"""The size of `std::ostream` in libstdc++."""
THREADS = 8
RUNS = 20
SECONDS = 60
has_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


class Net(nn.Module):
    """One delegate between operators on the CPU, large enough for threads in ExecuTorch's kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = torch.cos(self.b(torch.relu(self.a(torch.sin(x)))))
        return found


def inputs(count: int, shape: tuple[int, ...] = (1, 4, 24, 24)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


@pytest.fixture(scope="module")
def program() -> NeutronProgram:
    torch.manual_seed(0)
    data = inputs(2)
    return lower(quantize(Net().eval(), (data[0],), data, recover=None), payload="portable")


@pytest.fixture(scope="module")
def streaming() -> NeutronProgram:
    data = inputs(4, RingBuffer.frame)
    return lower(quantize(RingBuffer().eval(), (data[0],), data, recover=None), payload="portable")


def in_threads(work: Callable[[int], Any], count: int = THREADS) -> list[Any]:
    """Returns the results of `work` for each number. All threads begin at once."""
    barrier = threading.Barrier(count)

    def begin(number: int) -> Any:
        barrier.wait(SECONDS)
        return work(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(begin, range(count)))


def in_fork(work: Callable[[], bool]) -> bool:
    """Returns whether `work` returns True in a fork of this process. False if it takes too long."""
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)
        code = 1
        try:
            code = 0 if work() else 2
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_results_of_eight_threads_equal_one_thread(program: NeutronProgram) -> None:
    data = inputs(THREADS)
    expected = [program.run(x) for x in data]
    for number, found in enumerate(in_threads(lambda number: [program.run(data[number]) for _ in range(RUNS)])):
        assert all(torch.equal(one, expected[number]) for one in found)


def test_first_calls_of_all_threads_share_the_state(streaming: NeutronProgram) -> None:
    """Each of the threads loads the program; it is loaded once, so that each call sees the frames before it."""
    frame = inputs(1, RingBuffer.frame)[0]
    alone, together = pickle.loads(pickle.dumps(streaming)), pickle.loads(pickle.dumps(streaming))
    expected = [alone.run(frame) for _ in range(THREADS)]
    found = in_threads(lambda _: together.run(frame))
    # The frames are equal, so the outputs are those of the first, the second and all later calls, in any order.
    key = lambda output: output.flatten().tolist()  # noqa: E731
    assert sorted(map(key, found)) == sorted(map(key, expected))


def test_two_programs_at_once(program: NeutronProgram, streaming: NeutronProgram) -> None:
    data = inputs(1)[0]
    frame = inputs(1, RingBuffer.frame)[0]
    expected = program.run(data)
    hosts = [load(streaming.buffer) for _ in range(THREADS // 2)]
    frames = [load(streaming.buffer).run(frame)] * len(hosts)

    def work(number: int) -> Any:
        return program.run(data) if number % 2 else hosts[number // 2].run(frame)

    found = in_threads(work)
    assert all(torch.equal(one, expected) for one in found[1::2])
    assert all(torch.equal(one, other) for one, other in zip(found[::2], frames, strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="the name of the library is that of Linux")
def test_runs_of_several_threads_leave_the_streams_of_the_process(program: NeutronProgram) -> None:
    """ExecuTorch's Python module redirects `std::cout` during each call; calls must not overlap."""
    library = ctypes.CDLL("libstdc++.so.6")

    def streams() -> list[bytes]:
        return [(ctypes.c_char * STREAM_BYTES).in_dll(library, name).raw for name in ("_ZSt4cout", "_ZSt4cerr")]

    before, data = streams(), inputs(1)[0]
    hosts = [load(program.buffer) for _ in range(THREADS)]
    in_threads(lambda number: [hosts[number].run(data) for _ in range(RUNS)])
    assert streams() == before


def test_programs_that_are_deleted_while_they_run(program: NeutronProgram) -> None:
    """The running thread has the last reference, and the garbage collector runs in all threads."""
    data = inputs(1)[0]
    expected = program.run(data)
    programs = {number: load(program.buffer) for number in range(THREADS)}
    running = threading.Barrier(THREADS + 1)

    def work(number: int) -> Any:
        host = programs[number]
        running.wait(SECONDS)
        found = [host.run(data) for _ in range(RUNS)]
        host.cycle = [host]  # type: ignore[attr-defined]  # only the garbage collector frees the program
        del host
        gc.collect()
        return found

    def delete() -> None:
        running.wait(SECONDS)
        programs.clear()
        for _ in range(RUNS):
            gc.collect()

    deleting = threading.Thread(target=delete)
    deleting.start()
    found = in_threads(work)
    deleting.join()
    assert all(torch.equal(one, expected) for results in found for one in results)


def test_resets_and_loads_during_runs(streaming: NeutronProgram) -> None:
    frame = inputs(1, RingBuffer.frame)[0]
    host = load(streaming.buffer)
    possible = [host.run(frame) for _ in range(4)]
    host.reset()

    def work(number: int) -> bool:
        for _ in range(RUNS):
            if number == 0:
                host.reset()
            elif number == 1:
                load(streaming.buffer)
            else:
                found = host.run(frame)
                if not any(torch.equal(found, one) for one in possible):
                    return False
        return True

    assert all(in_threads(work))


@has_fork
class TestForks:
    @pytest.fixture
    def host(self, program: NeutronProgram) -> HostProgram:
        return load(program.buffer)

    def test_after_a_load_and_a_run(self, host: HostProgram, program: NeutronProgram) -> None:
        data = inputs(1)[0]
        expected = host.run(data)
        assert in_fork(lambda: torch.equal(host.run(data), expected))
        assert in_fork(lambda: torch.equal(load(program.buffer).run(data), expected))
        assert torch.equal(host.run(data), expected)

    def test_while_other_threads_run_the_program(self, host: HostProgram, program: NeutronProgram) -> None:
        """The fork must not copy a lock that another thread holds, nor a run that has not ended."""
        data = inputs(1)[0]
        expected = host.run(data)
        done = threading.Event()

        def run() -> None:
            while not done.is_set():
                host.run(data)
                load(program.buffer)

        threads = [threading.Thread(target=run) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:
            assert all(in_fork(lambda: torch.equal(host.run(data), expected)) for _ in range(5))
        finally:
            done.set()
            for thread in threads:
                thread.join()

    def test_a_fork_copies_the_current_state(self, streaming: NeutronProgram) -> None:
        frames = inputs(3, RingBuffer.frame)
        host, other = load(streaming.buffer), load(streaming.buffer)
        expected = [host.run(frame) for frame in frames]
        other.run(frames[0])
        assert in_fork(lambda: all(torch.equal(other.run(frames[i]), expected[i]) for i in (1, 2)))
        assert torch.equal(other.run(frames[1]), expected[1])

    def test_a_child_of_an_isolated_program_belongs_to_one_process(self, program: NeutronProgram) -> None:
        data = inputs(1)[0]
        host = load(program.buffer, isolated=True)
        expected = host.run(data)

        def work() -> bool:
            right = torch.equal(host.run(data), expected)
            host._session._finalizer()  # type: ignore[union-attr]  # what the end of a process calls
            return right

        assert in_fork(work)
        assert torch.equal(host.run(data), expected)

    def test_the_end_of_a_fork_keeps_the_child_of_the_parent(self, program: NeutronProgram) -> None:
        data = inputs(1)[0]
        host = load(program.buffer, isolated=True)
        finalizer = host._session._finalizer  # type: ignore[union-attr]
        assert in_fork(lambda: finalizer() is None)
        assert host.run(data) is not None


def run_in_process(program: NeutronProgram, x: torch.Tensor) -> list[float]:
    return [float(value) for value in program.run(x).flatten()]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_worker_processes(program: NeutronProgram, method: str) -> None:
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip("this system has no fork")
    data = inputs(1)[0]
    program.run(data)
    with multiprocessing.get_context(method).Pool(1) as pool:
        found = pool.apply_async(run_in_process, (program, data)).get(SECONDS)
    assert found == run_in_process(program, data)


@pytest.fixture
def states() -> Iterator[None]:
    """Checks that filters of warnings and the streams are as before."""
    import sys
    import warnings

    before = (list(warnings.filters), warnings.showwarning, sys.stderr, os.fstat(2))
    yield
    assert (list(warnings.filters), warnings.showwarning, sys.stderr, os.fstat(2)) == before


@pytest.mark.usefixtures("states")
def test_models_that_are_quantized_at_once(program: NeutronProgram) -> None:
    """Programs are equal to those of one thread, while other threads run modules and programs."""
    data = inputs(4)
    torch.manual_seed(0)
    model = Net().eval()

    def lowered(number: int) -> bytes:
        recover = (None, "fast")[number % 2]
        quantized = quantize(model, (data[0],), data, recover=recover, progress=False)
        quantized(data[0])
        return lower(quantized, payload="portable").buffer

    expected = [lowered(number) for number in range(2)]
    done = threading.Event()

    def run() -> None:
        while not done.is_set():
            program.run(data[0])
            load(program.buffer)

    running = threading.Thread(target=run)
    running.start()
    try:
        found = in_threads(lowered, 4)
    finally:
        done.set()
        running.join()
    assert found == expected * 2


def test_an_error_in_a_callback_frees_all_locks(program: NeutronProgram) -> None:
    data = inputs(2)

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    with pytest.raises(OpenNeutronError, match="ZeroDivisionError"):
        evaluate_side_by_side({"program": program}, [(x, 0) for x in data], progress=fail)
    with pytest.raises(OpenNeutronError, match="ZeroDivisionError"):
        quantize(Net().eval(), (data[0],), data, transform=fail, recover=None)
    found = in_threads(
        lambda _: (program.run(data[0]), lower(quantize(Net().eval(), (data[0],), data, recover=None))), 2
    )
    assert torch.equal(found[0][0], found[1][0])
