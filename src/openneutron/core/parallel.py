"""Distributes work over processes with joblib, whose backends include its own workers, dask and ray."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from openneutron.core.options import MOST_JOBS
from openneutron.core.waiting import start_worker
from openneutron.errors import OpenNeutronError, OptionError

__all__ = ["WorkerWarning", "check_jobs", "map_in_order", "split"]

Part = TypeVar("Part")
Result = TypeVar("Result")

# How often unfinished work is given to workers before this process does it itself.
ATTEMPTS = 2


class WorkerWarning(UserWarning):
    """A worker failed and its work is repeated, or there are more threads of workers than processor cores."""


def check_jobs(jobs: int) -> None:
    """Raises `OptionError` unless `jobs` is an integer from 1 to `MOST_JOBS`."""
    if isinstance(jobs, bool) or not isinstance(jobs, int) or not 1 <= jobs <= MOST_JOBS:
        raise OptionError(f"jobs must be a number of processes, from 1 to {MOST_JOBS}, not {jobs!r}.")


def split(items: Sequence[Part], count: int, multiple: int = 1) -> list[Sequence[Part]]:
    """Splits `items` into at most `count` consecutive parts. All sizes but the last are multiples of `multiple`."""
    size = max(-(-len(items) // count), 1)
    size = -(-size // multiple) * multiple
    return [items[start : start + size] for start in range(0, len(items), size)]


def map_in_order(work: Callable[[Part], Result], todo: Sequence[Part], jobs: int) -> Iterator[Result]:
    """Returns an iterator over the results of `work` for each part, in order. Runs in `jobs` processes if `jobs` > 1.

    `work` must be picklable. Workers use as many torch threads as this process, so that results are bitwise equal in
    all processes. `joblib.parallel_config` selects the kind of worker. If a worker fails, its parts are given to
    workers again, up to `ATTEMPTS` times; then this process computes them. Errors of OpenNeutron are raised at once.
    """
    done = 0
    if jobs > 1 and len(todo) > 1:
        _warn_of_shared_cores(jobs)
        for _ in range(ATTEMPTS):
            try:
                for result in _map_in_processes(work, todo[done:], jobs):
                    done += 1
                    yield result
            except OpenNeutronError:
                raise
            except Exception as error:  # each backend of joblib has its own error for a worker that died
                warnings.warn(
                    f"A worker failed: {type(error).__name__}: {error}. Its work is repeated.",
                    WorkerWarning,
                    stacklevel=3,
                )
            if done == len(todo):
                return
    for part in todo[done:]:
        yield work(part)


def _map_in_processes(work: Callable[[Part], Result], todo: Sequence[Part], jobs: int) -> Iterator[Result]:
    import joblib
    from joblib.parallel import get_active_backend

    backend, _ = get_active_backend()
    streams = bool(getattr(backend, "supports_return_generator", False))  # Ray's backend returns all at the end
    task = joblib.delayed(_run_with_threads)
    threads = torch.get_num_threads()
    tasks = (task(threads, work, part) for part in todo)
    # Workers log what this process logs. Otherwise, messages of torch and torchao about their own imports are printed.
    level = logging.root.manager.disable
    prepared = {"initializer": start_worker, "initargs": (level,)} if type(backend).__name__ == "LokyBackend" else {}
    results: Any = joblib.Parallel(n_jobs=jobs, return_as="generator" if streams else "list", **prepared)(tasks)
    try:
        yield from results
    finally:
        if streams:
            results.close()


def _run_with_threads(threads: int, work: Callable[[Part], Result], part: Part) -> Result:
    torch.set_num_threads(threads)
    return work(part)


def _cores() -> int:
    """Returns the number of cores that this process may use.

    On systems without CPU affinity (macOS, Windows), this is the number of cores of the machine.
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _warn_of_shared_cores(jobs: int) -> None:
    threads, cores = torch.get_num_threads(), _cores()
    if jobs * threads > cores and threads > 1:
        warnings.warn(
            f"{jobs} workers with {threads} threads each share {cores} processor cores, which is slow. Call "
            "torch.set_num_threads(1) first.",
            WorkerWarning,
            stacklevel=4,
        )
