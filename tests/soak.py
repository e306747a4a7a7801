"""Checks thousands of random models: `python -m tests.soak --minutes 30`, or `make soak MINUTES=30`.

Child processes check the models, so a model that ends its process or hangs is also a finding. The command prints each
fault with the source of its model, and a table of outcomes. It returns 1 if there was a fault.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from queue import Empty, SimpleQueue
from threading import Thread

from tests.random_model_check import Finding, Outcome, check_seed

SECONDS_OF_ONE_MODEL = 120
# A model that exceeds the limit is checked again with this one, because other work may have slowed the machine.
SECONDS_OF_A_SLOW_MODEL = 1200
MODELS_OF_A_PROCESS = 200
NO_FAULTS = {outcome.name for outcome in Outcome if not Finding(outcome).is_fault}


def main() -> None:
    """Runs the command, and returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--models", type=int, default=10**9, help="ends after so many")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seed", type=int, help="one model, with its source")
    parser.add_argument("--child", nargs=2, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        _child(*options.child)
    elif options.seed is not None:
        sys.exit(_show(options.seed))
    else:
        sys.exit(_campaign(options))


def _show(seed: int) -> int:
    model, flow, finding = check_seed(seed)
    print(model.source)
    print(flow)
    print(finding.outcome.value, finding.detail, sep="\n")
    return int(finding.is_fault)


def _child(first: int, count: int) -> None:
    for seed in range(first, first + count):
        print(json.dumps({"begins": seed}), flush=True)
        finding = check_seed(seed)[2]
        row = {**asdict(finding), "outcome": finding.outcome.name, "seed": seed, "fault": finding.is_fault}
        print(json.dumps(row), flush=True)


def _campaign(options: argparse.Namespace) -> int:
    end = time.monotonic() + 60 * options.minutes
    last = options.first_seed + options.models
    starts = range(options.first_seed, last, MODELS_OF_A_PROCESS)
    waiting = iter(starts)
    with ThreadPoolExecutor(options.jobs) as pool:
        workers = [pool.submit(_work, waiting, last, end) for _ in range(options.jobs)]
    counts = sum((worker.result() for worker in workers), Counter[str]())
    for name, count in counts.most_common():
        print(f"{count:8,}  {name}")
    print(f"{counts.total():8,}  models")
    return int(not counts.keys() <= NO_FAULTS)


def _work(waiting: Iterator[int], last: int, end: float) -> Counter[str]:
    """Returns the outcomes of the parts that this worker processes, until the time is over or no part is left."""
    counts: Counter[str] = Counter()
    while time.monotonic() < end and (first := next(waiting, None)) is not None:
        counts += _part(first, min(last, first + MODELS_OF_A_PROCESS), end)
    return counts


def _part(first: int, last: int, end: float) -> Counter[str]:
    """Returns the outcomes of the seeds from `first` to `last` (exclusive). A dead or hanging child is replaced."""
    counts: Counter[str] = Counter()
    while first < last and time.monotonic() < end:
        first = _one_child(first, last, end, counts)
    return counts


def _one_child(first: int, last: int, end: float, counts: Counter[str], limit: float = SECONDS_OF_ONE_MODEL) -> int:
    """Runs one child, and returns the next seed. `limit` is the seconds of one model."""
    command = [sys.executable, "-m", "tests.soak", "--child", str(first), str(last - first)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    lines: SimpleQueue[str] = SimpleQueue()
    Thread(target=_read, args=(child, lines), daemon=True).start()
    seed, died = first - 1, "HUNG"
    while time.monotonic() < end:
        try:
            line = lines.get(timeout=limit)
        except Empty:
            break
        if not line:
            died = f"DIED of signal {-child.wait()}" if child.wait() < 0 else f"DIED with status {child.wait()}"
            break
        row = json.loads(line) if line.startswith("{") else {}
        seed = row.get("begins", seed)
        if "outcome" in row:
            counts[row["outcome"]] += 1
            if row["fault"]:
                _report(row["seed"], row["outcome"], row["detail"])
            if row["seed"] == last - 1:
                child.wait()
                print(f"seeds {first} to {last - 1} checked", flush=True)
                return last
    child.kill()
    if time.monotonic() >= end:
        return last
    seed = max(seed, first)
    if died == "HUNG" and limit < SECONDS_OF_A_SLOW_MODEL:
        return _one_child(seed, seed + 1, end, counts, SECONDS_OF_A_SLOW_MODEL)
    counts[died] += 1
    _report(seed, died, "")
    return seed + 1


def _read(child: subprocess.Popen[str], lines: SimpleQueue[str]) -> None:
    assert child.stdout is not None
    for line in child.stdout:
        lines.put(line)
    lines.put("")


def _report(seed: int, outcome: str, detail: str) -> None:
    last = (detail.strip().splitlines() or [""])[-1]
    print(f"seed {seed}: {outcome}: {last[:300]}", flush=True)


if __name__ == "__main__":
    main()
