"""Damages files and opens them by every reader: `python -m tests.mutants model.pte other.tflite --minutes 10 --seed 1`.

Without files, it takes a small model of each TFLite operator. A third of the mutants of a `.pte` have changed bytes; a
third have other numbers in the places that a reader of the program reads; the others have a payload with a correct
checksum, whose TFLite model is a valid flatbuffer with wrong contents.

A mutant of a `.pte` first goes to the readers that all verbs begin with: `pte.read` and `payload.parse`, and for a
changed payload the check of its TFLite model. They refuse most mutants. All verbs open the other mutants, and a sample
of the refused ones, to verify that no verb runs them. Verbs that open the same bytes share one result of `pte.read` and
of `tflite.check`.

A forked process opens the mutants of a batch, and notes the number of the current one in shared memory. If a mutant
ends that process with a signal or hangs, another process continues after it. Such a mutant is a finding, like one that
raises an untyped error, and is kept in `--findings`. The command prints a table of outcomes and the mutants per second
of processor time, and returns 1 if there was a finding.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import json
import mmap
import os
import random
import resource
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from tests.kind_graphs import GRAPHS
from tests.structured_mutants import mutated_bytes, mutated_numbers, mutated_tflite, read_places

from openneutron.errors import OpenNeutronError
from openneutron.formats import payload, pte, tflite
from openneutron.formats.delegate_outputs import BACKEND

if TYPE_CHECKING:
    from openneutron.formats.flatbuffer import Source
    from openneutron.runtime import HostProgram

__all__ = ["Outcomes", "kind_models", "run_batch"]

MUTANTS_OF_A_BATCH = 1000
SECONDS_OF_ONE_VERB = 10
SECONDS_WITHOUT_PROGRESS = 60
BYTES_OF_MEMORY = 12 << 30
SHARE_OF_REFUSED = 0.05
"""The share of the refused mutants that the verbs open."""
SHARE_OF_SLOW_VERBS = 0.1
"""The share of the mutants opened by verbs that the slow ones open, too."""
COUNTER = struct.Struct("<Q")

Verb = Callable[[bytes, Path], object]
"""Opens the bytes of a file. The path is that of a folder for files that the verb writes."""


@dataclass
class Outcomes:
    """The outcomes of a batch. `findings` describe mutants that ended their process, and untyped errors."""

    counts: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)


class Mutant(NamedTuple):
    """A damaged file. `check` raises the error with which all readers refuse it; `data` makes its bytes."""

    kind: str
    check: Callable[[], object]
    data: Callable[[], bytes]


Opened = Callable[[Mutant], Iterator[str]]
"""Opens a mutant, and returns the outcomes."""


def kind_models() -> dict[str, bytes]:
    """Returns a small TFLite model for each operator, by name."""
    return {f"{name}.tflite": tflite.write(graph) for name, graph in GRAPHS.items()}


def mutants_of(data: bytes, is_pte: bool, rng: random.Random) -> Iterator[Mutant]:
    """Yields damaged copies of a file without end."""
    while not is_pte:
        is_structured = rng.random() < 0.5
        changed = mutated_tflite(data, rng) if is_structured else mutated_bytes(data, rng)
        yield Mutant("TFLite" if is_structured else "bytes", lambda: None, functools.partial(bytes, changed))
    places, payloads = _places_of(data)
    while True:
        choice = rng.random()
        if payloads and choice < 1 / 3:
            segment = rng.choice(list(payloads))
            blob = _mutated_payload(payloads[segment], rng)
            yield Mutant("payload", functools.partial(_check_payload, blob),
                         functools.partial(pte.replace_payloads, data, {segment: blob}))  # fmt: skip
        else:
            is_structured = bool(places) and choice < 2 / 3
            changed = mutated_numbers(data, places, rng) if is_structured else mutated_bytes(data, rng)
            yield Mutant("program" if is_structured else "bytes", functools.partial(_check_program, changed),
                         functools.partial(bytes, changed))  # fmt: skip


@functools.lru_cache(maxsize=64)
def _places_of(data: bytes) -> tuple[list[tuple[int, int]], dict[int, payload.Payload]]:
    """Returns the places that readers of a program read, and its portable payloads; none of a damaged program."""
    try:
        calls = [call for method in pte.read(data).methods for call in method.delegates]
        parsed = {call.segment: payload.parse(call.payload) for call in calls if call.segment is not None}
        return read_places(data), {segment: one for segment, one in parsed.items() if one.is_portable}
    except OpenNeutronError:
        return [], {}


def _mutated_payload(original: payload.Payload, rng: random.Random) -> bytes:
    change = mutated_bytes if rng.random() < 0.2 else mutated_tflite
    while True:
        try:
            return payload.pack_portable(original.header, change(original.tflite, rng))
        except OpenNeutronError:  # without the identifier of TFLite
            continue


def _check_program(data: bytes) -> None:
    for method in pte.read(data).methods:
        for call in method.delegates:
            if call.backend == BACKEND:
                payload.parse(call.payload)


def _check_payload(blob: bytes) -> None:
    tflite.check(payload.parse(blob).tflite)


def _inspect(data: bytes, _: Path) -> None:
    from openneutron.report.inspect import inspect_bytes

    inspect_bytes(data, "the mutant")


def _interpret(data: bytes, _: Path) -> None:
    from openneutron.runtime.engine import interpreter_of

    try:
        interpreter_of(data).invoke()
    except RuntimeError as error:
        if type(error) is not RuntimeError:
            raise
        raise OpenNeutronError(f"LiteRT: {error}") from error  # the host delegate reports it as HostError


def _run(data: bytes, _: Path) -> None:
    import openneutron

    program = openneutron.load(data)
    program.run(*_values(program))


def _values(program: HostProgram) -> Iterator[object]:
    """Returns a value for each input."""
    import torch

    from openneutron.runtime import TensorInfo

    for info in program.inputs:
        yield torch.rand(info.shape).to(info.dtype) if isinstance(info, TensorInfo) else info.value


def _package(data: bytes, folder: Path) -> None:
    from openneutron.firmware.packaging import package

    package(data, folder / "package", vectors=1)
    shutil.rmtree(folder / "package")


def _compare(data: bytes, _: Path) -> None:
    from openneutron.accuracy.compare_programs import compare_outputs

    compare_outputs(data, data, samples=1)


def _extract(data: bytes, folder: Path) -> None:
    from openneutron.report.extract import extract

    extract(data, folder / "extracted")


def _compile(data: bytes, _: Path) -> None:
    from openneutron.vendor.device import options_of

    options_of(data)


def _memory(data: bytes, _: Path) -> None:
    from openneutron.formats.method_memory import memory_of

    memory_of(data, "forward")


def _evaluate(data: bytes, _: Path) -> None:
    import torch

    from openneutron import load
    from openneutron.accuracy import evaluate

    program = load(data)  # in this process, because the start of another one takes seconds
    evaluate(program, [(tuple(_values(program)), torch.zeros(1, dtype=torch.int64))])


FAST: dict[str, dict[str, Verb]] = {
    ".pte": {"inspect": _inspect, "run": _run, "compile": _compile, "memory": _memory},
    ".tflite": {"inspect": _inspect, "interpret": _interpret},
}
SLOW: dict[str, dict[str, Verb]] = {
    ".pte": {"package": _package, "compare": _compare, "extract": _extract, "evaluate": _evaluate},
    ".tflite": {},
}  # fmt: skip
REFUSING = ("run", "interpret")
"""Verbs that refuse each mutant that its check refuses."""


def run_batch(
    name: str,
    data: bytes,
    seed: int,
    count: int = MUTANTS_OF_A_BATCH,
    *,
    keep: Path | None = None,
    mutated: bool = True,
) -> Outcomes:
    """Opens `count` mutants of a file in child processes, or the file itself, by all verbs, if not `mutated`.

    Writes each mutant that is a finding to the folder `keep`. The outcomes of mutants before one that ends its process
    are not counted.
    """
    suffix = Path(name).suffix

    def mutants() -> Iterator[Mutant]:
        unchanged = Mutant("unchanged", lambda: None, functools.partial(bytes, data))
        return mutants_of(data, suffix == ".pte", random.Random(seed)) if mutated else itertools.repeat(unchanged)

    outcomes, begin = Outcomes(), 0
    while begin < count:
        rows, end, fault = _run_child(mutants(), suffix, range(begin, count), seed, all_verbs=not mutated)
        for row in rows:
            outcomes.counts.update(row if isinstance(row, dict) else {})
        found = [(int(row[0]), str(row[1])) for row in rows if isinstance(row, list)] + [(end, fault)] * bool(fault)
        for number, text in found:
            outcomes.findings.append(f"{name}, seed {seed}, mutant {number}: {text}")
            if keep is not None:
                keep.mkdir(parents=True, exist_ok=True)
                mutant = next(itertools.islice(mutants(), number, None))
                (keep / f"{Path(name).stem}_{seed}_{number}{suffix}").write_bytes(mutant.data())
        begin = end + 1
    return outcomes


def _run_child(
    mutants: Iterator[Mutant], suffix: str, numbers: range, seed: int, *, all_verbs: bool
) -> tuple[list[dict[str, int] | list[int | str]], int, str]:
    """Opens the mutants `numbers` in a fork of this process.

    Returns the rows that it wrote, the number of its last mutant, and the fault that ended it there, "" for none.
    """
    current = mmap.mmap(-1, COUNTER.size)
    source, sink = os.pipe()
    with tempfile.TemporaryDirectory() as folder:
        child = os.fork()
        if child == 0:
            os.close(source)
            rng = random.Random(f"{seed} {numbers.start}")
            opened = functools.partial(_outcomes, suffix=suffix, rng=rng, folder=Path(folder), all_verbs=all_verbs)
            _open_all(mutants, numbers, current, sink, opened)
        os.close(sink)
        text, is_alive = _read_until_end(source, current, child)
        status = os.waitpid(child, 0)[1]
    os.close(source)
    rows = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    (last,) = COUNTER.unpack(current)
    return rows, last, _describe(status) if is_alive else "it hangs"


def _read_until_end(source: int, current: mmap.mmap, child: int) -> tuple[str, bool]:
    """Returns what the child writes, and False if it made no progress and was therefore ended."""
    parts: list[bytes] = []
    before = current[:]
    while True:
        if not select.select([source], [], [], SECONDS_WITHOUT_PROGRESS)[0]:
            if current[:] == before:
                os.kill(child, signal.SIGKILL)
                return b"".join(parts).decode(), False
            before = current[:]
            continue
        part = os.read(source, 1 << 16)
        if not part:
            return b"".join(parts).decode(), True
        parts.append(part)


def _describe(status: int) -> str:
    if os.WIFSIGNALED(status):
        return signal.Signals(os.WTERMSIG(status)).name
    return f"exit status {os.WEXITSTATUS(status)}" if os.WEXITSTATUS(status) else ""


def _open_all(mutants: Iterator[Mutant], numbers: range, current: mmap.mmap, sink: int, outcomes: Opened) -> NoReturn:
    """Opens the mutants, and writes a row for each finding and the counts of outcomes. Ends this process."""
    status = 1
    try:
        resource.setrlimit(resource.RLIMIT_AS, (BYTES_OF_MEMORY, BYTES_OF_MEMORY))
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        _share_readers()
        counts: Counter[str] = Counter()
        with os.fdopen(sink, "w") as out:
            for number, mutant in zip(numbers, itertools.islice(mutants, numbers.start, None), strict=False):
                current[:] = COUNTER.pack(number)
                counts[f"mutants of {mutant.kind}"] += 1
                for outcome in outcomes(mutant):
                    counts[outcome] += 1
                    if "UNTYPED" in outcome:
                        print(json.dumps([number, outcome]), file=out, flush=True)
            print(json.dumps(counts), file=out)
        status = 0
    finally:
        os._exit(status)


def _outcomes(mutant: Mutant, suffix: str, rng: random.Random, folder: Path, *, all_verbs: bool) -> Iterator[str]:
    """Yields the outcome of the check, if it refuses the mutant, and of each verb that opens the mutant."""
    refused = _outcome(mutant.check)
    if refused != "ok":
        yield f"check {refused}"
        if rng.random() >= SHARE_OF_REFUSED:
            return
    data, verbs = mutant.data(), dict(FAST[suffix])
    if all_verbs or rng.random() < SHARE_OF_SLOW_VERBS:
        verbs.update(SLOW[suffix])
    for verb, use in verbs.items():
        outcome = _outcome(functools.partial(use, data, folder))
        is_accepted = refused != "ok" and verb in REFUSING and outcome == "ok"
        yield f"{verb} {outcome}" + " UNTYPED: the check refuses this mutant" * is_accepted


def _share_readers() -> None:
    """Lets all calls of `pte.read` and `tflite.check` on the same bytes share one result. Both are pure functions."""
    checks = sys.modules["openneutron.formats.tflite.check"]
    read, check = pte.read, tflite.check
    shared_read, shared_check = _shared(read), _shared(check)

    def read_once(data: bytes | memoryview | Source, what: str = "the program") -> pte.Program:
        return shared_read(data) if type(data) is bytes else read(data, what)

    def check_once(data: bytes | memoryview, what: str = "") -> None:
        shared_check(bytes(data))

    pte.read = read_once
    tflite.check = checks.check = check_once  # type: ignore[attr-defined]


def _shared(function: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """Returns a function that keeps the last result, or the last `OpenNeutronError`."""

    @functools.lru_cache(maxsize=1)
    def kept(data: bytes) -> tuple[Any, OpenNeutronError | None]:
        try:
            return function(data), None
        except OpenNeutronError as error:
            return None, error

    def call(data: bytes) -> Any:
        result, error = kept(data)
        if error is not None:
            raise error.with_traceback(None)
        return result

    return call


def _outcome(use: Callable[[], object]) -> str:
    signal.alarm(SECONDS_OF_ONE_VERB)
    try:
        use()
    except OpenNeutronError as error:
        return type(error).__name__
    except MemoryError:
        return "MemoryError"
    except BaseException as error:
        return f"UNTYPED {type(error).__name__}: {str(error)[:200]}"
    finally:
        signal.alarm(0)
    return "ok"


def main() -> None:
    """Runs the command, and returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--findings", type=Path, default=Path("out/mutants"))
    options = parser.parse_args()
    files = {str(path): path.read_bytes() for path in options.files} or kind_models()
    _import_readers(files)
    gc.freeze()  # the objects of this process are not copied into its forks by their collection
    counts: Counter[str] = Counter()
    findings = 0
    start, cpu = time.monotonic(), _processor_seconds()
    seeds = itertools.takewhile(
        lambda _: time.monotonic() < start + 60 * options.minutes,
        ((seed, name) for seed in itertools.count(options.seed) for name in files),
    )
    seed = options.seed
    for seed, name in seeds:
        done = run_batch(name, files[name], seed, keep=options.findings)
        counts.update(done.counts)
        findings += len(done.findings)
        for finding in done.findings:
            print(finding, flush=True)
    for outcome, count in counts.most_common():
        print(f"{count:9,}  {outcome}")
    tried = sum(count for outcome, count in counts.items() if outcome.startswith("mutants of "))
    rate = tried / max(_processor_seconds() - cpu, 1e-9)
    print(
        f"{tried:,} mutants of {len(files)} files with the seeds {options.seed} to {seed}, {rate:,.0f} per second of "
        f"processor time: {findings} findings"
    )
    sys.exit(int(findings > 0))


def _processor_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def _import_readers(files: dict[str, bytes]) -> None:
    """Opens each file by each verb, so that child processes need not import the modules."""
    for name, data in files.items():
        suffix = Path(name).suffix
        with tempfile.TemporaryDirectory() as folder:
            for use in (FAST[suffix] | SLOW[suffix]).values():
                try:
                    use(data, Path(folder))
                except OpenNeutronError as error:
                    print(f"{name}: {error}")


if __name__ == "__main__":
    main()
