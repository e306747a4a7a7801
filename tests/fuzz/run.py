"""Gives mutated files to the readers: `python -m tests.fuzz.run --minutes 10 [READER ...]`, or `make fuzz MINUTES=10`.

An error other than `OpenNeutronError`, a signal, and an input that takes longer than 10 s or more than 2 GB are
findings. Each reader runs in a process of its own. With the package atheris, coverage of the package guides the
mutations; without it, `mutations.py` makes the mutations. An input that fails is written to `out/fuzz`. Put it
into `tests/fuzz/seeds/READER/` when the reader is repaired: the tests read all seeds.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.util
import random
import subprocess
import sys
import time
import traceback
from pathlib import Path

SEEDS = Path(__file__).parent / "seeds"
OUT = Path("out/fuzz")
SECONDS_PER_INPUT, MEGABYTES = 10, 2048
WRITES_STATUS = 5.0


def seeds(name: str) -> list[bytes]:
    """Returns the inputs that have failed once."""
    return [path.read_bytes() for path in sorted((SEEDS / name).glob("*"))]


def check(name: str, data: bytes) -> bool:
    """Reads an input. Returns whether the reader took it. Raises any error other than `OpenNeutronError`."""
    from tests.fuzz.readers import READERS

    from openneutron.errors import OpenNeutronError

    try:
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


def fuzz_without_atheris(name: str, seconds: int) -> int:
    """Returns 1 if an input fails, else 0."""
    from tests.fuzz.mutations import mutated
    from tests.fuzz.readers import READERS

    files = [*READERS[name].examples(), *seeds(name)]
    chance, end, count, read = random.Random(time.time_ns()), time.monotonic() + seconds, 0, 0
    while time.monotonic() < end:
        data = mutated(chance.choice(files), files, READERS[name].words, chance)
        begin = time.monotonic()
        try:
            read += check(name, data)
            taken = time.monotonic() - begin
            failure = f"takes {taken:.0f} s" if taken > SECONDS_PER_INPUT else None
        except Exception:
            failure = traceback.format_exc()
        if failure:
            file = OUT / f"{name}-{hashlib.sha256(data).hexdigest()[:16]}"
            file.write_bytes(data)
            print(f"{file}: {failure}", flush=True)
            return 1
        count += 1
    print(f"{name}: {count:,} inputs, {read:,} of them valid, no finding", flush=True)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readers", nargs="*", help="names of readers; all by default")
    parser.add_argument("--minutes", type=float, default=10, help="for all readers together")
    parser.add_argument("--seconds", type=int, help="run one reader in this process")
    parser.add_argument("--plain", action="store_true", help="do not use atheris")
    options = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    if options.seconds is not None:
        (name,) = options.readers
        if importlib.util.find_spec("atheris") and not options.plain:
            fuzz_with_atheris(name, options.seconds)
        return fuzz_without_atheris(name, options.seconds)
    from tests.fuzz.readers import READERS

    names, failed = options.readers or list(READERS), []
    seconds = max(1, int(options.minutes * 60 / len(names)))
    for name in names:
        print(f"{name}: {seconds} s", flush=True)
        command = [sys.executable, "-m", "tests.fuzz.run", name, "--seconds", str(seconds)]
        if subprocess.run([*command, *(["--plain"] if options.plain else [])], check=False).returncode:
            failed.append(name)
    print(f"findings: {', '.join(failed) or 'none'}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
