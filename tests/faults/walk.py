"""Makes each file operation of each writer fail, and checks what is left: `python -m tests.faults.walk [WRITER ...]`.

For each operation and each errno: the writer succeeds or raises an `OpenNeutronError` that gives the system's reason;
each file is as before or complete; no temporary file is left; a second run succeeds. With --kill, the process ends with
SIGKILL at each operation, too; temporary files may stay then, but each file is as before or complete, and a second
run succeeds. A line of JSON for each writer gives the number of operations, the number of faults and the findings.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.faults.faults import KILL, Faults, build_library, environment

ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EMFILE, errno.EINTR)
PRELOADED = "OPENNEUTRON_FAULTS"
TEMPORARY = re.compile(r"(^|/)\.[^/]*\.tmp(/|$)|^tmp/")
SECONDS = re.compile(rb"\d+\.\d{4} s")
Files = dict[str, bytes]


@dataclass
class Walk:
    """The results for one writer."""

    writer: str
    operations: int = 0
    faults: int = 0
    kills: int = 0
    survived: int = 0
    """The number of faults after which the writer succeeded."""
    seconds: float = 0.0
    findings: list[str] = field(default_factory=list)


class Case:
    """A writer in a folder of its own, with its files before and after."""

    def __init__(self, name: str, faults: Faults) -> None:
        from tests.faults.writers import WRITERS

        self.name, self.writer, self.faults = name, WRITERS[name], faults
        self.folder = Path(tempfile.mkdtemp(prefix="faults-"))
        self.work = self.folder / "work"
        self.begin()
        self.inputs = self.files()
        self.write()  # caches and imports
        self.begin()
        with faults.armed(self.folder):
            self.write()
        self.operations = faults.count
        self.complete = self.files()

    def begin(self) -> None:
        """Makes the folder and the inputs again."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.work.mkdir(parents=True)
        (self.folder / "tmp").mkdir()
        tempfile.tempdir = str(self.folder / "tmp")
        self.writer.before(self.work)

    def write(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.writer.write(self.work)

    def files(self) -> Files:
        """Returns the contents of all files, by their paths. Times in the texts of dumps are left out."""
        found = {}
        for path in sorted(self.folder.rglob("*")):
            if path.is_file():
                found[str(path.relative_to(self.folder))] = SECONDS.sub(b"", path.read_bytes())
            elif path.is_dir() and path.parent == self.folder / "tmp":
                found[str(path.relative_to(self.folder))] = b""
        return found

    def wrong_files(self, after_success: bool, killed: bool = False) -> Iterator[str]:
        """Returns what is wrong with the files that a fault left."""
        found = self.files()
        for path, content in found.items():
            if TEMPORARY.search(path):
                if not killed:
                    yield f"left {path}"
            elif path not in self.complete:
                if not path.startswith(tuple(f"work/{name}" for name in self.writer.numbered)):
                    yield f"made {path}"
            elif content not in (self.complete[path], self.inputs.get(path)):
                yield f"{path} is half-written"
        if after_success:
            optional = tuple(f"work/{name}/" for name in self.writer.optional)
            yield from (
                f"lacks {path}"
                for path, content in self.complete.items()
                if found.get(path) != content and not path.startswith(optional)
            )

    def second_run(self) -> Iterator[str]:
        """Writes again without faults. Returns what is wrong then."""
        from openneutron.errors import OutputError

        try:
            self.write()
        except OutputError as error:
            if "is not empty" not in str(error) or not self.writer.wants_new_folder:
                yield f"second run: {error}"
        except Exception as error:
            yield f"second run: {type(error).__name__}: {error}"
        complete = not self.writer.numbered  # its second run makes other folders
        yield from (f"second run: {wrong}" for wrong in self.wrong_files(after_success=complete, killed=True))

    def fail_at(self, number: int, error: int, *, again: bool) -> tuple[bool, list[str]]:
        """Returns whether the writer survived the fault, and the findings, also of a second run if `again`."""
        from openneutron.errors import OpenNeutronError

        self.begin()
        findings, survived = [], True
        try:
            with self.faults.armed(self.folder, number, error):
                self.write()
        except OpenNeutronError as raised:
            survived = False
            # Typer reports a path for which `stat` fails as one that does not exist.
            is_check_of_typer = self.faults.failed.startswith("stat") and "does not exist" in str(raised)
            if os.strerror(error) not in str(raised) and not is_check_of_typer:
                findings.append(f"no reason: {raised}")
            if "This is a fault of OpenNeutron" in str(raised):
                findings.append(f"untyped: {raised}")
        except Exception as raised:
            survived = False
            findings.append(f"untyped {type(raised).__name__}: {raised}")
        operation = self.faults.failed.replace(str(self.folder), "")
        is_cleanup = operation.startswith(("unlink", "rmdir"))
        findings += self.wrong_files(survived, killed=is_cleanup)
        if again:
            findings += self.second_run()
        where = f"operation {number} ({operation}), {errno.errorcode[error]}"
        return survived, [f"{where}: {finding}" for finding in findings]

    def kill_at(self, number: int) -> list[str]:
        """Ends a copy of this process at an operation. Returns the findings."""
        self.begin()
        child = os.fork()
        if child == 0:
            try:
                silent = os.open(os.devnull, os.O_WRONLY)
                os.dup2(silent, 1)
                os.dup2(silent, 2)
                with self.faults.armed(self.folder, number, KILL):
                    self.write()
            finally:
                os._exit(0)  # also after an exception, which would run the rest of the walk in this process
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        findings = [] if code == -signal.SIGKILL else [f"the process ended with {code} instead of SIGKILL"]
        findings += [*self.wrong_files(after_success=False, killed=True), *self.second_run()]
        return [f"killed at operation {number}: {finding}" for finding in findings]


def walk(
    name: str, faults: Faults, *, kills: bool, errors: int, limit: int | None, seed: object, second_runs: int = 1
) -> Walk:
    """Walks over the operations of a writer: all of them, or `limit` of them at random.

    The writer runs a second time after a fault at each operation whose number is a multiple of `second_runs`.
    """
    begin = time.monotonic()
    case = Case(name, faults)
    result = Walk(name, case.operations)
    numbers = list(range(case.operations))
    if limit is not None and limit < len(numbers):
        numbers = sorted(random.Random(f"{name} {seed}").sample(numbers, limit))
    for number in numbers:
        for turn in range(errors):
            survived, findings = case.fail_at(
                number, ERRORS[(number + turn) % len(ERRORS)], again=number % second_runs == 0
            )
            result.faults += 1
            result.survived += survived
            result.findings += findings
        if kills and case.writer.forks:
            result.kills += 1
            result.findings += case.kill_at(number)
    tempfile.tempdir = None
    shutil.rmtree(case.folder)
    result.seconds = round(time.monotonic() - begin, 1)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("writers", nargs="*", help="names of writers; all by default")
    parser.add_argument("--kill", action="store_true", help="end the process at each operation, too")
    parser.add_argument("--errors", type=int, default=len(ERRORS), help="the number of errnos for each operation")
    parser.add_argument("--limit", type=int, help="the number of operations of a writer, at random")
    parser.add_argument("--second-runs", type=int, default=1, help="run again after each N-th operation only")
    parser.add_argument("--quick", action="store_true", help="only the writers that take less than a tenth of a second")
    parser.add_argument("--minutes", type=float, help="walk over operations at random until the time is over")
    options = parser.parse_args()
    if PRELOADED not in os.environ:
        with tempfile.TemporaryDirectory() as folder:
            library = build_library(Path(folder))
            command = [sys.executable, "-m", "tests.faults.walk", *sys.argv[1:]]
            return subprocess.run(command, env={**environment(library), PRELOADED: "1"}, check=False).returncode
    from tests.faults.writers import WRITERS

    faults = Faults()
    names = options.writers or [name for name, one in WRITERS.items() if not (options.quick and one.is_slow)]
    limit = options.limit if options.minutes is None else options.limit or 5
    end, turn, failed = time.monotonic() + 60 * (options.minutes or 0), 0, False
    while turn == 0 or time.monotonic() < end:
        for name in names:
            done = walk(
                name, faults, kills=options.kill, errors=options.errors, limit=limit, seed=turn,
                second_runs=options.second_runs,
            )  # fmt: skip
            failed |= bool(done.findings)
            print(json.dumps(asdict(done)), flush=True)
            if turn and time.monotonic() > end:
                break
        turn += 1
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
