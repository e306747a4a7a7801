"""Damages files and opens them by every reader: `python -m tests.mutants model.pte other.tflite --minutes 10 --seed 1`.

Without files, it takes a small model of each TFLite operator. Half of the mutants of a `.pte` have changed bytes; the
other half have a payload with a correct checksum, whose TFLite model is a valid flatbuffer with wrong
contents. Child processes open the mutants. A mutant that ends its process with a signal, hangs or raises an untyped
error is a finding, and is kept in `--findings`. The command prints a table of outcomes, and returns 1 if there was a
finding.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING

from tests.kind_graphs import GRAPHS
from tests.structured_mutants import mutated_bytes, mutated_tflite

from openneutron.errors import OpenNeutronError
from openneutron.formats import payload, pte, tflite

if TYPE_CHECKING:
    from openneutron.runtime import HostProgram

__all__ = ["Outcomes", "kind_models", "mutants_of", "run_batch"]

MUTANTS_OF_A_BATCH = 100
SECONDS_OF_ONE_MUTANT = 10
BYTES_OF_MEMORY = 12 << 30
SHARE_OF_SLOW_VERBS = 0.05

Verb = Callable[[Path], object]


@dataclass(frozen=True)
class Outcomes:
    """The outcomes of a batch. `finding` describes what ended it, or an untyped error; "" for none."""

    counts: Counter[str]
    finding: str = ""


def kind_models() -> dict[str, bytes]:
    """Returns a small TFLite model for each operator, by name."""
    return {f"{name}.tflite": tflite.write(graph) for name, graph in GRAPHS.items()}


def mutants_of(data: bytes, is_pte: bool, rng: random.Random) -> Iterator[bytes]:
    """Yields damaged copies of a file without end."""
    segments = _portable_segments(data) if is_pte else {}
    while True:
        if rng.random() < 0.5 or (is_pte and not segments):
            yield mutated_bytes(data, rng)
        elif is_pte:
            segment = rng.choice(list(segments))
            yield pte.replace_payloads(data, {segment: _mutated_payload(segments[segment], rng)})
        else:
            yield mutated_tflite(data, rng)


def _portable_segments(data: bytes) -> dict[int, payload.Payload]:
    calls = [call for method in pte.read(data).methods for call in method.delegates]
    parsed = {call.segment: payload.parse(call.payload) for call in calls if call.segment is not None}
    return {segment: one for segment, one in parsed.items() if one.is_portable}


def _mutated_payload(original: payload.Payload, rng: random.Random) -> bytes:
    change = mutated_bytes if rng.random() < 0.3 else mutated_tflite
    while True:
        try:
            return payload.pack_portable(original.header, change(original.tflite, rng))
        except OpenNeutronError:  # without the identifier of TFLite
            continue


def _inspect(path: Path) -> None:
    import openneutron

    openneutron.inspect(path)


def _interpret(path: Path) -> None:
    from openneutron.runtime.engine import interpreter_of

    try:
        interpreter_of(path.read_bytes()).invoke()
    except RuntimeError as error:
        if type(error) is not RuntimeError:
            raise
        raise OpenNeutronError(f"LiteRT: {error}") from error  # the host delegate reports it as HostError


def _run(path: Path) -> None:
    import openneutron

    program = openneutron.load(path)
    program.run(*_values(program))


def _values(program: HostProgram) -> Iterator[object]:
    """Returns a value for each input."""
    import torch

    from openneutron.runtime import TensorInfo

    for info in program.inputs:
        yield torch.rand(info.shape).to(info.dtype) if isinstance(info, TensorInfo) else info.value


def _package(path: Path) -> None:
    from openneutron.firmware.packaging import package

    folder = path.parent / "package"
    shutil.rmtree(folder, ignore_errors=True)
    package(path.read_bytes(), folder, vectors=1)


def _compare(path: Path) -> None:
    from openneutron.accuracy.compare_programs import compare_outputs

    compare_outputs(path, path, samples=1)


def _extract(path: Path) -> None:
    from openneutron.report.extract import extract

    extract(path, path.parent / "extracted")


def _compile(path: Path) -> None:
    from openneutron.vendor.device import options_of

    options_of(path.read_bytes())


def _memory(path: Path) -> None:
    from openneutron.formats.method_memory import memory_of

    memory_of(path.read_bytes(), "forward")


def _evaluate(path: Path) -> None:
    import torch

    from openneutron import load
    from openneutron.accuracy import evaluate

    program = load(path)  # in this process, because the start of another one takes seconds
    evaluate(program, [(tuple(_values(program)), torch.zeros(1, dtype=torch.int64))])


FAST: dict[str, dict[str, Verb]] = {
    ".pte": {"inspect": _inspect, "run": _run, "compile": _compile, "memory": _memory},
    ".tflite": {"inspect": _inspect, "interpret": _interpret},
}
SLOW: dict[str, dict[str, Verb]] = {
    ".pte": {"package": _package, "compare": _compare, "extract": _extract, "evaluate": _evaluate},
    ".tflite": {},
}  # fmt: skip


def run_batch(
    name: str,
    data: bytes,
    seed: int,
    count: int = MUTANTS_OF_A_BATCH,
    *,
    keep: Path | None = None,
    mutated: bool = True,
) -> Outcomes:
    """Opens `count` mutants of a file in a child process, or the file itself, by all verbs, if not `mutated`.

    Copies a mutant that is a finding to the folder `keep`.
    """
    with tempfile.TemporaryDirectory() as folder:
        file, results = Path(folder, f"mutant{Path(name).suffix}"), Path(folder, "results")
        child = os.fork()
        if child == 0:
            mutants = mutants_of(data, file.suffix == ".pte", random.Random(seed)) if mutated else repeat(data)
            _child(mutants, seed, count, file, results, share=SHARE_OF_SLOW_VERBS if mutated else 1)
        status = _wait(child, count)
        text = results.read_text() if results.exists() else ""
        rows = [json.loads(line) for line in text.splitlines() if line.endswith("]")]
        counts = Counter(f"{verb} {outcome}" for verb, outcome in rows)
        untyped = [row for row in rows if row[1].startswith("UNTYPED")]
        finding = untyped[0][1] if untyped else _describe(status)
        if finding and keep is not None and file.exists():
            keep.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, keep / f"{Path(name).stem}_{seed}{file.suffix}")
        return Outcomes(counts, f"{name}, seed {seed}: {finding}" if finding else "")


def _wait(child: int, count: int) -> int | None:
    """Returns the status of the child; None if it hangs, and is therefore ended."""
    end = time.monotonic() + SECONDS_OF_ONE_MUTANT + count
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _describe(status: int | None) -> str:
    if status is None:
        return "it hangs"
    if os.WIFSIGNALED(status):
        return signal.Signals(os.WTERMSIG(status)).name
    return f"exit status {os.WEXITSTATUS(status)}" if os.WEXITSTATUS(status) else ""


def _child(mutants: Iterator[bytes], seed: int, count: int, file: Path, results: Path, *, share: float) -> None:
    """Opens the mutants, a `share` of them by the slow verbs, too. Ends this process.

    The last file that was written is the mutant of a finding.
    """
    try:
        resource.setrlimit(resource.RLIMIT_AS, (BYTES_OF_MEMORY, BYTES_OF_MEMORY))
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        rng = random.Random(seed)
        with results.open("w") as out:
            for _ in range(count):
                file.write_bytes(next(mutants))
                verbs = dict(FAST[file.suffix])
                if rng.random() < share:
                    verbs.update(SLOW[file.suffix])
                for verb, use in verbs.items():
                    outcome = _outcome(use, file)
                    print(json.dumps([verb, outcome]), file=out, flush=True)
                    if outcome.startswith("UNTYPED"):
                        os._exit(0)
    finally:
        os._exit(0)


def _outcome(use: Verb, file: Path) -> str:
    try:
        with _alarm():
            use(file)
    except OpenNeutronError as error:
        return type(error).__name__
    except MemoryError:
        return "MemoryError"
    except BaseException as error:
        return f"UNTYPED {type(error).__name__}: {str(error)[:200]}"
    return "ok"


@contextmanager
def _alarm() -> Iterator[None]:
    """Ends this process if the block takes too long."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(SECONDS_OF_ONE_MUTANT)
    try:
        yield
    finally:
        signal.alarm(0)


