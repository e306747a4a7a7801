"""Makes system calls on files fail, by a library that is loaded before this process starts (`faulty_files.c`)."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["KILL", "Faults", "build_library", "environment"]

KILL = 0
"""Given instead of an errno, ends the process with SIGKILL."""
COUNT_ONLY = -1
_SOURCE = Path(__file__).with_name("faulty_files.c")


def build_library(folder: Path) -> Path:
    """Compiles the library into `folder`. Raises `CalledProcessError` or `FileNotFoundError` without a C compiler."""
    library = folder / "faulty_files.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, _SOURCE, "-ldl"], check=True, capture_output=True)
    return library


def environment(library: Path) -> dict[str, str]:
    """Returns the environment of a process in which `Faults` works."""
    return {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1", "OPENNEUTRON_CACHE": ""}


class Faults:
    """The library in this process."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(None)
        self._library.faults_name.restype = ctypes.c_char_p
        self._starts_processes = False
        sys.addaudithook(self._fail_to_start_a_process)

    @contextmanager
    def armed(self, folder: Path, number: int = COUNT_ONLY, error: int = KILL) -> Iterator[None]:
        """Makes operation `number` of the block on a path below `folder` fail with the errno `error`."""
        self._library.faults_arm(os.fsencode(folder), number, error)
        self._starts_processes = True
        try:
            yield
        finally:
            self._starts_processes = False
            self._library.faults_disarm()

    @property
    def count(self) -> int:
        """The number of operations since the start of the last block."""
        return int(self._library.faults_count())

    @property
    def failed(self) -> str:
        """The operation that failed in the last block, and its path; an empty text if none has."""
        return bytes(self._library.faults_name()).decode(errors="replace")

    def _fail_to_start_a_process(self, event: str, _: tuple[Any, ...]) -> None:
        """Counts the start of a process as an operation. The library cannot replace vfork."""
        if event != "subprocess.Popen" or not self._starts_processes:
            return
        if error := self._library.faults_step(b"start of a process"):
            raise OSError(error, os.strerror(error))
