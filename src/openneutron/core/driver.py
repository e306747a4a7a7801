"""Runs passes one after another, and times, checks and dumps each of them.

A driver runs one list of passes on one graph, and keeps no state for another run. A graph may have any type: the caller
gives the functions that convert it to text and check it.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from openneutron.core.files import is_folder, reason_of, write_file
from openneutron.errors import OutputError

__all__ = ["DUMP_VARIABLE", "Driver", "PassRun"]

DUMP_VARIABLE = "OPENNEUTRON_DUMP"
"""The environment variable that names the folder for dumps."""
_PASSES = "passes"
_LOGGER = logging.getLogger(__name__)

G = TypeVar("G")


@dataclass(frozen=True)
class PassRun:
    """One run of a pass."""

    name: str
    purpose: str
    seconds: float


@dataclass
class Driver(Generic[G]):
    """Runs passes over a graph of type G.

    `pipeline` names the list of passes in dumps and in the log. `text` converts a graph to text. `check` raises if
    the pass of the given name made the graph invalid. Dumps go to the folder that the environment variable
    `OPENNEUTRON_DUMP` names, and to `intermediates_dir`.

    Each driver has a folder of its own, with the next free number: "003_prepare" in the folder of the variable,
    "passes/003_prepare" in `intermediates_dir`, which must exist. That folder holds the graph before and after each
    pass ("09_functionalize_before.txt", "07_functionalize_after.txt") and, once `finish` was called, "passes.txt" with
    the seconds of each. Without a folder, nothing is written. Raises `OutputError` if a file cannot be written,
    and `InputError` if the system cannot look up `intermediates_dir`.
    """

    pipeline: str
    text: Callable[[G], str]
    check: Callable[[G, str], object]
    intermediates_dir: str | os.PathLike[str] | None = None
    runs: list[PassRun] = field(default_factory=list)
    """The passes that were run, in order."""

    def __post_init__(self) -> None:
        given = os.environ.get(DUMP_VARIABLE)
        self.folders = [_new_folder(Path(given), self.pipeline)] if given else []
        if self.intermediates_dir is not None:
            folder = Path(self.intermediates_dir)
            if not is_folder(folder):
                raise OutputError(f"intermediates_dir is '{folder}', which is not a folder. Give one that exists.")
            self.folders.append(_new_folder(folder / _PASSES, self.pipeline))

    def run(self, name: str, purpose: str, transform: Callable[[G], G], graph: G) -> G:
        """Runs one pass. `transform` takes `graph` and returns a new graph, or the same graph after changes in place.

        The graph is dumped before it is checked, so that a broken graph can be read.
        """
        stem = f"{len(self.runs):02}_{name}"
        self._write_dump(f"{stem}_before.txt", graph)
        start = time.perf_counter()
        result = transform(graph)
        self.runs.append(PassRun(name, purpose, time.perf_counter() - start))
        _LOGGER.debug("%s: %s took %.4f s", self.pipeline, name, self.runs[-1].seconds)
        self._write_dump(f"{stem}_after.txt", result)
        self.check(result, name)
        return result

    def finish(self) -> None:
        """Writes "passes.txt" to each folder."""
        lines = [f"{run.seconds:9.4f} s  {run.name}: {run.purpose}" for run in self.runs]
        for folder in self.folders:
            write_file(folder / "passes.txt", ("\n".join(lines) + "\n").encode())

    def _write_dump(self, file: str, graph: G) -> None:
        if not self.folders:
            return
        text = self.text(graph).encode()
        for folder in self.folders:
            write_file(folder / file, text)


def _new_folder(parent: Path, pipeline: str) -> Path:
    """Creates a new folder in `parent`, with the next free number.

    Other processes may create folders at the same time.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
        number = _next_number([path.name for path in parent.iterdir()])
        while True:
            folder = parent / f"{number:03}_{pipeline}"
            try:
                folder.mkdir()
            except FileExistsError:
                number += 1
            else:
                return folder
    except OSError as error:
        raise OutputError(
            f"Cannot write dumps into '{parent}': {reason_of(error)}. Give a folder in which you may write as "
            f"{DUMP_VARIABLE} or intermediates_dir."
        ) from error


def _next_number(names: Sequence[str]) -> int:
    numbers = [name.partition("_")[0] for name in names]
    return 1 + max((int(number) for number in numbers if number.isdecimal()), default=-1)