def main() -> None:
    """Runs the command, and returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--findings", type=Path, default=Path("out/mutants"))
    options = parser.parse_args()
    files = {str(path): path.read_bytes() for path in options.files} or kind_models()
    _import_readers(files)
    counts: Counter[str] = Counter()
    findings, tried = 0, 0
    end = time.monotonic() + 60 * options.minutes
    seed = options.seed
    while time.monotonic() < end:
        for name, data in files.items():
            done = run_batch(name, data, seed, keep=options.findings)
            counts.update(done.counts)
            tried += sum(count for outcome, count in done.counts.items() if outcome.startswith("inspect "))
            if done.finding:
                findings += 1
                print(done.finding, flush=True)
            if time.monotonic() > end:
                break
        seed += 1
    for outcome, count in counts.most_common():
        print(f"{count:9,}  {outcome}")
    print(f"{tried:,} mutants of {len(files)} files with the seeds {options.seed} to {seed}: {findings} findings")
    sys.exit(int(findings > 0))


def _import_readers(files: dict[str, bytes]) -> None:
    """Opens each file by each verb, so that child processes need not import the modules."""
    for name, data in files.items():
        suffix = Path(name).suffix
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, f"file{suffix}")
            path.write_bytes(data)
            for use in (FAST[suffix] | SLOW[suffix]).values():
                try:
                    use(path)
                except OpenNeutronError as error:
                    print(f"{name}: {error}")


if __name__ == "__main__":
    main()
