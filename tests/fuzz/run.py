"""Gives mutated files to the readers: `python -m tests.fuzz.run --minutes 10 [READER ...]`, or `make fuzz MINUTES=10`.

An error other than `OpenNeutronError`, a signal, and an input that takes longer than 10 s, or more memory than four
times its size and 64 MB (for images, 716 MB), are findings; with atheris, 2 GB are. Each reader runs in its
own process. With the package atheris, coverage of the package guides the mutations; without it, `mutations.py` makes
them. An input that fails is written to `out/fuzz`. Put it into `tests/fuzz/seeds/READER/` when the reader is
repaired: the tests read all seeds.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.util
import random
import signal
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path

SEEDS = Path(__file__).parent / "seeds"
OUT = Path("out/fuzz")
SECONDS_PER_INPUT, MEGABYTES = 10, 2048
TIMES_THE_FILE = 4
SECONDS_OF_A_HANG = 60
"""A reader that takes longer is ended by a signal."""
WRITES_STATUS = 5.0


def seeds(name: str) -> list[bytes]:
    """Returns the inputs that have failed once."""
    return [path.read_bytes() for path in sorted((SEEDS / name).glob("*"))]


def check(name: str, data: bytes) -> bool:
    """Reads an input. Returns whether the reader took it. Raises any error other than `OpenNeutronError`."""
    from tests.fuzz.readers import READERS

    from openneutron.errors import OpenNeutronError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            READERS[name].read(data)
    except OpenNeutronError:
        return False
    return True


def fuzz_with_atheris(name: str, seconds: int) -> None:
    """Runs libFuzzer, which ends the process."""
    atheris = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["openneutron"]):
        from tests.fuzz.readers import READERS
    corpus, words = OUT / "corpus" / name, OUT / f"{name}.dict"
    corpus.mkdir(parents=True, exist_ok=True)
    for data in [*READERS[name].examples(), *seeds(name)]:
        (corpus / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
    lines = ["".join(f"\\x{byte:02x}" for byte in word) for word in READERS[name].words]
    words.write_text("".join(f'"{line}"\n' for line in lines))
    longest = 4 * max(map(len, READERS[name].examples()))
    options = {
        "max_total_time": seconds, "timeout": SECONDS_PER_INPUT, "rss_limit_mb": MEGABYTES, "max_len": longest,
        "dict": words, "artifact_prefix": f"{OUT}/{name}-", "print_final_stats": 1, "verbosity": 0,
    }  # fmt: skip

    def one(data: bytes) -> None:
        check(name, data)

    atheris.Setup([sys.argv[0], *(f"-{key}={value}" for key, value in options.items()), str(corpus)], one)
    atheris.Fuzz()


def fuzz_without_atheris(name: str, seconds: float, inputs: int) -> int:
    """Reads at most `inputs` mutants. Returns 1 if one fails, else 0."""
    from tests.fuzz.readers import READERS

    files = [*READERS[name].examples(), *seeds(name)]
    for data in files:
        check(name, data)  # imports
    chance, end, count, read = random.Random(time.time_ns()), time.monotonic() + seconds, 0, 0
    slowest, largest = 0.0, 0
    while time.monotonic() < end and count < inputs:
        data = READERS[name].mutant(files, chance)
        current(name).write_bytes(data)
        before, begin, failure = reset_peak(), time.monotonic(), None
        signal.alarm(SECONDS_OF_A_HANG)
        try:
            read += check(name, data)
        except Exception:
            failure = traceback.format_exc()
        finally:
            signal.alarm(0)
        taken, memory = time.monotonic() - begin, peak() - before
        slowest, largest = max(slowest, taken), max(largest, memory - TIMES_THE_FILE * len(data))
        if taken > SECONDS_PER_INPUT or memory > TIMES_THE_FILE * len(data) + READERS[name].memory:
            failure = failure or f"takes {taken:.0f} s and {memory:,} bytes of memory for {len(data):,} bytes"
        if failure:
            file = OUT / f"{name}-{hashlib.sha256(data).hexdigest()[:16]}"
            file.write_bytes(data)
            print(f"{file}: {failure}", flush=True)
            return 1
        count += 1
    current(name).unlink()
    print(
        f"{name}: {count:,} inputs, {read:,} of them valid, no finding; the slowest took {slowest:.2f} s, the largest "
        f"{max(0, largest) >> 20} MB more than {TIMES_THE_FILE} times the file",
        flush=True,
    )
    return 0


def current(name: str) -> Path:
    """Returns the file with the current input of a reader. It stays if the input ends the process."""
    return OUT / f"{name}-current"


def reset_peak() -> int:
    """Sets the largest memory that this process has used to the memory that it uses now, and returns this; 0 where the
    system does not tell.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return 0
    return peak()


def peak() -> int:
    """Returns the largest memory in bytes that this process has used; 0 where the system does not tell."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    line = next((line for line in status.splitlines() if line.startswith("VmHWM")), "VmHWM: 0 kB")
    return 1024 * int(line.split()[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readers", nargs="*", help="names of readers; all by default")
    parser.add_argument("--minutes", type=float, default=10, help="for all readers together")
    parser.add_argument("--seconds", type=int, help="run one reader in this process")
    parser.add_argument("--inputs", type=int, default=10**9, help="of each reader, at most; only without atheris")
    parser.add_argument("--plain", action="store_true", help="do not use atheris")
    options = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    if options.seconds is not None:
        (name,) = options.readers
        if importlib.util.find_spec("atheris") and not options.plain:
            fuzz_with_atheris(name, options.seconds)
        return fuzz_without_atheris(name, options.seconds, options.inputs)
    from tests.fuzz.readers import READERS

    names, failed = options.readers or list(READERS), []
    seconds = max(1, int(options.minutes * 60 / len(names)))
    for name in names:
        print(f"{name}: {seconds} s", flush=True)
        command = [sys.executable, "-m", "tests.fuzz.run", name, f"--seconds={seconds}", f"--inputs={options.inputs}"]
        if subprocess.run([*command, *(["--plain"] if options.plain else [])], check=False).returncode:
            failed.append(name)
    print(f"findings: {', '.join(failed) or 'none'}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
