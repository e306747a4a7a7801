"""Loads and runs mutated programs: `python -m tests.fuzz.programs --seconds 60`.

The programs run in a child process. A signal, an error other than `OpenNeutronError`, and a program that takes longer
than 10 s are findings. A finding is kept in `out/fuzz/program-SEED.pte`, and a child with the next seed
continues.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

SECONDS_PER_PROGRAM = 10
MUTANT = Path("out/fuzz/program.pte")


def run_mutants(seed: int, seconds: float) -> int:
    """Runs mutants until the time is over, and returns their number."""
    import torch
    from tests.fuzz.mutations import mutated
    from tests.fuzz.reader import program
    from tests.fuzz.readers import READERS

    from openneutron import load
    from openneutron.errors import OpenNeutronError
    from openneutron.runtime import TensorInfo

    chance, end, count = random.Random(seed), time.monotonic() + seconds, 0
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    while time.monotonic() < end:
        data = mutated(program(), [program()], READERS["pte"].words, chance)
        MUTANT.write_bytes(data)
        signal.alarm(SECONDS_PER_PROGRAM)
        with suppress(OpenNeutronError):
            host = load(data)
            host.run(*(torch.zeros(it.shape, dtype=it.dtype) for it in host.inputs if isinstance(it, TensorInfo)))
        signal.alarm(0)
        count += 1
    return count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    MUTANT.parent.mkdir(parents=True, exist_ok=True)
    if options.child:
        print(run_mutants(options.seed, options.seconds))
        return 0
    end, seed, count, findings = time.monotonic() + options.seconds, options.seed, 0, 0
    while (rest := end - time.monotonic()) > 0:
        command = [sys.executable, "-m", "tests.fuzz.programs", "--child", f"--seed={seed}", f"--seconds={rest}"]
        done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
        if done.returncode == 0:
            count += int(done.stdout.split()[-1])
        else:
            findings += 1
            kept = MUTANT.with_name(f"program-{seed}.pte")
            os.replace(MUTANT, kept)
            print(f"{kept}: exit code {done.returncode}", flush=True)
        seed += 1
    print(f"{count:,} mutants, {findings} findings")
    return int(findings > 0)


if __name__ == "__main__":
    sys.exit(main())
