"""Runs a program in a separate process, so that a crash in ExecuTorch or LiteRT does not end the caller's process.

The parent and the child exchange messages over the child's standard input and output. A message is its length as a
little-endian uint64, followed by the bytes of `runtime/values.py`. A request is `[verb, *values]`. An answer is
`["ok", *values]` or `[kind of error, text]`.
"""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import astuple
from typing import IO, Any

from openneutron.core.waiting import waiting_passively
from openneutron.errors import HostError, HostProcessError, NativeModuleError
from openneutron.formats.method_memory import MeasuredPools
from openneutron.runtime import values

__all__ = ["ChildSession", "serve"]

_LENGTH = struct.Struct("<Q")
_CODE = "from openneutron.runtime.child import serve; serve()"
_LOG_LINES = 3
"""The number of lines of the child's log in an error about its end."""
_ERRORS = {"HostError": HostError, "NativeModuleError": NativeModuleError, "MemoryError": HostError}


class ChildSession:
    """A `Session` in a child process. The start of the process takes as long as the import of torch.

    If the child ends, the call raises HostProcessError with the signal and the end of the child's log. `start` then
    starts a new child. The child ends when the session is deleted, and when the parent process ends.
    """

    def __init__(self, data: bytes, name: str, *, loads: bool = True, threads: int = 1) -> None:
        """Starts the child, which loads the bytes of a `.pte`. Raises the errors of `Session`."""
        self._data, self._name, self._loads, self._threads = data, name, loads, threads
        self._make_child()

    def constant(self, method: str) -> Any:
        """See `Session.constant`."""
        return self._ask("constant", method)[0]

    def start(self) -> None:
        """See `Session.start`."""
        if os.getpid() == self._parent and self._child.poll() is None:
            self._ask("start")
        else:
            self._make_child()

    def call(self, inputs: Sequence[Any]) -> list[Any]:
        """See `Session.call`."""
        return self._ask("call", *inputs)

    def seconds(self, inputs: Sequence[Any], repeat: int) -> list[float]:
        """See `Session.seconds`. The inputs are copied to the child once."""
        return self._ask("seconds", repeat, *inputs)

    def measure(self) -> MeasuredPools:
        """See `Session.measure`."""
        return MeasuredPools(*self._ask("measure"))

    def _make_child(self) -> None:
        try:
            self._start_child()
        except OSError as error:
            raise HostError(
                f"{self._name} cannot be loaded in a process of its own: {error.strerror or error}. Free memory, space "
                "on the disk, processes or open files."
            ) from error
        self._parent = os.getpid()
        self._finalizer = weakref.finalize(self, _end_own, self._child, self._parent)
        self._ask("load", self._name, _as_tensor(self._data), self._loads, self._threads)

    def _start_child(self) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  the child writes to it while the session lives
        paths = os.pathsep.join([path for path in sys.path if path])
        self._child = subprocess.Popen(
            [sys.executable, "-c", _CODE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=waiting_passively({**os.environ, "PYTHONPATH": paths}),
            start_new_session=True,  # Ctrl-C reaches only the parent, which ends the child
        )

    def _ask(self, *request: Any) -> list[Any]:
        """Sends a request and returns the values of its answer. Raises the error that the child reports.

        After a fork of this process, the child belongs to the process that started it. The other process starts a child
        of its own, in which the program has its initial state.
        """
        if os.getpid() != self._parent:
            self._make_child()
        try:
            _send(self._pipe(self._child.stdin), values.to_bytes(request))
            answer = _receive(self._pipe(self._child.stdout))
        except (BrokenPipeError, EOFError):
            raise self._death_error() from None
        except BaseException:  # after an interrupted request, each answer would belong to the request before
            _end(self._child)
            raise
        kind, *rest = values.from_bytes(answer)
        if kind == "ok":
            return rest
        raise _ERRORS.get(str(kind), HostError)(str(rest[0]))

    def _pipe(self, pipe: IO[bytes] | None) -> IO[bytes]:
        if pipe is None or pipe.closed:
            raise BrokenPipeError
        return pipe

    def _death_error(self) -> HostProcessError:
        code = self._child.wait()
        how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        self._log.seek(0)
        lines = [line for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        log = "".join(f"\n  {line}" for line in lines[-_LOG_LINES:])
        _end(self._child)
        return HostProcessError(
            f"{self._name} ended the process that ran it ({how}). The file is damaged, or a kernel of ExecuTorch or "
            f"LiteRT is faulty.{' The end of its log:' if log else ''}{log}"
        )


def _end_own(child: subprocess.Popen[bytes], parent: int) -> None:
    """Ends the child, unless this process is a fork of the one that started it."""
    if os.getpid() == parent:
        _end(child)


def _end(child: subprocess.Popen[bytes]) -> None:
    """Ends the child and closes its pipes."""
    child.kill()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            try:
                pipe.close()
            except BrokenPipeError:  # closing writes what was not sent yet
                continue
    child.wait()


def _as_tensor(data: bytes) -> Any:
    import torch

    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _send(pipe: IO[bytes], message: bytes) -> None:
    pipe.write(_LENGTH.pack(len(message)))
    pipe.write(message)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> bytes:
    """Returns the next message. Raises EOFError at the end of the pipe."""
    (length,) = _LENGTH.unpack(_read(pipe, _LENGTH.size))
    return _read(pipe, length)


def _read(pipe: IO[bytes], count: int) -> bytes:
    data = pipe.read(count)
    if len(data) < count:
        raise EOFError
    return data


def serve() -> None:
    """Answers requests until the parent closes the pipe. This is the child's main function.

    What libraries print goes to the standard error stream, because the answers go to the standard output.
    """
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    server = _Server()
    while True:
        try:
            request = _receive(requests)
        except EOFError:
            return
        _send(answers, values.to_bytes(server.answer(values.from_bytes(request))))


def _end_with_parent(parent: int) -> None:
    """Ends this process when its parent has ended, even during a run."""
    import time

    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


class _Server:
    """The session of the child."""

    def __init__(self) -> None:
        self._session: Any = None
        self._verbs: dict[str, Callable[..., list[Any]]] = {
            "load": self._load,
            "start": lambda: self._session.start() or [],
            "constant": lambda method: [self._session.constant(method)],
            "call": lambda *inputs: self._session.call(inputs),
            "seconds": lambda repeat, *inputs: self._session.seconds(inputs, repeat),
            "measure": lambda: list(astuple(self._session.measure())),
        }

    def answer(self, request: list[Any]) -> list[Any]:
        verb, *arguments = request
        try:
            return ["ok", *self._verbs[verb](*arguments)]
        except (HostError, MemoryError) as error:
            return [type(error).__name__, str(error) or "too little memory"]

    def _load(self, name: str, data: Any, loads: bool, threads: int) -> list[Any]:
        from openneutron.runtime.session import Session

        self._session = Session(bytes(data.numpy()), name, loads=loads, threads=threads)
        return []
