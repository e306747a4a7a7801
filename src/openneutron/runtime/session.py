"""Runs one program with ExecuTorch's runtime in this process."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from executorch.extension.pybindings import _C

from openneutron.cpu.registry import RUNTIME, cause_in, missing_kernels, native_log
from openneutron.cpu.signatures import signature_of
from openneutron.errors import FormatError, HostError
from openneutron.formats import pte_check
from openneutron.formats.flatbuffer import Source
from openneutron.formats.method_memory import MeasuredPools
from openneutron.runtime.memory import measure
from openneutron.runtime.native import is_installed, native_module
from openneutron.runtime.threads import engine_threads

__all__ = ["METHOD", "Session"]

METHOD = "forward"


class Session:
    """A program in ExecuTorch's runtime, with its method `forward`.

    Without the native module, `constant` works, and `start` and `call` raise `NativeModuleError`.
    """

    def __init__(
        self, data: bytes, name: str, *, loads: bool = True, source: Source | None = None, threads: int = 1
    ) -> None:
        """Loads the bytes of a `.pte`. Error messages call the program `name`. `source` has tables of `data`.

        LiteRT runs each delegate with `threads` threads.

        Without `loads`, `forward` is not loaded, so its delegates may hold microcode, and only `constant` works.
        Raises HostError if the program is damaged, or cannot run on this machine.
        """
        self._name = name
        self._threads = threads
        self._data = data  # the runtime reads constants from these bytes, so they must outlive it
        if is_installed():
            native_module().clear_error()
        try:
            pte_check.check(data if source is None else source, signature_of, name)
            with RUNTIME:
                level = _C.Verification.InternalConsistency
                self._program = program = _C._load_program_from_buffer(data, program_verification=level)
                self.method: Any = self._loaded_method() if is_installed() and loads else None
                self._constants = {program.get_method_name(i) for i in range(program.num_methods())} - {METHOD}
        except MemoryError as error:
            raise HostError(
                f"{name} cannot be loaded: this machine has too little memory for its tensors. Free memory, or use a "
                "machine with more"
            ) from error
        except (RuntimeError, ValueError, IndexError) as error:
            raise _failure_error(f"{name} cannot be loaded", _missing_kernels(data) or error) from error

    def constant(self, method: str) -> Any:
        """Returns the result of a method without inputs, such as `input0_scale`; None if there is no such method.

        Raises HostError if the method has inputs or fails.
        """
        if method not in self._constants:
            return None
        try:
            with RUNTIME:
                return self._program.load_method(method).call(())[0]
        except (RuntimeError, IndexError) as error:
            raise _failure_error(f"method '{method}' of {self._name} failed", error) from error

    def start(self) -> None:
        """Loads the method again, which restores its initial state. Raises HostError if that fails."""
        native_module().clear_error()
        try:
            with RUNTIME:
                self.method = self._loaded_method()
        except RuntimeError as error:
            raise _failure_error(f"{self._name} cannot be loaded", error) from error

    def _loaded_method(self) -> Any:
        with engine_threads(self._threads):
            return self._program.load_method(METHOD)

    def call(self, inputs: Sequence[Any]) -> list[Any]:
        """Runs the method on one value for each input. Returns copies of its outputs: tensors, numbers and None.

        Raises HostError with the cause if the method fails.
        """
        native = native_module()
        native.clear_error()
        try:
            with RUNTIME:
                outputs: list[Any] = self.method.call(inputs, clone_outputs=True)
        except RuntimeError as error:
            failure = _failure_error(f"{self._name} failed", error)
            if native.last_error() or isinstance(failure, KeyboardInterrupt):
                raise failure from error
            raise HostError(f"{self._name} failed: {self._find_cause(inputs) or error}") from error
        return outputs

    def seconds(self, inputs: Sequence[Any], repeat: int) -> list[float]:
        """Returns the seconds of each of `repeat` runs, after one that does not count. Raises HostError as `call`."""
        self.call(inputs)
        found = []
        for _ in range(repeat):
            start = time.perf_counter()
            self.call(inputs)
            found.append(time.perf_counter() - start)
        return found

    def measure(self) -> MeasuredPools:
        """Returns the memory that the runtime allocates for the method. Raises the errors of `measure`."""
        return measure(self._data, METHOD)

    def _find_cause(self, inputs: Sequence[Any]) -> str | None:
        """Runs the program again and reads the runtime's log, to find the CPU kernel that failed and the reason.

        Returns None if the log names no kernel.
        """
        with RUNTIME, native_log() as log:
            try:
                self.method.call(inputs, clone_outputs=True)
            except RuntimeError:
                kernel, cause = cause_in(log())
                reason = cause or "for an unknown reason"
                return f"the CPU kernel {kernel} rejects its inputs ({reason})" if kernel else None
        return None


def _missing_kernels(data: bytes) -> str | None:
    """Returns a message that names the missing kernels; None if none is missing, and for a damaged file."""
    try:
        missing = missing_kernels(data)
    except FormatError:
        return None
    return f"it calls CPU kernels that this ExecuTorch lacks: {', '.join(missing)}" if missing else None


def _failure_error(what: str, error: Exception | str) -> HostError | KeyboardInterrupt:
    """Returns the exception to raise for `error`, with the delegate's message if the delegate failed.

    Returns a KeyboardInterrupt after a Ctrl-C while a delegate ran, which the runtime reports as an error.
    """
    if not is_installed():
        return HostError(f"{what}: {error}")
    native = native_module()
    return KeyboardInterrupt() if native.interrupted() else HostError(f"{what}: {native.last_error() or error}")
