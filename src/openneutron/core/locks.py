"""Locks for data that all threads share, which remain usable after a fork of the process."""

from __future__ import annotations

import functools
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from enum import IntEnum
from operator import methodcaller
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

__all__ = ["ForkSafeLock", "Order", "traces_alone"]

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Order(IntEnum):
    """The order in which a thread takes locks. A thread takes no lock while it holds one of a later kind."""

    TRACING = 0
    """A fork does not wait for this lock, because worker processes start while a thread traces or calibrates."""
    LOADING = 1
    PROGRAM = 2
    RUNTIME = 3
    ERROR_STREAM = 4
    CODE = 5


class ForkSafeLock:
    """A reentrant lock. `os.fork` takes these locks first, in their order, and releases them afterwards.

    A fork therefore waits until no other thread holds such a lock, so both processes have consistent data. A fork does
    not wait for locks of the kind `TRACING`, and Ctrl-C may end its wait for others. In the new process, a lock that
    the fork did not take is free, unless the thread that forked holds it.
    """

    def __init__(self, order: Order) -> None:
        self.order = order
        self._lock = threading.RLock()
        with _GUARD:
            _ALL.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self._lock.release()

    def acquire(self) -> None:
        """Waits for the lock and takes it."""
        self._lock.acquire()

    def release(self) -> None:
        """Releases the lock, which this thread holds."""
        self._lock.release()

    def forget_other_threads(self) -> None:
        """Frees the lock, in a new process, if its holder is a thread that exists only in the parent process."""
        if self._lock.acquire(blocking=False):
            self._lock.release()
        else:
            self._lock = threading.RLock()


class _Held(threading.local):
    """The locks that a fork in this thread has taken so far."""

    def __init__(self) -> None:
        self.locks: list[Any] = []


_ALL: weakref.WeakSet[ForkSafeLock] = weakref.WeakSet()
_GUARD = threading.Lock()  # guards _ALL; a thread that holds it takes no other lock
_held = _Held()
_acquire, _release = methodcaller("acquire"), methodcaller("release")


def _before_fork() -> None:
    """Takes the locks. Python forks even if a signal handler, such as that of Ctrl-C, raises in this function."""
    with _GUARD:
        locks = [one for one in _ALL if one.order is not Order.TRACING]
    locks.sort(key=lambda it: (it.order, id(it)))
    # One call without Python code: no signal handler runs between the acquisition of a lock and its entry in the list.
    _held.locks.extend(filter(_acquire, [*(one._lock for one in locks), _GUARD]))


def _after_fork() -> None:
    locks, _held.locks = _held.locks, []
    deque(map(_release, reversed(locks)), maxlen=0)  # one call, for the same reason


def _after_fork_in_child() -> None:
    _after_fork()
    for lock in list(_ALL):
        lock.forget_other_threads()


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)

_TRACING = ForkSafeLock(Order.TRACING)


def traces_alone(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Lets one thread at a time run the functions with this decorator; others wait.

    torch.export replaces methods of torch.nn.Module, filters of warnings and flags for all threads while it runs. A
    module that another thread runs at the same time would become a part of the graph.
    """

    @functools.wraps(function)
    def alone(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with _TRACING:
            return function(*args, **kwargs)

    return alone
