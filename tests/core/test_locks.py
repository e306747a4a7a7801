"""Locks of threads, also in forks of the process."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from openneutron.core.error_stream import captured_error_stream, captured_python_errors
from openneutron.core.files import write_file, write_folder
from openneutron.core.locks import ForkSafeLock, Order, traces_alone

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
SECONDS = 20


def forked(*locks: ForkSafeLock) -> bool:
    """Returns whether a fork of this process can take the locks."""
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)
        for lock in locks:
            lock.acquire()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("order", list(Order))
def test_a_fork_in_another_thread_gets_a_free_lock(order: Order) -> None:
    lock = ForkSafeLock(order)
    taken, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            taken.set()
            leave.wait(0.2)  # a fork waits for locks that are not of tracing

    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait(SECONDS)
    assert forked(lock)
    leave.set()
    thread.join()
    with lock:
        pass


@pytest.mark.parametrize("order", list(Order))
def test_a_fork_in_the_thread_that_holds_the_lock(order: Order) -> None:
    lock = ForkSafeLock(order)
    with lock:
        assert forked(lock)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="this system sends no signals to threads")
def test_a_fork_that_is_interrupted_while_it_waits_keeps_no_lock() -> None:
    """Python ignores the exception of the handler, and forks."""
    earlier, awaited, later = ForkSafeLock(Order.LOADING), ForkSafeLock(Order.PROGRAM), ForkSafeLock(Order.RUNTIME)
    taken, interrupted, leave = threading.Event(), threading.Event(), threading.Event()
    main = threading.get_ident()

    def interrupt(*_: object) -> None:
        if not interrupted.is_set():
            interrupted.set()
            raise KeyboardInterrupt

    def hold() -> None:
        with awaited:
            taken.set()
            while not interrupted.is_set() and not leave.is_set():
                if is_held(earlier):  # then the fork waits for the other lock
                    signal.pthread_kill(main, signal.SIGUSR1)
                leave.wait(0.01)
            leave.wait(SECONDS)

    before = signal.signal(signal.SIGUSR1, interrupt)
    thread = threading.Thread(target=hold)
    thread.start()
    try:
        taken.wait(SECONDS)
        child_takes_all = forked(earlier, awaited, later)
        held = in_other_thread(lambda: [is_held(one) for one in (earlier, awaited, later)])
    finally:
        leave.set()
        thread.join()
        signal.signal(signal.SIGUSR1, before)
    assert (interrupted.is_set(), child_takes_all, held) == (True, True, [False, True, False])
    assert forked(earlier, awaited, later)


def is_held(lock: ForkSafeLock) -> bool:
    """Whether another thread holds the lock."""
    if lock._lock.acquire(blocking=False):
        lock._lock.release()
        return False
    return True


def in_other_thread(function: Callable[[], list[bool]]) -> list[bool]:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def test_one_thread_at_a_time_traces() -> None:
    inside = []

    @traces_alone
    def trace(number: int) -> int:
        inside.append(number)
        assert inside == [number]
        threading.Event().wait(0.002)
        inside.remove(number)
        return recursive(number)

    @traces_alone
    def recursive(number: int) -> int:
        return number

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(trace, range(32))) == list(range(32))


def test_captured_streams_are_restored_in_all_threads(capfd: pytest.CaptureFixture[str]) -> None:
    def capture(number: int) -> str:
        with captured_error_stream() as file, captured_python_errors():
            os.write(2, f"{number}".encode())
            file.seek(0)
            return file.read().decode()

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(capture, range(64))) == [str(number) for number in range(64)]
    os.write(2, b"after")
    assert capfd.readouterr().err == "after"


def test_files_of_all_threads_have_the_permissions_of_new_files(tmp_path: os.PathLike[str]) -> None:
    """The umask belongs to the process: no thread may change it, even for a moment."""
    before = os.umask(0o027)
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda number: write_file(f"{tmp_path}/{number}", b"x"), range(32)))
            list(pool.map(lambda number: write_folder(f"{tmp_path}/f{number}", {"a": b"x"}), range(8)))
        modes = {os.stat(f"{tmp_path}/{number}").st_mode & 0o777 for number in range(32)}
        folders = {os.stat(f"{tmp_path}/f{number}").st_mode & 0o777 for number in range(8)}
        assert (modes, folders, os.umask(0o027)) == ({0o640}, {0o750}, 0o027)
    finally:
        os.umask(before)


def test_eight_threads_write_one_file(tmp_path: os.PathLike[str]) -> None:
    path = f"{tmp_path}/file"
    contents = [bytes([number]) * 100_000 for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda content: write_file(path, content), contents * 4))
    with open(path, "rb") as file:
        assert file.read() in contents
    assert os.listdir(tmp_path) == ["file"]
